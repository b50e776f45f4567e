"""The sizes of tiny models: fields of configs, exceptions of single names, inputs beside text."""

from typing import Any

VOCAB = 67


def _sizes(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Fields of configs, whatever the family. A config takes the fields that it has.
SIZES: dict[str, Any] = {
    **_sizes(VOCAB, "vocab_size decoder_vocab_size n_vocab unpadded_vocab_size"),
    **_sizes(
        32,
        "hidden_size d_model n_embd embed_dim intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim "
        "n_inner dim_ff dff d_ff ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size emb_dim d_inner embedding_size hidden_dim "
        "out_hidden_size mlp_dim projection_dim text_hidden_size encoder_hidden_size d_embed lru_width "
        "attention_hidden_size moe_shared_expert_intermediate_size intermediate_size_mlp "
        "dense_intermediate_size prefix_dense_intermediate_size output_dim word_embed_proj_dim "
        "backbone_hidden_size cross_attention_hidden_size attention_intermediate_size "
        "projector_hidden_size shared_experts_intermediate_size",
    ),
    **_sizes(
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers layers depth "
        "num_decoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads attention_heads "
        "decoder_attention_heads encoder_attention_heads num_key_value_heads kv_n_heads num_kv_heads "
        "num_encoder_attention_heads num_decoder_attention_heads "
        "num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts "
        "index_n_heads swa_num_attention_heads swa_num_key_value_heads linear_num_heads "
        "linear_num_key_heads linear_num_value_heads mamba_n_heads mamba_num_heads n_mamba_heads",
    ),
    **_sizes(
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts index_topk q_lora_rank kv_lora_rank",
    ),
    **_sizes(
        16,
        "head_dim dim_head d_kv v_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim swa_head_dim swa_v_head_dim kv_channels mamba_d_head "
        "mamba_head_dim attention_head_dim global_head_dim",
    ),
    **_sizes(
        8, "qk_rope_head_dim rotary_dim chunk_size mamba_chunk_size mamba_d_state state_size ssm_state_size"
    ),
    **_sizes(
        1,
        "n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts "
        "moe_num_shared_experts",
    ),
    **_sizes(64, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
    **_sizes(
        0, "pad_token_id num_mtp_layers num_nextn_predict_layers first_k_dense_replace num_kv_shared_layers"
    ),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "patch_size": 4,
    "image_size": 16,
    "image_token_id": 60,
    "image_token_index": 60,
    "video_token_id": 61,
    "video_token_index": 61,
    "audio_token_id": 62,
    "audio_token_index": 62,
    "is_decoder": True,
    # values at which a forgotten scale or cap changes the loss
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logits_scaling": 1.75,
    "logit_scale": 0.375,
    "lm_head_multiplier": 0.4,
    "logits_mup_width_multiplier": 1.75,
    "mup_enabled": True,
    "router_aux_loss_coef": 0.25,
    "aux_loss_coef": 0.25,
    "moe_loss_weight": 0.25,
}

# What a family needs beyond the generic sizes: fields of its config, sub-configs as dictionaries.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HALF = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
_MROPE_HALF = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
_PER_TYPE = {
    "rope_parameters": {
        "full_attention": _HALF["rope_parameters"],
        "sliding_attention": _HALF["rope_parameters"],
    }
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_VQ = {
    "base_channels": 32,
    "latent_channels": 8,
    "num_embeddings": 16,
    "embed_dim": 8,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
_FOUR_TOKENS = {"num_query_tokens": 4, "qformer_config": {"encoder_hidden_size": 32}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "blip-2": _FOUR_TOKENS,
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "chameleon": {"vocabulary_map": {"<image>": 60}, "vq_config": _VQ},
    "codegen": {"n_head": 4},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cosmos3_edge": {"text_config": _MROPE},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dots3_note": {
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "text_config": {"layer_types": ["full_attention", "full_attention"]},
    },
    "emu3": {"vocabulary_map": {"<image>": 60}, "vq_config": _VQ},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 32],
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        }
    },
    "falcon_h1": {"mamba_d_ssm": 32},
    "florence2": {
        "vision_config": {
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [32, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "window_size": 2,
        }
    },
    "gemma3n_text": _PER_LAYER,
    "gemma4": {"text_config": _PER_LAYER},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
        },
    },
    "gemma4_text": _PER_LAYER,
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 32, "output_proj_dims": 32}},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 2}
    },
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": _MROPE_HALF},
    "glm5_next": {"text_config": {"index_topk": 16, "qk_rope_head_dim": 0, **_MIXED}},
    "glm_ocr": {"text_config": _MROPE},
    "glmga": {"text_config": {"text_config": _MROPE}},  # the name's config is the text's, the class's is not
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
        "qformer_config": {"num_attention_heads": 2},
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}}},
    "instructblip": _FOUR_TOKENS,
    "instructblipvideo": _FOUR_TOKENS,
    "kosmos-2": {"latent_query_num": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {
        "vision_config": {"num_image_tokens": 16},
        "vq_config": {"base_channels": 32, "latent_channels": 8, "num_embeddings": 16, "num_patches": 4},
    },
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "llama4": {
        "vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    },
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_key_value_heads": 1, **_PER_TYPE},
    "minicpm_ocr": {"text_config": _MIXED},
    "minicpmv4_6": {"text_config": _MIXED},
    "minicpmv4_7": {"text_config": _MIXED},
    "molmo2": {
        "vision_config": {"image_size": [16, 16], "num_position_embeddings": 16},
        "adapter_config": {"vision_feature_layer": [-1]},
        "text_config": {"additional_vocab_size": 8},
    },
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "patch_sizes": [2, 2, 2, 2],
            "hidden_sizes": [32] * 4,
            "depths": [1] * 4,
        }
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _MROPE},
    "pp_formulanet": {
        "vision_config": {
            "output_channels": 32,
            "post_conv_in_channels": 32,
            "post_conv_mid_channels": 32,
            "post_conv_out_channels": 32,
            "decoder_hidden_size": 32,
            "global_attn_indexes": [1],
            "window_size": 2,
        }
    },
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 48}},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen3_5": {"text_config": _MIXED},
    "qwen3_5_moe": {"text_config": _MIXED},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp": {"text_config": _MIXED | _QSA},
    "qwen4_exp_text": _MIXED | _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attention_head_size": 16,
        "feed_forward_size": 32,
        "hash_seed": 0,
        "num_buckets": 2,
        "max_position_embeddings": 8,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 4}},
    "xlstm": {"chunk_size": 8, "hidden_size": 128, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# What a model needs beside text: for each argument the kind of its entries and its shape.
_IMAGES = {"pixel_values": ("float", 2, 3, 16, 16)}
INPUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "blip": _IMAGES,
    "blip-2": _IMAGES,
    "git": _IMAGES,
    "idefics": {"pixel_values": ("float", 2, 1, 3, 16, 16), "image_attention_mask": ("ones", 2, 8, 1)},
    "instructblip": _IMAGES | {"qformer_input_ids": ("ids", 2, 8)},
    "instructblipvideo": {"pixel_values": ("float", 2, 4, 3, 16, 16), "qformer_input_ids": ("ids", 2, 8)},
    "kosmos-2": _IMAGES | {"image_embeds_position_mask": ("first", 2, 8)},
    "musicgen": {"input_ids": ("ids", 8, 8), "labels": ("ids", 2, 8, 4)},
    "musicgen_melody": {"input_ids": ("ids", 8, 8), "labels": ("ids", 2, 8, 4)},
    "pix2struct": {"flattened_patches": ("float", 2, 4, 50)},
    "pp_formulanet": {"pixel_values": ("float", 2, 3, 16, 16)},
    "udop": _IMAGES | {"bbox": ("zeros", 2, 8, 4)},
    "vision-encoder-decoder": _IMAGES,
}

# Their backward needs training mode; these models have no dropout here.
TRAIN_MODE = {"reformer", "rwkv"}

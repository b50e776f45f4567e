"""Merge a trained adapter into its base, for tools that do not read adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ual.config.run import ModelConfig
from ual.errors import UserError
from ual.files import folder_aside, writing
from ual.models.load import load_config, load_model, load_tokenizer, save_model, stored_dtype


def merge(base: ModelConfig, adapter: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Write base and adapter as one model in safetensors, as `save_pretrained` does.

    The tokenizer is the adapter's, with the chat template of its training, or else the base's.

    Weights are added in float32 and rounded once, to the base's dtype. A base that was quantized for training
    is merged unquantized.

    Args:
        base: the model that the adapter was trained on.
        adapter: the folder with adapter_config.json.
        target: a new folder; it is complete or absent afterwards.
        trust_remote_code: run model code that is shipped with the weights.

    Raises:
        UserError: there is no adapter, the target exists, the base cannot be loaded, or the disk is full.
    """
    if not (adapter / "adapter_config.json").is_file():
        remedy = "give a run that has finished, or finish this run with --resume"
        raise UserError("there is no adapter", place=str(adapter), remedy=remedy)
    if target.exists():
        raise UserError("the folder exists already", place=str(target), remedy="choose another --output")
    pretrained = load_config(base, trust_remote_code=trust_remote_code)
    exact = base.model_copy(update={"dtype": "float32", "quantization": None})
    model = load_model(exact, trust_remote_code=trust_remote_code)
    _untie(model)  # a tied head would share what the adapter adds with the embedding
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    if getattr(pretrained, "tie_word_embeddings", False):
        _tie_if_equal(merged)
    merged.to(stored_dtype(base, pretrained))
    merged.config.use_cache = getattr(pretrained, "use_cache", True)  # load_model turns it off for training
    saved = (adapter / "tokenizer_config.json").is_file()
    source = base.model_copy(update={"tokenizer": str(adapter)} if saved else {})
    remedy = "free some space, or choose another --output"
    with writing("the merged model", target, remedy), folder_aside(target) as scratch:
        save_model(merged, scratch)
        load_tokenizer(source, trust_remote_code=trust_remote_code).save_pretrained(scratch)


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tie_if_equal(model: Any) -> None:
    """Store one matrix if the adapter has changed neither the head nor the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True

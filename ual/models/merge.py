"""A trained adapter and its base as one model in safetensors, for tools that know no adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ual.config.run import ModelConfig
from ual.errors import UserError
from ual.files import folder_aside, writing
from ual.models.load import load_config, load_model, load_tokenizer, save_model, stored_dtype


def merge(base: ModelConfig, adapter: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Add the adapter to the base's weights and save the sum, with the tokenizer, as `save_pretrained` does.

    The sum is made in float32 and rounded once, to the base's own dtype; a base that was quantised for
    training is merged as it was before.

    Args:
        base: the model that the adapter was trained on.
        adapter: the folder with adapter_config.json.
        target: a folder that is not there yet; it appears whole or not at all.
        trust_remote_code: run model code that comes with the weights.

    Raises:
        UserError: there is no adapter, the target exists, the base cannot be loaded, or the disk is full.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            "there is no adapter", place=str(adapter), remedy="name a run that has finished, or --resume it"
        )
    if target.exists():
        raise UserError("the folder exists already", place=str(target), remedy="choose another --output")
    of_base = load_config(base, trust_remote_code=trust_remote_code)
    whole = base.model_copy(update={"dtype": "float32", "quantization": None})
    loaded = load_model(whole, trust_remote_code=trust_remote_code)
    _untie(loaded)  # else what an adapter adds to the head would be added to the embedding too
    merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True)
    _tie_again(merged, of_base)
    merged.to(stored_dtype(base, of_base))
    merged.config.use_cache = getattr(of_base, "use_cache", True)  # training went without
    remedy = "free some space, or choose another --output"
    with writing("the merged model", target, remedy), folder_aside(target) as scratch:
        save_model(merged, scratch)
        load_tokenizer(base, trust_remote_code=trust_remote_code).save_pretrained(scratch)


def _untie(model: PreTrainedModel) -> None:
    head, embedding = _head_and_embedding(model)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tie_again(model: PreTrainedModel, of_base: PreTrainedConfig) -> None:
    """Store one matrix where the adapter has left head and embedding equal."""
    head, embedding = _head_and_embedding(model)
    if getattr(of_base, "tie_word_embeddings", False) and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True


def _head_and_embedding(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]

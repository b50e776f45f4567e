"""Load what a configuration names: the tokenizer, the base model, its LoRA adapter."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ual.config.run import LoraConfig, ModelConfig
from ual.errors import UserError

log = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end-of-sequence token.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    name = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise cannot_load("tokenizer", name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load what a model says of itself, without its weights.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    try:
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise cannot_load("model", config.path, error) from error
    assert isinstance(found, PreTrainedConfig)
    return found


def stored_dtype(config: ModelConfig, pretrained: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of `ModelConfig`, with "auto" resolved by the model's own configuration."""
    dtype = pretrained.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_model(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the base model from safetensors.

    Raises:
        UserError: nothing of that name can be loaded, or `quantization` is asked for where it cannot run.
    """
    options: dict[str, Any] = {
        "dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    }
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization:
        options |= _quantised(config.quantization)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", config.path, error) from error
    model.config.use_cache = False
    log.info("loaded %s: %d parameters in %s", config.path, model.num_parameters(), model.dtype)
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save the model as `save_pretrained` does.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # safetensors reports a full disk so
        raise OSError(str(error)) from error


def _quantised(kind: str) -> dict[str, Any]:
    """Options of QLoRA's base: 4 or 8 bits for linear layers but the head, on this process's GPU."""
    place = "configuration, model.quantization"
    if not torch.cuda.is_available():
        raise UserError(
            f"{kind!r} needs a CUDA GPU, and there is none",
            place=place,
            remedy="remove it and train LoRA on the weights as they are",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{kind!r} needs bitsandbytes", place=place, remedy="pip install 'ual-kernels[qlora]'"
        )
    chosen = (
        BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    )
    return {"quantization_config": chosen, "device_map": {"": torch.cuda.current_device()}}


def attach_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap the model in a fresh LoRA adapter; initial weights come from torch's seed.

    Raises:
        UserError: `target_modules` or `modules_to_save` name nothing in this model.
    """
    try:
        wrapped = get_peft_model(
            model,
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                r=config.r,
                lora_alpha=config.alpha,  # type: ignore[arg-type]
                lora_dropout=config.dropout,
                target_modules=config.target_modules,
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
                modules_to_save=config.modules_to_save or None,
            ),
        )
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise UserError(
            f"PEFT refused the adapter: {error}",
            place="configuration, lora",
            remedy=f"linear modules of this model: {', '.join(names)}",
        ) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def cannot_load(what: str, name: str, error: Exception) -> UserError:
    """Say which of model and tokenizer cannot be loaded, and what a name may be."""
    folder = Path(name)
    if folder.is_dir():
        problem = f"cannot load a {what} from the folder {name}: {_first_line(error)}"
        remedy = "it must hold config.json, tokenizer files and *.safetensors, as save_pretrained writes them"
    elif name.startswith((".", "/", "~")):
        problem, remedy = f"no such folder: {name}", "check model.path"
    else:
        problem = f"cannot load the {what} {name!r}: {_first_line(error)}"
        remedy = "give a folder, or a name on the Hugging Face hub (with network access, or cached before)"
    return UserError(
        problem, place=f"configuration, model.{'tokenizer' if what == 'tokenizer' else 'path'}", remedy=remedy
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

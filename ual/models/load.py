"""Load what a configuration names: tokenizer, base model, LoRA adapter. Save a model."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ual.config.run import LoraConfig, ModelConfig
from ual.errors import UserError
from ual.files import shown

log = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Without a padding token, the end-of-sequence token is used for padding.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    name = config.tokenizer or config.path
    options = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    with loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the model's own configuration (config.json), without weights.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    options = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    with loading("model", config.path):
        found = AutoConfig.from_pretrained(config.path, **options)
    assert isinstance(found, PreTrainedConfig)
    return found


def stop_ids(config: ModelConfig, pretrained: PreTrainedConfig) -> frozenset[int]:
    """Return the tokens that stop the model's generation, by its generation_config.json or else config.json.

    Raises:
        UserError: generation_config.json cannot be read.
    """
    found = pretrained.get_text_config().eos_token_id
    try:
        found = (
            GenerationConfig.from_pretrained(config.path, revision=config.revision or "main").eos_token_id
            or found
        )
    except OSError as error:  # also for a model without the file
        if (Path(config.path) / "generation_config.json").exists():
            place = f"{config.path}/generation_config.json"
            raise UserError(first_line(error), place=place, remedy="repair or remove the file") from error
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def stored_dtype(config: ModelConfig, pretrained: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a run stores weights in; "auto" is the dtype of the model's own configuration."""
    dtype = pretrained.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_model(config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the base model from safetensors, without a key-value cache.

    Raises:
        UserError: there is no such model, it cannot be read, or `quantization` cannot run on this machine.
    """
    options: dict[str, Any] = {"revision": config.revision, "dtype": config.dtype}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization:
        options |= _quantization_options(config.quantization)
    with loading("model", config.path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.path, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
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
    except SafetensorError as error:  # safetensors' exception for a full disk
        raise OSError(str(error)) from error


def check_quantization(kind: str) -> None:
    """Refuse quantization where it cannot run.

    Raises:
        UserError: there is no CUDA GPU, or bitsandbytes is not installed.
    """
    place = "configuration, model.quantization"
    if not torch.cuda.is_available():
        remedy = "remove the key to train LoRA on unquantized weights"
        raise UserError(f"{kind!r} needs a CUDA GPU, and there is none", place=place, remedy=remedy)
    if importlib.util.find_spec("bitsandbytes") is None:
        remedy = "pip install 'ual-kernels[qlora]'"
        raise UserError(f"{kind!r} needs bitsandbytes, which is not installed", place=place, remedy=remedy)


def _quantization_options(kind: str) -> dict[str, Any]:
    """Return options for QLoRA's base: linear layers but the head in 4 or 8 bits, on this process's GPU."""
    check_quantization(kind)
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = BitsAndBytesConfig(**(four_bits if kind == "nf4" else {"load_in_8bit": True}))  # type: ignore[no-untyped-call]
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def attach_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap the model in a new LoRA adapter, initialized from torch's random state.

    Raises:
        UserError: `target_modules` or `modules_to_save` match no module of this model.
    """
    try:
        adapter = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            modules_to_save=config.modules_to_save or None,
        )
        wrapped = get_peft_model(model, adapter)
    except ValueError as error:
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        remedy = f"linear modules of this model: {', '.join(names)}"
        raise UserError(
            f"PEFT refused the adapter: {error}", place="configuration, lora", remedy=remedy
        ) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


@contextmanager
def loading(what: Literal["model", "tokenizer"], name: str) -> Iterator[None]:
    """Turn the errors of transformers into a `UserError` that says what cannot be loaded from where."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if Path(name).is_dir():
            problem = f"cannot load a {what} from the folder {name}: {first_line(error)}"
            remedy = (
                "the folder needs what save_pretrained writes: config.json, *.safetensors, tokenizer files"
            )
        elif name.startswith((".", "/", "~")):
            problem, remedy = f"no such folder: {shown(Path(name))}", "check model.path"
        else:
            problem = f"cannot load the {what} {name!r}: {first_line(error)}"
            remedy = "give a folder, or a name on the Hugging Face hub (online, or cached before)"
        key = "tokenizer" if what == "tokenizer" else "path"
        raise UserError(problem, place=f"configuration, model.{key}", remedy=remedy) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""A GGUF file, dequantised into a plain transformers folder that any training code loads."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ual.errors import UserError
from ual.models.load import save_model


def convert(source: Path, folder: Path, *, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> None:
    """Write the model and the tokenizer of a GGUF file into an existing folder.

    Every weight is dequantised in float32 and then stored in `dtype`. bfloat16 halves the file, and its
    rounding (relative error 2^-9) is far below that of a 4-bit block. What third parties write meanwhile
    to stderr, as warnings or to the log (below ERROR), progress bars included, is held back.

    Args:
        source: the GGUF file, of an architecture that transformers knows.
        folder: where config.json, model.safetensors and the tokenizer's files go.
        dtype: of the stored weights; a run may load them in another.

    Raises:
        UserError: a package that reading GGUF needs is not installed.
        OSError: the folder cannot be written.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f'reading a GGUF file needs the package "{package}", which is not installed',
                place=source.name,
                remedy=f"pip install {package}",
            )
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        _complete(tokenizer, model.config)
        save_model(model, folder)
        tokenizer.save_pretrained(folder)


def _complete(tokenizer: Any, config: Any) -> None:
    """Take over what the tokenizer in the file leaves unsaid, or what transformers 5.17 misreads (eos)."""
    tokenizer.model_max_length = config.max_position_embeddings
    for name in ("bos", "eos", "pad"):
        index = getattr(config, f"{name}_token_id")
        if index is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(index))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

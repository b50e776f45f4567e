"""Convert a GGUF file into a dequantized transformers folder, which any training code loads."""

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

    Weights are dequantized in float32 and stored in `dtype`. bfloat16 halves the file; its rounding (relative
    error 2^-9) is far below that of a 4-bit block. Output of other packages is suppressed: stderr, warnings,
    progress bars and log records below ERROR.

    Args:
        source: a GGUF file of an architecture that transformers knows.
        folder: receives config.json, model.safetensors and the tokenizer's files.
        dtype: of the stored weights; a run may load them in another dtype.

    Raises:
        UserError: a package that reading GGUF needs is not installed.
        OSError: the folder cannot be written.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            problem = f'reading a GGUF file needs the package "{package}", which is not installed'
            raise UserError(problem, place=source.name, remedy=f"pip install {package}")
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
    """Set what the file's tokenizer omits, and the end token, which transformers 5.17 misreads."""
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

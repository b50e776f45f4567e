"""Constants, literal types and the error type that all modules of the package share."""

from typing import Final, Literal

IGNORE_INDEX: Final = -100

Reduction = Literal["none", "sum", "mean"]
Backend = Literal["auto", "triton", "torch", "reference"]
Precision = Literal["high", "fast"]


class UnsupportedError(RuntimeError):
    """A backend or option that was requested explicitly is not supported for these tensors."""

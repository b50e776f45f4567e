"""Names that every module of the package shares: constants, literals, one error type."""

from typing import Final, Literal

IGNORE_INDEX: Final = -100

Reduction = Literal["none", "sum", "mean"]
Backend = Literal["auto", "triton", "torch", "reference"]
Precision = Literal["high", "fast"]


class UnsupportedError(RuntimeError):
    """What was requested by name cannot run on these tensors. Nothing else was run in its place."""

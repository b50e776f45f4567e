"""Names shared by every floor of the package: constants, literals, one error type."""

from typing import Final, Literal

IGNORE_INDEX: Final = -100

Reduction = Literal["none", "sum", "mean"]
Backend = Literal["auto", "triton", "torch", "reference"]
SmoothingOver = Literal["all", "others"]
Precision = Literal["high", "fast"]


class UnsupportedError(RuntimeError):
    """What was asked for by name cannot run on these tensors, and nothing else was run in its place."""

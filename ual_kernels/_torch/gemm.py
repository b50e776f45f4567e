"""Matrix products of 16-bit factors with float32 accumulation, on CPU and CUDA."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ual_kernels._operands import accumulator


class Gemm:
    """The products of one call: factors in the dtype that the device multiplies, results in ACC.

    On a CPU the product of bfloat16 matrices is bfloat16. oneDNN can multiply *float32* matrices as bfloat16
    with float32 accumulation. This is exact for values that are bfloat16, and four times faster than float32.
    CUDA multiplies 16-bit factors into float32. With precision="fast", results (including logits) are rounded
    to 16 bits on both.
    """

    def __init__(self, input: Tensor, precision: str) -> None:
        self._dtype = input.dtype
        self._acc = accumulator(input)
        self._sixteen = input.dtype in (torch.bfloat16, torch.float16)
        self._fast = precision == "fast" and self._sixteen
        self._cuda = input.is_cuda
        self._widens = self._sixteen and not (self._fast or self._cuda)
        self._new = input.new_empty

    def buffer(self, width: int, features: int) -> Tensor:
        """Allocate the buffer of `operand`."""
        return self._new(width if self._widens else 0, features, dtype=self._acc)

    def factor(self, left: Tensor) -> Tensor:
        """Convert the left factor of `logits`."""
        return left.to(self._acc) if self._widens else left

    def operand(self, tile: Tensor, buffer: Tensor) -> Tensor:
        """Convert the right factor, a tile of the head."""
        return buffer[: len(tile)].copy_(tile) if self._widens else tile

    def logits(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Compute out = left @ right^T."""
        if self._fast:
            out.copy_(torch.mm(left, right.T))
        elif self._cuda and self._sixteen:
            out.copy_(torch.mm(left, right.T, out_dtype=self._acc))
        else:
            with self._exact_bf16():
                torch.mm(left, right.T, out=out)

    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Compute out += a @ b."""
        if self._fast:
            out += torch.mm(a.to(self._dtype), b.to(self._dtype))
        elif self._cuda and self._sixteen:
            out += torch.mm(a.to(self._dtype), b.to(self._dtype), out_dtype=self._acc)
        else:
            with self._exact_bf16():
                out.addmm_(a, b.to(self._acc))

    def add_scaled(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Compute out += a @ b, where |a| <= 1 and b is divided by a number of tokens.

        float16 values of b may underflow, so they are scaled first.
        """
        if self._dtype != torch.float16 or self._widens:
            return self.add(out, a, b)
        scale = b.abs().amax() * (len(b) * 2.0**-14)  # no sum of len(b) products overflows
        scale = torch.where(scale == 0, 1.0, scale)
        product = torch.zeros_like(out)
        self.add(product, a, b / scale)
        out.addcmul_(product, scale)
        return None

    def _exact_bf16(self) -> AbstractContextManager[None]:
        exact = self._widens and self._dtype == torch.bfloat16
        return onednn_precision("bf16") if exact else nullcontext()


@contextmanager
def onednn_precision(name: str) -> Iterator[None]:
    """Set the precision of oneDNN's float32 products inside the context. The setting is process-wide."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = name
    try:
        yield
    finally:
        settings.fp32_precision = before


def even(tokens: int, most: int) -> Iterator[slice]:
    """Yield slices of at most `most` tokens, as even as possible."""
    pieces = -(-tokens // most)
    for i in range(pieces):
        yield slice(tokens * i // pieces, tokens * (i + 1) // pieces)

"""Matrix products of 16-bit factors with float32 results, by cuBLAS."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32; on the interpreter's CPU, 16-bit factors are widened first."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, in float32: cuBLAS adds while it writes, so nothing else passes over `out`."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return out.addmm_(a.float(), b.float())
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as a sum of two bfloat16, good to 2^-17: products stay on tensor cores, whatever
    `torch.set_float32_matmul_precision` says.
    """
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)

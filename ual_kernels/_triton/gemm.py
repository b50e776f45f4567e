"""Matrix products of 16-bit factors with float32 results by cuBLAS."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b in float32. On a CPU (interpreter), 16-bit factors are converted to float32 first."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out += a @ b in float32. cuBLAS adds when it writes, without another pass over `out`."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return out.addmm_(a.float(), b.float())
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into a sum of two bfloat16 with a relative error of 2^-17.

    Products of the halves run on tensor cores and do not depend on `torch.set_float32_matmul_precision`.
    """
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)

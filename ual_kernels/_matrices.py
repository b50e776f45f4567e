"""Passes over matrices of the head's size that allocate no second matrix of that size."""

from collections.abc import Callable

import torch
from torch import Tensor

from ual_kernels._operands import accumulator


def column_mean(matrix: Tensor, class_weight: Tensor | None, vocab: int) -> Tensor:
    """Sum over v of c_v C_v / V, [D]. It is the weighted mean if the matrix holds all V classes."""
    acc = accumulator(matrix)
    if class_weight is not None:
        total = _sum_blocks(matrix, acc, lambda block, part: class_weight[part] @ block)
    elif matrix.is_cpu:  # a CPU converts the complete 16-bit matrix to float32 before it sums
        total = _sum_blocks(matrix, acc, lambda block, part: block.sum(0))
    else:
        total = matrix.sum(0, dtype=acc)
    return total / vocab


def _sum_blocks(matrix: Tensor, acc: torch.dtype, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Sum over float32 blocks that fit the cache; a float32 copy of the head may not fit into memory."""
    size = max(1, (1 << 19) // max(matrix.shape[1], 1))
    parts = [slice(start, start + size) for start in range(0, len(matrix), size)]
    widens = matrix.dtype != acc
    # one buffer: on a CPU, new memory pages cost more than the arithmetic on them
    buffer = matrix.new_empty((min(size, len(matrix)) if widens else 0, matrix.shape[1]), dtype=acc)

    def widened(block: Tensor) -> Tensor:
        return buffer[: len(block)].copy_(block) if widens else block

    return torch.stack([of(widened(matrix[part]), part) for part in parts]).sum(0)


def add_by_label(out: Tensor, label: Tensor, values: Tensor) -> None:
    """Add values to out[label], in the same order in every run."""
    if out.is_cuda:
        out.index_put_((label,), values, accumulate=True)  # sorts by label; index_add_ would race
    else:
        out.index_add_(0, label, values)


def subtract_at(out: Tensor, column: Tensor, values: Tensor) -> None:
    """Subtract values [M, K] from out [M, V] at columns [M, K], in the same order in every run."""
    if column.shape[1] == 1:  # equal to scatter_add_, which CUDA rejects if determinism is requested
        out.scatter_(1, column, out.gather(1, column) - values)
    elif out.is_cuda:
        token = torch.arange(len(out), device=out.device)[:, None].expand_as(column)
        out.index_put_((token, column), -values, accumulate=True)
    else:
        out.scatter_add_(1, column, -values)


def add_selected(out: Tensor, factor: Tensor, matrix: Tensor, label: Tensor) -> None:
    """Compute out [M, D] += sum over k of factor [M, K] times matrix [V, D] at labels [M, K].

    No [M, K, D] is allocated.
    """
    for k in range(label.shape[1]):
        out.addcmul_(factor[:, k, None], matrix[label[:, k]].to(out.dtype))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Gradient [N, ...] times factor [N] or [1], in `dtype`; `out` may be the gradient itself."""
    if out is None:
        out = torch.empty_like(gradient, dtype=dtype)
    factor = factor.expand(len(gradient)).view(-1, *(1,) * (gradient.ndim - 1))
    # if the dtypes differ, a CPU converts complete tensors
    parts = 32 if gradient.is_cpu and not gradient.dtype == dtype == factor.dtype else 1
    blocks = (tensor.chunk(parts) for tensor in (gradient, factor, out))
    for block, of_block, product in zip(*blocks, strict=True):
        torch.mul(block, of_block, out=product)
    return out

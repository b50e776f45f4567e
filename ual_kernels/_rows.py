"""What every backend does to the rows of a loss in the same way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# statistics [7, M] of some live rows -> their smoothing and their weight, or None for what it leaves alone
Rule: TypeAlias = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]

STATISTICS = 8  # the fields of TokenStatistics
LOGITS_STATISTICS = 7  # all but the dropped mass, where nothing is dropped
COUNT = -1  # a number of live rows that nobody told: it is read from the device


@dataclass(frozen=True)
class Kept:
    """The rows that take part, in their order."""

    index: Tensor  # [K]
    live: Tensor | None  # [K] bool where dead rows may be among them
    enough: Tensor | None  # bool: all live rows are among them


def kept_rows(target: Tensor, ignore_index: int, live_rows: int) -> Kept:
    """All live rows if `live_rows` is COUNT (which waits for the device), else that many, live ones first."""
    live = target != ignore_index
    if live_rows == COUNT:
        return Kept(live.nonzero().squeeze(1), None, None)
    if live_rows >= len(target):
        return Kept(torch.arange(len(target), device=target.device), live, None)
    order = live.logical_not().to(torch.uint8).argsort(stable=True)[: max(live_rows, 1)]
    return Kept(order, live[order], live.sum() <= live_rows)


def poison_missed(
    kept: Kept, target: Tensor, ignore_index: int, loss: Tensor, state: Tensor, dinput: Tensor
) -> None:
    """NaN in the live rows that a number of rows too small left out; the rows that took part hold it."""
    if kept.enough is not None:
        missed = (target != ignore_index) & ~kept.enough
        loss.masked_fill_(missed, torch.nan)
        state.masked_fill_(missed, torch.nan)
        dinput.masked_fill_(missed[: len(dinput), None], torch.nan)


def labels(target: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """A column that exists for every row, which rows count, and which hold a legal label."""
    live = target != ignore_index
    legal = (target >= 0) & (target < vocab)
    return torch.where(live & legal, target, 0).long(), live, legal


def stored_dtype(dtype: torch.dtype, per_row: bool) -> torch.dtype:
    """The dtype in which forward keeps dinput.

    bfloat16 has float32's range, so a gradient that is only multiplied by a constant later may be kept in it.
    float16 has not (1 / tokens underflows before a loss scaler's factor arrives), and arbitrary upstream
    gradients would round a second time.
    """
    return dtype if dtype == torch.bfloat16 and not per_row else torch.promote_types(dtype, torch.float32)


def column_mean(matrix: Tensor, class_weight: Tensor | None, vocab: int) -> Tensor:
    """Sum over v of c_v C_v / V, [D]: the mean, where the matrix has all V rows."""
    acc = torch.promote_types(matrix.dtype, torch.float32)
    if class_weight is not None:
        total = sum_blocks(matrix, acc, lambda block, rows: class_weight[rows] @ block)
    elif matrix.is_cpu:  # which would widen all of a 16-bit matrix first
        total = sum_blocks(matrix, acc, lambda block, rows: block.sum(0))
    else:
        total = matrix.sum(0, dtype=acc)
    return total / vocab


def sum_blocks(matrix: Tensor, acc: torch.dtype, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Sum over widened blocks of rows that fit a cache; a copy of a whole head would not fit a memory."""
    size = max(1, (1 << 19) // max(matrix.shape[1], 1))
    parts = [slice(start, start + size) for start in range(0, len(matrix), size)]
    widens = matrix.dtype != acc
    # one buffer: fresh pages cost a CPU more than the numbers in them
    room = matrix.new_empty((min(size, len(matrix)) if widens else 0, matrix.shape[1]), dtype=acc)

    def widened(block: Tensor) -> Tensor:
        return room[: len(block)].copy_(block) if widens else block

    return torch.stack([of(widened(matrix[rows]), rows) for rows in parts]).sum(0)


def add_rows(out: Tensor, y: Tensor, rows: Tensor) -> None:
    """out[y] += rows, in the same order on every run."""
    if out.is_cuda:
        out.index_put_((y,), rows, accumulate=True)  # sorts by label, where index_add_ races
    else:
        out.index_add_(0, y, rows)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient times a scalar, in `dtype`, with no second float32 copy of a whole head on the way."""
    out = torch.empty_like(gradient, dtype=dtype)
    # a CPU makes of the product a whole of its own where the output has another dtype
    parts = 32 if gradient.is_cpu and dtype != gradient.dtype else 1
    for block, product in zip(gradient.chunk(parts), out.chunk(parts), strict=True):
        torch.mul(block, factor, out=product)
    return out


def dead_statistics(like: Tensor, fields: int, rows: int, acc: torch.dtype) -> Tensor:
    """Statistics [fields, N] of rows that do not take part."""
    stats = like.new_full((fields, rows), torch.nan, dtype=acc)
    stats[6] = 0.0
    return stats

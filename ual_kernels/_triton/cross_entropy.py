"""Cross entropy of given logits, a smoothing of its own for every row.

For a row of logits z in R^V (scaled and capped), a target y, a smoothing s, class weights c (or 1), with

    high = max(z)   log_sum = log sum exp(z - high)   nll = (high - z_y) + log_sum   gap = mean(c (z - z_y))
    Q    = (1 - s) c_y + s mean(c)                      K   = Q + 2 z_loss (high + log_sum)

    loss  = Q nll - s gap + z_loss (high + log_sum)^2
    dz_v  = g (K exp(z_v - high - log_sum) - (1 - s) c_y [v = y] - s c_v / V)          g = upstream
    dx_v  = dz_v (1 - (z_v / softcap)^2) logit_scale                                    x = the raw logits
    ds    = g ((mean(c) - c_y) nll - gap)

Everything is measured from the row's own maximum or its own target, never as lse(z) itself: a stored lse
near 100 has already lost 4e-6 of every probability in float32.

Traffic: forward reads x once and keeps four numbers a row; backward reads x once more and writes dx (6NV
bytes in bf16). With `row_scale` the forward goes over its row a second time, from L2, and leaves the gradient
in place (4NV). A row that is ignored is not read. Offsets are int64: N V passes 2^31 at 16k tokens of a 128k
vocabulary. A row whose label is out of range, or whose numbers are NaN, gets NaN: loud and local.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ual_kernels._triton.math import final_logits


class Plan(NamedTuple):
    """Launch shape for a vocabulary and bytes a logit; a pure function, so tests can enumerate plans."""

    block_v: int
    num_warps: int


def plan(vocab: int, itemsize: int) -> Plan:
    """Two 16-byte loads a thread in flight, whatever the dtype; a float32 row needs half the warps for that.

    16-bit and float32 kernels spill on none of sm_80, sm_90, sm_100 and gfx942 (`python -m ual_kernels.aot`).
    """
    wide = itemsize <= 2
    block_v = min(triton.next_power_of_2(vocab), 4_096 if wide else 1_024)
    return Plan(block_v, num_warps=8 if wide and block_v > 512 else 4)


@triton.jit
def _forward_kernel(
    logits_ptr,  # [N, V], rows stride_n apart; becomes the gradient if INPLACE
    target_ptr,  # [N]
    smoothing_ptr,  # [N] ACC
    row_scale_ptr,  # [N] ACC, read if INPLACE
    class_weight_ptr,  # [V] ACC, read if WEIGHTED
    loss_ptr,  # [N] ACC, out
    state_ptr,  # [4, N] ACC, out: high, log_sum, K, ds
    statistics_ptr,  # [7, N] ACC, out if STATISTICS
    stride_n,
    N,
    V,
    ignore_index,
    ACC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    INPLACE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    live = target != ignore_index
    legal = (target >= 0) & (target < V)
    s = tl.load(smoothing_ptr + row)
    logits_ptr += row * stride_n
    x_y = tl.load(logits_ptr + tl.where(legal, target, 0), mask=live, other=0.0).to(ACC)
    z_y = final_logits(x_y, SOFTCAP, LOGIT_SCALE)
    c_y = tl.full((), 1.0, ACC)
    c_mean = tl.full((), 1.0, ACC)
    if WEIGHTED:
        c_y = tl.load(class_weight_ptr + tl.where(legal, target, 0))
        c_mean = tl.full((), 0.0, ACC)

    # online softmax: rescale the running sums whenever the running maximum moves
    high = tl.full((), float("-inf"), ACC)
    second = tl.full((), float("-inf"), ACC)
    exp_sum = tl.full((), 0.0, ACC)
    gap = tl.full((), 0.0, ACC)
    plain_gap = tl.full((), 0.0, ACC)
    weighted_sum = tl.full((), 0.0, ACC)  # of exp(z - high) (z - high)
    stop = tl.where(live, V, 0)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        x = tl.load(logits_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)
        z = tl.where(inside, final_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))
        block_high = tl.max(z, axis=0)
        new_high = tl.maximum(high, block_high)
        # a row of -inf so far has no mass: 0, not exp(-inf - -inf)
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        rescale = tl.exp(high - base)
        e = tl.exp(z - base)
        if STATISTICS:
            moved = tl.where(high == float("-inf"), 0.0, (high - base) * exp_sum)
            weighted_sum = rescale * (weighted_sum + moved)
            weighted_sum += tl.sum(tl.where(e > 0.0, e * (z - base), 0.0), axis=0)
            # where two columns share the largest, it is the second largest as well
            largest = z == block_high
            block_second = tl.max(tl.where(largest, float("-inf"), z), axis=0)
            block_second = tl.where(tl.sum(largest.to(tl.int32), axis=0) > 1, block_high, block_second)
            second = tl.maximum(tl.minimum(high, block_high), tl.maximum(second, block_second))
            plain_gap += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
        exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
        high = new_high
        if WEIGHTED:
            c = tl.load(class_weight_ptr + column, mask=inside, other=0.0)
            gap += tl.sum(tl.where(inside, c * (z - z_y), 0.0), axis=0)
            c_mean += tl.sum(c, axis=0)
        else:
            gap += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
    log_sum = tl.log(exp_sum)
    gap = gap / V
    if WEIGHTED:
        c_mean = c_mean / V

    nll = (high - z_y) + log_sum
    k = (1.0 - s) * c_y + s * c_mean
    # a row that does not smooth must not see the mean of a vocabulary with -inf in it (0 inf = nan)
    loss = k * nll - tl.where(s == 0.0, 0.0, s * gap)
    if Z_LOSS != 0.0:
        lse = high + log_sum
        loss += Z_LOSS * lse * lse
        k += 2.0 * Z_LOSS * lse
    poison = tl.where(legal, 0.0, float("nan"))
    loss += poison
    k += poison
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    tl.store(state_ptr + row, tl.where(live, high, 0.0))
    tl.store(state_ptr + N + row, tl.where(live, log_sum, 0.0))
    tl.store(state_ptr + 2 * N + row, tl.where(live, k, 0.0))
    tl.store(state_ptr + 3 * N + row, tl.where(live, (c_mean - c_y) * nll - gap + poison, 0.0))
    if STATISTICS:
        known = live & legal
        nan = float("nan")
        statistics_ptr += row
        mean = z_y + plain_gap / V
        tl.store(statistics_ptr, tl.where(known, high + log_sum, nan))
        tl.store(statistics_ptr + N, tl.where(known, -nll, nan))
        tl.store(statistics_ptr + 2 * N, tl.where(known, log_sum - weighted_sum / exp_sum, nan))
        tl.store(statistics_ptr + 3 * N, tl.where(known, 1.0 / exp_sum, nan))
        tl.store(statistics_ptr + 4 * N, tl.where(known, high - second, nan))
        tl.store(statistics_ptr + 5 * N, tl.where(known, mean, nan))
        tl.store(statistics_ptr + 6 * N, tl.where(known & (z_y >= high), 1.0, 0.0))
    if INPLACE:
        # every thread has read the target's logit before any thread overwrites it
        tl.debug_barrier()
        _write_gradient(
            logits_ptr, logits_ptr, class_weight_ptr, target, s, high, log_sum, k, c_y,
            tl.load(row_scale_ptr + row) * LOGIT_SCALE, live, V,
            ACC, WEIGHTED, SOFTCAP, LOGIT_SCALE, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    dloss_ptr,  # [N], stride_g apart: 0 when a scalar was broadcast
    logits_ptr,  # [N, V], rows stride_n apart
    target_ptr,  # [N]
    smoothing_ptr,  # [N] ACC
    class_weight_ptr,  # [V] ACC, read if WEIGHTED
    state_ptr,  # [4, N] ACC
    dlogits_ptr,  # [N, V] contiguous, out
    stride_g,
    stride_n,
    N,
    V,
    ignore_index,
    ACC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    live = target != ignore_index
    c_y = tl.full((), 1.0, ACC)
    if WEIGHTED:
        legal = (target >= 0) & (target < V)
        c_y = tl.load(class_weight_ptr + tl.where(legal, target, 0))
    _write_gradient(
        logits_ptr + row * stride_n,
        dlogits_ptr + row * V,
        class_weight_ptr,
        target,
        tl.load(smoothing_ptr + row),
        tl.load(state_ptr + row),
        tl.load(state_ptr + N + row),
        tl.load(state_ptr + 2 * N + row),
        c_y,
        tl.load(dloss_ptr + row * stride_g).to(ACC) * LOGIT_SCALE,
        live,
        V,
        ACC,
        WEIGHTED,
        SOFTCAP,
        LOGIT_SCALE,
        BLOCK_V,
    )


@triton.jit
def _write_gradient(
    source_ptr,  # [V], one row of raw logits
    out_ptr,  # [V], may be source_ptr: a block is read before it is written
    class_weight_ptr,
    target,
    s,
    high,
    log_sum,
    k,
    c_y,
    scale,
    live,
    V,
    ACC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    on_target = (1.0 - s) * c_y
    spread = s / V
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        x = tl.load(source_ptr + column, mask=inside & live, other=0.0, eviction_policy="evict_first").to(ACC)
        z = final_logits(x, SOFTCAP, LOGIT_SCALE)
        p = tl.exp(z - high - log_sum)
        q = tl.where(column == target, on_target, 0.0)
        if WEIGHTED:
            q += spread * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
        else:
            q += spread
        dx = (k * p - q) * scale
        if SOFTCAP != 0.0:
            dx *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
        tl.store(out_ptr + column, tl.where(live, dx, 0.0), mask=inside)


@triton.jit
def _scale_rows_kernel(
    buffer_ptr, scale_ptr, stride_n, stride_s, V, ACC: tl.constexpr, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row * stride_s).to(ACC)
    buffer_ptr += row * stride_n
    # decided on the device: the usual upstream of 1 costs one load a row
    stop = tl.where(scale == 1.0, 0, V)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(buffer_ptr + column, mask=column < V, other=0.0).to(ACC)
        tl.store(buffer_ptr + column, x * scale, mask=column < V)


def forward(
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    *,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of `ops.cross_entropy`; with `row_scale`, of `ops.cross_entropy_inplace`."""
    rows, vocab = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(rows, dtype=acc)
    state = logits.new_empty((4, rows), dtype=acc)
    stats = logits.new_empty((7, rows if statistics else 0), dtype=acc)
    if rows:
        block_v, num_warps = plan(vocab, logits.element_size())
        _forward_kernel[(rows,)](
            logits,
            target,
            smoothing,
            row_scale,
            class_weight,
            loss,
            state,
            stats,
            logits.stride(0),
            rows,
            vocab,
            ignore_index,
            ACC=_TL[acc],
            WEIGHTED=class_weight is not None,
            STATISTICS=statistics,
            INPLACE=row_scale is not None,
            SOFTCAP=softcap,
            LOGIT_SCALE=logit_scale,
            Z_LOSS=z_loss,
            BLOCK_V=block_v,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return loss, state, stats


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    state: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """The body of `ops.cross_entropy_backward`: dlogits [N, V], contiguous."""
    rows, vocab = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        block_v, num_warps = plan(vocab, logits.element_size())
        _backward_kernel[(rows,)](
            dloss,
            logits,
            target,
            smoothing,
            class_weight,
            state,
            dlogits,
            dloss.stride(0),
            logits.stride(0),
            rows,
            vocab,
            ignore_index,
            ACC=_TL[state.dtype],
            WEIGHTED=class_weight is not None,
            SOFTCAP=softcap,
            LOGIT_SCALE=logit_scale,
            BLOCK_V=block_v,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return dlogits


def scale_rows(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply the rows of `buffer` [N, V] by `scale` [N], in place."""
    rows, vocab = buffer.shape
    if rows:
        block_v, num_warps = plan(vocab, buffer.element_size())
        _scale_rows_kernel[(rows,)](
            buffer,
            scale,
            buffer.stride(0),
            scale.stride(0),
            vocab,
            ACC=_TL[torch.promote_types(buffer.dtype, torch.float32)],
            BLOCK_V=block_v,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return buffer


_TL = {torch.float32: tl.float32, torch.float64: tl.float64}

"""Cross entropy of given logits, with a smoothing of its own for every token.

For a token with logits z in R^V (scaled and capped) and the algebra of `_tokens`, where

    high = max(z)   log_sum = log sum exp(z - high)   nll = (high - z_y) + log_sum   t = mean(c (z - z_y))

    dz_v  = g (K exp(z_v - high - log_sum) - (1 - s) c_y [v = y] - s c_v / V)          g = upstream
    dx_v  = dz_v (1 - (z_v / softcap)^2) logit_scale                                    x = the raw logits

Everything is measured from the token's own maximum or its own target, never as lse(z) itself: a stored lse
near 100 has already lost 4e-6 of every probability in float32.

Traffic: forward reads x once and keeps four numbers a token; backward reads x once more and writes dx (6NV
bytes in bf16). In place, the forward reads its token's logits a second time, from L2, and leaves the
gradient there (4NV). The logits of an ignored token are not read. Offsets are int64: N V passes 2^31 at 16k
tokens of a 128k vocabulary. A token whose label is out of range, or whose numbers are NaN, gets NaN: loud and
local.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ual_kernels._operands import LogitsInputs, LogitsOutputs, LogitsSpec, accumulator
from ual_kernels._triton.math import (
    final_logits,
    merge_two_largest,
    store_statistics,
    token_terms,
    two_largest,
)


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
    logits_ptr,  # [N, V], tokens stride_n apart; becomes the gradient if INPLACE
    target_ptr,  # [N]
    smoothing_ptr,  # [N] ACC
    token_scale_ptr,  # [N] ACC, read if INPLACE
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
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + token).to(tl.int64)
    selected = target != ignore_index
    valid = (target >= 0) & (target < V)
    s = tl.load(smoothing_ptr + token)
    logits_ptr += token * stride_n
    x_y = tl.load(logits_ptr + tl.where(valid, target, 0), mask=selected, other=0.0).to(ACC)
    z_y = final_logits(x_y, SOFTCAP, LOGIT_SCALE)
    c_y = tl.full((), 1.0, ACC)
    c_mean = tl.full((), 1.0, ACC)
    if WEIGHTED:
        c_y = tl.load(class_weight_ptr + tl.where(valid, target, 0))
        c_mean = tl.full((), 0.0, ACC)

    # online softmax: rescale the running sums whenever the running maximum moves
    high = tl.full((), float("-inf"), ACC)
    second = tl.full((), float("-inf"), ACC)
    exp_sum = tl.full((), 0.0, ACC)
    smoothing_term = tl.full((), 0.0, ACC)
    plain_term = tl.full((), 0.0, ACC)
    weighted_sum = tl.full((), 0.0, ACC)  # of exp(z - high) (z - high)
    stop = tl.where(selected, V, 0)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        x = tl.load(logits_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)
        z = tl.where(inside, final_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))
        block_high = tl.max(z, axis=0)
        new_high = tl.maximum(high, block_high)
        # logits of -inf so far have no mass: 0, not exp(-inf - -inf)
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        rescale = tl.exp(high - base)
        e = tl.exp(z - base)
        if STATISTICS:
            moved = tl.where(high == float("-inf"), 0.0, (high - base) * exp_sum)
            weighted_sum = rescale * (weighted_sum + moved)
            weighted_sum += tl.sum(tl.where(e > 0.0, e * (z - base), 0.0), axis=0)
            second = merge_two_largest(high, second, block_high, two_largest(z)[1])
            plain_term += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
        exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
        high = new_high
        if WEIGHTED:
            c = tl.load(class_weight_ptr + column, mask=inside, other=0.0)
            smoothing_term += tl.sum(tl.where(inside, c * (z - z_y), 0.0), axis=0)
            c_mean += tl.sum(c, axis=0)
        else:
            smoothing_term += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
    log_sum = tl.log(exp_sum)
    smoothing_term = smoothing_term / V
    if WEIGHTED:
        c_mean = c_mean / V

    nll = (high - z_y) + log_sum
    loss, k, _, ds = token_terms(nll, high + log_sum, smoothing_term, s, c_y, c_mean, Z_LOSS)
    nan_mask = tl.where(valid, 0.0, float("nan"))
    tl.store(loss_ptr + token, tl.where(selected, loss + nan_mask, 0.0))
    tl.store(state_ptr + token, tl.where(selected, high, 0.0))
    tl.store(state_ptr + N + token, tl.where(selected, log_sum, 0.0))
    tl.store(state_ptr + 2 * N + token, tl.where(selected, k + nan_mask, 0.0))
    tl.store(state_ptr + 3 * N + token, tl.where(selected, ds + nan_mask, 0.0))
    if STATISTICS:
        store_statistics(
            statistics_ptr + token, N, True, selected & valid,
            z_y, high, exp_sum, nll, weighted_sum, high, second, z_y + plain_term / V,
        )  # fmt: skip
    if INPLACE:
        # every thread has read the target's logit before any thread overwrites it
        tl.debug_barrier()
        _write_gradient(
            logits_ptr, logits_ptr, class_weight_ptr, target, s, high, log_sum, k + nan_mask, c_y,
            tl.load(token_scale_ptr + token) * LOGIT_SCALE, selected, V,
            ACC, WEIGHTED, SOFTCAP, LOGIT_SCALE, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    dloss_ptr,  # [N], stride_g apart: 0 when a scalar was broadcast
    logits_ptr,  # [N, V], tokens stride_n apart
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
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + token).to(tl.int64)
    selected = target != ignore_index
    c_y = tl.full((), 1.0, ACC)
    if WEIGHTED:
        valid = (target >= 0) & (target < V)
        c_y = tl.load(class_weight_ptr + tl.where(valid, target, 0))
    _write_gradient(
        logits_ptr + token * stride_n,
        dlogits_ptr + token * V,
        class_weight_ptr,
        target,
        tl.load(smoothing_ptr + token),
        tl.load(state_ptr + token),
        tl.load(state_ptr + N + token),
        tl.load(state_ptr + 2 * N + token),
        c_y,
        tl.load(dloss_ptr + token * stride_g).to(ACC) * LOGIT_SCALE,
        selected,
        V,
        ACC,
        WEIGHTED,
        SOFTCAP,
        LOGIT_SCALE,
        BLOCK_V,
    )


@triton.jit
def _write_gradient(
    source_ptr,  # [V], raw logits of one token
    out_ptr,  # [V], may be source_ptr: a block is read before it is written
    class_weight_ptr,
    target,
    s,
    high,
    log_sum,
    k,
    c_y,
    scale,
    selected,
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
        x = tl.load(source_ptr + column, mask=inside & selected, other=0.0, eviction_policy="evict_first").to(
            ACC
        )
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
        tl.store(out_ptr + column, tl.where(selected, dx, 0.0), mask=inside)


@triton.jit
def _scale_tokens_kernel(
    buffer_ptr, scale_ptr, stride_n, stride_s, V, ACC: tl.constexpr, BLOCK_V: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + token * stride_s).to(ACC)
    buffer_ptr += token * stride_n
    # decided on the device: the usual upstream of 1 costs one load a token
    stop = tl.where(scale == 1.0, 0, V)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(buffer_ptr + column, mask=column < V, other=0.0).to(ACC)
        tl.store(buffer_ptr + column, x * scale, mask=column < V)


def forward(inputs: LogitsInputs, spec: LogitsSpec, *, inplace_scale: Tensor | None = None) -> LogitsOutputs:
    """The body of `ops.cross_entropy_op`; with `inplace_scale` [N], of `ops.cross_entropy_inplace_op`."""
    logits, target, smoothing, class_weight = inputs
    tokens, vocab = logits.shape
    outputs = LogitsOutputs.empty(inputs, spec)
    if tokens:
        block_v, num_warps = plan(vocab, logits.element_size())
        _forward_kernel[(tokens,)](
            logits, target, smoothing, inplace_scale, class_weight, *outputs,
            logits.stride(0), tokens, vocab, spec.ignore_index,
            ACC=_TL[accumulator(logits)],
            WEIGHTED=class_weight is not None,
            STATISTICS=spec.statistics,
            INPLACE=inplace_scale is not None,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            Z_LOSS=spec.z_loss,
            BLOCK_V=block_v,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs


def backward(dloss: Tensor, state: Tensor, inputs: LogitsInputs, spec: LogitsSpec) -> Tensor:
    """The body of `ops.cross_entropy_backward_op`: dlogits [N, V], contiguous."""
    logits, target, smoothing, class_weight = inputs
    tokens, vocab = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if tokens:
        block_v, num_warps = plan(vocab, logits.element_size())
        _backward_kernel[(tokens,)](
            dloss, logits, target, smoothing, class_weight, state, dlogits,
            dloss.stride(0), logits.stride(0), tokens, vocab, spec.ignore_index,
            ACC=_TL[state.dtype],
            WEIGHTED=class_weight is not None,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            BLOCK_V=block_v,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dlogits


def scale_tokens(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply each token's row of `buffer` [N, V] by its number of `scale` [N], in place."""
    tokens, vocab = buffer.shape
    if tokens:
        block_v, num_warps = plan(vocab, buffer.element_size())
        _scale_tokens_kernel[(tokens,)](
            buffer, scale, buffer.stride(0), scale.stride(0), vocab,
            ACC=_TL[accumulator(buffer)], BLOCK_V=block_v, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return buffer


_TL = {torch.float32: tl.float32, torch.float64: tl.float64}

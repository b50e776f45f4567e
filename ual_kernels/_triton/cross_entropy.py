"""Cross entropy of given logits with a separate smoothing for every token.

For a token with logits z in R^V (scaled and capped), a reference point k and the terms of `_tokens`,

    log_sum = log sum exp(z - k)   nll = (k - z_y) + log_sum   t = mean(c (z - z_y))   (the smoothing term)

    dz_v  = g (K exp(z_v - k - log_sum) - (1 - s) c_y [v = y] - s c_v / V)             g = upstream
    dx_v  = dz_v (1 - (z_v / softcap)^2) logit_scale                                    x = the raw logits

This is for a class index. A target of K classes is a vector of K in the same program; their columns of the
gradient are written last. A dense target is read block by block beside the logits.

A reference point k is a number that is subtracted from the logits before exp. Probabilities are computed from
z - k and log_sum: in float32, rounding an lse(z) near 100 changes every probability by 4e-6.

For 16-bit logits the reference point is fixed, k = z_y. It is known before the logits are read, so the loop
sums over lanes without a reduction or mask. If the sum exceeds 2^100, because the target is 69 nats below the
maximum, the token's logits are read again with a running maximum, k = max(z). For wider logits the reference
point is always the running maximum; a fixed reference point would reduce their accuracy.

Memory traffic: forward reads x once and stores four numbers per token; backward reads x once more and writes
dx (6NV bytes in bf16). In place, forward reads a token's logits a second time, from the end, which is still
in L2, and overwrites them with the gradient (4NV). The logits of an ignored token are not read. Offsets are
int64: N V exceeds 2^31 for 16k tokens and a vocabulary of 128k. A token whose label is out of range, or that
has NaN inputs, gets NaN. Other tokens are unaffected.

A vocabulary size that is not a multiple of 16 needs eight times as many load instructions, of 2 bytes each.
Pad such a vocabulary.
"""

from typing import Any, NamedTuple

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
    top2,
    two_largest,
)

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LARGEST_SUM: tl.constexpr = tl.constexpr(2.0**100)


# With four tokens per processor, 132 processors hold 52 MB of logits, about an L2 of 50 MB. For this V, an
# H100 reaches 0.81 of the copy's bandwidth with four tokens per processor, and at most 0.74 with fewer.
_SMALL_VOCAB = 49_152


class LaunchConfig(NamedTuple):
    """Launch config of the kernels in this module."""

    block_v: int
    num_warps: int
    fold: int  # parts of a block that are summed before they are added to accumulators, which saves registers


def launch_config(
    vocab: int, itemsize: int, *, heavy: bool = False, dense: bool = False, capped: bool = False
) -> LaunchConfig:
    """Return the launch config for a vocabulary size and bytes per logit.

    16-bit logits are processed in blocks of 32 per thread, which are four loads of 16 bytes in flight. With
    32 warps one token is in flight per processor, so the second read of its logits hits L2. Four tokens of a
    small vocabulary fit as well, and hide each other's latency (docs/kernels.md). A softcap needs
    more registers: 16 logits per thread. Statistics and class weights (`heavy`) need even more: 8 logits per
    thread and 16 warps. A dense target needs registers of its own. No kernel spills on sm_80, sm_90, sm_100
    and gfx942 (`python -m ual_kernels.aot`).
    """
    heavy = heavy or dense
    if itemsize > 2:
        most = 512 if dense else 1_024
    else:
        most = 4_096 if heavy else 16_384 if capped else 32_768 if vocab > _SMALL_VOCAB else 8_192
    block_v = min(1 << (vocab.bit_length() - 1), most)  # at least one full block, which needs no mask
    if itemsize > 2:
        return LaunchConfig(block_v, num_warps=4, fold=1)
    num_warps = max(4, block_v // (256 if heavy else 512 if capped else 1_024))
    return LaunchConfig(block_v, num_warps, fold=max(1, block_v // (256 * num_warps)))


@triton.jit
def _forward_kernel(
    logits_ptr,  # [N, V], tokens stride_n apart; overwritten with the gradient if INPLACE
    target_ptr,  # [N]
    smoothing_ptr,  # [N] ACC
    token_scale_ptr,  # [N] ACC, read if INPLACE
    class_weight_ptr,  # [V] ACC, read if WEIGHTED
    classes_ptr,  # [N, K] int64, read if BLOCK_C
    probability_ptr,  # [N, K] ACC, read if BLOCK_C; [N, V], read if DENSE
    loss_ptr,  # [N] ACC, out
    state_ptr,  # [4, N] ACC, out: reference point, log_sum, K, ds
    statistics_ptr,  # [8, N] ACC, out if STATISTICS
    dprobability_ptr,  # like probability_ptr, out if PROBABILITY_GRAD
    stride_n,
    N,
    V,
    K,
    ignore_index,
    ACC: tl.constexpr,
    FIXED_REFERENCE: tl.constexpr,
    BLOCK_C: tl.constexpr,  # of classes of a target; 0 for a class index and a dense target
    DENSE: tl.constexpr,
    PROBABILITY_GRAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    INPLACE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FOLD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + token).to(tl.int64)
    selected = target != ignore_index
    valid = (target >= 0) & (target < V)
    logits_ptr += token * stride_n
    column, live, p, c, z_y, z = _target_classes(
        logits_ptr, class_weight_ptr, classes_ptr, probability_ptr, token, target, selected,
        valid, K, ACC, BLOCK_C, WEIGHTED, SOFTCAP, LOGIT_SCALE,
    )  # fmt: skip
    if DENSE:
        probability_ptr += token * V

    stop = tl.where(selected, V, 0)
    zero = tl.zeros((), ACC)
    weight, excess, mass, plain_excess = zero, zero, zero, zero
    if FIXED_REFERENCE:
        k = z_y
        exp_sum, term, plain_term, moment, high, second, predicted, c_mean = _fixed_reference_sums(
            logits_ptr, class_weight_ptr, z_y, stop, WEIGHTED, STATISTICS, SOFTCAP, LOGIT_SCALE, BLOCK_V, FOLD
        )
        if not (exp_sum < _LARGEST_SUM):  # true for NaN
            (
                k, exp_sum, term, plain_term, moment, high, second, predicted, c_mean, _, _, _, _
            ) = _online_sums(
                logits_ptr, class_weight_ptr, probability_ptr, z_y, stop,
                ACC, False, WEIGHTED, STATISTICS, SOFTCAP, LOGIT_SCALE, BLOCK_V,
            )  # fmt: skip
    else:
        (
            k, exp_sum, term, plain_term, moment, high, second, predicted, c_mean,
            weight, excess, mass, plain_excess,
        ) = _online_sums(
            logits_ptr, class_weight_ptr, probability_ptr, z_y, stop,
            ACC, DENSE, WEIGHTED, STATISTICS, SOFTCAP, LOGIT_SCALE, BLOCK_V,
        )  # fmt: skip
    log_sum = tl.log(exp_sum)
    smoothing_term = term / V
    c_mean = c_mean / V if WEIGHTED else tl.full((), 1.0, ACC)

    s = tl.load(smoothing_ptr + token)
    nll = (k - z_y) + log_sum
    if not DENSE:
        weight, mass = p * c, p
        if BLOCK_C > 0:
            # if the label's logit is -inf, nll is infinite already
            below = tl.where(live, tl.where(z_y == float("-inf"), 0.0, z_y - z), 0.0)
            excess = tl.sum(weight * below, axis=0)
            plain_excess = tl.sum(p * below, axis=0)
            weight = tl.sum(weight, axis=0)
            mass = tl.sum(mass, axis=0)
    loss, coefficient, _, ds = token_terms(
        nll, k + log_sum, smoothing_term, s, weight, excess, c_mean, Z_LOSS
    )
    nan_mask = tl.where(valid, 0.0, float("nan"))
    coefficient += nan_mask
    tl.store(loss_ptr + token, tl.where(selected, loss + nan_mask, 0.0))
    tl.store(state_ptr + token, tl.where(selected, k, 0.0))
    tl.store(state_ptr + N + token, tl.where(selected, log_sum, 0.0))
    tl.store(state_ptr + 2 * N + token, tl.where(selected, coefficient, 0.0))
    tl.store(state_ptr + 3 * N + token, tl.where(selected, ds + nan_mask, 0.0))
    if STATISTICS:
        store_statistics(
            statistics_ptr + token, N, True, selected & valid,
            k, exp_sum, -(mass * nll + plain_excess), moment, high - k, second - k, z_y + plain_term / V,
            z_y >= high, target, predicted,
        )  # fmt: skip
    if PROBABILITY_GRAD:
        if DENSE:
            for start in range(0, V, BLOCK_V):
                at = start + tl.arange(0, BLOCK_V)
                x = tl.load(logits_ptr + at, mask=(at < stop), other=0.0).to(ACC)
                z_v = final_logits(x, SOFTCAP, LOGIT_SCALE)
                dp = (1.0 - s) * (nll + (z_y - z_v))
                if WEIGHTED:
                    dp *= tl.load(class_weight_ptr + at, mask=at < V, other=0.0)
                tl.store(dprobability_ptr + token * V + at, tl.where(selected, dp, 0.0), mask=at < V)
        else:
            entry = tl.arange(0, BLOCK_C)
            dp = (1.0 - s) * c * ((nll + nan_mask) + (z_y - z))
            tl.store(dprobability_ptr + token * K + entry, tl.where(selected, dp, 0.0), mask=entry < K)
    if INPLACE:
        # every thread has read the target's logit before any thread overwrites it
        tl.debug_barrier()
        _write_gradient(
            logits_ptr, logits_ptr, class_weight_ptr, probability_ptr, column, live, p, c, z, s, k, log_sum,
            coefficient, tl.load(token_scale_ptr + token) * LOGIT_SCALE, selected, V,
            ACC, DENSE, WEIGHTED, SOFTCAP, LOGIT_SCALE, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _target_classes(
    logits_ptr,  # [V], one token
    class_weight_ptr,
    classes_ptr,  # [N, K]
    probability_ptr,  # [N, K]
    token,
    target,
    selected,
    valid,
    K,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
):
    """Return column, whether it counts, p, c, z_y and z of a token's target; all but z_y may be vectors.

    The first entry of the vectors is the target's class. An entry that does not count is padding.
    """
    y = tl.where(valid, target, 0)
    z_y = final_logits(tl.load(logits_ptr + y, mask=selected, other=0.0).to(ACC), SOFTCAP, LOGIT_SCALE)
    if BLOCK_C > 0:
        entry = tl.arange(0, BLOCK_C)
        column = tl.load(classes_ptr + token * K + entry, mask=entry < K, other=0)
        p = tl.load(probability_ptr + token * K + entry, mask=entry < K, other=0.0)
        z = tl.load(logits_ptr + column, mask=(entry < K) & selected, other=0.0).to(ACC)
        z = final_logits(z, SOFTCAP, LOGIT_SCALE)
        live = (p != 0.0) & valid
        c = tl.full((BLOCK_C,), 1.0, ACC)
    else:
        column = y
        p = tl.full((), 1.0, ACC)
        z = z_y
        live = valid
        c = tl.full((), 1.0, ACC)
    if WEIGHTED:
        c = tl.load(class_weight_ptr + column)
    return column, live, p, c, z_y, z


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Sum FOLD parts of a block. A thread has the same lanes of all parts, so no data moves."""
    return tl.sum(tl.reshape(x, (FOLD, x.shape[0] // FOLD)), axis=0)


@triton.jit
def _fixed_reference_sums(
    logits_ptr,  # [V], one token
    class_weight_ptr,
    z_y,
    stop,  # V, or 0 for an ignored token
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Sums for d = z - z_y: exp(d), c d, d, exp(d) d; the two largest z and a class; the sum of c."""
    zero = tl.zeros((BLOCK_V,), tl.float32)
    low = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    plain, moment, c_sum, highs, seconds = zero, zero, zero, low, low
    total = tl.zeros((BLOCK_V // FOLD,), tl.float32)
    term = total
    tops = tl.zeros((BLOCK_V,), tl.int32)
    lane = tl.arange(0, BLOCK_V)
    full = stop // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        x = tl.load(logits_ptr + start + lane, eviction_policy="evict_last").to(tl.float32)
        z = final_logits(x, SOFTCAP, LOGIT_SCALE)
        d = z - z_y
        e = tl.exp2(d * _LOG2E)
        total += _fold(e, FOLD)
        if WEIGHTED:
            c = tl.load(class_weight_ptr + start + lane)
            c_sum += c
            term += _fold(c * d, FOLD)
        else:
            term += _fold(d, FOLD)
        if STATISTICS:
            plain += d
            moment += e * tl.maximum(d, -200.0)
            tops = tl.where(z > highs, start + lane, tops)
            highs, seconds = top2(highs, seconds, z, float("-inf"))
    if full < stop:  # the ragged tail
        inside = full + lane < stop
        x = tl.load(logits_ptr + full + lane, mask=inside, other=0.0, eviction_policy="evict_last")
        z = tl.where(inside, final_logits(x.to(tl.float32), SOFTCAP, LOGIT_SCALE), float("-inf"))
        d = z - z_y
        e = tl.exp2(d * _LOG2E)
        total += _fold(e, FOLD)
        if WEIGHTED:
            c = tl.load(class_weight_ptr + full + lane, mask=inside, other=0.0)
            c_sum += c
            term += _fold(tl.where(inside, c * d, 0.0), FOLD)
        else:
            term += _fold(tl.where(inside, d, 0.0), FOLD)
        if STATISTICS:
            plain += tl.where(inside, d, 0.0)
            moment += e * tl.maximum(d, -200.0)
            tops = tl.where(z > highs, full + lane, tops)
            highs, seconds = top2(highs, seconds, z, float("-inf"))
    high, second = tl.max(highs, axis=0), tl.max(seconds, axis=0)
    predicted = tl.full((), 0, tl.int32)
    if STATISTICS:
        high, second = tl.reduce((highs, seconds), 0, top2)
        predicted = tl.min(tl.where(highs == high, tops, stop), axis=0)
    return (
        tl.sum(total, axis=0), tl.sum(term, axis=0), tl.sum(plain, axis=0), tl.sum(moment, axis=0),
        high, second, predicted, tl.sum(c_sum, axis=0),
    )  # fmt: skip


@triton.jit
def _online_sums(
    logits_ptr,  # [V], one token
    class_weight_ptr,
    probability_ptr,  # [V], read if DENSE
    z_y,
    stop,
    ACC: tl.constexpr,
    DENSE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The maximum, and the sums of `_fixed_reference_sums` relative to it; c d and d are relative to z_y.

    For a dense target q also the sums of c q, c q (z_y - z), q and q (z_y - z).
    """
    high = tl.full((), float("-inf"), ACC)
    second = tl.full((), float("-inf"), ACC)
    exp_sum = tl.full((), 0.0, ACC)
    term = tl.full((), 0.0, ACC)
    plain_term = tl.full((), 0.0, ACC)
    moment = tl.full((), 0.0, ACC)
    c_sum = tl.full((), 0.0, ACC)
    weight = tl.full((), 0.0, ACC)
    excess = tl.full((), 0.0, ACC)
    mass = tl.full((), 0.0, ACC)
    plain_excess = tl.full((), 0.0, ACC)
    predicted = tl.full((), 0, tl.int32)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < stop
        x = tl.load(logits_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)
        z = tl.where(inside, final_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))
        block_high = tl.max(z, axis=0)
        new_high = tl.maximum(high, block_high)
        # if all logits so far are -inf, exp(-inf - -inf) would be NaN
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        rescale = tl.exp(high - base)
        e = tl.exp(z - base)
        if STATISTICS:
            moved = tl.where(high == float("-inf"), 0.0, (high - base) * exp_sum)
            moment = rescale * (moment + moved)
            moment += tl.sum(tl.where(e > 0.0, e * (z - base), 0.0), axis=0)
            second = merge_two_largest(high, second, block_high, two_largest(z)[1])
            top = tl.min(tl.where(z == block_high, column, stop), axis=0)
            predicted = tl.where(block_high > high, top, predicted)
            plain_term += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
        exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
        high = new_high
        if WEIGHTED:
            c = tl.load(class_weight_ptr + column, mask=inside, other=0.0)
            term += tl.sum(tl.where(inside, c * (z - z_y), 0.0), axis=0)
            c_sum += tl.sum(c, axis=0)
        else:
            term += tl.sum(tl.where(inside, z - z_y, 0.0), axis=0)
        if DENSE:
            q = tl.load(probability_ptr + column, mask=inside, other=0.0)
            below = tl.where(q == 0.0, 0.0, tl.where(z_y == float("-inf"), 0.0, q * (z_y - z)))
            mass += tl.sum(q, axis=0)
            plain_excess += tl.sum(below, axis=0)
            if WEIGHTED:
                q *= c
                below *= c
            weight += tl.sum(q, axis=0)
            excess += tl.sum(below, axis=0)
    return (
        high, exp_sum, term, plain_term, moment, high, second, predicted, c_sum,
        weight, excess, mass, plain_excess,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    dloss_ptr,  # [N], stride_g apart; 0 for a scalar that was broadcast
    logits_ptr,  # [N, V], tokens stride_n apart
    target_ptr,  # [N]
    smoothing_ptr,  # [N] ACC
    class_weight_ptr,  # [V] ACC, read if WEIGHTED
    classes_ptr,  # [N, K] int64, read if BLOCK_C
    probability_ptr,  # [N, K] ACC, read if BLOCK_C; [N, V], read if DENSE
    state_ptr,  # [4, N] ACC
    dlogits_ptr,  # [N, V] contiguous, out
    stride_g,
    stride_n,
    N,
    V,
    K,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DENSE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + token).to(tl.int64)
    selected = target != ignore_index
    valid = (target >= 0) & (target < V)
    logits_ptr += token * stride_n
    column, live, p, c, _, z = _target_classes(
        logits_ptr, class_weight_ptr, classes_ptr, probability_ptr, token, target, selected,
        valid, K, ACC, BLOCK_C, WEIGHTED, SOFTCAP, LOGIT_SCALE,
    )  # fmt: skip
    if DENSE:
        probability_ptr += token * V
    _write_gradient(
        logits_ptr, dlogits_ptr + token * V, class_weight_ptr, probability_ptr, column, live, p, c, z,
        tl.load(smoothing_ptr + token),
        tl.load(state_ptr + token),
        tl.load(state_ptr + N + token),
        tl.load(state_ptr + 2 * N + token),
        tl.load(dloss_ptr + token * stride_g).to(ACC) * LOGIT_SCALE,
        selected, V, ACC, DENSE, WEIGHTED, SOFTCAP, LOGIT_SCALE, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _write_gradient(
    source_ptr,  # [V], raw logits of one token
    out_ptr,  # [V], may be source_ptr: each thread overwrites only elements that it has read
    class_weight_ptr,
    probability_ptr,  # [V], read if DENSE
    column,  # of the target's classes, with the results of `_target_classes`
    live,
    p,
    c,
    z,
    s,
    k,
    log_sum,
    coefficient,
    scale,
    selected,
    V,
    ACC: tl.constexpr,
    DENSE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    if selected:
        # from the end, which was read last and is in L2
        if full < V:
            inside = full + lane < V
            x = tl.load(source_ptr + full + lane, mask=inside, other=0.0, eviction_policy="evict_first")
            q = _spread(class_weight_ptr, probability_ptr, full + lane, V, s, DENSE, WEIGHTED)
            dx = _dlogits(x, k, log_sum, coefficient, q, scale, ACC, SOFTCAP, LOGIT_SCALE)
            tl.store(out_ptr + full + lane, dx, mask=inside)
        for i in range(0, full // BLOCK_V):
            start = full - BLOCK_V - i * BLOCK_V
            x = tl.load(source_ptr + start + lane, eviction_policy="evict_first")
            q = _spread(class_weight_ptr, probability_ptr, start + lane, V, s, DENSE, WEIGHTED)
            dx = _dlogits(x, k, log_sum, coefficient, q, scale, ACC, SOFTCAP, LOGIT_SCALE)
            tl.store(out_ptr + start + lane, dx, eviction_policy="evict_first")
        if not DENSE:
            # the target's columns are overwritten after all stores of their blocks
            tl.debug_barrier()
            dx = _exp(z, k, log_sum, ACC) * coefficient - ((1.0 - s) * p * c + s / V * c)
            if SOFTCAP != 0.0:
                dx *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
            tl.store(out_ptr + column, dx * scale, mask=live)
    else:
        zero = tl.zeros((BLOCK_V,), ACC)
        for start in range(0, V, BLOCK_V):
            tl.store(out_ptr + start + lane, zero, mask=start + lane < V)


@triton.jit
def _spread(class_weight_ptr, probability_ptr, column, V, s, DENSE: tl.constexpr, WEIGHTED: tl.constexpr):
    """The smoothed targets of a block, times class weights, without the target's classes unless DENSE."""
    spread = s / V
    if DENSE:
        spread += (1.0 - s) * tl.load(probability_ptr + column, mask=column < V, other=0.0)
    if WEIGHTED:
        spread = spread * tl.load(class_weight_ptr + column, mask=column < V, other=0.0)
    return spread


@triton.jit
def _exp(z, k, log_sum, ACC: tl.constexpr):
    """exp(z - k - log_sum), without rounding k + log_sum."""
    if tl.float32 == ACC:
        p = tl.exp2((z - k) * _LOG2E - log_sum * _LOG2E)
    else:
        p = tl.exp(z - k - log_sum)
    return p


@triton.jit
def _dlogits(
    x,
    k,
    log_sum,
    coefficient,
    spread,
    scale,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
):
    """The gradient of raw logits x that are not the target's."""
    z = final_logits(x.to(ACC), SOFTCAP, LOGIT_SCALE)
    dx = (coefficient * _exp(z, k, log_sum, ACC) - spread) * scale
    if SOFTCAP != 0.0:
        dx *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
    return dx


@triton.jit
def _scale_tokens_kernel(
    buffer_ptr, scale_ptr, stride_n, stride_s, V, ACC: tl.constexpr, BLOCK_V: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + token * stride_s).to(ACC)
    buffer_ptr += token * stride_n
    # decided on the device: the usual upstream gradient of 1 costs one load per token
    stop = tl.where(scale == 1.0, 0, V)
    for start in range(0, stop, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(buffer_ptr + column, mask=column < V, other=0.0).to(ACC)
        tl.store(buffer_ptr + column, x * scale, mask=column < V)


def forward(inputs: LogitsInputs, spec: LogitsSpec, *, inplace_scale: Tensor | None = None) -> LogitsOutputs:
    """Implement `ops.cross_entropy_op` or, with `inplace_scale` [N], `ops.cross_entropy_inplace_op`."""
    logits, target, smoothing, class_weight, classes, probabilities = inputs
    tokens, vocab = logits.shape
    outputs = LogitsOutputs.empty(inputs, spec)
    if tokens:
        flags = _target_flags(inputs)
        heavy = class_weight is not None or spec.statistics
        block_v, num_warps, fold = launch_config(
            vocab, logits.element_size(), heavy=heavy, dense=flags["DENSE"], capped=bool(spec.softcap)
        )
        _forward_kernel[(tokens,)](
            logits, target, smoothing, inplace_scale, class_weight, classes, probabilities, *outputs,
            logits.stride(0), tokens, vocab, 0 if classes is None else classes.shape[1], spec.ignore_index,
            ACC=_TL[accumulator(logits)],
            FIXED_REFERENCE=logits.element_size() == 2 and not flags["DENSE"],
            PROBABILITY_GRAD=spec.probability_grad,
            **flags,
            WEIGHTED=class_weight is not None,
            STATISTICS=spec.statistics,
            INPLACE=inplace_scale is not None,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            Z_LOSS=spec.z_loss,
            BLOCK_V=block_v,
            FOLD=fold,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs


def backward(dloss: Tensor, state: Tensor, inputs: LogitsInputs, spec: LogitsSpec) -> Tensor:
    """Implement `ops.cross_entropy_backward_op`: return dlogits [N, V], contiguous."""
    logits, target, smoothing, class_weight, classes, probabilities = inputs
    tokens, vocab = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if tokens:
        flags = _target_flags(inputs)
        heavy = class_weight is not None
        block_v, num_warps, _ = launch_config(vocab, logits.element_size(), heavy=heavy, dense=flags["DENSE"])
        _backward_kernel[(tokens,)](
            dloss, logits, target, smoothing, class_weight, classes, probabilities, state, dlogits,
            dloss.stride(0), logits.stride(0), tokens, vocab, 0 if classes is None else classes.shape[1],
            spec.ignore_index,
            ACC=_TL[state.dtype],
            **flags,
            WEIGHTED=class_weight is not None,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            BLOCK_V=block_v,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dlogits


def scale_tokens(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply the values of each token in `buffer` [N, V] by `scale` [N] in place."""
    tokens, vocab = buffer.shape
    if tokens:
        block_v, num_warps, _ = launch_config(vocab, buffer.element_size())
        _scale_tokens_kernel[(tokens,)](
            buffer, scale, buffer.stride(0), scale.stride(0), vocab,
            ACC=_TL[accumulator(buffer)], BLOCK_V=block_v, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return buffer


def _target_flags(inputs: LogitsInputs) -> dict[str, Any]:
    if inputs.classes is not None:
        return {"BLOCK_C": triton.next_power_of_2(inputs.classes.shape[1]), "DENSE": False}
    return {"BLOCK_C": 0, "DENSE": inputs.dense}


_TL = {torch.float32: tl.float32, torch.float64: tl.float64}

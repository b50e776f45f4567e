"""Cross entropy of hidden states and a head: two GEMMs per chunk of tokens, nothing as large as the logits.

For a token with hidden state e, the algebra of `_tokens` and z = scale (C e + b),

    x_v  = exp(z_v - k) for v != y, 0 for v = y         total = sum_v x_v        t = exp(z_y - k)
    nll  = log(1 + total / t)       p_y = t / (total + t)       lse = k + log(total + t)
    de   = a scale (K (1 - p_y) x C / sum_v x_v + (U - K (1 - p_y)) C_y - s cbar)

with cbar = mean_v c_v C_v and the token's scale a. The target's column is left out of x, so that what is
rounded to 16 bits is never the probability that 1 is subtracted from. Two ways to make x, both from float32:

fused   a GEMM with the exponential in its epilogue, and the constant reference point k = z_y + 40: one visit,
        2 MV bytes written. bfloat16 has the exponents of float32, which a constant reference needs. Tokens
        whose total leaves [0, 2^100), because the target is some 109 nats below the maximum, are computed
        again from their own maximum; the device decides.
cublas  `torch.mm` into float32, then a kernel with one program a token, k = max(z): exact for every input.

float32 and float16 inputs, a softcap (whose slope needs the sum before x can be stored) and a bias that is
trained (a sum over tokens that cancels, so x stays float32) take the second, and so do features that are no
multiple of 16, a LoRA adapter on the head and logits that may be rounded (precision="fast").
float16 has 5 bits of exponent: there k is 15 log 2 below the maximum, so that x reaches 2^15 and what is lost
is below 2^-39 of the largest. Where x does not have the largest at 1 (a softcap) or meets gradients divided
by many tokens (a head that is trained) it stays float32. float64 is not for tensor cores: use
backend="torch".
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ual_kernels._matrices import add_by_label, column_mean
from ual_kernels._operands import LinearInputs, LinearOutputs, LinearSpec
from ual_kernels._tokens import LossTokens, TokenFns, labels, mark_missed, select_loss_tokens
from ual_kernels._triton.math import (
    final_logits,
    merge_two_largest,
    store_statistics,
    token_terms,
    two_largest,
)
from ual_kernels._vocab_parallel import Shards
from ual_kernels.statistics import LINEAR_STATISTICS

# "fused" where possible; a benchmark or a test may request "cublas" everywhere
VARIANT: Literal["fused", "cublas"] = "fused"

_INTERPRETED = triton.knobs.runtime.interpret
_PRODUCT_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 29  # of x or logits: at a vocabulary of 128k, 2048 tokens of the one or 1024 of the other
_MOST_TOKENS = 4_096  # beyond, reading the head once a chunk is lost beside its FLOPs (ridge: 183 tokens)
_TILE_TOKENS = 128

_REFERENCE: tl.constexpr = tl.constexpr(40.0)
_LARGEST_TOTAL: tl.constexpr = tl.constexpr(2.0**100)  # x C must not overflow either

# planes of the [9, M] float32 table that the kernels hand each other
_Z_Y: tl.constexpr = tl.constexpr(0)
_MEAN: tl.constexpr = tl.constexpr(1)  # mean(c z)
_K: tl.constexpr = tl.constexpr(2)
_TOTAL: tl.constexpr = tl.constexpr(3)
_MOMENT: tl.constexpr = tl.constexpr(4)  # sum of x (z - k)
_HIGH: tl.constexpr = tl.constexpr(5)  # the largest z beside the target's
_SECOND: tl.constexpr = tl.constexpr(6)
_PLAIN_MEAN: tl.constexpr = tl.constexpr(7)
_ROUNDED: tl.constexpr = tl.constexpr(8)  # sum of x as stored
_TABLE_PLANES = 9


class GemmPlan(NamedTuple):
    """Launch shape of the fused GEMM."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


def gemm_plan(platform: str, statistics: bool) -> GemmPlan:
    """By platform: "cuda", "hip" (64 KiB of shared memory) or "interpreter" (many ragged tiles)."""
    if platform == "interpreter":
        return GemmPlan(16, 64, 32, 2, 4, 1)
    if platform == "hip":
        return GemmPlan(128, 64, 32, 8, 8, 2)
    # the four more sums of a token take the registers of a larger tile
    return GemmPlan(128, 64, 64, 8, 8, 4) if statistics else GemmPlan(128, 256, 64, 8, 8, 3)


def chunk_tokens(vocab: int, itemsize: int) -> int:
    """Tokens at a time: whole tiles, as many as the budget holds."""
    fitting = _CHUNK_BYTES // (vocab * itemsize)
    return max(_TILE_TOKENS, min(_MOST_TOKENS, fitting // _TILE_TOKENS * _TILE_TOKENS))


# ---- step 1: two dot products per token ----


@triton.jit
def _dots_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read if BIASED
    y_ptr,  # [M]
    column_mean_ptr,  # [D] fp32, read unless SOFTCAP
    bias_mean_ptr,  # [1] fp32, read if BIASED unless SOFTCAP
    table_ptr,  # [9, M] fp32, out: Z_Y, and MEAN unless SOFTCAP
    M,
    D,
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + token)
    z_y = tl.zeros((BLOCK_D,), tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        e = tl.load(e_ptr + token * D + feature, mask=inside, other=0.0).to(tl.float32)
        z_y += e * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP == 0.0:
            mean += e * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
    z_y = tl.sum(z_y, axis=0)
    mean = tl.sum(mean, axis=0)
    if BIASED:
        z_y += tl.load(bias_ptr + y)
        if SOFTCAP == 0.0:
            mean += tl.load(bias_mean_ptr)
    tl.store(table_ptr + _Z_Y * M + token, final_logits(z_y, SOFTCAP, LOGIT_SCALE))
    if SOFTCAP == 0.0:
        tl.store(table_ptr + _MEAN * M + token, mean * LOGIT_SCALE)


# ---- step 2, fused ----


@triton.jit
def _fused_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read if BIASED
    y_ptr,  # [M]
    table_ptr,  # [9, M] fp32
    x_ptr,  # [M, V], tokens stride_x apart, out if WRITE
    partial_ptr,  # [2 or 6, M, tiles of columns] fp32, planes stride_p apart, out
    stride_x,
    stride_p,
    M,
    V,
    D,
    BIASED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP tiles of tokens walk the columns together and share each tile of the head in L2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % group
    tile_n = pid % (GROUP * tiles_n) // group

    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_K)
    # past the edge read something that exists: no mask in the loop, none of it is kept
    e_ptrs = e_ptr + tl.where(token < M, token, 0).to(tl.int64)[:, None] * D + feature[None, :]
    head_ptrs = head_ptr + tl.where(column < V, column, 0).to(tl.int64)[:, None] * D + feature[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_D:
            a = tl.load(e_ptrs)
            b = tl.load(head_ptrs)
        else:
            a = tl.load(e_ptrs, mask=feature[None, :] < D - start, other=0.0)
            b = tl.load(head_ptrs, mask=feature[None, :] < D - start, other=0.0)
        if INTERPRETED:  # which multiplies the bits of bfloat16 as integers
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc)
        e_ptrs += BLOCK_K
        head_ptrs += BLOCK_K

    if BIASED:
        acc += tl.load(bias_ptr + column, mask=column < V, other=0.0)[None, :]
    known = token < M
    z_y = tl.load(table_ptr + _Z_Y * M + token, mask=known, other=0.0)
    y = tl.load(y_ptr + token, mask=known, other=-1).to(tl.int32)
    d = acc * LOGIT_SCALE - z_y[:, None]
    inside = column[None, :] < V
    keep = inside & (column[None, :] != y[:, None])
    x = tl.where(keep, tl.exp(d - _REFERENCE), 0.0)
    partial_ptr += token.to(tl.int64) * tiles_n + tile_n
    tl.store(partial_ptr, tl.sum(x, axis=1), mask=known)
    if WRITE:
        # the sum first: the store goes through shared memory, and x need not stay in registers across it
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(partial_ptr + stride_p, tl.sum(rounded.to(tl.float32), axis=1), mask=known)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_x + column[None, :]
        tl.store(x_ptrs, rounded, mask=known[:, None] & inside)
    if STATISTICS:
        # where d is -inf x is 0, and so is its share
        moment = tl.sum(x * tl.maximum(d - _REFERENCE, -200.0), axis=1)
        tl.store(partial_ptr + 2 * stride_p, moment, mask=known)
        tl.store(partial_ptr + 5 * stride_p, tl.sum(tl.where(inside, d, 0.0), axis=1), mask=known)
        d = tl.where(keep, d, float("-inf"))
        high = tl.max(d, axis=1)
        tl.store(partial_ptr + 3 * stride_p, high, mask=known)
        largest = d == high[:, None]
        second = tl.max(tl.where(largest, float("-inf"), d), axis=1)
        second = tl.where(tl.sum(largest.to(tl.int32), axis=1) > 1, high, second)
        tl.store(partial_ptr + 4 * stride_p, second, mask=known)


@triton.jit
def _join_kernel(
    partial_ptr,  # [2 or 6, M, tiles] fp32, planes stride_p apart
    table_ptr,  # [9, M] fp32, out: K, TOTAL, and if STATISTICS the rest but MEAN
    stride_p,
    M,
    V,
    tiles,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    partial_ptr += token * tiles
    total = tl.zeros((BLOCK,), tl.float32)
    rounded = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        inside = tile < tiles
        total += tl.load(partial_ptr + tile, mask=inside, other=0.0)
        if WRITE:
            rounded += tl.load(partial_ptr + stride_p + tile, mask=inside, other=0.0)
        if STATISTICS:
            moment += tl.load(partial_ptr + 2 * stride_p + tile, mask=inside, other=0.0)
            plain += tl.load(partial_ptr + 5 * stride_p + tile, mask=inside, other=0.0)
            highs = tl.load(partial_ptr + 3 * stride_p + tile, mask=inside, other=float("-inf"))
            seconds = tl.load(partial_ptr + 4 * stride_p + tile, mask=inside, other=float("-inf"))
            block_high, block_second = two_largest(highs)
            block_second = tl.maximum(block_second, tl.max(seconds, axis=0))
            second = merge_two_largest(high, second, block_high, block_second)
            high = tl.maximum(high, block_high)
    z_y = tl.load(table_ptr + _Z_Y * M + token)
    tl.store(table_ptr + _K * M + token, z_y + _REFERENCE)
    tl.store(table_ptr + _TOTAL * M + token, tl.sum(total, axis=0))
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M + token, tl.sum(rounded, axis=0))
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M + token, tl.sum(moment, axis=0))
        tl.store(table_ptr + _HIGH * M + token, z_y + high)
        tl.store(table_ptr + _SECOND * M + token, z_y + second)
        tl.store(table_ptr + _PLAIN_MEAN * M + token, z_y + tl.sum(plain, axis=0) / V)


# ---- step 2 from a token's own maximum ----


@triton.jit
def _own_maximum_kernel(
    logits_ptr,  # [M, V] fp32 products of e and the head, read if GIVEN
    e_ptr,  # [M, D], read unless GIVEN
    head_ptr,  # [V, D], read unless GIVEN
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED and SOFTCAP
    y_ptr,  # [M]
    table_ptr,  # [9, M] fp32, out: all but Z_Y; MEAN if SOFTCAP; the last four if STATISTICS
    x_ptr,  # [M, V], tokens stride_x apart, out if WRITE; may lie in the logits' own memory
    stride_x,
    M,
    V,
    D,
    GIVEN: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    HEADROOM: tl.constexpr,  # k is this far below the maximum
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if GIVEN:
        logits_ptr += token * V
    elif tl.load(table_ptr + _TOTAL * M + token) < _LARGEST_TOTAL:  # false for NaN
        return  # the constant reference point served this token well
    y = tl.load(y_ptr + token)
    z_y = tl.load(table_ptr + _Z_Y * M + token)
    e_ptr += token * D
    high = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    mean = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = _raw_logits(logits_ptr, e_ptr, head_ptr, column, inside, D, GIVEN, BLOCK_V, BLOCK_D)
        z = _biased(raw, bias_ptr, column, inside, BIASED, SOFTCAP, LOGIT_SCALE)
        if SOFTCAP != 0.0:
            if WEIGHTED:
                mean += z * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
            else:
                mean += tl.where(inside, z, 0.0)
        if STATISTICS:
            plain += tl.where(inside, z, 0.0)
        others = tl.where(inside & (column != y), z, float("-inf"))
        if STATISTICS:
            block_high, block_second = two_largest(others)
            second = merge_two_largest(high, second, block_high, block_second)
        high = tl.maximum(high, tl.max(others, axis=0))
    k = tl.maximum(high, z_y) - HEADROOM
    k = tl.where(k == float("-inf"), 0.0, k)
    total = tl.zeros((BLOCK_V,), tl.float32)
    rounded = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = _raw_logits(logits_ptr, e_ptr, head_ptr, column, inside, D, GIVEN, BLOCK_V, BLOCK_D)
        z = _biased(raw, bias_ptr, column, inside, BIASED, SOFTCAP, LOGIT_SCALE)
        x = tl.where(inside & (column != y), tl.exp(z - k), 0.0)
        total += x
        if STATISTICS:
            moment += tl.where(x > 0.0, x * (z - k), 0.0)
        if WRITE:
            # a block of 16-bit x lands on logits that were read, its own first half included
            tl.debug_barrier()
            as_stored = x.to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + token * stride_x + column, as_stored, mask=inside)
            rounded += as_stored.to(tl.float32)
    tl.store(table_ptr + _K * M + token, k)
    tl.store(table_ptr + _TOTAL * M + token, tl.sum(total, axis=0))
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M + token, tl.sum(rounded, axis=0))
    if SOFTCAP != 0.0:
        tl.store(table_ptr + _MEAN * M + token, tl.sum(mean, axis=0) / V)
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M + token, tl.sum(moment, axis=0))
        tl.store(table_ptr + _HIGH * M + token, high)
        tl.store(table_ptr + _SECOND * M + token, second)
        tl.store(table_ptr + _PLAIN_MEAN * M + token, tl.sum(plain, axis=0) / V)


@triton.jit
def _raw_logits(
    logits_ptr,
    e_ptr,
    head_ptr,
    column,
    inside,
    D,
    GIVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of one token: read, or multiplied out once more."""
    if GIVEN:
        raw = tl.load(logits_ptr + column, mask=inside, other=0.0)
    else:
        acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            feature = start + tl.arange(0, BLOCK_D)
            e = tl.load(e_ptr + feature, mask=feature < D, other=0.0).to(tl.float32)
            c_ptrs = head_ptr + column.to(tl.int64)[:, None] * D + feature[None, :]
            c = tl.load(c_ptrs, mask=inside[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)
            acc += e[None, :] * c
        raw = tl.sum(acc, axis=1)
    return raw


@triton.jit
def _biased(
    raw,
    bias_ptr,
    column,
    inside,
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
):
    if BIASED:
        raw += tl.load(bias_ptr + column, mask=inside, other=0.0)
    return final_logits(raw, SOFTCAP, LOGIT_SCALE)


@triton.jit
def _bend_kernel(
    logits_ptr,  # [M, V] fp32 products
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED
    y_ptr,  # [M]
    smoothing_ptr,  # [M]
    table_ptr,  # [9, M]
    factors_ptr,  # [4, M]
    x_ptr,  # [M, V], tokens stride_x apart, out: the gradient of the capped token; may lie on the logits
    stride_x,
    M,
    V,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A softcap bends every column by its own slope: stored is rate x - s c / V, times the slope."""
    token = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + token)
    spread = tl.load(smoothing_ptr + token) / V
    k = tl.load(table_ptr + _K * M + token)
    rate = tl.load(factors_ptr + 3 * M + token)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = tl.load(logits_ptr + token * V + column, mask=inside, other=0.0)
        z = _biased(raw, bias_ptr, column, inside, BIASED, SOFTCAP, LOGIT_SCALE)
        q = spread
        if WEIGHTED:
            q = spread * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
        dz = (rate * tl.exp(z - k) - q) * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
        dz = tl.where(column == y, 0.0, dz)
        tl.debug_barrier()
        tl.store(x_ptr + token * stride_x + column, dz.to(x_ptr.dtype.element_ty), mask=inside)


# ---- loss, and the factors of the gradient ----


@triton.jit
def _finish_kernel(
    table_ptr,  # [9, M]
    y_ptr,  # [M]
    smoothing_ptr,  # [M]
    token_scale_ptr,  # [M]
    class_weight_ptr,  # [V], read if WEIGHTED
    class_mean_ptr,  # [1], read if WEIGHTED
    state_ptr,  # [2, M], tokens stride_out apart, out: unit loss, d(unit loss)/ds
    statistics_ptr,  # [7, M], tokens stride_out apart, out if STATISTICS
    factors_ptr,  # [4, M], out: of x C, of C_y, of cbar, and K / (total + t)
    stride_out,
    M,
    V,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = token < M
    table_ptr += token
    z_y = tl.load(table_ptr + _Z_Y * M, mask=known, other=0.0)
    k = tl.load(table_ptr + _K * M, mask=known, other=0.0)
    total = tl.load(table_ptr + _TOTAL * M, mask=known, other=1.0)
    s = tl.load(smoothing_ptr + token, mask=known, other=0.0)
    c_y = tl.full((BLOCK,), 1.0, tl.float32)
    c_mean = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        c_y = tl.load(class_weight_ptr + tl.load(y_ptr + token, mask=known, other=0), mask=known, other=0.0)
        c_mean = tl.load(class_mean_ptr + tl.zeros((BLOCK,), tl.int32))
    smoothing_term = tl.load(table_ptr + _MEAN * M, mask=known, other=0.0) - c_mean * z_y

    t = tl.exp(z_y - k)
    whole = total + t
    lse = k + tl.log(whole)
    # log(1 + total / t), where neither total nor t may be representable
    log_odds = (k - z_y) + tl.log(total)
    nll = tl.maximum(log_odds, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(log_odds)))
    rest = total / whole  # 1 - p_y, without the subtraction

    unit, coefficient, at_target, ds = token_terms(nll, lse, smoothing_term, s, c_y, c_mean, Z_LOSS)
    at_target -= coefficient * rest
    rate = coefficient / whole
    if WRITE:
        # weights that sum to 1 as stored: a token that one wrong class dominates does not feel x's rounding
        rounded = tl.load(table_ptr + _ROUNDED * M, mask=known, other=1.0)
        rate = tl.where(rounded > 0.0, coefficient * rest / rounded, rate)
    state_ptr += token
    tl.store(state_ptr, unit, mask=known)
    tl.store(state_ptr + stride_out, ds, mask=known)

    a = tl.load(token_scale_ptr + token, mask=known, other=0.0) * LOGIT_SCALE
    factors_ptr += token
    tl.store(factors_ptr + 3 * M, rate, mask=known)
    if SOFTCAP != 0.0:
        slope = 1.0 - (z_y / SOFTCAP) * (z_y / SOFTCAP)
        at_target = (at_target - s * c_y / V) * slope
        rate = tl.full((BLOCK,), 1.0, tl.float32)
        s = tl.zeros((BLOCK,), tl.float32)
    tl.store(factors_ptr, a * rate, mask=known)
    tl.store(factors_ptr + M, a * at_target, mask=known)
    tl.store(factors_ptr + 2 * M, a * s, mask=known)

    if STATISTICS:
        moment = tl.load(table_ptr + _MOMENT * M, mask=known, other=0.0)
        moment += tl.where(t > 0.0, t * (z_y - k), 0.0)
        others = tl.load(table_ptr + _HIGH * M, mask=known, other=0.0)
        second = tl.load(table_ptr + _SECOND * M, mask=known, other=0.0)
        plain_mean = tl.load(table_ptr + _PLAIN_MEAN * M, mask=known, other=0.0)
        store_statistics(
            statistics_ptr + token, stride_out, known, known, z_y, k, whole, nll, moment,
            tl.maximum(z_y, others), merge_two_largest(z_y, float("-inf"), others, second), plain_mean,
        )  # fmt: skip


@triton.jit
def _input_gradient_kernel(
    product_ptr,  # [M, D] fp32: x C
    head_ptr,  # [V, D]
    column_mean_ptr,  # [D] fp32, read unless SOFTCAP
    y_ptr,  # [M]
    index_ptr,  # [M], tokens of dinput
    factors_ptr,  # [4, M]
    dinput_ptr,  # [N, D], out
    M,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + token)
    out = tl.load(index_ptr + token)
    of_product = tl.load(factors_ptr + token)
    of_target = tl.load(factors_ptr + M + token)
    of_mean = tl.load(factors_ptr + 2 * M + token)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        de = of_product * tl.load(product_ptr + token * D + feature, mask=inside, other=0.0)
        de += of_target * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP == 0.0:
            de -= of_mean * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
        tl.store(dinput_ptr + out * D + feature, de.to(dinput_ptr.dtype.element_ty), mask=inside)


# ---- the operator's body ----


def linear_cross_entropy(
    inputs: LinearInputs,
    spec: LinearSpec,
    token_fns: TokenFns | None = None,
    shards: Shards | None = None,
) -> LinearOutputs:
    """The body of `ops.linear_cross_entropy_op`. Ignored tokens are dropped before the first GEMM.

    `functional` refuses `gradient_filter` and process groups before they get here.
    """
    outputs = LinearOutputs.empty(inputs, spec)
    outputs.fill_ignored()
    outputs.dlinear_weight.zero_()
    tokens = select_loss_tokens(inputs.target, spec.ignore_index, spec.max_loss_tokens)
    count = len(tokens.indices)
    if count:
        run = _Run(inputs, spec, outputs, tokens, token_fns)
        for part in _chunks(count, run.most):
            run.compute(part)
        run.complete()
        mark_missed(tokens, inputs.target, spec.ignore_index, outputs.loss, outputs.state.T, outputs.dinput)
    return outputs


class _Head(NamedTuple):
    """The head as kernels read it; wide is float32."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] wide
    lora_a: Tensor | None  # [r, D] wide
    lora_b: Tensor | None  # [V, r] wide
    class_weight: Tensor | None  # [V] wide
    class_mean: Tensor | None  # [1]
    # means over the classes, None under a softcap
    weight_mean: Tensor | None  # [D]
    merged_mean: Tensor | None  # [D], with the adapter
    bias_mean: Tensor | None  # [1]
    lora_b_mean: Tensor  # [r]

    @classmethod
    def read(cls, inputs: LinearInputs, spec: LinearSpec) -> "_Head":
        def wide(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(torch.float32)

        class_weight, weight = inputs.class_weight, inputs.linear_weight.detach().contiguous()
        bias, a, b = wide(inputs.linear_bias), wide(inputs.lora_a), wide(inputs.lora_b)
        bias = None if bias is None else bias.contiguous()
        weight_mean = merged_mean = bias_mean = None
        b_mean = weight.new_zeros(inputs.rank, dtype=torch.float32)
        if not spec.softcap:
            weight_mean = merged_mean = column_mean(weight, class_weight, len(weight))
            if bias is not None:
                bias_mean = column_mean(bias[:, None], class_weight, len(weight))
            if a is not None and b is not None:
                b_mean = column_mean(b, class_weight, len(weight))
                merged_mean = weight_mean + spec.lora_scale * (b_mean @ a)
        class_mean = None if class_weight is None else class_weight.mean()
        return cls(weight, bias, a, b, class_weight, class_mean, weight_mean, merged_mean, bias_mean, b_mean)


class _Chunk(NamedTuple):
    """Some of the loss tokens."""

    part: slice  # of the loss tokens
    hidden: Tensor  # [M, D]
    label: Tensor  # [M], a column for every token
    table: Tensor  # [9, M], what kernels hand each other
    factors: Tensor  # [4, M], of x C, of C_y, of cbar, and K / (total + t)
    lora_u: Tensor | None  # [M, r], scale e A^T


class _Run:
    """One call of the operator: buffers that its chunks share, and what accumulates over them."""

    def __init__(
        self,
        inputs: LinearInputs,
        spec: LinearSpec,
        outputs: LinearOutputs,
        tokens: LossTokens,
        token_fns: TokenFns | None,
    ) -> None:
        self.inputs, self.spec, self.outputs, self.tokens, self.token_fns = (
            inputs, spec, outputs, tokens, token_fns,
        )  # fmt: skip
        self.head = _Head.read(inputs, spec)
        self.statistics = spec.statistics or token_fns is not None
        (_, features), vocab = inputs.input.shape, len(self.head.weight)
        index, count = tokens.indices, len(tokens.indices)
        label = labels(inputs.target[index], vocab, spec.ignore_index)
        self.column, self.counted = label.column, label.selected & label.valid
        self.nan_mask = label.nan_mask.to(torch.float32)
        if tokens.complete is not None:
            self.nan_mask = torch.where(tokens.complete, self.nan_mask, torch.nan)
        self.smoothing = tokens.keep(inputs.smoothing[index])
        self.scale = tokens.keep(inputs.token_scale[index])
        self.given_scale = self.scale.clone() if token_fns is not None else self.scale

        new = inputs.input.new_empty
        self.state = new((2, count), dtype=torch.float32)
        seen = count if self.statistics else 0
        self.packed = inputs.input.new_zeros((LINEAR_STATISTICS, seen), dtype=torch.float32)

        self.x_dtype = _x_dtype(inputs, spec, outputs)
        self.factor = torch.bfloat16 if inputs.input.dtype == torch.bfloat16 else self.x_dtype
        self.operand = self.head.weight.to(self.factor)
        self.fast = spec.precision == "fast" and inputs.input.dtype in (torch.bfloat16, torch.float16)
        # hidden states and heads whose rows do not start on 16 bytes are loaded number by number
        self.fused = (
            VARIANT == "fused"
            and self.x_dtype == torch.bfloat16
            and not (spec.softcap or self.fast or inputs.rank)
            and features % 16 == 0
        )
        self.most = spec.chunk_tokens or chunk_tokens(vocab, 2 if self.fused else 4)
        # whole groups of 8 columns, so that every token's x starts on 16 bytes
        width = -(-vocab // 8) * 8 if self.fused else vocab
        rows = min(self.most, count) if spec.gradients or not self.fused else 0
        self.buffer = new((rows, width), dtype=self.x_dtype if self.fused else torch.float32)
        # the rank-one parts of dC, dB and db: sums of s a e, s a u and s a
        self.smoothed = inputs.input.new_zeros(features, dtype=torch.float32)
        self.smoothed_u = inputs.input.new_zeros(inputs.rank, dtype=torch.float32)
        self.smoothed_count = inputs.input.new_zeros((), dtype=torch.float32)

    @property
    def flags(self) -> dict[str, bool | float]:
        return {"BIASED": self.head.bias is not None, "LOGIT_SCALE": self.spec.logit_scale}

    def compute(self, part: slice) -> None:
        """Loss, statistics and gradients of one chunk."""
        chunk = self._read(part)
        x, logits = self._make_x(chunk)
        self._finish(chunk)
        if self.token_fns is not None:
            # the statistics do not depend on what the functions return; the factors do, so once more
            smoothing, weight = self.token_fns(self.packed[:7, part])
            if smoothing is not None:
                self.smoothing[part] = self.tokens.keep(smoothing, part)
            if weight is not None:
                self.scale[part] = self.tokens.keep(self.scale[part] * weight, part)
            self._finish(chunk)
        if not self.spec.gradients:
            return
        if logits is not None and self.spec.softcap:
            self._bend(chunk, logits, x)
        if chunk.lora_u is None:
            self._input_gradient(chunk, x)
        else:
            self._lora_gradients(chunk, x, chunk.lora_u)
        if self.spec.head_grad:
            self._head_gradient(chunk, x)

    def complete(self) -> None:
        """Results by token, and the rank-one parts of the head's gradient, after the last chunk."""
        index, outputs, vocab = self.tokens.indices, self.outputs, len(self.head.weight)
        scale = self.scale + self.nan_mask
        state = self.state + self.nan_mask
        if self.token_fns is not None:  # a weight from the statistics is part of `state`
            given = self.given_scale
            state = state * torch.where(given == 0, 0.0, scale / given)
        outputs.loss[index] = self.tokens.keep(scale * self.state[0])
        outputs.state[:, index] = self.tokens.keep(state)
        if self.spec.statistics:
            outputs.statistics[:, index] = torch.where(
                self.counted, self.packed, outputs.statistics[:, index]
            )
        if self.spec.softcap:
            return
        class_weight = self.head.class_weight
        over = self.head.weight.new_ones(vocab, dtype=torch.float32) if class_weight is None else class_weight
        for out, total in ((outputs.dlinear_weight, self.smoothed), (outputs.dlora_b, self.smoothed_u)):
            if out.numel():
                out.addr_(over, total, alpha=-1.0 / vocab)
        if outputs.dlinear_bias.numel():
            outputs.dlinear_bias.sub_(over * (self.smoothed_count / vocab))

    def _read(self, part: slice) -> _Chunk:
        """Step 1: the target's logit, and the mean of the logits."""
        head, spec = self.head, self.spec
        hidden = self.inputs.input[self.tokens.indices[part]]
        if self.tokens.selected is not None:
            hidden = hidden.masked_fill(~self.tokens.selected[part][:, None], 0.0)
        count, features = hidden.shape
        table = hidden.new_empty((_TABLE_PLANES, count), dtype=torch.float32)
        factors = hidden.new_empty((4, count), dtype=torch.float32)
        label = self.column[part]
        _dots_kernel[(count,)](
            hidden, head.weight, head.bias, label, head.merged_mean, head.bias_mean, table, count, features,
            **self.flags, SOFTCAP=spec.softcap,
            BLOCK_D=_block_d(features), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        u = None if head.lora_a is None else (hidden.to(torch.float32) @ head.lora_a.T) * spec.lora_scale
        return _Chunk(part, hidden, label, table, factors, u)

    def _make_x(self, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Step 2: x [M, V], and the logits that it overwrites, if there are any."""
        head, spec, vocab = self.head, self.spec, len(self.head.weight)
        count, features = chunk.hidden.shape
        if self.fused:
            logits, x = None, self.buffer[:count, :vocab]
            self._fused_x(chunk, x)
        else:
            logits = self._logits(chunk)
            # in the logits' own memory: 16-bit x of a token takes the first half of its logits
            x = logits.view(self.x_dtype)[:, :vocab]
        _own_maximum_kernel[(count,)](
            logits, chunk.hidden, head.weight, head.bias, head.class_weight, chunk.label, chunk.table,
            x, x.stride(0), count, vocab, features,
            **self.flags,
            GIVEN=not self.fused,
            WEIGHTED=head.class_weight is not None,
            STATISTICS=self.statistics,
            WRITE=spec.gradients and not spec.softcap,
            SOFTCAP=spec.softcap,
            HEADROOM=_FLOAT16_HEADROOM if self.x_dtype == torch.float16 else 0.0,
            BLOCK_V=64 if self.fused else min(triton.next_power_of_2(vocab), 4_096),
            BLOCK_D=128 if self.fused else 1,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        return x, logits

    def _fused_x(self, chunk: _Chunk, x: Tensor) -> None:
        """x with the constant reference point; K, TOTAL and the statistics of the table."""
        head, spec, statistics = self.head, self.spec, self.statistics
        (count, features), vocab = chunk.hidden.shape, len(head.weight)
        platform = "interpreter" if _INTERPRETED else "hip" if torch.version.hip else "cuda"
        plan = gemm_plan(platform, statistics)
        tiles = triton.cdiv(vocab, plan.block_n)
        partial = chunk.table.new_empty((6 if statistics else 2, count, tiles))
        _fused_kernel[(triton.cdiv(count, plan.block_m) * tiles,)](
            chunk.hidden, head.weight, head.bias, chunk.label, chunk.table, x, partial,
            x.stride(0), partial.stride(0), count, vocab, features,
            **self.flags,
            STATISTICS=statistics,
            WRITE=spec.gradients,
            EVEN_D=features % plan.block_k == 0,
            INTERPRETED=_INTERPRETED,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            BLOCK_K=plan.block_k,
            GROUP=plan.group,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        _join_kernel[(count,)](
            partial, chunk.table, partial.stride(0), count, vocab, tiles,
            STATISTICS=statistics, WRITE=spec.gradients, BLOCK=min(triton.next_power_of_2(tiles), 512),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _logits(self, chunk: _Chunk) -> Tensor:
        """float32 products of hidden states and head, with the adapter's."""
        head = self.head
        logits = self.buffer[: len(chunk.hidden)]
        if self.fast:
            logits.copy_(torch.mm(chunk.hidden, head.weight.T))
        else:
            _product(chunk.hidden, head.weight.T, out=logits)
        if chunk.lora_u is not None and head.lora_b is not None:
            logits.addmm_(chunk.lora_u, head.lora_b.T)
        if self.fast or chunk.lora_u is not None:
            # the target's logit must be the number that the token's logits hold
            z_y = logits.gather(1, chunk.label[:, None]).squeeze(1)
            if head.bias is not None:
                z_y = z_y + head.bias[chunk.label]
            z_y, softcap = z_y * self.spec.logit_scale, self.spec.softcap
            chunk.table[_Z_Y.value] = softcap * torch.tanh(z_y / softcap) if softcap else z_y
        return logits

    def _finish(self, chunk: _Chunk) -> None:
        """Loss, statistics, and the factors of the gradient."""
        head, spec, part = self.head, self.spec, chunk.part
        scale = self.scale[part] + self.nan_mask[part]
        _finish_kernel[(triton.cdiv(len(scale), 128),)](
            chunk.table, chunk.label, self.smoothing[part], scale, head.class_weight, head.class_mean,
            self.state[:, part], self.packed[:, part] if self.statistics else self.packed, chunk.factors,
            self.state.stride(0), len(scale), len(head.weight),
            WEIGHTED=head.class_weight is not None,
            STATISTICS=self.statistics,
            WRITE=spec.gradients and not spec.softcap,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            Z_LOSS=spec.z_loss,
            BLOCK=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _bend(self, chunk: _Chunk, logits: Tensor, x: Tensor) -> None:
        head, vocab = self.head, len(self.head.weight)
        _bend_kernel[(len(x),)](
            logits, head.bias, head.class_weight, chunk.label, self.smoothing[chunk.part], chunk.table,
            chunk.factors, x, x.stride(0), len(x), vocab,
            **self.flags, WEIGHTED=head.class_weight is not None, SOFTCAP=self.spec.softcap,
            BLOCK_V=min(triton.next_power_of_2(vocab), 4_096), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip

    def _input_gradient(self, chunk: _Chunk, x: Tensor) -> None:
        if not self.spec.input_grad:
            return
        count, features = chunk.hidden.shape
        _input_gradient_kernel[(count,)](
            _product(x.to(self.factor), self.operand), self.head.weight, self.head.weight_mean, chunk.label,
            self.tokens.indices[chunk.part], chunk.factors, self.outputs.dinput, count, features,
            SOFTCAP=self.spec.softcap, BLOCK_D=_block_d(features), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _lora_gradients(self, chunk: _Chunk, x: Tensor, u: Tensor) -> None:
        """Gradients of A, B and the hidden states: [M, r] numbers more reach these through B."""
        head, outputs = self.head, self.outputs
        assert head.lora_a is not None
        assert head.lora_b is not None
        of_product, of_target, of_mean, _ = chunk.factors.unbind(0)
        wide = x.to(torch.float32)
        through_b = (wide @ head.lora_b) * of_product[:, None] + head.lora_b[chunk.label] * of_target[:, None]
        through_b = (through_b - of_mean[:, None] * head.lora_b_mean) * self.spec.lora_scale
        if self.spec.lora_grad:
            outputs.dlora_a.addmm_(through_b.T, chunk.hidden.to(torch.float32))
            outputs.dlora_b.addmm_(wide.T, u * of_product[:, None])
            add_by_label(outputs.dlora_b, chunk.label, u * of_target[:, None])
            self.smoothed_u += of_mean @ u
        if self.spec.input_grad:
            de = _product(x.to(self.factor), self.operand).mul_(of_product[:, None])
            de.addmm_(through_b, head.lora_a)
            de.addcmul_(of_target[:, None], head.weight[chunk.label].to(torch.float32))
            if head.weight_mean is not None:
                de.addcmul_(of_mean[:, None], head.weight_mean, value=-1)
            outputs.dinput[self.tokens.indices[chunk.part]] = de.to(outputs.dinput.dtype)

    def _head_gradient(self, chunk: _Chunk, x: Tensor) -> None:
        outputs, hidden = self.outputs, chunk.hidden.to(torch.float32)
        of_product, of_target, of_mean, _ = chunk.factors.unbind(0)
        rounded = x.to(self.factor)
        _add_product(outputs.dlinear_weight, rounded.T, (hidden * of_product[:, None]).to(self.factor))
        add_by_label(outputs.dlinear_weight, chunk.label, hidden * of_target[:, None])
        self.smoothed += of_mean @ hidden
        if outputs.dlinear_bias.numel():
            outputs.dlinear_bias.add_(of_product @ x)
            add_by_label(outputs.dlinear_bias, chunk.label, of_target)
            self.smoothed_count += of_mean.sum()


_FLOAT16_HEADROOM = 15 * 0.6931471805599453


def _x_dtype(inputs: LinearInputs, spec: LinearSpec, outputs: LinearOutputs) -> torch.dtype:
    """The dtype of x, as the head of this module explains."""
    dtype = inputs.input.dtype
    if outputs.dlinear_bias.numel():
        return torch.float32
    if dtype == torch.float16 and (spec.softcap or spec.head_grad or spec.lora_grad):
        return torch.float32
    return dtype


def _block_d(features: int) -> int:
    block: int = triton.next_power_of_2(features)
    return min(block, 1_024)


def _chunks(tokens: int, most: int) -> Iterator[slice]:
    """Even slices of at most `most` tokens, of whole tiles where that leaves their number as it is."""
    pieces = -(-tokens // most)
    each = -(-tokens // pieces)
    if most % _TILE_TOKENS == 0:
        each = -(-each // _TILE_TOKENS) * _TILE_TOKENS
    for start in range(0, tokens, each):
        yield slice(start, min(start + each, tokens))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32; on the interpreter's CPU, 16-bit factors are widened first."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in float32, by blocks whose product is small beside the head's gradient."""
    block = max(1, _PRODUCT_BYTES // (4 * out.shape[1]))
    for start in range(0, len(out), block):
        part = slice(start, start + block)
        out[part] += _product(a[part], b)

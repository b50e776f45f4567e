"""Cross entropy of hidden states and a head: two GEMMs a chunk of rows, nothing as large as the logits.

For a row with hidden state e, target y, smoothing s, class weights c (or 1) and z = scale (C e + b),

    x_v  = exp(z_v - k) for v != y, 0 for v = y         total = sum_v x_v        t = exp(z_y - k)
    nll  = log(1 + total / t)       p_y = t / (total + t)       lse = k + log(total + t)
    K    = (1 - s) c_y + s mean(c) + 2 z_loss lse
    loss = ((1 - s) c_y + s mean(c)) nll - s (mean(c z) - mean(c) z_y) + z_loss lse^2
    de   = a scale (K (1 - p_y) x C / sum_v x_v + (s mean(c) + 2 z_loss lse - K (1 - p_y)) C_y - s cbar)

with cbar = mean_v c_v C_v and the row's scale a. The target's column stays out of x, so that what is rounded
to 16 bits is never the probability that 1 is subtracted from. Two ways to make x, both from fp32:

fused   a GEMM with the exponential in its epilogue, k = z_y + 40: one visit, 2 MV bytes written. bfloat16
        has float32's exponents, which a constant anchor needs. A row whose total leaves [0, 2^100), its
        target being some 109 nats below the maximum, is made again from its own maximum; the device decides.
cublas  `torch.mm` into float32, then a kernel with one program a row, k = max(z): exact for every input.

float32 and float16 inputs, a softcap (whose slope needs the sum before x can be stored) and a bias that is
trained (a sum over rows that cancels, so x stays float32) take the second, and so do features that are no
multiple of 16, a LoRA adapter on the head and logits that may be rounded (precision="fast").
float16 has 5 bits of exponent:
there k is 15 log 2 below the maximum, so that x reaches 2^15 and what is lost is below 2^-39 of the largest;
where x does not have the largest at 1 (a softcap) or meets gradients divided by many tokens (a head that is
trained) it stays float32. float64 is not for tensor cores: ask the "torch" backend.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ual_kernels._rows import (
    COUNT,
    STATISTICS,
    Rule,
    add_rows,
    dead_statistics,
    kept_rows,
    labels,
    poison_missed,
)
from ual_kernels._rows import column_mean as rows_mean
from ual_kernels._rows import stored_dtype as stored_dtype_of
from ual_kernels._triton.math import final_logits

# "fused" where it can be; a benchmark or a test may ask for "cublas" everywhere
VARIANT: Literal["fused", "cublas"] = "fused"

_INTERPRETED = triton.knobs.runtime.interpret
_PRODUCT_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 29  # of x or logits: at a vocabulary of 128k, 2048 rows of the one or 1024 of the other
_MOST_ROWS = 4_096  # beyond, reading the head once a chunk is lost beside its FLOPs (ridge: 183 rows)
_TILE_ROWS = 128

_ANCHOR: tl.constexpr = tl.constexpr(40.0)
_LARGEST_TOTAL: tl.constexpr = tl.constexpr(2.0**100)  # x C must not overflow either

# rows of the [9, M] float32 table that the kernels hand each other
_Z_Y: tl.constexpr = tl.constexpr(0)
_MEAN: tl.constexpr = tl.constexpr(1)  # mean(c z)
_K: tl.constexpr = tl.constexpr(2)
_TOTAL: tl.constexpr = tl.constexpr(3)
_MOMENT: tl.constexpr = tl.constexpr(4)  # sum of x (z - k)
_HIGH: tl.constexpr = tl.constexpr(5)  # the largest z beside the target's
_SECOND: tl.constexpr = tl.constexpr(6)
_PLAIN_MEAN: tl.constexpr = tl.constexpr(7)
_ROUNDED: tl.constexpr = tl.constexpr(8)  # sum of x as stored
_TABLE_ROWS = 9


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
    # the four more sums of a row take the registers of a larger tile
    return GemmPlan(128, 64, 64, 8, 8, 4) if statistics else GemmPlan(128, 256, 64, 8, 8, 3)


def chunk_rows(vocab: int, itemsize: int) -> int:
    """Rows at a time: whole tiles, as many as the budget holds."""
    fitting = _CHUNK_BYTES // (vocab * itemsize)
    return max(_TILE_ROWS, min(_MOST_ROWS, fitting // _TILE_ROWS * _TILE_ROWS))


# ---- step 1: two dot products a row ----


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
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row)
    z_y = tl.zeros((BLOCK_D,), tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        e = tl.load(e_ptr + row * D + feature, mask=inside, other=0.0).to(tl.float32)
        z_y += e * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP == 0.0:
            mean += e * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
    z_y = tl.sum(z_y, axis=0)
    mean = tl.sum(mean, axis=0)
    if BIASED:
        z_y += tl.load(bias_ptr + y)
        if SOFTCAP == 0.0:
            mean += tl.load(bias_mean_ptr)
    tl.store(table_ptr + _Z_Y * M + row, final_logits(z_y, SOFTCAP, LOGIT_SCALE))
    if SOFTCAP == 0.0:
        tl.store(table_ptr + _MEAN * M + row, mean * LOGIT_SCALE)


# ---- step 2, fused ----


@triton.jit
def _anchored_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read if BIASED
    y_ptr,  # [M]
    table_ptr,  # [9, M] fp32
    x_ptr,  # [M, V], rows stride_x apart, out if WRITE
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
    # GROUP tiles of rows walk the columns together and share each tile of the head in L2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % group
    tile_n = pid % (GROUP * tiles_n) // group

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_K)
    # past the edge read something that exists: no mask in the loop, none of it is kept
    e_ptrs = e_ptr + tl.where(row < M, row, 0).to(tl.int64)[:, None] * D + feature[None, :]
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
    known = row < M
    z_y = tl.load(table_ptr + _Z_Y * M + row, mask=known, other=0.0)
    y = tl.load(y_ptr + row, mask=known, other=-1).to(tl.int32)
    d = acc * LOGIT_SCALE - z_y[:, None]
    inside = column[None, :] < V
    keep = inside & (column[None, :] != y[:, None])
    x = tl.where(keep, tl.exp(d - _ANCHOR), 0.0)
    partial_ptr += row.to(tl.int64) * tiles_n + tile_n
    tl.store(partial_ptr, tl.sum(x, axis=1), mask=known)
    if WRITE:
        # the sum first: the store goes through shared memory, and x need not stay in registers across it
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(partial_ptr + stride_p, tl.sum(rounded.to(tl.float32), axis=1), mask=known)
        x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_x + column[None, :]
        tl.store(x_ptrs, rounded, mask=known[:, None] & inside)
    if STATISTICS:
        # where d is -inf x is 0, and so is its share
        moment = tl.sum(x * tl.maximum(d - _ANCHOR, -200.0), axis=1)
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
    row = tl.program_id(0).to(tl.int64)
    partial_ptr += row * tiles
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
            block_high, block_second = _two_largest(highs)
            block_second = tl.maximum(block_second, tl.max(seconds, axis=0))
            second = tl.maximum(tl.minimum(high, block_high), tl.maximum(second, block_second))
            high = tl.maximum(high, block_high)
    z_y = tl.load(table_ptr + _Z_Y * M + row)
    tl.store(table_ptr + _K * M + row, z_y + _ANCHOR)
    tl.store(table_ptr + _TOTAL * M + row, tl.sum(total, axis=0))
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M + row, tl.sum(rounded, axis=0))
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M + row, tl.sum(moment, axis=0))
        tl.store(table_ptr + _HIGH * M + row, z_y + high)
        tl.store(table_ptr + _SECOND * M + row, z_y + second)
        tl.store(table_ptr + _PLAIN_MEAN * M + row, z_y + tl.sum(plain, axis=0) / V)


@triton.jit
def _two_largest(z):
    """Of a vector; where two share the largest, it is the second largest as well."""
    high = tl.max(z, axis=0)
    largest = z == high
    second = tl.max(tl.where(largest, float("-inf"), z), axis=0)
    return high, tl.where(tl.sum(largest.to(tl.int32), axis=0) > 1, high, second)


# ---- step 2 from a row's own maximum ----


@triton.jit
def _rows_kernel(
    logits_ptr,  # [M, V] fp32 products of e and the head, read if GIVEN
    e_ptr,  # [M, D], read unless GIVEN
    head_ptr,  # [V, D], read unless GIVEN
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED and SOFTCAP
    y_ptr,  # [M]
    table_ptr,  # [9, M] fp32, out: all but Z_Y; MEAN if SOFTCAP; the last four if STATISTICS
    x_ptr,  # [M, V], rows stride_x apart, out if WRITE; may lie in the logits' own memory
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
    row = tl.program_id(0).to(tl.int64)
    if GIVEN:
        logits_ptr += row * V
    elif tl.load(table_ptr + _TOTAL * M + row) < _LARGEST_TOTAL:  # false for NaN
        return  # the constant anchor served this row well
    y = tl.load(y_ptr + row)
    z_y = tl.load(table_ptr + _Z_Y * M + row)
    e_ptr += row * D
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
            block_high, block_second = _two_largest(others)
            second = tl.maximum(tl.minimum(high, block_high), tl.maximum(second, block_second))
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
            tl.store(x_ptr + row * stride_x + column, as_stored, mask=inside)
            rounded += as_stored.to(tl.float32)
    tl.store(table_ptr + _K * M + row, k)
    tl.store(table_ptr + _TOTAL * M + row, tl.sum(total, axis=0))
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M + row, tl.sum(rounded, axis=0))
    if SOFTCAP != 0.0:
        tl.store(table_ptr + _MEAN * M + row, tl.sum(mean, axis=0) / V)
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M + row, tl.sum(moment, axis=0))
        tl.store(table_ptr + _HIGH * M + row, high)
        tl.store(table_ptr + _SECOND * M + row, second)
        tl.store(table_ptr + _PLAIN_MEAN * M + row, tl.sum(plain, axis=0) / V)


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
    """A block of one row: read, or multiplied out once more."""
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
    x_ptr,  # [M, V], rows stride_x apart, out: the gradient of the capped row; may lie on the logits
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
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row)
    spread = tl.load(smoothing_ptr + row) / V
    k = tl.load(table_ptr + _K * M + row)
    rate = tl.load(factors_ptr + 3 * M + row)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = tl.load(logits_ptr + row * V + column, mask=inside, other=0.0)
        z = _biased(raw, bias_ptr, column, inside, BIASED, SOFTCAP, LOGIT_SCALE)
        q = spread
        if WEIGHTED:
            q = spread * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
        dz = (rate * tl.exp(z - k) - q) * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
        dz = tl.where(column == y, 0.0, dz)
        tl.debug_barrier()
        tl.store(x_ptr + row * stride_x + column, dz.to(x_ptr.dtype.element_ty), mask=inside)


# ---- loss, and the factors of the gradient ----


@triton.jit
def _finish_kernel(
    table_ptr,  # [9, M]
    y_ptr,  # [M]
    smoothing_ptr,  # [M]
    row_scale_ptr,  # [M]
    class_weight_ptr,  # [V], read if WEIGHTED
    class_mean_ptr,  # [1], read if WEIGHTED
    state_ptr,  # [2, M], rows stride_out apart, out: unit loss, d(unit loss)/ds
    statistics_ptr,  # [7, M], rows stride_out apart, out if STATISTICS
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
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = row < M
    table_ptr += row
    z_y = tl.load(table_ptr + _Z_Y * M, mask=known, other=0.0)
    k = tl.load(table_ptr + _K * M, mask=known, other=0.0)
    total = tl.load(table_ptr + _TOTAL * M, mask=known, other=1.0)
    s = tl.load(smoothing_ptr + row, mask=known, other=0.0)
    c_y = tl.full((BLOCK,), 1.0, tl.float32)
    c_mean = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        c_y = tl.load(class_weight_ptr + tl.load(y_ptr + row, mask=known, other=0), mask=known, other=0.0)
        c_mean = tl.load(class_mean_ptr + tl.zeros((BLOCK,), tl.int32))
    gap = tl.load(table_ptr + _MEAN * M, mask=known, other=0.0) - c_mean * z_y

    t = tl.exp(z_y - k)
    whole = total + t
    log_whole = tl.log(whole)
    lse = k + log_whole
    # log(1 + total / t) when neither total nor t may be represented
    odds = (k - z_y) + tl.log(total)
    nll = tl.maximum(odds, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(odds)))
    rest = total / whole  # 1 - p_y, without the subtraction

    coefficient = (1.0 - s) * c_y + s * c_mean
    at_target = s * c_mean
    # a row that does not smooth must not see the mean of a vocabulary with -inf in it (0 inf = nan)
    unit = coefficient * nll - tl.where(s == 0.0, 0.0, s * gap)
    if Z_LOSS != 0.0:
        unit += Z_LOSS * lse * lse
        coefficient += 2.0 * Z_LOSS * lse
        at_target += 2.0 * Z_LOSS * lse
    at_target -= coefficient * rest
    rate = coefficient / whole
    if WRITE:
        # weights that sum to 1 as stored: a row that one wrong class dominates does not feel x's rounding
        rounded = tl.load(table_ptr + _ROUNDED * M, mask=known, other=1.0)
        rate = tl.where(rounded > 0.0, coefficient * rest / rounded, rate)
    state_ptr += row
    tl.store(state_ptr, unit, mask=known)
    tl.store(state_ptr + stride_out, (c_mean - c_y) * nll - gap, mask=known)

    a = tl.load(row_scale_ptr + row, mask=known, other=0.0) * LOGIT_SCALE
    factors_ptr += row
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
        statistics_ptr += row
        moment = tl.load(table_ptr + _MOMENT * M, mask=known, other=0.0)
        moment += tl.where(t > 0.0, t * (z_y - k), 0.0)
        others = tl.load(table_ptr + _HIGH * M, mask=known, other=0.0)
        second = tl.load(table_ptr + _SECOND * M, mask=known, other=0.0)
        first = z_y >= others
        high = tl.where(first, z_y, others)
        second = tl.where(first, others, tl.maximum(second, z_y))
        tl.store(statistics_ptr, lse, mask=known)
        tl.store(statistics_ptr + stride_out, -nll, mask=known)
        tl.store(statistics_ptr + 2 * stride_out, log_whole - moment / whole, mask=known)
        tl.store(statistics_ptr + 3 * stride_out, tl.exp(high - k) / whole, mask=known)
        tl.store(statistics_ptr + 4 * stride_out, high - second, mask=known)
        plain = tl.load(table_ptr + _PLAIN_MEAN * M, mask=known, other=0.0)
        tl.store(statistics_ptr + 5 * stride_out, plain, mask=known)
        tl.store(statistics_ptr + 6 * stride_out, tl.where(first, 1.0, 0.0), mask=known)


@triton.jit
def _input_gradient_kernel(
    product_ptr,  # [M, D] fp32: x C
    head_ptr,  # [V, D]
    column_mean_ptr,  # [D] fp32, read unless SOFTCAP
    y_ptr,  # [M]
    index_ptr,  # [M], rows of dinput
    factors_ptr,  # [4, M]
    dinput_ptr,  # [N, D], out
    M,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row)
    out = tl.load(index_ptr + row)
    of_product = tl.load(factors_ptr + row)
    of_target = tl.load(factors_ptr + M + row)
    of_mean = tl.load(factors_ptr + 2 * M + row)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        de = of_product * tl.load(product_ptr + row * D + feature, mask=inside, other=0.0)
        de += of_target * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP == 0.0:
            de -= of_mean * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
        tl.store(dinput_ptr + out * D + feature, de.to(dinput_ptr.dtype.element_ty), mask=inside)


# ---- the operator's body ----


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lora_scale: float,
    z_loss: float,
    gradient_filter: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    lora_grad: bool,
    per_row: bool,
    live_rows: int = COUNT,
    chunk_tokens: int = 0,
    precision: str = "high",
    rule: Rule | None = None,
    whole: None = None,
) -> tuple[Tensor, ...]:
    """The body of `ops.linear_cross_entropy`. Ignored rows leave before the first GEMM.

    `functional` refuses `gradient_filter` and shards (`whole`) before they get here.
    """
    rows, features = input.shape
    vocab = linear_weight.shape[0]
    acc = torch.float32
    write, capped, biased = input_grad or head_grad or lora_grad, bool(softcap), linear_bias is not None
    facts_wanted = statistics or rule is not None

    loss = input.new_zeros(rows, dtype=acc)
    state = input.new_zeros((2, rows), dtype=acc)
    stats = dead_statistics(input, STATISTICS, rows if statistics else 0, acc)
    stored = stored_dtype_of(input.dtype, per_row)
    dinput = input.new_zeros((rows if input_grad else 0, features), dtype=stored)
    dhead = input.new_zeros((vocab if head_grad else 0, features), dtype=acc)
    dbias = input.new_zeros(vocab if head_grad and biased else 0, dtype=acc)
    rank = 0 if lora_a is None else lora_a.shape[0]
    dlora_a = input.new_zeros((rank if lora_grad else 0, features), dtype=acc)
    dlora_b = input.new_zeros((vocab if lora_grad else 0, rank), dtype=acc)
    outputs = (loss, state, stats, dinput, dhead, dbias, dlora_a, dlora_b)
    kept = kept_rows(target, ignore_index, live_rows)
    count = len(kept.index)
    if count == 0:
        return outputs

    head = linear_weight.detach().contiguous()
    bias = None if linear_bias is None else linear_bias.detach().to(acc).contiguous()
    a_wide = None if lora_a is None else lora_a.detach().to(acc)
    b_wide = None if lora_b is None else lora_b.detach().to(acc)
    column_mean = bias_mean = whole_mean = None
    b_mean = input.new_zeros(rank, dtype=acc)
    if not capped:
        column_mean = whole_mean = rows_mean(head, class_weight, vocab)
        bias_mean = None if bias is None else rows_mean(bias[:, None], class_weight, vocab)
        if a_wide is not None and b_wide is not None:
            b_mean = rows_mean(b_wide, class_weight, vocab)
            whole_mean = column_mean + lora_scale * (b_mean @ a_wide)
    class_mean = None if class_weight is None else class_weight.mean()

    y, alive, legal = labels(target[kept.index], vocab, ignore_index)
    poison = torch.where(legal | ~alive, 0.0, torch.nan).to(acc)
    if kept.enough is not None:
        poison = torch.where(kept.enough, poison, torch.nan)
    s, a = smoothing[kept.index], row_scale[kept.index]
    if kept.live is not None:  # dead rows are among these; what they hold must not matter
        s, a = s.where(kept.live, 0.0), a.where(kept.live, 0.0)
    base_scale = a.clone() if rule is not None else a
    known_state = input.new_empty((2, count), dtype=acc)
    known_stats = input.new_zeros((STATISTICS, count if facts_wanted else 0), dtype=acc)

    x_dtype = input.dtype
    if dbias.numel() or (input.dtype == torch.float16 and (capped or head_grad or lora_grad)):
        x_dtype = acc
    factor = torch.bfloat16 if input.dtype == torch.bfloat16 else x_dtype
    operand = head.to(factor)
    fast = precision == "fast" and input.dtype in (torch.bfloat16, torch.float16)
    # rows of e and of the head that do not start on 16 bytes are loaded number by number
    fused = (
        VARIANT == "fused"
        and x_dtype == torch.bfloat16
        and not (capped or fast or rank)
        and features % 16 == 0
    )
    most = chunk_tokens or chunk_rows(vocab, 2 if fused else 4)
    room = min(most, count)
    # whole groups of 8 columns, so that every row of x starts on 16 bytes
    width = -(-vocab // 8) * 8 if fused else vocab
    size = (room if write or not fused else 0, width)
    buffer = input.new_empty(size, dtype=x_dtype if fused else acc)
    smoothed_rows = input.new_zeros(features, dtype=acc)  # sum of s a e, for the rank-one part of dC
    smoothed_ranks = input.new_zeros(rank, dtype=acc)  # and of dB
    smoothed_count = input.new_zeros((), dtype=acc)  # sum of s a, likewise for the bias

    block_d = min(triton.next_power_of_2(features), 1_024)
    flags = {"BIASED": biased, "LOGIT_SCALE": logit_scale}

    def finish(
        chunk: slice, table: Tensor, y_chunk: Tensor, s_chunk: Tensor, a_chunk: Tensor, factors: Tensor
    ) -> None:
        _finish_kernel[(triton.cdiv(len(y_chunk), 128),)](
            table, y_chunk, s_chunk, a_chunk, class_weight, class_mean,
            known_state[:, chunk], known_stats[:, chunk] if facts_wanted else known_stats, factors,
            count, len(y_chunk), vocab,
            WEIGHTED=class_weight is not None, STATISTICS=facts_wanted, WRITE=write and not capped,
            SOFTCAP=softcap, LOGIT_SCALE=logit_scale, Z_LOSS=z_loss, BLOCK=128,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    for chunk in _chunks(count, most):
        index, y_chunk, s_chunk, a_chunk = kept.index[chunk], y[chunk], s[chunk], a[chunk] + poison[chunk]
        e = input[index]
        if kept.live is not None:
            e = e.masked_fill(~kept.live[chunk][:, None], 0.0)
        here = len(index)
        table = input.new_empty((_TABLE_ROWS, here), dtype=acc)
        factors = input.new_empty((4, here), dtype=acc)
        _dots_kernel[(here,)](
            e, head, bias, y_chunk, whole_mean, bias_mean, table, here, features,
            **flags, SOFTCAP=softcap, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        u = None
        if a_wide is not None and b_wide is not None:
            u = (e.to(acc) @ a_wide.T) * lora_scale
        logits = None
        if fused:
            x = buffer[:here, :vocab]
            _anchored(e, head, bias, y_chunk, table, x, logit_scale, facts_wanted, write)
        else:
            logits = buffer[:here]
            if fast:
                logits.copy_(torch.mm(e, head.T))
            else:
                _product(e, head.T, out=logits)
            if u is not None and b_wide is not None:
                logits.addmm_(u, b_wide.T)
            if fast or u is not None:
                # the target's logit must be the number that its row holds
                _read_target(table, logits, y_chunk, bias, softcap, logit_scale)
            # in the logits' own memory: a row of 16-bit x takes the first half of its row
            x = logits.view(x_dtype)[:, :vocab]
        _rows_kernel[(here,)](
            logits, e, head, bias, class_weight, y_chunk, table, x, x.stride(0), here, vocab, features,
            **flags,
            GIVEN=not fused,
            WEIGHTED=class_weight is not None,
            STATISTICS=facts_wanted,
            WRITE=write and not capped,
            SOFTCAP=softcap,
            HEADROOM=_FLOAT16_HEADROOM if x_dtype == torch.float16 else 0.0,
            BLOCK_V=64 if fused else min(triton.next_power_of_2(vocab), 4_096),
            BLOCK_D=128 if fused else 1,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        finish(chunk, table, y_chunk, s_chunk, a_chunk, factors)
        if rule is not None:
            # the statistics do not depend on what the rule chooses from them; the factors do, so once more
            chosen, weight = rule(known_stats[:7, chunk])
            s_chunk = s_chunk if chosen is None else chosen
            a_chunk = a_chunk if weight is None else a_chunk * weight
            if kept.live is not None:
                dead = ~kept.live[chunk]
                s_chunk, a_chunk = s_chunk.masked_fill(dead, 0.0), a_chunk.masked_fill(dead, 0.0)
            s_chunk, a_chunk = s_chunk.contiguous(), a_chunk.contiguous()
            s[chunk], a[chunk] = s_chunk, a_chunk
            finish(chunk, table, y_chunk, s_chunk, a_chunk, factors)
        if not write:
            continue
        if capped:
            _bend_kernel[(here,)](
                logits, bias, class_weight, y_chunk, s_chunk, table, factors, x, x.stride(0), here, vocab,
                **flags, WEIGHTED=class_weight is not None, SOFTCAP=softcap,
                BLOCK_V=min(triton.next_power_of_2(vocab), 4_096), num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
        rounded = x.to(factor)
        of_product, of_target, of_mean, _ = factors.unbind(0)
        if u is not None and a_wide is not None and b_wide is not None:
            # [M, r] numbers more: what reaches the head's input through B
            through_b = (x.to(acc) @ b_wide) * of_product[:, None] + b_wide[y_chunk] * of_target[:, None]
            through_b = (through_b - of_mean[:, None] * b_mean) * lora_scale
            if lora_grad:
                dlora_a.addmm_(through_b.T, e.to(acc))
                dlora_b.addmm_(x.to(acc).T, u * of_product[:, None])
                add_rows(dlora_b, y_chunk, u * of_target[:, None])
                smoothed_ranks += of_mean @ u
            if input_grad:
                de = _product(rounded, operand).mul_(of_product[:, None]).addmm_(through_b, a_wide)
                de.addcmul_(of_target[:, None], head[y_chunk].to(acc))
                if column_mean is not None:
                    de.addcmul_(of_mean[:, None], column_mean, value=-1)
                dinput[index] = de.to(stored)
        elif input_grad:
            _input_gradient_kernel[(here,)](
                _product(rounded, operand), head, column_mean, y_chunk, index, factors, dinput,
                here, features, SOFTCAP=softcap, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        if head_grad:
            wide = e.to(acc)
            _add_product(dhead, rounded.T, (wide * of_product[:, None]).to(factor))
            add_rows(dhead, y_chunk, wide * of_target[:, None])
            smoothed_rows += of_mean @ wide
            if dbias.numel():
                dbias += of_product @ x
                add_rows(dbias, y_chunk, of_target)
                smoothed_count += of_mean.sum()
    a = a + poison
    scaled, unit = a * known_state[0], known_state + poison
    if rule is not None:  # a weight that the rule chose belongs to the unit loss
        unit = unit * torch.where(base_scale == 0, 0.0, a / base_scale)
    if kept.live is not None:
        scaled, unit = torch.where(kept.live, scaled, 0.0), torch.where(kept.live, unit, 0.0)
    loss[kept.index] = scaled
    state[:, kept.index] = unit
    if statistics:
        stats[:, kept.index] = torch.where(legal & alive, known_stats, stats[:, kept.index])
    if not capped:
        over = head.new_ones(vocab, dtype=acc) if class_weight is None else class_weight
        for out, total in ((dhead, smoothed_rows), (dlora_b, smoothed_ranks)):
            if out.numel():
                out.addr_(over, total, alpha=-1.0 / vocab)
        if dbias.numel():
            dbias -= over * (smoothed_count / vocab)
    poison_missed(kept, target, ignore_index, loss, state, dinput)
    return outputs


_FLOAT16_HEADROOM = 15 * 0.6931471805599453


def _anchored(
    e: Tensor,
    head: Tensor,
    bias: Tensor | None,
    y: Tensor,
    table: Tensor,
    x: Tensor,
    logit_scale: float,
    statistics: bool,
    write: bool,
) -> None:
    """Step 2 with the constant anchor: x [M, V], and K, TOTAL and the statistics of `table`."""
    (rows, features), vocab = e.shape, len(head)
    platform = "interpreter" if _INTERPRETED else "hip" if torch.version.hip else "cuda"
    plan = gemm_plan(platform, statistics)
    tiles = triton.cdiv(vocab, plan.block_n)
    partial = e.new_empty((6 if statistics else 2, rows, tiles), dtype=torch.float32)
    _anchored_kernel[(triton.cdiv(rows, plan.block_m) * tiles,)](
        e, head, bias, y, table, x, partial, x.stride(0), partial.stride(0), rows, vocab, features,
        BIASED=bias is not None,
        STATISTICS=statistics,
        WRITE=write,
        LOGIT_SCALE=logit_scale,
        EVEN_D=features % plan.block_k == 0,
        INTERPRETED=_INTERPRETED,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        GROUP=plan.group,
        num_warps=plan.num_warps, enable_fp_fusion=True,
        num_stages=plan.num_stages,
    )  # fmt: skip
    _join_kernel[(rows,)](
        partial, table, partial.stride(0), rows, vocab, tiles,
        STATISTICS=statistics, WRITE=write, BLOCK=min(triton.next_power_of_2(tiles), 512),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _chunks(rows: int, most: int) -> Iterator[slice]:
    """Even slices of at most `most` rows, of whole tiles where that leaves their number as it is."""
    pieces = -(-rows // most)
    each = -(-rows // pieces)
    if most % _TILE_ROWS == 0:
        each = -(-each // _TILE_ROWS) * _TILE_ROWS
    for start in range(0, rows, each):
        yield slice(start, min(start + each, rows))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32; the interpreter's CPU has no such product of 16-bit factors but by widening them."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in float32, by blocks of rows whose product is small beside the head's gradient."""
    block = max(1, _PRODUCT_BYTES // (4 * out.shape[1]))
    for start in range(0, len(out), block):
        rows = slice(start, start + block)
        out[rows] += _product(a[rows], b)


def _read_target(
    table: Tensor, logits: Tensor, y: Tensor, bias: Tensor | None, softcap: float, logit_scale: float
) -> None:
    z_y = logits.gather(1, y[:, None]).squeeze(1)
    if bias is not None:
        z_y = z_y + bias[y]
    z_y = z_y * logit_scale
    table[_Z_Y.value] = softcap * torch.tanh(z_y / softcap) if softcap else z_y

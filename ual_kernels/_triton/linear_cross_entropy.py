"""Cross entropy of hidden states and a head, by two or three GEMMs, without materializing the logits.

For a token with hidden state e, the terms of `_tokens` and z = scale (C e + u B + b) in units of log 2,

    x_v  = 2^(z_v - k) for v != y, 0 for v = y          total = sum_v x_v        t = 2^(z_y - k)
    nll  = log(1 + total / t)       p_y = t / (total + t)       lse = log 2 (k + log2(total + t))
    de   = a scale (K (1 - p_y) x C / sum_v x_v + (U - K (1 - p_y)) C_y - s cbar)

with cbar = mean_v c_v C_v and the token's scale a. The reference point k is a number that is subtracted from
the logits before 2^z. x excludes the target's column, so 1 is never subtracted from a probability that was
rounded to 16 bits.

The other classes i of a target of several classes are part of the sums, but their columns of x are set to 0
before x is multiplied, and a scale (K p_i - (1 - s) w_i) C_i is added to de: a difference of numbers that are
nearly equal after training is not formed from an x that was rounded to 16 bits.

**Fixed reference point** (bfloat16, the usual case). The reference point k = z_y + 32 is known before the
first GEMM, so each logit is computed once and the GEMM stores x in bfloat16, which has the exponent range of
float32. No step needs the complete x of a token, so

    frozen head    up to 8192 tokens at a time, the vocabulary in slices: x of a slice, then O += x C
    trained head   x of all V classes for up to 2 D tokens: O = x C, dC += x^T (f E); x is as large as dC
    no gradient    x is not stored

`VARIANT` selects the GEMM that computes x: "tma" (persistent, tensor memory accelerator, sm_90 and later),
"pointer" (any GPU) or "cublas" (`torch.mm` into float32, then a kernel with one program per token). If the
total of a token is not below 2^100, because its target is about 90 nats below the maximum, the token is
*far*: a separate kernel recomputes it with its maximum as the reference point. The host does not read the
totals.

**Exact** (all other cases). `torch.mm` computes float32 logits of a chunk, then one program per token
computes x with k = max(z). This variant is used for float32 and float16 inputs, for a softcap (whose slope
needs the sum before x can be stored), for a trained bias (its gradient is a sum over tokens that cancels, so
x stays float32) and for precision="fast". float16 has 5 bits of exponent: k is 15 below the maximum, so that
x reaches 2^15, and values below 2^-39 of the largest are lost. For float16 inputs x stays float32 with a
softcap, where all of x may be small, and with a trained head or adapter, where x is multiplied by gradients
that are divided by the number of tokens. float64 is not supported; use backend="torch".
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ual_kernels._matrices import add_by_label, add_selected
from ual_kernels._operands import LinearInputs, LinearOutputs, LinearSpec
from ual_kernels._tokens import LossTokens, TokenFns, mark_missed, select_loss_tokens
from ual_kernels._triton.gemm import add_product, halves, product
from ual_kernels._triton.math import (
    final_logits,
    merge_two_largest,
    store_statistics,
    token_terms,
    top2,
    two_largest,
)
from ual_kernels._vocab_parallel import Shards
from ual_kernels.statistics import LINEAR_STATISTICS, LOGITS_STATISTICS

Variant = Literal["tma", "pointer", "cublas", "exact"]

VARIANT: Literal["auto"] | Variant = "auto"
"""The variant that is used if the inputs allow it; benchmarks and tests set it."""

_INTERPRETED = triton.knobs.runtime.interpret

_FROZEN_TOKENS = 8_192  # tokens at a time; with more, reading the head again is negligible next to the GEMMs
_KEPT_BYTES = 1 << 30  # of x that is kept for an adapter's gradients
_EXACT_BYTES = 1 << 29  # of float32 logits
_CAPPED_BYTES = 1 << 30  # of float32 logits with a softcap, for gradients of the head or of an adapter
_EXACT_TOKENS = 4_096
_TILE_TOKENS = 128

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_OFFSET: tl.constexpr = tl.constexpr(32.0)  # k above the target's logit
_LARGEST_TOTAL: tl.constexpr = tl.constexpr(2.0**100)  # x C must not overflow either
_HEADROOM = 15.0  # of float16, in powers of 2

# planes of the [11, M] float32 table that kernels share; all but the first two in units of log 2
_Z_Y: tl.constexpr = tl.constexpr(0)  # z_y, nats
_MEAN: tl.constexpr = tl.constexpr(1)  # mean(c z), nats
_K: tl.constexpr = tl.constexpr(2)
_D_Y: tl.constexpr = tl.constexpr(3)  # z_y - k
_TOTAL: tl.constexpr = tl.constexpr(4)
_ROUNDED: tl.constexpr = tl.constexpr(5)  # sum of x as stored
_MOMENT: tl.constexpr = tl.constexpr(6)  # sum of x (z - k)
_PLAIN: tl.constexpr = tl.constexpr(7)  # sum of z - k
_HIGH: tl.constexpr = tl.constexpr(8)  # the largest z - k except the target's
_SECOND: tl.constexpr = tl.constexpr(9)
_TOP: tl.constexpr = tl.constexpr(10)  # the column of _HIGH
_TABLE_PLANES = 11

# planes of the [5, M] float32 sums over the classes of a target; see `_tokens`
_WEIGHT: tl.constexpr = tl.constexpr(0)  # W
_OTHER_WEIGHT: tl.constexpr = tl.constexpr(1)  # W - w_y
_EXCESS: tl.constexpr = tl.constexpr(2)  # R
_MASS: tl.constexpr = tl.constexpr(3)  # sum of p_k
_PLAIN_EXCESS: tl.constexpr = tl.constexpr(4)  # R without class weights
_CLASS_PLANES = 5


class GemmLaunchConfig(NamedTuple):
    """Launch config of the GEMM that computes x."""

    block_m: int
    block_n: int
    block_k: int
    group: int  # tiles of tokens that are processed together and share each tile of the head in L2
    num_warps: int
    num_stages: int
    flatten: bool = False  # one loop over tiles and features: the next tile is loaded during an epilogue
    source: str = "predicted"  # or the committed measurement


_H100 = "benchmarks/results/nvidia-h100-80gb-hbm3/gpu/2026-11-27-aab0a211f2b7-prove.jsonl"
LAUNCH_CONFIGS: dict[tuple[str, str], GemmLaunchConfig] = {
    ("sm_90", "tma"): GemmLaunchConfig(128, 256, 64, 32, 8, 4, flatten=True, source=_H100),
    ("sm_90", "pointer"): GemmLaunchConfig(128, 128, 64, 8, 8, 3),
    ("sm_100", "tma"): GemmLaunchConfig(128, 256, 64, 8, 8, 3),
    ("sm_100", "tma, statistics"): GemmLaunchConfig(128, 64, 64, 8, 8, 4),
    ("sm_100", "pointer"): GemmLaunchConfig(128, 256, 64, 8, 8, 3),
    ("sm_100", "pointer, statistics"): GemmLaunchConfig(128, 64, 64, 8, 8, 4),
    ("sm_80", "pointer"): GemmLaunchConfig(128, 256, 64, 8, 8, 3),
    ("sm_80", "pointer, statistics"): GemmLaunchConfig(128, 128, 64, 8, 8, 3),
    # any other NVIDIA GPU: 64 KiB of shared memory
    ("cuda", "pointer"): GemmLaunchConfig(128, 128, 64, 8, 8, 2),
    ("hip", "pointer"): GemmLaunchConfig(128, 64, 32, 8, 8, 2),
    ("hip", "pointer, statistics"): GemmLaunchConfig(64, 64, 32, 8, 8, 2),
    # small tiles, so that tests have many, some of them partial
    ("interpreter", "tma"): GemmLaunchConfig(16, 64, 32, 2, 4, 1, flatten=True),
    ("interpreter", "pointer"): GemmLaunchConfig(16, 64, 32, 2, 4, 1),
}
"""Launch configs by architecture and variant."""


class Platform(NamedTuple):
    """The properties of a device that determine launch configs."""

    name: str  # "sm_90", ..., "hip" or "interpreter"
    processors: int
    waves: int = 32  # of tiles in a slice of the vocabulary

    @classmethod
    def of(cls, tensor: Tensor) -> "Platform":
        """Return the platform of a tensor's device."""
        if _INTERPRETED:
            return cls("interpreter", 2, 1)
        properties = torch.cuda.get_device_properties(tensor.device)
        if torch.version.hip:
            return cls("hip", properties.multi_processor_count)
        # GPUs of one major version differ in shared memory, except for versions 9 and 10
        minor = 0 if properties.major in (9, 10) else properties.minor
        return cls(f"sm_{properties.major}{minor}", properties.multi_processor_count)

    @property
    def tma(self) -> bool:
        """Whether the device has tensor descriptors."""
        return (self.name, "tma") in LAUNCH_CONFIGS

    def launch_config(self, variant: str, statistics: bool = False) -> GemmLaunchConfig:
        """Return the launch config of a variant."""
        family = self.name if self.name in ("hip", "interpreter") else "cuda"
        names = [f"{variant}, statistics", variant] if statistics else [variant]
        return next(
            LAUNCH_CONFIGS[key]
            for name in names
            for key in ((self.name, name), (family, name))
            if key in LAUNCH_CONFIGS
        )


def slice_columns(tokens: int, vocab: int, block_m: int, block_n: int, platform: Platform) -> int:
    """Return the number of columns in a slice of the vocabulary: complete tiles in complete waves."""
    most = max(1, platform.waves * platform.processors // -(-tokens // block_m))
    return min(most, -(-vocab // block_n)) * block_n


def exact_tokens(vocab: int, budget: int = _EXACT_BYTES) -> int:
    """Return the number of tokens in a chunk of the exact variant: complete tiles within the budget."""
    fitting = budget // (4 * vocab)
    return max(_TILE_TOKENS, min(_EXACT_TOKENS, fitting // _TILE_TOKENS * _TILE_TOKENS))


# ---- step 1: the target's logit, the mean of the logits, the reference point ----


@triton.jit
def _select_kernel(
    source_ptr,  # [N, D], tokens stride_n apart
    index_ptr,  # [M] int64
    selected_ptr,  # [M] bool, read if MASKED
    out_ptr,  # [M, D], out: zeros for tokens that are not selected
    stride_n,
    D,
    MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    source_ptr += tl.load(index_ptr + token) * stride_n
    selected = True
    if MASKED:
        selected = tl.load(selected_ptr + token) != 0
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        row = tl.load(source_ptr + feature, mask=(feature < D) & selected, other=0.0)
        tl.store(out_ptr + token * D + feature, row, mask=feature < D)


@triton.jit
def _prepare_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read if BIASED
    u_ptr,  # [M, R] fp32, read if RANKED
    b_ptr,  # [V, R] fp32, read if RANKED
    target_ptr,  # [M] int
    complete_ptr,  # bool, read if COUNTED
    column_mean_ptr,  # [D] fp32, read unless CAPPED
    bias_mean_ptr,  # [1] fp32, read if BIASED unless CAPPED
    bias_high_ptr,  # [1] fp32, read if BIASED: the largest bias, scaled
    label_ptr,  # [M] int32, out: a column in [0, V) for every token
    nan_mask_ptr,  # [M] fp32, out
    table_ptr,  # [11, M] fp32, out: Z_Y, K, D_Y, and MEAN unless CAPPED
    M,
    V,
    D,
    R,
    ignore_index,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    COUNTED: tl.constexpr,
    CAPPED: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + token).to(tl.int64)
    valid = (target >= 0) & (target < V)
    nan = float("nan")
    nan_mask = tl.where(valid | (target == ignore_index), 0.0, nan)
    if COUNTED:
        nan_mask = tl.where(tl.load(complete_ptr) != 0, nan_mask, nan)
    y = tl.where(valid & (target != ignore_index), target, 0)
    tl.store(label_ptr + token, y.to(tl.int32))
    tl.store(nan_mask_ptr + token, nan_mask)
    z_y = tl.zeros((BLOCK_D,), tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        e = tl.load(e_ptr + token * D + feature, mask=inside, other=0.0).to(tl.float32)
        z_y += e * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if not CAPPED:
            mean += e * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
    z_y = tl.sum(z_y, axis=0)
    mean = tl.sum(mean, axis=0)
    if RANKED:
        rank = tl.arange(0, BLOCK_R)
        u = tl.load(u_ptr + token * R + rank, mask=rank < R, other=0.0)
        z_y += tl.sum(u * tl.load(b_ptr + y * R + rank, mask=rank < R, other=0.0), axis=0)
    if BIASED:
        z_y += tl.load(bias_ptr + y)
        if not CAPPED:
            mean += tl.load(bias_mean_ptr)
    table_ptr += token
    tl.store(table_ptr + _Z_Y * M, z_y * LOGIT_SCALE)
    # rounded once, so that the rounding error is the same in x and t
    k = z_y * (LOGIT_SCALE * _LOG2E) + _OFFSET
    if BIASED:  # the logits of an ignored token are the bias; this reference point keeps it from being far
        k = tl.where(target == ignore_index, tl.load(bias_high_ptr) * _LOG2E + _OFFSET, k)
    tl.store(table_ptr + _K * M, k)
    tl.store(table_ptr + _D_Y * M, tl.fma(z_y, LOGIT_SCALE * _LOG2E, -k))
    if not CAPPED:
        tl.store(table_ptr + _MEAN * M, mean * LOGIT_SCALE)


# ---- step 2 with a fixed reference point: x from the GEMM that computes the logits ----


@triton.jit
def _tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    first = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    return first + tile % (GROUP * tiles_n) % group, tile % (GROUP * tiles_n) // group


@triton.jit
def _round_to_bfloat16(x):
    """Round to the nearest bfloat16; return it in bfloat16 and in float32.

    Integer operations are used, because conversions occupy the pipe of the exponentials. A NaN of all ones
    becomes -0.0; the sum of x is still NaN.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x8000) & -65536
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.float32, bitcast=True)


@triton.jit
def _exponentials(
    acc,  # [BLOCK_M, BLOCK_N] fp32: raw logits
    k,  # [BLOCK_M]
    y,  # [BLOCK_M] int32, columns numbered like `first`
    first,  # the tile's first column
    V,
    SCALE: tl.constexpr,  # of logits, in units of log 2
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return x in bfloat16 and, over the columns: total, rounded, moment, plain, the two largest, a top."""
    d = acc * SCALE - k[:, None]
    at_edge = first + BLOCK_N > V
    plain = tl.zeros((BLOCK_M,), tl.float32)
    if STATISTICS:
        if at_edge:
            column = first + tl.arange(0, BLOCK_N)
            plain = tl.sum(tl.where(column[None, :] < V, d, 0.0), axis=1)
        else:
            plain = tl.sum(d, axis=1)
    holds_target = (y >= first) & (y < first + BLOCK_N)
    # few tiles need a mask. It is applied to d: a mask on `acc` makes ptxas wait after every product
    if (tl.max(holds_target.to(tl.int32), axis=0) > 0) | at_edge:
        column = first + tl.arange(0, BLOCK_N)
        d = tl.where((column[None, :] == y[:, None]) | (column[None, :] >= V), float("-inf"), d)
    x = tl.exp2(d)
    total = tl.sum(x, axis=1)
    moment = total
    high = total
    second = total
    top = total
    if STATISTICS:
        # if d is -inf, x is 0 and the product must be 0
        moment = tl.sum(x * tl.maximum(d, -300.0), axis=1)
        high, second = tl.reduce((d, tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)), 1, top2)
        # from x: with d, which is not needed any more, registers spill
        place = tl.where(x == tl.max(x, axis=1)[:, None], tl.arange(0, BLOCK_N)[None, :], BLOCK_N)
        top = first + tl.min(place, axis=1)
    stored, as_stored = _round_to_bfloat16(x)
    return stored, total, tl.sum(as_stored, axis=1), moment, plain, high, second, top


@triton.jit
def _store_partials(
    partial_ptr,  # at the tile's tokens, planes stride_p apart
    stride_p,
    known,
    total,
    rounded,
    moment,
    plain,
    high,
    second,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
):
    tl.store(partial_ptr, total, mask=known)
    if WRITE:
        tl.store(partial_ptr + stride_p, rounded, mask=known)
    if STATISTICS:
        tl.store(partial_ptr + 2 * stride_p, moment, mask=known)
        tl.store(partial_ptr + 3 * stride_p, plain, mask=known)
        tl.store(partial_ptr + 4 * stride_p, high, mask=known)
        tl.store(partial_ptr + 5 * stride_p, second, mask=known)


@triton.jit
def _tma_kernel(
    e_desc,  # [M, D]
    head_desc,  # [V, D]
    x_desc,  # [M, V], blocks of half a tile, out if WRITE
    u_desc,  # [M, R] bf16, read if RANKED
    b_desc,  # [V, R] bf16, read if RANKED
    bias_ptr,  # [V] fp32, read if BIASED
    label_ptr,  # [M] int32
    k_ptr,  # [M] fp32
    partial_ptr,  # [2 or 7, tiles of columns, M] fp32, planes stride_p apart, out
    stride_p,
    first_column,  # of this slice of the vocabulary
    M,
    V,
    D,
    R,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SCALE: tl.constexpr,
    FLATTEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PROCESSORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    start = tl.program_id(0)
    # a separate counter, so that a flattened loop need not keep its own counter during the epilogue
    finished = start - PROCESSORS
    for tile in tl.range(start, tiles_m * tiles_n, PROCESSORS, flatten=FLATTEN):
        tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(tl.cdiv(D, BLOCK_K)):
            a = e_desc.load([tile_m * BLOCK_M, i * BLOCK_K])
            b = head_desc.load([tile_n * BLOCK_N, i * BLOCK_K])
            if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
        if RANKED:
            for i in range(tl.cdiv(R, BLOCK_K)):
                a = u_desc.load([tile_m * BLOCK_M, i * BLOCK_K])
                b = b_desc.load([tile_n * BLOCK_N, i * BLOCK_K])
                if INTERPRETED:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                acc = tl.dot(a, b.T, acc)
        finished += PROCESSORS
        tile_m, tile_n = _tile_of(finished, tiles_m, tiles_n, GROUP)
        token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        known = token < M
        k = tl.load(k_ptr + token, mask=known, other=0.0)
        y = tl.load(label_ptr + token, mask=known, other=-1) - first_column
        column = tile_n * BLOCK_N
        # two halves, so that both epilogues use the same registers; the split moves no data
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        if BIASED:
            offset = tl.arange(0, HALF)
            left += tl.load(bias_ptr + column + offset, mask=column + offset < V, other=0.0)[None, :]
            column_r = column + HALF
            right += tl.load(bias_ptr + column_r + offset, mask=column_r + offset < V, other=0.0)[None, :]
        stored, total, rounded, moment, plain, high, second, top = _exponentials(
            left, k, y, column, V, SCALE, STATISTICS, BLOCK_M, HALF
        )
        if WRITE:
            x_desc.store([tile_m * BLOCK_M, column], stored)
        if STATISTICS:
            tops_ptr = partial_ptr + 6 * stride_p + tile_n * M + token
            tl.store(tops_ptr, (first_column + top).to(tl.float32), mask=known)
        stored, total_r, rounded_r, moment_r, plain_r, high_r, second_r, top_r = _exponentials(
            right, k, y, column + HALF, V, SCALE, STATISTICS, BLOCK_M, HALF
        )
        if WRITE:
            x_desc.store([tile_m * BLOCK_M, column + HALF], stored)
        second = merge_two_largest(high, second, high_r, second_r)
        if STATISTICS:  # replaces what the same thread has stored
            tl.store(tops_ptr, (first_column + top_r).to(tl.float32), mask=known & (high_r > high))
        _store_partials(
            partial_ptr + tile_n * M + token, stride_p, known, total + total_r, rounded + rounded_r,
            moment + moment_r, plain + plain_r, tl.maximum(high, high_r), second, STATISTICS, WRITE,
        )  # fmt: skip


@triton.jit
def _pointer_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    x_ptr,  # [M, V], tokens stride_x apart, out if WRITE
    u_ptr,  # [M, R] bf16, read if RANKED
    b_ptr,  # [V, R] bf16, read if RANKED
    bias_ptr,  # [V] fp32, read if BIASED
    label_ptr,  # [M] int32
    k_ptr,  # [M] fp32
    partial_ptr,  # [2 or 7, tiles of columns, M] fp32, planes stride_p apart, out
    stride_x,
    stride_p,
    first_column,
    M,
    V,
    D,
    R,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_N), GROUP)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_K)
    # beyond the edge, read elements that exist: the loop needs no mask, and the results are not stored
    source_token = tl.where(token < M, token, 0).to(tl.int64)[:, None]
    head_row = tl.where(column < V, column, 0).to(tl.int64)[:, None]
    e_ptrs = e_ptr + source_token * D + feature[None, :]
    head_ptrs = head_ptr + head_row * D + feature[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_D:
            a = tl.load(e_ptrs)
            b = tl.load(head_ptrs)
        else:
            a = tl.load(e_ptrs, mask=feature[None, :] < D - start, other=0.0)
            b = tl.load(head_ptrs, mask=feature[None, :] < D - start, other=0.0)
        if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc)
        e_ptrs += BLOCK_K
        head_ptrs += BLOCK_K
    if RANKED:
        for start in range(0, R, BLOCK_K):
            inside = start + feature[None, :] < R
            a = tl.load(u_ptr + source_token * R + start + feature[None, :], mask=inside, other=0.0)
            b = tl.load(b_ptr + head_row * R + start + feature[None, :], mask=inside, other=0.0)
            if INTERPRETED:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)

    known = token < M
    k = tl.load(k_ptr + token, mask=known, other=0.0)
    y = tl.load(label_ptr + token, mask=known, other=-1) - first_column
    first = tile_n * BLOCK_N
    offset = tl.arange(0, HALF)
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    if BIASED:
        left += tl.load(bias_ptr + first + offset, mask=first + offset < V, other=0.0)[None, :]
        first_r = first + HALF
        right += tl.load(bias_ptr + first_r + offset, mask=first_r + offset < V, other=0.0)[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_x + first + offset[None, :]
    stored, total, rounded, moment, plain, high, second, top = _exponentials(
        left, k, y, first, V, SCALE, STATISTICS, BLOCK_M, HALF
    )
    if WRITE:
        tl.store(x_ptrs, stored, mask=known[:, None] & (first + offset < V)[None, :])
    if STATISTICS:
        tops_ptr = partial_ptr + 6 * stride_p + tile_n * M + token
        tl.store(tops_ptr, (first_column + top).to(tl.float32), mask=known)
    stored, total_r, rounded_r, moment_r, plain_r, high_r, second_r, top_r = _exponentials(
        right, k, y, first + HALF, V, SCALE, STATISTICS, BLOCK_M, HALF
    )
    if WRITE:
        tl.store(x_ptrs + HALF, stored, mask=known[:, None] & (first + HALF + offset < V)[None, :])
    second = merge_two_largest(high, second, high_r, second_r)
    if STATISTICS:
        tl.store(tops_ptr, (first_column + top_r).to(tl.float32), mask=known & (high_r > high))
    _store_partials(
        partial_ptr + tile_n * M + token, stride_p, known, total + total_r, rounded + rounded_r,
        moment + moment_r, plain + plain_r, tl.maximum(high, high_r), second, STATISTICS, WRITE,
    )  # fmt: skip


@triton.jit
def _add_to_table(
    table_ptr,  # [11, M] fp32 at the tokens
    M,
    mask,
    total,
    rounded,
    moment,
    plain,
    high,
    second,
    top,
    FIRST: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Add the sums of a slice of the vocabulary to the table; the FIRST slice overwrites the table."""
    if not FIRST:
        total += tl.load(table_ptr + _TOTAL * M, mask=mask, other=0.0)
        if WRITE:
            rounded += tl.load(table_ptr + _ROUNDED * M, mask=mask, other=0.0)
        if STATISTICS:
            moment += tl.load(table_ptr + _MOMENT * M, mask=mask, other=0.0)
            plain += tl.load(table_ptr + _PLAIN * M, mask=mask, other=0.0)
            before = tl.load(table_ptr + _HIGH * M, mask=mask, other=float("-inf"))
            second_before = tl.load(table_ptr + _SECOND * M, mask=mask, other=float("-inf"))
            second = merge_two_largest(high, second, before, second_before)
            top = tl.where(high > before, top, tl.load(table_ptr + _TOP * M, mask=mask, other=0.0))
            high = tl.maximum(high, before)
    tl.store(table_ptr + _TOTAL * M, total, mask=mask)
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M, rounded, mask=mask)
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M, moment, mask=mask)
        tl.store(table_ptr + _PLAIN * M, plain, mask=mask)
        tl.store(table_ptr + _HIGH * M, high, mask=mask)
        tl.store(table_ptr + _SECOND * M, second, mask=mask)
        tl.store(table_ptr + _TOP * M, top, mask=mask)


@triton.jit
def _join_kernel(
    partial_ptr,  # [2 or 7, tiles, M] fp32, planes stride_p apart
    table_ptr,  # [11, M] fp32, out
    stride_p,
    M,
    tiles,
    FIRST: tl.constexpr,  # slice of the vocabulary
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the partial results of all tiles of a slice."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = token < M
    low = float("-inf")
    total = tl.zeros((BLOCK_M,), tl.float32)
    rounded = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    plain = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), low, tl.float32)
    second = tl.full((BLOCK_M,), low, tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        inside = (tile < tiles)[:, None] & known[None, :]
        ptrs = partial_ptr + tile[:, None] * M + token[None, :]
        total += tl.sum(tl.load(ptrs, mask=inside, other=0.0), axis=0)
        if WRITE:
            rounded += tl.sum(tl.load(ptrs + stride_p, mask=inside, other=0.0), axis=0)
        if STATISTICS:
            moment += tl.sum(tl.load(ptrs + 2 * stride_p, mask=inside, other=0.0), axis=0)
            plain += tl.sum(tl.load(ptrs + 3 * stride_p, mask=inside, other=0.0), axis=0)
            highs = tl.load(ptrs + 4 * stride_p, mask=inside, other=low)
            seconds = tl.load(ptrs + 5 * stride_p, mask=inside, other=low)
            tops = tl.load(ptrs + 6 * stride_p, mask=inside, other=0.0)
            high_t, second_t = tl.reduce((highs, seconds), 0, top2)
            top_t = tl.min(tl.where(highs == high_t[None, :], tops, float("inf")), axis=0)
            second = merge_two_largest(high, second, high_t, second_t)
            top = tl.where(high_t > high, top_t, top)
            high = tl.maximum(high, high_t)
    _add_to_table(
        table_ptr + token, M, known, total, rounded, moment, plain, high, second, top,
        FIRST, STATISTICS, WRITE,
    )  # fmt: skip


@triton.jit
def _exponentials_kernel(
    logits_ptr,  # [M, V] fp32 products, tokens stride_l apart
    bias_ptr,  # [V] fp32, read if BIASED
    label_ptr,  # [M] int32
    table_ptr,  # [11, M] fp32, out
    x_ptr,  # [M, V] bf16, tokens stride_x apart, out if WRITE; in the memory of the logits
    stride_l,
    stride_x,
    first_column,
    M,
    V,
    FIRST: tl.constexpr,
    BIASED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Step 2 of variant "cublas": one read of the logits, one write of x."""
    token = tl.program_id(0).to(tl.int64)
    y = tl.load(label_ptr + token) - first_column
    table_ptr += token
    k = tl.load(table_ptr + _K * M)
    low = float("-inf")
    total = tl.zeros((BLOCK_V,), tl.float32)
    rounded = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    highs = tl.full((BLOCK_V,), low, tl.float32)
    seconds = tl.full((BLOCK_V,), low, tl.float32)
    tops = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = tl.load(logits_ptr + token * stride_l + column, mask=inside, other=0.0)
        if BIASED:
            raw += tl.load(bias_ptr + column, mask=inside, other=0.0)
        d = raw * SCALE - k
        if STATISTICS:
            plain += tl.where(inside, d, 0.0)
        d = tl.where(inside & (column != y), d, low)
        x = tl.exp2(d)
        total += x
        if STATISTICS:
            moment += x * tl.maximum(d, -300.0)
            tops = tl.where(d > highs, column, tops)
            highs, seconds = top2(highs, seconds, d, low)
        if WRITE:
            stored, as_stored = _round_to_bfloat16(x)
            rounded += as_stored
            # x overwrites logits that were read, including the first half of this block
            tl.debug_barrier()
            tl.store(x_ptr + token * stride_x + column, stored, mask=inside)
    total = tl.sum(total, axis=0)
    rounded = tl.sum(rounded, axis=0)
    moment = tl.sum(moment, axis=0)
    plain = tl.sum(plain, axis=0)
    high, second = tl.reduce((highs, seconds), 0, top2)
    top = (first_column + tl.min(tl.where(highs == high, tops, V), axis=0)).to(tl.float32)
    _add_to_table(
        table_ptr, M, True, total, rounded, moment, plain, high, second, top, FIRST, STATISTICS, WRITE
    )


# ---- step 2 with the token's maximum as the reference point ----


@triton.jit
def _is_far(table_ptr, target_ptr, token, M, ignore_index):
    """Whether a loss token's reference point is out of range. An ignored token may hold NaN."""
    total = tl.load(table_ptr + _TOTAL * M + token, mask=token < M, other=0.0)
    target = tl.load(target_ptr + token, mask=token < M, other=0).to(tl.int64)
    in_range = total < _LARGEST_TOTAL  # false for NaN
    return (in_range == 0) & (target != ignore_index)


@triton.jit
def _own_maximum_kernel(
    logits_ptr,  # [M, V] fp32 products, tokens stride_l apart, read if GIVEN
    e_ptr,  # [M, D], read unless GIVEN
    head_ptr,  # [V, D], read unless GIVEN
    u_ptr,  # [M, R] fp32, read if RANKED unless GIVEN
    b_ptr,  # [V, R] fp32, read if RANKED unless GIVEN
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED and SOFTCAP
    target_ptr,  # [M] int, read unless GIVEN
    label_ptr,  # [M] int32
    table_ptr,  # [11, M] fp32, out; MEAN only if SOFTCAP, the last five planes only if STATISTICS
    x_ptr,  # [M, V], tokens stride_x apart, out if WRITE; may be in the memory of the logits
    stride_l,
    stride_x,
    M,
    V,
    D,
    R,
    ignore_index,
    GIVEN: tl.constexpr,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WRITE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    HEADROOM: tl.constexpr,  # k is this far below the maximum, in powers of 2
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if GIVEN:
        logits_ptr += token * stride_l
    elif not _is_far(table_ptr, target_ptr, token, M, ignore_index):
        return
    y = tl.load(label_ptr + token)
    if GIVEN:
        # read from the logits, so that it has the same rounding as the other logits
        raw_y = tl.load(logits_ptr + y)
        if BIASED:
            raw_y += tl.load(bias_ptr + y)
        z_y = final_logits(raw_y, SOFTCAP, LOGIT_SCALE)
        tl.store(table_ptr + _Z_Y * M + token, z_y)
        # every thread reads the target's logit before any thread overwrites it
        tl.debug_barrier()
    else:
        z_y = tl.load(table_ptr + _Z_Y * M + token)
    e_ptr += token * D
    if RANKED:
        u_ptr += token * R
    high = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), 0, tl.int32)
    mean = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        z = _final_block(
            logits_ptr, e_ptr, head_ptr, u_ptr, b_ptr, bias_ptr, column, inside, D, R,
            GIVEN, BIASED, RANKED, SOFTCAP, LOGIT_SCALE, BLOCK_V, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        if SOFTCAP != 0.0:
            if WEIGHTED:
                mean += z * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
            else:
                mean += tl.where(inside, z, 0.0)
        others = tl.where(inside & (column != y), z, float("-inf"))
        if STATISTICS:
            block_high, block_second = two_largest(others)
            place = tl.min(tl.where(others == block_high, column, V), axis=0)
            top = tl.where(block_high > high, place, top)
            second = merge_two_largest(high, second, block_high, block_second)
        high = tl.maximum(high, tl.max(others, axis=0))
    k = tl.maximum(high, z_y) * _LOG2E - HEADROOM
    k = tl.where(k == float("-inf"), 0.0, k)
    total = tl.zeros((BLOCK_V,), tl.float32)
    rounded = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        z = _final_block(
            logits_ptr, e_ptr, head_ptr, u_ptr, b_ptr, bias_ptr, column, inside, D, R,
            GIVEN, BIASED, RANKED, SOFTCAP, LOGIT_SCALE, BLOCK_V, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        d = z * _LOG2E - k
        x = tl.where(inside & (column != y), tl.exp2(d), 0.0)
        total += x
        if STATISTICS:
            moment += tl.where(x > 0.0, x * d, 0.0)
            plain += tl.where(inside, d, 0.0)
        if WRITE:
            # 16-bit x overwrites logits that were read, including the first half of this block
            tl.debug_barrier()
            as_stored = x.to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + token * stride_x + column, as_stored, mask=inside)
            rounded += as_stored.to(tl.float32)
    table_ptr += token
    tl.store(table_ptr + _K * M, k)
    tl.store(table_ptr + _D_Y * M, z_y * _LOG2E - k)
    tl.store(table_ptr + _TOTAL * M, tl.sum(total, axis=0))
    if WRITE:
        tl.store(table_ptr + _ROUNDED * M, tl.sum(rounded, axis=0))
    if SOFTCAP != 0.0:
        tl.store(table_ptr + _MEAN * M, tl.sum(mean, axis=0) / V)
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M, tl.sum(moment, axis=0))
        tl.store(table_ptr + _PLAIN * M, tl.sum(plain, axis=0))
        tl.store(table_ptr + _HIGH * M, high * _LOG2E - k)
        tl.store(table_ptr + _SECOND * M, second * _LOG2E - k)
        tl.store(table_ptr + _TOP * M, top.to(tl.float32))


@triton.jit
def _final_block(
    logits_ptr,
    e_ptr,
    head_ptr,
    u_ptr,
    b_ptr,
    bias_ptr,
    column,
    inside,
    D,
    R,
    GIVEN: tl.constexpr,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the final logits of one token at a block of columns; compute them again unless GIVEN."""
    if GIVEN:
        raw = tl.load(logits_ptr + column, mask=inside, other=0.0)
    else:
        raw = _dot_block(e_ptr, head_ptr, column, inside, D, BLOCK_V, BLOCK_D)
        if RANKED:
            raw += _dot_block(u_ptr, b_ptr, column, inside, R, BLOCK_V, BLOCK_R)
    if BIASED:
        raw += tl.load(bias_ptr + column, mask=inside, other=0.0)
    return final_logits(raw, SOFTCAP, LOGIT_SCALE)


@triton.jit
def _dot_block(left_ptr, right_ptr, column, inside, D, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return one token's left [D] times a block of rows of the matrix right [V, D]."""
    acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        left = tl.load(left_ptr + feature, mask=feature < D, other=0.0).to(tl.float32)
        ptrs = right_ptr + column.to(tl.int64)[:, None] * D + feature[None, :]
        right = tl.load(ptrs, mask=inside[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)
        acc += left[None, :] * right
    return tl.sum(acc, axis=1)


@triton.jit
def _far_tokens_kernel(
    e_ptr,  # [M, D]
    head_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read if BIASED
    target_ptr,  # [M] int
    label_ptr,  # [M] int32
    classes_ptr,  # [M, K] int64, read if BLOCK_C
    probability_ptr,  # [M, K] fp32, read if BLOCK_C
    table_ptr,  # [11, M] fp32, out
    scratch_ptr,  # [programs, V] fp32
    product_ptr,  # [M, D] fp32, out: x C
    M,
    V,
    D,
    K,
    ignore_index,
    BLOCK_C: tl.constexpr,
    BIASED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps 2 and 3 for far tokens, if x is not kept.

    One program computes a complete far token, which is slow. Other tokens cost one load.
    """
    scratch_ptr += tl.program_id(0).to(tl.int64) * V
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        candidates = block * BLOCK_M + tl.arange(0, BLOCK_M)
        far = _is_far(table_ptr, target_ptr, candidates, M, ignore_index)
        if tl.max(far.to(tl.int32), axis=0) > 0:
            for i in range(0, BLOCK_M):
                token = tl.zeros((), tl.int64) + (block * BLOCK_M + i)  # int64, since it is multiplied by D
                if _is_far(table_ptr, target_ptr, token, M, ignore_index):
                    _far_token(
                        e_ptr + token * D, head_ptr, bias_ptr, tl.load(label_ptr + token), classes_ptr,
                        probability_ptr, token, table_ptr + token, scratch_ptr, product_ptr + token * D,
                        M, V, D, K, BLOCK_C, BIASED, STATISTICS, SCALE, BLOCK_V, BLOCK_D,
                    )  # fmt: skip


@triton.jit
def _far_token(
    e_ptr,
    head_ptr,
    bias_ptr,
    y,
    classes_ptr,
    probability_ptr,
    token,
    table_ptr,
    scratch_ptr,
    product_ptr,
    M,
    V,
    D,
    K,
    BLOCK_C: tl.constexpr,
    BIASED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    low = float("-inf")
    z_y = tl.load(table_ptr + _Z_Y * M) * _LOG2E
    highs = tl.full((BLOCK_V,), low, tl.float32)
    seconds = tl.full((BLOCK_V,), low, tl.float32)
    tops = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = _dot_block(e_ptr, head_ptr, column, inside, D, BLOCK_V, BLOCK_D)
        if BIASED:
            raw += tl.load(bias_ptr + column, mask=inside, other=0.0)
        z = raw * SCALE
        tl.store(scratch_ptr + column, z, mask=inside)
        others = tl.where(inside & (column != y), z, low)
        if STATISTICS:
            tops = tl.where(others > highs, column, tops)
        highs, seconds = top2(highs, seconds, others, low)
    high, second = tl.reduce((highs, seconds), 0, top2)
    k = tl.maximum(high, z_y)
    k = tl.where(k == low, 0.0, k)
    total = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    tl.debug_barrier()
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        d = tl.load(scratch_ptr + column, mask=inside, other=0.0) - k
        x = tl.where(inside & (column != y), tl.exp2(d), 0.0)
        total += x
        if STATISTICS:
            moment += tl.where(x > 0.0, x * d, 0.0)
            plain += tl.where(inside, d, 0.0)
        tl.debug_barrier()  # several threads have the same column
        tl.store(scratch_ptr + column, x, mask=inside)
    tl.debug_barrier()
    if BLOCK_C > 0:
        _clear(scratch_ptr, classes_ptr + token * K, probability_ptr + token * K, 0, V, K, BLOCK_C)
        tl.debug_barrier()
    for start_d in range(0, D, BLOCK_D):
        feature = start_d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            inside = column < V
            x = tl.load(scratch_ptr + column, mask=inside, other=0.0)
            ptrs = head_ptr + column.to(tl.int64)[:, None] * D + feature[None, :]
            c = tl.load(ptrs, mask=inside[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)
            acc += x[:, None] * c
        tl.store(product_ptr + feature, tl.sum(acc, axis=0), mask=feature < D)
    total = tl.sum(total, axis=0)
    tl.store(table_ptr + _K * M, k)
    tl.store(table_ptr + _D_Y * M, z_y - k)
    tl.store(table_ptr + _TOTAL * M, total)
    tl.store(table_ptr + _ROUNDED * M, total)
    if STATISTICS:
        tl.store(table_ptr + _MOMENT * M, tl.sum(moment, axis=0))
        tl.store(table_ptr + _PLAIN * M, tl.sum(plain, axis=0))
        tl.store(table_ptr + _HIGH * M, high - k)
        tl.store(table_ptr + _SECOND * M, second - k)
        top = tl.min(tl.where(highs == high, tops, V), axis=0)
        tl.store(table_ptr + _TOP * M, top.to(tl.float32))
    tl.debug_barrier()


@triton.jit
def _softcap_gradient_kernel(
    logits_ptr,  # [M, V] fp32 products, tokens stride_l apart
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED
    label_ptr,  # [M] int32
    smoothing_ptr,  # [M]
    table_ptr,  # [11, M]
    factors_ptr,  # [7, M]
    x_ptr,  # [M, V], tokens stride_x apart, out: the gradient of raw logits; may be in their memory
    stride_l,
    stride_x,
    M,
    V,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store (rate x - s c / V) times the slope of the softcap in each column."""
    token = tl.program_id(0).to(tl.int64)
    y = tl.load(label_ptr + token)
    spread = tl.load(smoothing_ptr + token) / V
    k = tl.load(table_ptr + _K * M + token)
    rate = tl.load(factors_ptr + 3 * M + token)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        raw = tl.load(logits_ptr + token * stride_l + column, mask=inside, other=0.0)
        if BIASED:
            raw += tl.load(bias_ptr + column, mask=inside, other=0.0)
        z = final_logits(raw, SOFTCAP, LOGIT_SCALE)
        q = spread
        if WEIGHTED:
            q = spread * tl.load(class_weight_ptr + column, mask=inside, other=0.0)
        dz = (rate * tl.exp2(z * _LOG2E - k) - q) * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
        dz = tl.where(column == y, 0.0, dz)
        tl.debug_barrier()
        tl.store(x_ptr + token * stride_x + column, dz.to(x_ptr.dtype.element_ty), mask=inside)


# ---- the classes of a target of several classes ----


@triton.jit
def _classes_kernel(
    logits_ptr,  # [M, V] fp32 products, tokens stride_l apart, read if GIVEN
    e_ptr,  # [M, D], read unless GIVEN
    head_ptr,  # [V, D], read unless GIVEN
    u_ptr,  # [M, R] fp32, read if RANKED unless GIVEN
    b_ptr,  # [V, R] fp32, read if RANKED unless GIVEN
    bias_ptr,  # [V] fp32, read if BIASED
    class_weight_ptr,  # [V] fp32, read if WEIGHTED
    label_ptr,  # [M] int32
    classes_ptr,  # [M, K] int64
    probability_ptr,  # [M, K] fp32
    table_ptr,  # [11, M] fp32, read unless GIVEN
    z_ptr,  # [M, K] fp32, out: the logits
    sums_ptr,  # [5, M] fp32, out
    stride_l,
    M,
    D,
    R,
    K,
    GIVEN: tl.constexpr,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVERY: tl.constexpr,  # also the logits of classes of probability 0
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the logits of the target's classes and the sums over them."""
    token = tl.program_id(0).to(tl.int64)
    classes_ptr += token * K
    probability_ptr += token * K
    z_ptr += token * K
    y = tl.load(label_ptr + token).to(tl.int64)
    if GIVEN:
        raw_y = tl.load(logits_ptr + token * stride_l + y)
        if BIASED:
            raw_y += tl.load(bias_ptr + y)
        z_y = final_logits(raw_y, SOFTCAP, LOGIT_SCALE)
    else:
        z_y = tl.load(table_ptr + _Z_Y * M + token)
    tl.store(z_ptr, z_y)
    mass = tl.load(probability_ptr)
    weight = mass
    if WEIGHTED:
        weight = mass * tl.load(class_weight_ptr + y)
    label_weight = weight
    excess = tl.zeros((), tl.float32)
    plain_excess = tl.zeros((), tl.float32)
    other_weight = tl.zeros((), tl.float32)
    for i in range(1, K):
        p = tl.load(probability_ptr + i)
        column = tl.load(classes_ptr + i)
        if (p != 0.0) | EVERY:
            if GIVEN:
                raw = tl.load(logits_ptr + token * stride_l + column)
            else:
                raw = _dot(e_ptr + token * D, head_ptr + column * D, D, BLOCK_D)
                if RANKED:
                    raw += _dot(u_ptr + token * R, b_ptr + column * R, R, BLOCK_R)
            if BIASED:
                raw += tl.load(bias_ptr + column)
            z = final_logits(raw, SOFTCAP, LOGIT_SCALE)
            tl.store(z_ptr + i, z)
            w = p
            if WEIGHTED:
                w *= tl.load(class_weight_ptr + column)
            # if the label's logit is -inf, nll is infinite already
            below = tl.where(p == 0.0, 0.0, tl.where(z_y == float("-inf"), 0.0, z_y - z))
            other_weight += w
            mass += p
            excess += w * below
            plain_excess += p * below
    sums_ptr += token
    tl.store(sums_ptr + _WEIGHT * M, label_weight + other_weight)
    tl.store(sums_ptr + _OTHER_WEIGHT * M, other_weight)
    tl.store(sums_ptr + _EXCESS * M, excess)
    tl.store(sums_ptr + _MASS * M, mass)
    tl.store(sums_ptr + _PLAIN_EXCESS * M, plain_excess)


@triton.jit
def _dot(left_ptr, right_ptr, D, BLOCK_D: tl.constexpr):
    """Return the inner product of two vectors [D]."""
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        left = tl.load(left_ptr + feature, mask=feature < D, other=0.0).to(tl.float32)
        acc += left * tl.load(right_ptr + feature, mask=feature < D, other=0.0).to(tl.float32)
    return tl.sum(acc, axis=0)


@triton.jit
def _clear(x_ptr, classes_ptr, probability_ptr, first_column, V, K, BLOCK_C: tl.constexpr):
    """Set x [V] to 0 in the columns of a token's other classes, which `_class_factors_kernel` adds."""
    entry = tl.arange(0, BLOCK_C)
    column = tl.load(classes_ptr + entry, mask=entry < K, other=0) - first_column
    p = tl.load(probability_ptr + entry, mask=entry < K, other=0.0)
    counts = (entry > 0) & (p != 0.0) & (column >= 0) & (column < V)
    tl.store(x_ptr + column, tl.zeros((BLOCK_C,), x_ptr.dtype.element_ty), mask=counts)


@triton.jit
def _clear_kernel(
    x_ptr,  # [M, V], tokens stride_x apart, out
    classes_ptr,  # [M, K] int64
    probability_ptr,  # [M, K] fp32
    stride_x,
    first_column,
    V,
    K,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    _clear(
        x_ptr + token * stride_x, classes_ptr + token * K, probability_ptr + token * K, first_column, V, K,
        BLOCK_C,
    )  # fmt: skip


@triton.jit
def _class_factors_kernel(
    classes_ptr,  # [M, K] int64
    probability_ptr,  # [M, K] fp32
    z_ptr,  # [M, K] fp32
    class_weight_ptr,  # [V] fp32, read if WEIGHTED
    table_ptr,  # [11, M] fp32
    factors_ptr,  # [7, M] fp32
    smoothing_ptr,  # [M]
    selected_ptr,  # [M] int, target
    index_ptr,  # [M] int64, tokens of dprobabilities
    weight_ptr,  # [M], read if REWEIGHTED
    factor_ptr,  # [M, K] fp32, out: the factor of each class's row of the head; 0 for the label and padding
    dprobability_ptr,  # [N, K] fp32, out if PROBABILITY_GRAD
    M,
    V,
    K,
    ignore_index,
    WEIGHTED: tl.constexpr,
    REWEIGHTED: tl.constexpr,
    PROBABILITY_GRAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the factors of the other classes, and the gradient of the probabilities."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK_C)
    known = entry < K
    p = tl.load(probability_ptr + token * K + entry, mask=known, other=0.0)
    z = tl.load(z_ptr + token * K + entry, mask=known & ((p != 0.0) | PROBABILITY_GRAD), other=0.0)
    c = tl.full((BLOCK_C,), 1.0, tl.float32)
    if WEIGHTED:
        column = tl.load(classes_ptr + token * K + entry, mask=known, other=0)
        c = tl.load(class_weight_ptr + column)
    s = tl.load(smoothing_ptr + token)
    rate = tl.load(factors_ptr + 4 * M + token)
    a = tl.load(factors_ptr + 5 * M + token)
    k = tl.load(table_ptr + _K * M + token)
    x = tl.exp2(z * _LOG2E - k)
    factor = rate * x - (1.0 - s) * p * c
    if SOFTCAP != 0.0:
        factor = (factor - s * c / V) * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
    counts = (entry > 0) & (p != 0.0)
    tl.store(factor_ptr + token * K + entry, tl.where(counts, a * factor, 0.0), mask=known)
    if PROBABILITY_GRAD:
        z_y = tl.load(table_ptr + _Z_Y * M + token)
        lse = (k + tl.log2(tl.load(table_ptr + _TOTAL * M + token))) * _LN2  # if z_y is -inf
        dp = tl.where(z_y == float("-inf"), lse - z, tl.load(factors_ptr + 6 * M + token) + (z_y - z))
        dp *= (1.0 - s) * c
        if REWEIGHTED:
            dp *= tl.load(weight_ptr + token)
        dp = tl.where(tl.load(selected_ptr + token) != ignore_index, dp, 0.0)
        tl.store(dprobability_ptr + tl.load(index_ptr + token) * K + entry, dp, mask=known)


# ---- loss, and the factors of the gradient ----


@triton.jit
def _finish_kernel(
    table_ptr,  # [11, M]
    index_ptr,  # [M] int64, tokens of the results
    target_ptr,  # [M] int
    label_ptr,  # [M] int32
    nan_mask_ptr,  # [M]
    smoothing_ptr,  # [M]
    token_scale_ptr,  # [M]
    weight_ptr,  # [M], read if REWEIGHTED: factor of token_scale that was computed from the statistics
    class_weight_ptr,  # [V], read if WEIGHTED
    class_mean_ptr,  # [1], read if WEIGHTED
    sums_ptr,  # [5, M], read if SPARSE
    loss_ptr,  # [N], out
    state_ptr,  # [2, N], out: loss for a token_scale of 1, and its derivative by the smoothing
    statistics_ptr,  # [8, M], planes stride_s apart, out if STATISTICS
    factors_ptr,  # [7, M], out: factors of x C, C_y and cbar, K / (total + t); for `_class_factors_kernel`
    # the same without the rounding of x, the token's scale, nll
    stride_s,
    N,
    M,
    V,
    ignore_index,
    REWEIGHTED: tl.constexpr,
    SPARSE: tl.constexpr,
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
    d_y = tl.load(table_ptr + _D_Y * M, mask=known, other=0.0)
    total = tl.load(table_ptr + _TOTAL * M, mask=known, other=1.0)
    s = tl.load(smoothing_ptr + token, mask=known, other=0.0)
    target = tl.load(target_ptr + token, mask=known, other=0).to(tl.int64)
    selected = target != ignore_index
    nan_mask = tl.load(nan_mask_ptr + token, mask=known, other=0.0)
    c_y = tl.full((BLOCK,), 1.0, tl.float32)
    c_mean = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        c_y = tl.load(
            class_weight_ptr + tl.load(label_ptr + token, mask=known, other=0), mask=known, other=0.0
        )
        c_mean = tl.load(class_mean_ptr + tl.zeros((BLOCK,), tl.int32))
    smoothing_term = tl.load(table_ptr + _MEAN * M, mask=known, other=0.0) - c_mean * z_y

    t = tl.exp2(d_y)
    total_with_target = total + t
    lse = (k + tl.log2(total_with_target)) * _LN2
    # log(1 + total / t); total and t may overflow or underflow
    log_odds = (tl.log2(total) - d_y) * _LN2
    nll = tl.maximum(log_odds, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(log_odds)))
    rest = total / total_with_target  # 1 - p_y, without the subtraction

    weight_sum = c_y
    excess = tl.zeros((BLOCK,), tl.float32)
    log_prob = -nll
    if SPARSE:
        sums_ptr += token
        weight_sum = tl.load(sums_ptr + _WEIGHT * M, mask=known, other=0.0)
        excess = tl.load(sums_ptr + _EXCESS * M, mask=known, other=0.0)
        mass = tl.load(sums_ptr + _MASS * M, mask=known, other=0.0)
        log_prob = -(mass * nll + tl.load(sums_ptr + _PLAIN_EXCESS * M, mask=known, other=0.0))
    unit, coefficient, at_target, ds = token_terms(
        nll, lse, smoothing_term, s, weight_sum, excess, c_mean, Z_LOSS
    )
    if SPARSE:
        at_target += (1.0 - s) * tl.load(sums_ptr + _OTHER_WEIGHT * M, mask=known, other=0.0)
    at_target -= coefficient * rest
    rate = coefficient / total_with_target
    if SPARSE:
        tl.store(factors_ptr + 4 * M + token, rate, mask=known)
        tl.store(factors_ptr + 6 * M + token, nll + nan_mask, mask=known)
    if WRITE:
        # normalized by the sum of x as stored, which cancels the rounding of x if one class dominates
        rounded = tl.load(table_ptr + _ROUNDED * M, mask=known, other=1.0)
        rate = tl.where(rounded > 0.0, coefficient * rest / rounded, rate)

    a = tl.load(token_scale_ptr + token, mask=known, other=0.0) + nan_mask
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if REWEIGHTED:
        weight = tl.load(weight_ptr + token, mask=known, other=0.0)
    index = tl.load(index_ptr + token, mask=known, other=0)
    tl.store(loss_ptr + index, tl.where(selected, a * unit, 0.0), mask=known)
    state_ptr += index
    tl.store(state_ptr, tl.where(selected, (unit + nan_mask) * weight, 0.0), mask=known)
    tl.store(state_ptr + N, tl.where(selected, (ds + nan_mask) * weight, 0.0), mask=known)

    a = a * LOGIT_SCALE
    factors_ptr += token
    if SPARSE:
        tl.store(factors_ptr + 5 * M, a, mask=known)
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
        moment += tl.where(t > 0.0, t * d_y, 0.0)
        others = tl.load(table_ptr + _HIGH * M, mask=known, other=0.0)
        second = tl.load(table_ptr + _SECOND * M, mask=known, other=0.0)
        plain = tl.load(table_ptr + _PLAIN * M, mask=known, other=0.0)
        top = tl.load(table_ptr + _TOP * M, mask=known, other=0.0)
        largest = tl.maximum(d_y, others)
        second = merge_two_largest(d_y, float("-inf"), others, second)
        store_statistics(
            statistics_ptr + token, stride_s, known, selected & (target >= 0) & (target < V),
            k * _LN2, total_with_target, log_prob, moment * _LN2, largest * _LN2, second * _LN2,
            (k + plain / V) * _LN2, d_y >= others, target.to(tl.float32), top,
        )  # fmt: skip


# ---- gradients ----


@triton.jit
def _input_gradient_kernel(
    product_ptr,  # [M, D] fp32: x C
    head_ptr,  # [V, D]
    column_mean_ptr,  # [D] fp32, read unless CAPPED
    through_ptr,  # [M, D] fp32, read if RANKED: the gradient through an adapter
    target_ptr,  # [M] int
    label_ptr,  # [M] int32
    index_ptr,  # [M] int64, tokens of dinput
    factors_ptr,  # [7, M]
    classes_ptr,  # [M, K] int64, read if SPARSE
    factor_ptr,  # [M, K] fp32, read if SPARSE
    dinput_ptr,  # [N, D], out
    M,
    D,
    K,
    ignore_index,
    RANKED: tl.constexpr,
    SPARSE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    selected = tl.load(target_ptr + token).to(tl.int64) != ignore_index
    y = tl.load(label_ptr + token).to(tl.int64)
    out = tl.load(index_ptr + token)
    of_product = tl.load(factors_ptr + token)
    of_target = tl.load(factors_ptr + M + token)
    of_mean = tl.load(factors_ptr + 2 * M + token)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = feature < D
        de = of_product * tl.load(product_ptr + token * D + feature, mask=inside, other=0.0)
        de += of_target * tl.load(head_ptr + y * D + feature, mask=inside, other=0.0).to(tl.float32)
        if not CAPPED:
            de -= of_mean * tl.load(column_mean_ptr + feature, mask=inside, other=0.0)
        if RANKED:
            de += tl.load(through_ptr + token * D + feature, mask=inside, other=0.0)
        if SPARSE:
            for i in range(1, K):
                factor = tl.load(factor_ptr + token * K + i)
                if factor != 0.0:  # true for NaN
                    row = head_ptr + tl.load(classes_ptr + token * K + i) * D
                    de += factor * tl.load(row + feature, mask=inside, other=0.0).to(tl.float32)
        de = tl.where(selected, de, 0.0)  # x C may be NaN
        tl.store(dinput_ptr + out * D + feature, de.to(dinput_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_targets_kernel(
    hidden_ptr,  # [M, D]
    factor_ptr,  # [M K] fp32
    sorted_ptr,  # [M K], labels in ascending order; V for an entry that does not count
    order_ptr,  # [M K], the entries in the order of the labels
    out_ptr,  # [V, D] fp32: factor times hidden is added at the labels
    entries,  # M K
    V,
    D,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the targets' part of the head's gradient; one program per label keeps the order of sums fixed."""
    place = tl.program_id(0)
    label = tl.load(sorted_ptr + place).to(tl.int64)
    if tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1) == label:
        return  # not the first entry of its label
    if label >= V:
        return
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = feature < D
    out_ptrs = out_ptr + label * D + feature
    acc = tl.load(out_ptrs, mask=inside, other=0.0)
    mine = label < V
    while mine:
        # most labels have one entry: the loads of the others are off, and cost little
        for i in tl.static_range(BLOCK_T):
            mine = tl.load(sorted_ptr + place + i, mask=place + i < entries, other=-1) == label
            entry = tl.load(order_ptr + place + i, mask=mine, other=0)
            factor = tl.load(factor_ptr + entry, mask=mine, other=0.0)
            ptrs = hidden_ptr + (entry // K).to(tl.int64) * D + feature
            acc += factor * tl.load(ptrs, mask=inside & mine, other=0.0).to(tl.float32)
        place += BLOCK_T
    tl.store(out_ptrs, acc, mask=inside)


@triton.jit
def _scale_kernel(
    matrix_ptr,  # [M, D]
    factor_ptr,  # [M], stride_f apart; 0 for one factor
    out_ptr,  # [M, D], out
    stride_f,
    D,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + token * stride_f).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        row = tl.load(matrix_ptr + token * D + feature, mask=feature < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * D + feature, (row * factor).to(out_ptr.dtype.element_ty), mask=feature < D)


def scale_matrix(matrix: Tensor, factor: Tensor, out: Tensor) -> None:
    """Store matrix [M, D] times factor [M] or [1] in out [M, D], both contiguous; computed in float32."""
    rows, features = matrix.shape
    if out.numel():
        block_d = min(triton.next_power_of_2(features), 4_096)
        _scale_kernel[(rows,)](
            matrix, factor, out, factor.stride(0) if len(factor) > 1 else 0, features,
            BLOCK_D=block_d, num_warps=max(1, min(8, block_d // 512)),
        )  # fmt: skip


@triton.jit
def _column_sum_kernel(
    matrix_ptr,  # [V, D]
    class_weight_ptr,  # [V] fp32, read if WEIGHTED
    out_ptr,  # [programs along V, D] fp32
    V,
    D,
    WEIGHTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = feature < D
    acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_V, V, tl.num_programs(0) * BLOCK_V):
        row = start + tl.arange(0, BLOCK_V)
        ptrs = matrix_ptr + row.to(tl.int64)[:, None] * D + feature[None, :]
        block = tl.load(ptrs, mask=(row < V)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            block *= tl.load(class_weight_ptr + row, mask=row < V, other=0.0)[:, None]
        acc += block
    tl.store(out_ptr + tl.program_id(0) * D + feature, tl.sum(acc, axis=0), mask=inside)


def column_mean(matrix: Tensor, class_weight: Tensor | None) -> Tensor:
    """Return the mean over classes of c_v times matrix [V, D], in float32."""
    (classes, features), programs = matrix.shape, min(256, triton.cdiv(matrix.shape[0], 32))
    partial = matrix.new_empty((programs, features), dtype=torch.float32)
    block_d = min(128, triton.next_power_of_2(features))
    _column_sum_kernel[(programs, triton.cdiv(features, block_d))](
        matrix, class_weight, partial, classes, features,
        WEIGHTED=class_weight is not None, BLOCK_V=32, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return partial.sum(0) / classes


# ---- implementation of the operator ----


def linear_cross_entropy(
    inputs: LinearInputs,
    spec: LinearSpec,
    token_fns: TokenFns | None = None,
    shards: Shards | None = None,
) -> LinearOutputs:
    """Implement `ops.linear_cross_entropy_op`. Ignored tokens are dropped before the first GEMM.

    `functional` has already rejected `gradient_filter` and process groups.
    """
    outputs = LinearOutputs.empty(inputs, spec)
    head = _Head.read(inputs, spec)  # launched before the host waits for the number of loss tokens
    tokens = select_loss_tokens(inputs.target, spec.ignore_index, spec.max_loss_tokens)
    count = len(tokens.indices)
    outputs.fill_ignored() if count < len(inputs.target) else outputs.zero_summed()
    if count == 0:
        outputs.dlinear_weight.zero_()
        return outputs
    variant = choose_variant(inputs, spec, head.weight)
    run = (_Exact if variant == "exact" else _FixedReference)(
        inputs, spec, outputs, head, tokens, token_fns, variant
    )
    for part in _chunks(count, run.chunk_tokens):
        run.compute(part)
    run.complete()
    mark_missed(
        tokens, inputs.target, spec.ignore_index, outputs.loss, outputs.state.T, outputs.dinput,
        outputs.dprobabilities,
    )  # fmt: skip
    return outputs


def choose_variant(inputs: LinearInputs, spec: LinearSpec, weight: Tensor) -> Variant:
    """Return the variant of a call; `VARIANT` selects among those that are possible.

    Args:
        inputs: the operator's tensors.
        spec: the operator's scalars.
        weight: the head, contiguous. A view into a flat buffer may have an alignment of 2 bytes.
    """
    if inputs.input.dtype != torch.bfloat16 or spec.softcap or spec.bias_grad or spec.precision == "fast":
        return "exact"
    if VARIANT in ("exact", "cublas"):
        return VARIANT
    features = weight.shape[1]
    described = features % 8 == 0 and weight.data_ptr() % 16 == 0  # the requirements of a descriptor
    if VARIANT != "pointer" and described and Platform.of(weight).tma:
        return "tma"
    # the pointer kernel loads rows of a matrix that are not aligned to 16 bytes one element at a time
    return "pointer" if features % 16 == 0 else "cublas"


class _Head(NamedTuple):
    """The head in the form that kernels read."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] fp32
    lora_a: Tensor | None  # [r, D] fp32
    lora_b: Tensor | None  # [V, r] fp32
    class_weight: Tensor | None  # [V] fp32
    class_mean: Tensor | None  # [1]
    # weighted means over the classes, None with a softcap
    weight_mean: Tensor | None  # [D]
    merged_mean: Tensor | None  # [D], with the adapter
    bias_mean: Tensor | None  # [1]
    lora_b_mean: Tensor  # [r]
    bias_high: Tensor | None  # [1], the largest bias, scaled

    @classmethod
    def read(cls, inputs: LinearInputs, spec: LinearSpec) -> "_Head":
        def wide(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(torch.float32).contiguous()

        class_weight, weight = inputs.class_weight, inputs.linear_weight.detach().contiguous()
        bias, a, b = wide(inputs.linear_bias), wide(inputs.lora_a), wide(inputs.lora_b)
        weight_mean = merged_mean = bias_mean = None
        b_mean = weight.new_zeros(inputs.rank, dtype=torch.float32)
        if not spec.softcap:
            weight_mean = merged_mean = column_mean(weight, class_weight)
            if bias is not None:
                bias_mean = column_mean(bias[:, None], class_weight)
            if a is not None and b is not None:
                b_mean = column_mean(b, class_weight)
                merged_mean = weight_mean + spec.lora_scale * (b_mean @ a)
        class_mean = None if class_weight is None else class_weight.mean()
        bias_high = None if bias is None else (bias * spec.logit_scale).amax().reshape(1)
        return cls(
            weight, bias, a, b, class_weight, class_mean,
            weight_mean, merged_mean, bias_mean, b_mean, bias_high,
        )  # fmt: skip

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


class _Classes(NamedTuple):
    """The classes of a chunk's targets of several classes."""

    column: Tensor  # [M, K] int64; the first is the label's
    probability: Tensor  # [M, K]
    z: Tensor  # [M, K], their logits
    sums: Tensor  # [5, M]
    factor: Tensor  # [M, K], of each class's row of the head in the gradient; 0 for the label

    @property
    def width(self) -> int:
        """K."""
        return self.column.shape[1]

    @property
    def block(self) -> int:
        return _block_r(self.width)


class _Chunk(NamedTuple):
    """A chunk of the loss tokens."""

    part: slice  # of the loss tokens
    hidden: Tensor  # [M, D]
    label: Tensor  # [M] int32, a column in [0, V) for every token
    nan_mask: Tensor  # [M]
    table: Tensor  # [11, M], shared by kernels
    factors: Tensor  # [7, M], see `_finish_kernel`
    lora_u: Tensor | None  # [M, r] fp32, scale e A^T
    classes: _Classes | None  # None for class indices

    @property
    def class_columns(self) -> Tensor:
        """The columns of the target's classes, [M, K] int64; that of the label is the first."""
        return self.label[:, None].long() if self.classes is None else self.classes.column

    @property
    def of_classes(self) -> Tensor:
        """The factor of each class's row of the head in the gradient, [M, K]."""
        of_label = self.factors[1][:, None]
        return of_label if self.classes is None else torch.cat([of_label, self.classes.factor[:, 1:]], 1)

    def by_class(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the columns of the target's classes and their factors, [M] each."""
        columns, factors = self.class_columns, self.of_classes
        # padding would add to class 0 again and again, which is slow on a GPU
        columns = torch.where(factors == 0, columns[:, :1], columns)
        yield from zip(columns.T, factors.T, strict=True)


class _Made(NamedTuple):
    """The results of step 2 that gradients need."""

    x: Tensor | None  # [M, V], if it is kept
    product: Tensor | None  # [M, D] fp32, x C, if it is computed already
    logits: Tensor | None  # [M, V] fp32, in whose memory x is stored with a softcap


class _Run(ABC):
    """One call of the operator, with the buffers and sums that its chunks share."""

    chunk_tokens: int  # number of tokens at a time
    logits_given: bool  # whether `_make_x` computes the logits of a chunk, among them the classes' logits

    def __init__(
        self,
        inputs: LinearInputs,
        spec: LinearSpec,
        outputs: LinearOutputs,
        head: _Head,
        tokens: LossTokens,
        token_fns: TokenFns | None,
        variant: Variant,
    ) -> None:
        self.inputs, self.spec, self.outputs, self.variant = inputs, spec, outputs, variant
        self.head, self.tokens, self.token_fns = head, tokens, token_fns
        self.statistics = spec.statistics or token_fns is not None
        self.all_selected = len(tokens.indices) == len(inputs.target)  # nothing to gather
        self.target = self._gather(inputs.target)
        self.smoothing = tokens.zero_ignored(self._gather(inputs.smoothing))
        self.scale = tokens.zero_ignored(self._gather(inputs.token_scale))
        if token_fns is not None:  # values are replaced below, and these may be the operator's inputs
            self.smoothing, self.scale = self.smoothing.clone(), self.scale.clone()
        packed_tokens = len(tokens.indices) if self.statistics else 0
        self.packed = inputs.input.new_zeros((LINEAR_STATISTICS, packed_tokens), dtype=torch.float32)
        # the rank-one part of dB: sum of s a u
        self.smoothed_u = inputs.input.new_zeros(inputs.rank, dtype=torch.float32)
        self._allocate()

    @abstractmethod
    def _allocate(self) -> None:
        """Choose the size of chunks and allocate their buffers."""

    def _gather(self, tensor: Tensor, part: slice | None = None) -> Tensor:
        """Return the selected tokens of [N, ...], as a view if all tokens are selected."""
        if self.all_selected:
            return tensor if part is None else tensor[part]
        return tensor[self.tokens.indices if part is None else self.tokens.indices[part]]

    def _hidden(self, part: slice) -> Tensor:
        """Return the hidden states of the selected tokens, [M, D], contiguous and aligned to 16 bytes.

        An ignored token may hold NaN. It is 0 here if a gradient is a sum over tokens.
        """
        source, tokens = self.inputs.input.detach(), self.tokens
        sums = self.spec.head_grad or self.spec.bias_grad or self.inputs.rank > 0
        masked = tokens.selected is not None and sums
        if self.all_selected and not masked:
            hidden = source[part].contiguous()
            # a view into a flat buffer may have an alignment of 2 bytes
            return hidden.clone() if hidden.data_ptr() % 16 else hidden
        if source.stride(1) != 1:
            source = source.contiguous()
        index, features = tokens.indices[part], source.shape[1]
        hidden = source.new_empty((len(index), features))
        _select_kernel[(len(index),)](
            source, index, None if tokens.selected is None else tokens.selected[part], hidden,
            source.stride(0), features,
            MASKED=tokens.selected is not None, BLOCK_D=_block_d(features), num_warps=4,
        )  # fmt: skip
        return hidden

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "BIASED": self.head.bias is not None,
            "RANKED": self.inputs.rank > 0,
            "LOGIT_SCALE": self.spec.logit_scale,
        }

    def compute(self, part: slice) -> None:
        """Compute loss, statistics and gradients of one chunk."""
        chunk = self._prepare(part)
        if chunk.classes is not None and not self.logits_given:
            self._class_logits(chunk, chunk.classes, None)
        made = self._make_x(chunk)
        weight = None
        self._finish(chunk, weight)
        if self.token_fns is not None:
            # loss and factors depend on the values that the functions return, so they are computed again
            smoothing, weight = self.token_fns(self.packed[:LOGITS_STATISTICS, part])
            if smoothing is not None:
                self.smoothing[part] = self.tokens.zero_ignored(smoothing, part)
            if weight is not None:
                weight = self.tokens.zero_ignored(weight, part).contiguous()
                self.scale[part] *= weight
            self._finish(chunk, weight)
        if chunk.classes is not None and (self.spec.gradients or self.spec.probability_grad):
            self._class_factors(chunk, chunk.classes, weight)
        if not self.spec.gradients:
            return
        if self.spec.softcap:
            assert made.logits is not None
            assert made.x is not None
            self._softcap_gradient(chunk, made.logits, made.x)
        if chunk.classes is not None and made.x is not None:
            self._clear(made.x, chunk.classes, 0)
        self._input_gradient(chunk, made)
        if self.spec.head_grad or self.spec.bias_grad:
            assert made.x is not None
            self._head_gradient(chunk, made.x)

    def complete(self) -> None:
        """Store the statistics and add the rank-one parts of gradients, after the last chunk."""
        outputs, vocab = self.outputs, self.head.vocab
        if self.spec.statistics:
            counted = (self.target != self.spec.ignore_index) & (self.target >= 0) & (self.target < vocab)
            self.packed[-1] = torch.where(counted, 0.0, torch.nan)
            if self.all_selected:
                outputs.statistics.copy_(self.packed)
            else:
                outputs.statistics[:, self.tokens.indices] = self.packed
        if outputs.dlora_b.numel() and not self.spec.softcap:
            outputs.dlora_b.addr_(self._class_weight(), self.smoothed_u, alpha=-1.0 / vocab)

    def _class_weight(self) -> Tensor:
        """Return the class weights or ones, [V]."""
        if self.head.class_weight is not None:
            return self.head.class_weight
        return self.head.weight.new_ones(self.head.vocab, dtype=torch.float32)

    def _prepare(self, part: slice) -> _Chunk:
        """Step 1."""
        head, spec, tokens = self.head, self.spec, self.tokens
        hidden = self._hidden(part)
        count, features = hidden.shape
        u = None
        if head.lora_a is not None:
            u = (_times(hidden, head.lora_a.T) * spec.lora_scale).contiguous()
        label = hidden.new_empty(count, dtype=torch.int32)
        nan_mask = hidden.new_empty(count, dtype=torch.float32)
        table = hidden.new_empty((_TABLE_PLANES, count), dtype=torch.float32)
        factors = hidden.new_empty((7, count), dtype=torch.float32)
        classes = None
        if self.inputs.classes is not None:
            assert self.inputs.probabilities is not None
            column = self._gather(self.inputs.classes, part).contiguous()
            probability = self._gather(self.inputs.probabilities, part).contiguous()
            z, factor = torch.empty_like(probability), torch.empty_like(probability)
            sums = hidden.new_empty((_CLASS_PLANES, count), dtype=torch.float32)
            classes = _Classes(column, probability, z, sums, factor)
        _prepare_kernel[(count,)](
            hidden, head.weight, head.bias, u, head.lora_b, self.target[part], tokens.complete,
            head.merged_mean, head.bias_mean, head.bias_high, label, nan_mask, table,
            count, head.vocab, features, self.inputs.rank, spec.ignore_index,
            **self.flags, COUNTED=tokens.complete is not None, CAPPED=bool(spec.softcap),
            BLOCK_D=_block_d(features), BLOCK_R=_block_r(self.inputs.rank),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return _Chunk(part, hidden, label, nan_mask, table, factors, u, classes)

    def _class_logits(self, chunk: _Chunk, classes: _Classes, logits: Tensor | None) -> None:
        """Compute the logits of the target's classes, or read them, and the sums over them."""
        head, (count, features) = self.head, chunk.hidden.shape
        _classes_kernel[(count,)](
            logits, chunk.hidden, head.weight, chunk.lora_u, head.lora_b, head.bias, head.class_weight,
            chunk.label, classes.column, classes.probability, chunk.table, classes.z, classes.sums,
            0 if logits is None else logits.stride(0), count, features, self.inputs.rank, classes.width,
            **self.flags,
            GIVEN=logits is not None,
            WEIGHTED=head.class_weight is not None,
            EVERY=self.spec.probability_grad,
            SOFTCAP=self.spec.softcap,
            BLOCK_D=_block_d(features), BLOCK_R=_block_r(self.inputs.rank),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _class_factors(self, chunk: _Chunk, classes: _Classes, weight: Tensor | None) -> None:
        head, spec, part = self.head, self.spec, chunk.part
        _class_factors_kernel[(len(chunk.label),)](
            classes.column, classes.probability, classes.z, head.class_weight, chunk.table, chunk.factors,
            self.smoothing[part], self.target[part], self.tokens.indices[part], weight, classes.factor,
            self.outputs.dprobabilities, len(chunk.label), head.vocab, classes.width, spec.ignore_index,
            WEIGHTED=head.class_weight is not None,
            REWEIGHTED=weight is not None,
            PROBABILITY_GRAD=spec.probability_grad,
            SOFTCAP=spec.softcap,
            BLOCK_C=classes.block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _clear(self, x: Tensor, classes: _Classes, first_column: int) -> None:
        """Set x to 0 in the columns of other classes."""
        if classes.width > 1:
            _clear_kernel[(len(x),)](
                x, classes.column, classes.probability, x.stride(0), first_column, x.shape[1], classes.width,
                BLOCK_C=classes.block, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    @abstractmethod
    def _make_x(self, chunk: _Chunk) -> _Made:
        """Step 2."""

    @abstractmethod
    def _head_gradient(self, chunk: _Chunk, x: Tensor) -> None:
        """Add the gradients of a trained head and its bias for one chunk."""

    def _own_maximum(
        self, chunk: _Chunk, logits: Tensor | None, x: Tensor, *, write: bool, headroom: float = 0.0
    ) -> None:
        """Step 2 with each token's maximum as the reference point; without logits only for far tokens."""
        head, given, vocab = self.head, logits is not None, self.head.vocab
        count, features = chunk.hidden.shape
        _own_maximum_kernel[(count,)](
            logits, chunk.hidden, head.weight, chunk.lora_u, head.lora_b, head.bias, head.class_weight,
            self.target[chunk.part], chunk.label, chunk.table, x,
            0 if logits is None else logits.stride(0), x.stride(0),
            count, vocab, features, self.inputs.rank, self.spec.ignore_index,
            **self.flags,
            GIVEN=given,
            WEIGHTED=head.class_weight is not None,
            STATISTICS=self.statistics,
            WRITE=write,
            SOFTCAP=self.spec.softcap,
            HEADROOM=headroom,
            BLOCK_V=min(triton.next_power_of_2(vocab), 4_096) if given else 64,
            BLOCK_D=1 if given else 128,
            BLOCK_R=_block_r(self.inputs.rank),
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip

    def _finish(self, chunk: _Chunk, weight: Tensor | None) -> None:
        """Compute loss, statistics and the factors of the gradient."""
        head, spec, part, outputs = self.head, self.spec, chunk.part, self.outputs
        count = len(chunk.label)
        _finish_kernel[(triton.cdiv(count, 128),)](
            chunk.table, self.tokens.indices[part], self.target[part], chunk.label, chunk.nan_mask,
            self.smoothing[part], self.scale[part], weight, head.class_weight, head.class_mean,
            None if chunk.classes is None else chunk.classes.sums,
            outputs.loss, outputs.state, self.packed[:, part] if self.statistics else self.packed,
            chunk.factors, self.packed.stride(0), len(outputs.loss), count, head.vocab, spec.ignore_index,
            REWEIGHTED=weight is not None,
            SPARSE=chunk.classes is not None,
            WEIGHTED=head.class_weight is not None,
            STATISTICS=self.statistics,
            WRITE=spec.gradients and not spec.softcap,
            SOFTCAP=spec.softcap,
            LOGIT_SCALE=spec.logit_scale,
            Z_LOSS=spec.z_loss,
            BLOCK=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _softcap_gradient(self, chunk: _Chunk, logits: Tensor, x: Tensor) -> None:
        head, vocab = self.head, self.head.vocab
        _softcap_gradient_kernel[(len(x),)](
            logits, head.bias, head.class_weight, chunk.label, self.smoothing[chunk.part], chunk.table,
            chunk.factors, x, logits.stride(0), x.stride(0), len(x), vocab,
            BIASED=head.bias is not None, WEIGHTED=head.class_weight is not None,
            SOFTCAP=self.spec.softcap, LOGIT_SCALE=self.spec.logit_scale,
            BLOCK_V=min(triton.next_power_of_2(vocab), 4_096), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip

    def _input_gradient(self, chunk: _Chunk, made: _Made) -> None:
        """Compute the gradients of the hidden states and of an adapter."""
        spec, head, outputs, classes = self.spec, self.head, self.outputs, chunk.classes
        count, features = chunk.hidden.shape
        indices, of_x = self.tokens.indices[chunk.part], made.product
        if spec.input_grad and of_x is None:
            assert made.x is not None
            of_x = product(made.x.to(self.factor), self.operand)
        through = None
        if chunk.lora_u is not None:
            assert made.x is not None
            through_b = self._lora_gradients(chunk, made.x, chunk.lora_u)
            if of_x is not None:
                assert head.lora_a is not None
                multiply = _through if self.factor == torch.bfloat16 else torch.mm
                through = multiply(through_b, head.lora_a)
        if of_x is not None:
            _input_gradient_kernel[(count,)](
                of_x, head.weight, head.weight_mean, through, self.target[chunk.part], chunk.label, indices,
                chunk.factors, *((None, None) if classes is None else (classes.column, classes.factor)),
                outputs.dinput, count, features, 0 if classes is None else classes.width, spec.ignore_index,
                RANKED=through is not None,
                SPARSE=classes is not None,
                CAPPED=bool(spec.softcap),
                BLOCK_D=_block_d(features), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    def _lora_gradients(self, chunk: _Chunk, x: Tensor, u: Tensor) -> Tensor:
        """Add the gradients of A and B; return the gradient of u, [M, r]."""
        head, outputs = self.head, self.outputs
        assert head.lora_b is not None
        of_x, of_mean = chunk.factors[0], chunk.factors[2]
        through_b = _times(x, head.lora_b) * of_x[:, None]
        add_selected(through_b, chunk.of_classes, head.lora_b, chunk.class_columns)
        through_b = (through_b - of_mean[:, None] * head.lora_b_mean) * self.spec.lora_scale
        if self.spec.lora_grad:
            outputs.dlora_a.add_(_times(chunk.hidden.T, through_b).T)
            outputs.dlora_b.add_(_times(x.T, u * of_x[:, None]))
            for column, factor in chunk.by_class():
                add_by_label(outputs.dlora_b, column, u * factor[:, None])
            self.smoothed_u += of_mean @ u
        return through_b

    @property
    def factor(self) -> torch.dtype:
        """The dtype of the factors of x C and x^T (f E)."""
        return torch.bfloat16

    @property
    def operand(self) -> Tensor:
        """The head in the dtype of `factor`."""
        return self.head.weight


class _FixedReference(_Run):
    """x from the GEMM that computes the logits, in slices of the vocabulary."""

    logits_given = False

    def _allocate(self) -> None:
        inputs, spec, variant, vocab = self.inputs, self.spec, self.variant, self.head.vocab
        self.platform = Platform.of(inputs.input)
        self.launch_config = self.platform.launch_config(
            "pointer" if variant == "cublas" else variant, self.statistics
        )
        count, features = len(self.tokens.indices), inputs.input.shape[1]
        # gradients of a trained head or an adapter need x after `total` is known
        self.keep = spec.gradients and (spec.head_grad or inputs.rank > 0)
        usual = _FROZEN_TOKENS
        if spec.head_grad:
            # 16-bit x of 2 D tokens is as large as the float32 gradient of the head
            usual = -(-2 * features // _TILE_TOKENS) * _TILE_TOKENS
        elif self.keep:
            usual = max(1, min(usual, _KEPT_BYTES // (2 * vocab)) // _TILE_TOKENS) * _TILE_TOKENS
        self.chunk_tokens = spec.chunk_tokens or usual
        tokens = min(self.chunk_tokens, count)
        block_m, block_n = self.launch_config.block_m, self.launch_config.block_n
        width = slice_columns(tokens, vocab, block_m, block_n, self.platform)
        if variant == "cublas":  # a slice of float32 logits is twice as large
            width = max(block_n, width // 2)
        self.slices = [slice(v, min(v + width, vocab)) for v in range(0, vocab, width)]
        width = min(width, vocab)
        # strides are multiples of 16, for which Triton compiles a specialization
        padded = -(-(vocab if self.keep else width) // 16) * 16
        self.rank_one = self._rank_one_factors() if spec.head_grad else inputs.input.new_empty((0, vocab))
        kept = tokens + len(self.rank_one) if spec.gradients else 0
        new = inputs.input.new_empty
        self.logits = new((tokens, -(-width // 16) * 16 if variant == "cublas" else 0), dtype=torch.float32)
        if variant == "cublas" and not self.keep:
            self.buffer = self.logits.view(torch.bfloat16)[:, :width] if spec.gradients else self.logits
        else:
            self.buffer = new((kept, padded), dtype=torch.bfloat16)
        self.lora = self._lora_factors()
        self.started = False  # whether the head's gradient is initialized

    def _rank_one_factors(self) -> Tensor:
        """Return left factors of the rank-one part of dC, [2 or 4, V] bf16, to be appended to x.

        The right factors are the halves of -sum s a e / V. Ones are exact in bfloat16; class weights need
        two halves.
        """
        if self.head.class_weight is None:
            return self.head.weight.new_ones((2, self.head.vocab), dtype=torch.bfloat16)
        high, low = halves(self.head.class_weight)
        return torch.stack([high, high, low, low])

    def _lora_factors(self) -> Tensor | None:
        """Return B for the GEMM, [V, 3 r]: u B = u_high B_high + u_low B_high + u_high B_low."""
        if self.head.lora_b is None:
            return None
        high, low = halves(self.head.lora_b)
        return _padded(torch.cat([high, high, low], 1))

    def _make_x(self, chunk: _Chunk) -> _Made:
        count, write, head = len(chunk.label), self.spec.gradients, self.head
        u = None
        if chunk.lora_u is not None:
            high, low = halves(chunk.lora_u)
            u = _padded(torch.cat([high, low, high], 1))
        of_x = None
        for columns in self.slices:
            first, width = columns.start == 0, columns.stop - columns.start
            x = self.buffer[:count, columns] if self.keep else self.buffer[:count, :width]
            if self.variant == "cublas":
                self._by_cublas(chunk, columns, x, u)
            else:
                self._by_triton(chunk, columns, x, u)
            if write and not self.keep:
                if chunk.classes is not None:
                    self._clear(x, chunk.classes, columns.start)
                weight = head.weight[columns]
                of_x = product(x, weight) if first or of_x is None else add_product(of_x, x, weight)
        x = self.buffer[:count, : head.vocab]
        if of_x is not None:
            self._far_tokens(chunk, of_x)
        else:
            self._own_maximum(chunk, None, x, write=write)
        return _Made(x if self.keep else None, of_x, None)

    def _by_triton(self, chunk: _Chunk, columns: slice, x: Tensor, u: Tensor | None) -> None:
        config, head, statistics = self.launch_config, self.head, self.statistics
        (count, features), width = chunk.hidden.shape, columns.stop - columns.start
        weight, lora = head.weight[columns], None if self.lora is None else self.lora[columns]
        bias = None if head.bias is None else head.bias[columns]
        rank = 0 if u is None else u.shape[1]
        tiles_m, tiles_n = triton.cdiv(count, config.block_m), triton.cdiv(width, config.block_n)
        partial = chunk.table.new_empty((7 if statistics else 2, tiles_n, count))
        flags = {
            "BIASED": bias is not None,
            "RANKED": u is not None,
            "STATISTICS": statistics,
            "WRITE": self.spec.gradients,
            "SCALE": self.spec.logit_scale * _LOG2E.value,
            "INTERPRETED": _INTERPRETED,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        }
        common = (bias, chunk.label, chunk.table[_K.value], partial)
        sizes = (columns.start, count, width, features, rank)
        if self.variant == "pointer":
            _pointer_kernel[(tiles_m * tiles_n,)](
                chunk.hidden, weight, x, u, lora, *common, x.stride(0), partial.stride(0), *sizes,
                EVEN_D=features % config.block_k == 0, **flags,
            )  # fmt: skip
        else:
            processors = self.platform.processors
            a, b = [config.block_m, config.block_k], [config.block_n, config.block_k]
            half = [config.block_m, config.block_n // 2]
            _tma_kernel[(min(processors, tiles_m * tiles_n),)](
                _descriptor(chunk.hidden, a, features),
                _descriptor(weight, b, features),
                _descriptor(x, half, x.stride(0)) if self.spec.gradients else None,
                None if u is None else _descriptor(u, a, rank),
                None if lora is None else _descriptor(lora, b, rank),
                *common, partial.stride(0), *sizes,
                # with a second inner loop the outer loop cannot be flattened
                FLATTEN=config.flatten and u is None, PROCESSORS=processors, **flags,
            )  # fmt: skip
        block_m = 16 if _INTERPRETED else 32
        _join_kernel[(triton.cdiv(count, block_m),)](
            partial, chunk.table, partial.stride(0), count, tiles_n,
            FIRST=columns.start == 0, STATISTICS=statistics, WRITE=self.spec.gradients,
            BLOCK_M=block_m, BLOCK_T=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _by_cublas(self, chunk: _Chunk, columns: slice, x: Tensor, u: Tensor | None) -> None:
        head, width = self.head, columns.stop - columns.start
        logits = self.logits[: len(chunk.label), :width]
        product(chunk.hidden, head.weight[columns].T, out=logits)
        if u is not None and self.lora is not None:
            add_product(logits, u, self.lora[columns].T)
        bias = None if head.bias is None else head.bias[columns]
        _exponentials_kernel[(len(logits),)](
            logits, bias, chunk.label, chunk.table, x, logits.stride(0), x.stride(0),
            columns.start, len(logits), width,
            FIRST=columns.start == 0,
            BIASED=bias is not None,
            STATISTICS=self.statistics,
            WRITE=self.spec.gradients,
            SCALE=self.spec.logit_scale * _LOG2E.value,
            BLOCK_V=min(triton.next_power_of_2(width), 4_096), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip

    def _far_tokens(self, chunk: _Chunk, of_x: Tensor) -> None:
        head, classes, (count, features) = self.head, chunk.classes, chunk.hidden.shape
        programs = min(16, triton.cdiv(count, 128))
        scratch = of_x.new_empty((programs, head.vocab))
        _far_tokens_kernel[(programs,)](
            chunk.hidden, head.weight, head.bias, self.target[chunk.part], chunk.label,
            *((None, None) if classes is None else (classes.column, classes.probability)),
            chunk.table, scratch, of_x, count, head.vocab, features, 0 if classes is None else classes.width,
            self.spec.ignore_index,
            BLOCK_C=0 if classes is None else classes.block,
            BIASED=head.bias is not None,
            STATISTICS=self.statistics,
            SCALE=self.spec.logit_scale * _LOG2E.value,
            BLOCK_M=128, BLOCK_V=64, BLOCK_D=128, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip

    def _head_gradient(self, chunk: _Chunk, x: Tensor) -> None:
        """Add x^T (f E) and the rank-one part to dC in one product, then the targets' part."""
        outputs, hidden, count = self.outputs, chunk.hidden, len(chunk.label)
        of_x, of_mean = chunk.factors[0], chunk.factors[2]
        extra = len(self.rank_one)
        right = hidden.new_empty((count + extra, hidden.shape[1]), dtype=torch.bfloat16)
        scale_matrix(hidden, of_x, right[:count])
        self.buffer[count : count + extra, : self.head.vocab] = self.rank_one
        smoothed = _times(hidden.T, of_mean[:, None])[:, 0] / -self.head.vocab
        right[count:] = torch.stack(halves(smoothed)).repeat(extra // 2, 1)
        left = self.buffer[: count + extra, : self.head.vocab].T
        if self.started:
            add_product(outputs.dlinear_weight, left, right)
        else:
            product(left, right, out=outputs.dlinear_weight)
        self.started = True
        columns, factor = chunk.class_columns, chunk.of_classes
        counts = factor != 0  # padding would be a long list of entries for class 0
        counts[:, 0] = True
        label, order = torch.sort(torch.where(counts, columns, self.head.vocab).flatten(), stable=True)
        block_d = _block_d(hidden.shape[1])
        _add_targets_kernel[(len(label), triton.cdiv(hidden.shape[1], block_d))](
            hidden, factor.contiguous(), label, order, outputs.dlinear_weight,
            len(label), self.head.vocab, hidden.shape[1], columns.shape[1],
            BLOCK_T=2 if _INTERPRETED else 8, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


class _Exact(_Run):
    """x from float32 logits of a chunk, with each token's maximum as the reference point."""

    logits_given = True

    def _allocate(self) -> None:
        inputs, spec, head = self.inputs, self.spec, self.head
        self.outputs.dlinear_weight.zero_()
        dtype, count = inputs.input.dtype, len(self.tokens.indices)
        half_range = dtype == torch.float16 and (spec.softcap or spec.head_grad or spec.lora_grad)
        self.x_dtype = torch.float32 if spec.bias_grad or half_range else dtype
        self._factor = torch.bfloat16 if dtype == torch.bfloat16 else self.x_dtype
        self._operand = head.weight.to(self._factor)
        self.fast = spec.precision == "fast" and dtype in (torch.bfloat16, torch.float16)
        larger = spec.softcap and (spec.head_grad or (spec.gradients and inputs.rank > 0))
        budget = _CAPPED_BYTES if larger else _EXACT_BYTES
        self.chunk_tokens = spec.chunk_tokens or exact_tokens(head.vocab, budget)
        # strides are multiples of 16
        width = -(-head.vocab // 16) * 16
        self.buffer = inputs.input.new_empty((min(self.chunk_tokens, count), width), dtype=torch.float32)
        # the rank-one parts of dC and db: sums of s a e and s a
        self.smoothed = inputs.input.new_zeros(inputs.input.shape[1], dtype=torch.float32)
        self.smoothed_count = inputs.input.new_zeros((), dtype=torch.float32)

    @property
    def factor(self) -> torch.dtype:
        return self._factor

    @property
    def operand(self) -> Tensor:
        return self._operand

    def complete(self) -> None:
        super().complete()
        outputs, vocab = self.outputs, self.head.vocab
        if self.spec.softcap:
            return
        if self.spec.head_grad:
            outputs.dlinear_weight.addr_(self._class_weight(), self.smoothed, alpha=-1.0 / vocab)
        if self.spec.bias_grad:
            outputs.dlinear_bias.sub_(self._class_weight() * (self.smoothed_count / vocab))

    def _make_x(self, chunk: _Chunk) -> _Made:
        logits = self._logits(chunk)
        if chunk.classes is not None:
            self._class_logits(chunk, chunk.classes, logits)
        # in the memory of the logits: 16-bit x of a token overwrites the first half of its logits
        x = logits.view(self.x_dtype)[:, : self.head.vocab]
        headroom = _HEADROOM if self.x_dtype == torch.float16 else 0.0
        write = self.spec.gradients and not self.spec.softcap
        self._own_maximum(chunk, logits, x, write=write, headroom=headroom)
        return _Made(x, None, logits)

    def _logits(self, chunk: _Chunk) -> Tensor:
        """Return float32 logits, including the adapter's, with padded strides."""
        head = self.head
        padded = self.buffer[: len(chunk.label)]
        logits = padded[:, : head.vocab]
        if self.fast:
            logits.copy_(torch.mm(chunk.hidden, head.weight.T))
        else:
            product(chunk.hidden, head.weight.T, out=logits)
        if chunk.lora_u is not None and head.lora_b is not None:
            multiply = _through if self.factor == torch.bfloat16 else torch.mm
            logits.add_(multiply(chunk.lora_u, head.lora_b.T))
        return padded

    def _head_gradient(self, chunk: _Chunk, x: Tensor) -> None:
        outputs, hidden = self.outputs, chunk.hidden.to(torch.float32)
        of_x, of_mean = chunk.factors[0], chunk.factors[2]
        if self.spec.head_grad:
            right = (hidden * of_x[:, None]).to(self.factor)
            add_product(outputs.dlinear_weight, x.to(self.factor).T, right)
            for column, factor in chunk.by_class():
                add_by_label(outputs.dlinear_weight, column, hidden * factor[:, None])
            self.smoothed += of_mean @ hidden
        if self.spec.bias_grad:
            outputs.dlinear_bias.add_(of_x @ x)
            for column, factor in chunk.by_class():
                add_by_label(outputs.dlinear_bias, column, factor)
            self.smoothed_count += of_mean.sum()


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a [m, k] @ b [k, r] in float32, for float32 b and small r; bfloat16 a uses the halves of b."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a.to(torch.float32), b)
    both = product(a, torch.cat(halves(b), 1))
    return both[:, : b.shape[1]] + both[:, b.shape[1] :]


def _through(a: Tensor, b: Tensor) -> Tensor:
    """Return a [m, r] @ b [r, k] for float32 factors and small r: three products of halves in one."""
    (high, low), (right_high, right_low) = halves(a), halves(b)
    return product(torch.cat([high, low, high], 1), torch.cat([right_high, right_high, right_low]))


def _padded(factors: Tensor) -> Tensor:
    """Pad columns with zeros to a multiple of 16, so that rows of the matrix are aligned to 16 bytes."""
    return torch.nn.functional.pad(factors, (0, -factors.shape[1] % 16))


def _descriptor(matrix: Tensor, block: list[int], stride: int) -> TensorDescriptor:
    """Return a descriptor with an explicit first stride. PyTorch's is arbitrary for a dimension of 1."""
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], block)


def _block_d(features: int) -> int:
    block: int = triton.next_power_of_2(features)
    return min(block, 1_024)


def _block_r(rank: int) -> int:
    block: int = triton.next_power_of_2(max(rank, 1))
    return block


def _chunks(tokens: int, most: int) -> Iterator[slice]:
    """Yield even slices of at most `most` tokens, of complete tiles if that does not add a slice."""
    pieces = -(-tokens // most)
    each = -(-tokens // pieces)
    if most % _TILE_TOKENS == 0:
        each = -(-each // _TILE_TOKENS) * _TILE_TOKENS
    for start in range(0, tokens, each):
        yield slice(start, min(start + each, tokens))

"""Jitted helpers of the kernels; terms and names are those of `ual_kernels._tokens`."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh, as accurate as PyTorch's up to a factor of 2, in float32 or float64.

    `tl` has no tanh that the interpreter supports. 1 - 2 / (exp(2 |x|) + 1) cancels for small x. Up to 0.75,
    tanh is therefore x + x z P(z) with z = x^2. P interpolates at the Chebyshev nodes of [0, 0.75^2]; its
    relative error is 6e-9 (float32) and 6e-18 (float64), below half of a rounding.
    """
    size = tl.abs(x)
    z = x * x
    if x.dtype == tl.float64:
        p = z * -1.64085996468314441e-6 + 1.00480539281294987e-5
        p = p * z - 3.44947246999821692e-5
        p = p * z + 9.42476297649358034e-5
        p = p * z - 2.38094069369792824e-4
        p = p * z + 5.89746998695332784e-4
        p = p * z - 1.45578182533106923e-3
        p = p * z + 3.59212138850604196e-3
        p = p * z - 8.86323498743910123e-3
        p = p * z + 2.18694885097110373e-2
        p = p * z - 5.39682539675820755e-2
        p = p * z + 1.33333333333326607e-1
        p = p * z - 3.33333333333333322e-1
    else:
        p = z * 1.90950245e-3 - 7.93380762e-3
        p = p * z + 2.16153189e-2
        p = p * z - 5.39358536e-2
        p = p * z + 1.33331796e-1
        p = p * z - 3.33333321e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.75, x + x * (z * p), tl.where(x < 0.0, -large, large))


@triton.jit
def final_logits(x, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Scale and cap raw logits; SOFTCAP = 0 is no softcap. -inf stays -inf without a softcap."""
    z = x * LOGIT_SCALE
    if SOFTCAP != 0.0:
        z = SOFTCAP * tanh(z / SOFTCAP)
    return z


@triton.jit
def token_terms(nll, lse, smoothing_term, s, weight, excess, c_mean, Z_LOSS: tl.constexpr):
    """Loss for a sample weight of 1, K, U and dloss/ds; see `_tokens.token_terms`."""
    k = (1.0 - s) * weight + s * c_mean
    # without smoothing the smoothing term must not be used: it may be infinite, and 0 * inf is NaN
    loss = k * nll + (1.0 - s) * excess - tl.where(s == 0.0, 0.0, s * smoothing_term)
    uniform = s * c_mean
    if Z_LOSS != 0.0:
        loss += Z_LOSS * lse * lse
        k += 2.0 * Z_LOSS * lse
        uniform += 2.0 * Z_LOSS * lse
    return loss, k, uniform, (c_mean - weight) * nll - excess - smoothing_term


@triton.jit
def store_statistics(
    statistics_ptr,  # [8, M], planes `stride` apart, at the tokens; out
    stride,
    mask,  # tokens that exist
    valid,  # tokens that are neither ignored nor out of range; other tokens get NaN
    reference,
    total,
    log_prob,
    moment,
    largest,
    second,
    mean,
    correct,
    label,
    predicted,
):
    """Store the fields of TokenStatistics without dropped mass, in nats; see `_tokens.token_statistics`.

    `largest` and `second` are relative to `reference`, like the sums.
    """
    nan = float("nan")
    log_total = tl.log(total)
    tl.store(statistics_ptr, tl.where(valid, reference + log_total, nan), mask=mask)
    tl.store(statistics_ptr + stride, tl.where(valid, log_prob, nan), mask=mask)
    tl.store(statistics_ptr + 2 * stride, tl.where(valid, log_total - moment / total, nan), mask=mask)
    tl.store(statistics_ptr + 3 * stride, tl.where(valid, tl.exp(largest) / total, nan), mask=mask)
    tl.store(statistics_ptr + 4 * stride, tl.where(valid, largest - second, nan), mask=mask)
    tl.store(statistics_ptr + 5 * stride, tl.where(valid, mean, nan), mask=mask)
    tl.store(statistics_ptr + 6 * stride, tl.where(valid & correct, 1.0, 0.0), mask=mask)
    predicted = tl.where(valid, tl.where(correct, label, predicted), -1)
    tl.store(statistics_ptr + 7 * stride, predicted.to(statistics_ptr.dtype.element_ty), mask=mask)


@triton.jit
def two_largest(z):
    """The two largest values of a vector, which may be equal."""
    high = tl.max(z, axis=0)
    is_largest = z == high
    second = tl.max(tl.where(is_largest, float("-inf"), z), axis=0)
    return high, tl.where(tl.sum(is_largest.to(tl.int32), axis=0) > 1, high, second)


@triton.jit
def merge_two_largest(high, second, other_high, other_second):
    """The second largest value of two sets, from the two largest values of each."""
    return tl.maximum(tl.minimum(high, other_high), tl.maximum(second, other_second))


@triton.jit
def top2(high, second, other_high, other_second):
    """The two largest values of two sets, from the two largest values of each; for `tl.reduce`."""
    return tl.maximum(high, other_high), merge_two_largest(high, second, other_high, other_second)

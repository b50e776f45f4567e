"""Jitted helpers of the kernels; terms and names are those of `ual_kernels._tokens`."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh computed from exp, because the interpreter has no tanh. The error is about one ulp of 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


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

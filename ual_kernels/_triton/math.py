"""Jitted helpers that kernels share."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh from exp alone: the library's own is a stub in the interpreter. Error: about one ulp of 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def final_logits(x, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Raw logits, scaled, then capped; SOFTCAP 0 is none. -inf stays -inf without a cap."""
    z = x * LOGIT_SCALE
    if SOFTCAP != 0.0:
        z = SOFTCAP * tanh(z / SOFTCAP)
    return z

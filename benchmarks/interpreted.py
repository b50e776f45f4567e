"""Triton's interpreter for machines without a GPU, repaired as far as the compared kernels need it.

Import this module before any module that imports Triton, because it selects the interpreter. The kernels of
this project convert to float32 right after each load and need only `tests.kernels.interpreter`. Kernels of
other implementations also add and multiply in bfloat16, and call libdevice. The interpreter (triton 3.6 to
3.9) adds and multiplies the bits of bfloat16 numbers as integers, and has only stubs of libdevice. The
repairs, and what needs them:

    bfloat16 +, -, *, <    cut-cross-entropy's indexed dot and its locked sums; liger's scaling by an upstream
    tl.dot of bfloat16     cut-cross-entropy's GEMMs; the products are exact in float32, as on tensor cores
    libdevice.log1p        cut-cross-entropy's logaddexp
    tl.reduce with "and"   cut-cross-entropy's filter: correct without it, but loops over 16384 numbers

An interpreted kernel returns a GPU's numbers up to the order of summation. The order matters for
cut-cross-entropy, which sums in bfloat16. Times of interpreted kernels are meaningless.
"""

import os
import sys
from typing import Any

import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise RuntimeError(
            "benchmarks.interpreted was imported after triton; "
            "import it first, or set TRITON_INTERPRET=1 before Python starts"
        )
    os.environ["TRITON_INTERPRET"] = "1"

_repaired = False


def repair() -> None:
    """Apply the repairs once, for the rest of the process. Does nothing on a machine with a GPU."""
    global _repaired
    if _repaired or not INTERPRETED:
        return
    _repaired = True
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    from tests.kernels.interpreter import repair as repair_for_ours
    from ual_kernels._triton import linear_cross_entropy as ours

    repair_for_ours()

    def wide(handle: Any) -> Any:
        """Convert to float32: a bfloat16 is stored as the upper half of the bits."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain_binary, plain_dot = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return plain_binary(self, left, right, op)
        result = plain_binary(self, wide(left), wide(right), op)
        return result if result.data.dtype == np.bool_ else self.cast_impl(result, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), *rest)

    InterpreterBuilder.binary_op, InterpreterBuilder.create_dot = binary_op, create_dot

    def log1p(x: Any) -> Any:
        return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    libdevice.log1p = log1p

    plain_reduce = ReduceOps.apply_impl

    def apply_impl(self: Any, values: Any) -> Any:
        if getattr(self.combine_fn, "__name__", "") == "tl_and_reduce_fn" and self.axis is None:
            return [self.to_tensor(np.all(values[0].handle.data), tl.int1)]
        return plain_reduce(self, values)

    ReduceOps.apply_impl = apply_impl

    # the launch configs of a GPU: the small tiles of the tests would take ten times as long in Python
    ours.Platform.of = staticmethod(lambda tensor: ours.Platform("sm_90", 132))  # type: ignore[method-assign]

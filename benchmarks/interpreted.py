"""Triton on a machine without a GPU: its interpreter, repaired as far as the peers' kernels need it.

Import this before anything that imports Triton: it chooses the interpreter, which must happen first. Our own
kernels widen right after each load and need no more than `tests.kernels.interpreter`. The peers' also
multiply and add in bfloat16, which the interpreter (triton 3.6 to 3.9) does on the bits as if they were
integers, and call libdevice, whose functions are stubs there. What is repaired, and for whom:

    bfloat16 +, -, *, <    cut-cross-entropy's indexed dot and its locked sums; liger's scaling by an upstream
    tl.dot of bfloat16     cut-cross-entropy's GEMMs; the products are exact in float32, as on tensor cores
    libdevice.log1p        cut-cross-entropy's logaddexp
    tl.reduce with "and"   cut-cross-entropy's filter: right without it, but a Python loop over 16384 numbers

An interpreted kernel gives a GPU's numbers up to the order of its sums: no small matter for
cut-cross-entropy, whose sums are in bfloat16. It says nothing about speed.
"""

import os
import sys
from typing import Any

import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise RuntimeError(
            "benchmarks.interpreted must be imported before triton, which is loaded already; "
            "import it first, or set TRITON_INTERPRET=1 before Python starts"
        )
    os.environ["TRITON_INTERPRET"] = "1"

_repaired = False


def repair() -> None:
    """Make the repairs above, once, for the rest of the process; nothing where there is a GPU."""
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
        """The same numbers in float32: a bfloat16 is kept as the upper half of its bits."""
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

    # tests want many ragged tiles; here a GPU's tiles are wanted, and a tenth of the Python
    # the launch shapes of a card
    ours.Platform.of = staticmethod(lambda tensor: ours.Platform("sm_90", 132))  # type: ignore[method-assign]

"""One repair of Triton's interpreter: float32 becomes bfloat16 by rounding to nearest even, as on a GPU.

The interpreter (3.6 to 3.9 at least) cuts the low bits off, so that half of all stored gradients are one unit
in the last place away from what a GPU stores, and no budget that is tight enough to catch a bug holds. Our
kernels widen right after each load and narrow only in a store, so nothing else of its bfloat16 is needed.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_nearest_even() -> None:
    """Replace the interpreter's narrowing cast to bfloat16 for the rest of the process."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        # the interpreter keeps a bfloat16 as its bits
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl

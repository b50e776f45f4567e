"""Repairs of Triton's interpreter (at least 3.6 to 3.9): rounding to bfloat16 and speed.

With the repair, float32 is rounded to the nearest even bfloat16, as on a GPU. The interpreter truncates, so
half of all stored gradients differ from a GPU's by one unit in the last place, which exceeds the accuracy
criteria of the tests. The kernels convert to float32 after each load and to bfloat16 only in stores, so they
need no other bfloat16 arithmetic.

The interpreter also replaces the members of `triton.language` at every call of a device function, including
`tl.sum`, although it has replaced them at the launch. This takes half of the time of a small kernel. It makes
a table of all dtypes for each value (a fifth of the rest), and reduces by a function of ours one number at a
time (a third of the rest). With the repair, whole halves are combined, in a tree as on a GPU.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


@cache
def repair() -> None:
    """Apply the repairs for the rest of the process."""
    _round_to_nearest_even()
    _replace_once_per_launch()
    _look_up_dtypes_once()
    _reduce_by_halves()


def _round_to_nearest_even() -> None:
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        # the interpreter represents a bfloat16 by its bits
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl


def _replace_once_per_launch() -> None:
    launch, replace = GridExecutor.__call__, interpreter._patch_lang
    done: set[int] = set()  # ids of modules' globals, which determine what is replaced

    def launch_and_reset(self: GridExecutor, *args: Any, **options: Any) -> None:
        done.clear()  # a launch restores the members at its end
        launch(self, *args, **options)

    def replace_once(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return replace(fn)

    GridExecutor.__call__, interpreter._patch_lang = launch_and_reset, replace_once


def _look_up_dtypes_once() -> None:
    plain = interpreter._get_np_dtype
    of_scalar = cache(plain)

    def numpy_dtype(dtype: tl.dtype) -> np.dtype[Any]:
        scalar = dtype.scalar
        return plain(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = numpy_dtype


def _reduce_by_halves() -> None:
    one_by_one = ReduceOps.generic_reduce

    def generic_reduce(self: ReduceOps, input: tuple[Any, ...]) -> list[Any]:
        if self.axis is None:
            return one_by_one(self, input)
        dtypes = [value.dtype for value in input]
        parts = [np.moveaxis(value.handle.data, self.axis, 0) for value in input]
        while len(parts[0]) > 1:  # a power of two, as all extents of blocks
            neighbors = [self.to_tensor(part[i::2], dtype) for i in (0, 1)
                         for part, dtype in zip(parts, dtypes, strict=True)]  # fmt: skip
            combined = self.combine_fn.fn(*neighbors)
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [value.handle.data for value in combined]
        parts = [np.moveaxis(part, 0, self.axis) if self.keep_dims else part[0] for part in parts]
        return [self.to_tensor(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]

    ReduceOps.generic_reduce = generic_reduce

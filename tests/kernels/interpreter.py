"""Two repairs of Triton's interpreter (at least 3.6 to 3.9): rounding to bfloat16 and speed.

With the repair, float32 is rounded to the nearest even bfloat16, as on a GPU. The interpreter truncates, so
half of all stored gradients differ from a GPU's by one unit in the last place, which exceeds the accuracy
criteria of the tests. The kernels convert to float32 after each load and to bfloat16 only in stores, so they
need no other bfloat16 arithmetic.

The interpreter also replaces the members of `triton.language` at every call of a device function, including
`tl.sum`, although it has replaced them at the launch. This takes half of the time of a small kernel.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


@cache
def repair() -> None:
    """Apply both repairs for the rest of the process."""
    _round_to_nearest_even()
    _replace_once_per_launch()


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

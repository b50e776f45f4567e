"""Two repairs of Triton's interpreter (3.6 to 3.9 at least): of a number, and of its speed.

float32 becomes bfloat16 by rounding to nearest even, as on a GPU. The interpreter cuts the low bits off, so
that half of all stored gradients are one unit in the last place away from what a GPU stores, and no budget
that is tight enough to catch a bug holds. Our kernels widen right after each load and narrow only in a store,
so nothing else of its bfloat16 is needed.

And it exchanges the members of `triton.language` at every call of a device function, `tl.sum` among them,
though they have been exchanged when the launch began: half of a small kernel's time.
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
    """Make both repairs for the rest of the process."""
    _round_to_nearest_even()
    _exchange_once_a_launch()


def _round_to_nearest_even() -> None:
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        # the interpreter keeps a bfloat16 as its bits
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl


def _exchange_once_a_launch() -> None:
    launch, exchange = GridExecutor.__call__, interpreter._patch_lang
    done: set[int] = set()  # modules, by their globals: what is exchanged depends on nothing else

    def launch_afresh(self: GridExecutor, *args: Any, **options: Any) -> None:
        done.clear()  # a launch puts the members back when it ends
        launch(self, *args, **options)

    def exchange_once(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return exchange(fn)

    GridExecutor.__call__, interpreter._patch_lang = launch_afresh, exchange_once

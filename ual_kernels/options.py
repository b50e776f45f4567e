"""Options of the losses that affect speed and memory.

PyTorch 2.13 has similar options with other fields (`torch.nn.LinearCrossEntropyOptions`).
"""

from dataclasses import dataclass
from typing import get_args

from torch import distributed as dist

from ual_kernels._types import Precision


@dataclass(frozen=True, slots=True)
class CrossEntropyOptions:
    """Options of `cross_entropy`.

    Args:
        inplace_backward: compute the gradient in forward and *overwrite `input`* with it, for the least
            memory and traffic. `input` must be contiguous and neither a leaf nor a view of a leaf. float16 is
            not supported: gradients underflow before the loss scale is applied. `input` cannot be used
            afterwards; autograd raises if another operation has saved it. If no gradient is needed, nothing
            is overwritten. Not supported under torch.compile.
        process_group: the ranks of this group hold consecutive columns of the logits, in rank order (`input`
            and `weight` are this rank's); targets are classes of the complete vocabulary. On every rank, loss
            and statistics are those of the complete vocabulary, and the gradient of `input` is that of this
            rank's columns. A wrong argument of one rank, such as a shard without classes, raises on all
            ranks. Only with backend="torch", which is then the default.
    """

    inplace_backward: bool = False
    process_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyOptions:
    """Options of `linear_cross_entropy`.

    Args:
        max_loss_tokens: upper bound on the number of non-ignored tokens, >= 0, if known on the host. Avoids a
            device synchronization. If it is too small, the loss is NaN.
        compact: drop ignored tokens before the first GEMM. False computes them too, at full cost. It is for
            CUDA graphs, where the number of tokens must not depend on data.
        chunk_tokens: number of tokens that are computed at a time, >= 1. With None the backend chooses it to
            fit a memory budget (docs/kernels.md).
        precision: "high" never rounds logits to 16 bits. "fast" rounds them, as most implementations do. The
            relative error of the gradient then increases from 2e-3, its rounding error, to 1e-2
            (docs/kernels.md).
        gradient_filter: in [0, 1), e.g. 1e-4; 0.0 is exact. Skip the gradient of tiles of the vocabulary that
            together hold less than this probability for every token. The mass of a skipped tile is spread
            evenly over the tile. Only with backend="torch".
        process_group: the ranks of this group hold consecutive rows of the head, in rank order
            (`linear_weight`, `linear_bias`, `weight` and LoRA's B are this rank's). All ranks pass the same
            `input` and `target`. Loss and gradients are those of the complete head. A wrong argument of one
            rank, such as a shard without classes, raises on all ranks. Only with backend="torch".
        reduce_input_grad: sum the gradient of `input` over the ranks of `process_group`. False returns this
            rank's summand, for callers that all-reduce it themselves (e.g. Megatron-LM).

    Raises:
        ValueError: a value is out of range, or two options contradict each other.
    """

    max_loss_tokens: int | None = None
    compact: bool = True
    chunk_tokens: int | None = None
    precision: Precision = "high"
    gradient_filter: float = 0.0
    process_group: dist.ProcessGroup | None = None
    reduce_input_grad: bool = True

    def __post_init__(self) -> None:
        if self.max_loss_tokens is not None and self.max_loss_tokens < 0:
            raise ValueError(f"max_loss_tokens must be an integer >= 0 or None, got {self.max_loss_tokens}")
        if self.max_loss_tokens is not None and not self.compact:
            raise ValueError(
                f"max_loss_tokens has no effect with compact=False, got {self.max_loss_tokens}; "
                "remove one of them"
            )
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be an integer >= 1 or None, got {self.chunk_tokens}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, got {self.precision!r}")
        if isinstance(self.gradient_filter, str) or not 0 <= self.gradient_filter < 1:
            raise ValueError(
                f"gradient_filter must be a number in [0, 1), got {self.gradient_filter!r}; 0.0 is exact"
            )
        if not self.reduce_input_grad and self.process_group is None:
            raise ValueError("reduce_input_grad=False needs a process_group, got process_group=None")

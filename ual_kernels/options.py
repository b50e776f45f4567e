"""How a loss is computed: options that change speed and memory, not what is computed.

PyTorch 2.13 separates the two in the same way (`torch.nn.LinearCrossEntropyOptions`); its fields are others.
"""

from dataclasses import dataclass
from typing import get_args

from torch import distributed as dist

from ual_kernels._types import Precision


@dataclass(frozen=True, slots=True)
class CrossEntropyOptions:
    """How `cross_entropy` computes.

    Args:
        inplace_backward: compute the gradient in forward and *overwrite `input`* with it, for the least
            memory and traffic. `input` must be contiguous, not float16 (its range is too small for gradients
            that wait for a loss scaler), and neither a leaf nor a view of one. It cannot be used afterwards;
            autograd raises where another operation has saved it. Nothing is overwritten if no gradient is
            needed. Not available under torch.compile.
        process_group: the ranks of this group hold consecutive columns of the logits, in the order of the
            ranks (`input` and `weight` are this rank's); targets are classes of the complete vocabulary. Loss
            and statistics are those of the complete vocabulary on every rank, and the gradient of `input` is
            that of this rank's columns. Only with backend="torch", which is then the default.
    """

    inplace_backward: bool = False
    process_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyOptions:
    """How `linear_cross_entropy` computes.

    Args:
        max_loss_tokens: upper bound on the number of non-ignored tokens, >= 0, if known on the host. Avoids a
            device synchronization. If it is too small, the loss is NaN.
        compact: drop ignored tokens before the first GEMM. False keeps them, at full cost: for CUDA graphs,
            where the number of tokens must not depend on data.
        chunk_tokens: number of tokens that are computed at a time, >= 1. None is the backend's choice, by a
            budget of memory (docs/kernels.md).
        precision: "high" never rounds logits to 16 bits. "fast" does, as most implementations do: the
            relative error of the gradient grows from 2e-3, its rounding error, to 1e-2 (docs/kernels.md).
        gradient_filter: skip the gradient of parts of the vocabulary that together hold less than this
            probability for every token, in [0, 1), e.g. 1e-4; their mass is spread evenly over the part.
            0.0 is exact. Only with backend="torch".
        process_group: the ranks of this group hold consecutive rows of the head, in the order of the ranks
            (`linear_weight`, `linear_bias`, `weight` and LoRA's B are this rank's). All ranks pass the same
            `input` and `target`. Loss and gradients are those of the complete head. Only with
            backend="torch".
        reduce_input_grad: sum the gradient of `input` over the ranks of `process_group`. False returns this
            rank's summand, for callers that all-reduce it themselves (Megatron-LM does).

    Raises:
        ValueError: a value is out of range, or one option contradicts another.
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
                f"max_loss_tokens has no effect with compact=False, got {self.max_loss_tokens}; drop one"
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
            raise ValueError("reduce_input_grad=False needs a process_group; without one nothing is reduced")

"""The losses as `nn.Module`: constants are arguments of the constructor, tensors of `forward`.

>>> import torch
>>> from ual_kernels import losses
>>> LinearCrossEntropyLoss(reduction="sum", **losses.mile())
LinearCrossEntropyLoss(reduction='sum', sample_weight=EntropyPower(shift=1.0, unit=1.0, power=1.0))
>>> loss = CrossEntropyLoss(label_smoothing=0.1)
>>> round(loss(torch.zeros(2, 4), torch.tensor([1, 2])).item(), 4)  # log 4
1.3863
"""

import inspect
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ual_kernels import functional
from ual_kernels._types import IGNORE_INDEX, Backend, Reduction
from ual_kernels.options import CrossEntropyOptions, LinearCrossEntropyOptions
from ual_kernels.statistics import TokenFn, TokenStatistics
from ual_kernels.targets import SparseTarget

Options = TypeVar("Options", CrossEntropyOptions, LinearCrossEntropyOptions)


class _Loss(nn.Module, Generic[Options]):
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
        label_smoothing: float | TokenFn = 0.0,
        sample_weight: TokenFn | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        options: Options | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.sample_weight = sample_weight
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.options: Options | None = options
        self.backend: Backend = backend

    def _keywords(self, **given: Any) -> dict[str, Any]:
        """Return the constructor's keywords, replaced by those of the call that are not None."""
        own = {name: getattr(self, name) for name in inspect.signature(_Loss).parameters}
        return own | {name: value for name, value in given.items() if value is not None}

    def extra_repr(self) -> str:
        shown = []
        for name, parameter in inspect.signature(_Loss).parameters.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                shown.append(f"{name}={list(value.shape)}")
            elif value != parameter.default:
                # the repr of a plain function contains an address
                shown.append(f"{name}={getattr(value, '__qualname__', repr(value))}")
        return ", ".join(shown)


class CrossEntropyLoss(_Loss[CrossEntropyOptions]):
    """`ual_kernels.cross_entropy`; drop-in for `torch.nn.CrossEntropyLoss` with the classes last.

    The keywords are those of the function, which checks them when it is called. In the constructor
    `label_smoothing` and `sample_weight` are constants or functions of the statistics; tensors are passed to
    `forward`. The state dict contains `weight`, if given.
    """

    def forward(
        self,
        input: Tensor,  # [..., V]
        target: Tensor | SparseTarget,  # [...], or [..., K] twice
        *,
        label_smoothing: float | Tensor | TokenFn | None = None,
        sample_weight: Tensor | TokenFn | None = None,
        num_items: int | Tensor | None = None,
        options: CrossEntropyOptions | None = None,
    ) -> Tensor:
        """Return the loss; an argument that is not None replaces the constructor's."""
        keywords = self._keywords(
            label_smoothing=label_smoothing, sample_weight=sample_weight, num_items=num_items, options=options
        )
        return functional.cross_entropy(input, target, **keywords)

    def with_statistics(
        self, input: Tensor, target: Tensor | SparseTarget, **given: Any
    ) -> tuple[Tensor, TokenStatistics]:
        """Return the loss and `TokenStatistics`; arguments are those of `forward`."""
        return functional.cross_entropy_with_statistics(input, target, **self._keywords(**given))


class LinearCrossEntropyLoss(_Loss[LinearCrossEntropyOptions]):
    """`ual_kernels.linear_cross_entropy`; the head belongs to the model and is an argument of `forward`.

    The keywords are those of the function, which checks them when it is called. In the constructor
    `label_smoothing` and `sample_weight` are constants or functions of the statistics; tensors are passed to
    `forward`. The state dict contains `weight`, if given.
    """

    def forward(
        self,
        input: Tensor,  # [..., D]
        linear_weight: Tensor,  # [V, D]
        target: Tensor | SparseTarget,  # [...], or [..., K] twice
        *,
        linear_bias: Tensor | None = None,  # [V]
        linear_lora: tuple[Tensor, Tensor, float] | None = None,
        label_smoothing: float | Tensor | TokenFn | None = None,
        sample_weight: Tensor | TokenFn | None = None,
        num_items: int | Tensor | None = None,
        options: LinearCrossEntropyOptions | None = None,
    ) -> Tensor:
        """Return the loss; an argument that is not None replaces the constructor's."""
        keywords = self._keywords(
            linear_bias=linear_bias,
            linear_lora=linear_lora,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            num_items=num_items,
            options=options,
        )
        return functional.linear_cross_entropy(input, linear_weight, target, **keywords)

    def with_statistics(
        self, input: Tensor, linear_weight: Tensor, target: Tensor | SparseTarget, **given: Any
    ) -> tuple[Tensor, TokenStatistics]:
        """Return the loss and `TokenStatistics`; arguments are those of `forward`."""
        return functional.linear_cross_entropy_with_statistics(
            input, linear_weight, target, **self._keywords(**given)
        )

"""`nn.Module` faces of the loss functions: constant options in the constructor, tensors in `forward`.

>>> import torch
>>> from ual_kernels import losses
>>> LinearCrossEntropyLoss(reduction="sum", **losses.mile())
LinearCrossEntropyLoss(reduction='sum', sample_weight=EntropyPower(shift=1.0, unit=1.0, power=1.0))
>>> loss = CrossEntropyLoss(label_smoothing=0.1)
>>> round(loss(torch.zeros(2, 4), torch.tensor([1, 2])).item(), 4)  # log 4
1.3863
"""

import inspect
from typing import Any, Literal

from torch import Tensor, nn
from torch import distributed as dist

from ual_kernels._types import IGNORE_INDEX, Backend, Precision, Reduction, SmoothingOver
from ual_kernels.functional import TokenRule, cross_entropy, linear_cross_entropy
from ual_kernels.statistics import TokenStatistics


class _Loss(nn.Module):
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float | TokenRule

    def __init__(self, weight: Tensor | None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def _options(self, **overrides: Any) -> dict[str, Any]:
        """The constructor's options, but for those that the call gave."""
        own = {name: getattr(self, name) for name in ("weight", *self._names)}
        return own | {name: value for name, value in overrides.items() if value is not None}

    def extra_repr(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if isinstance(value, Tensor):
                shown.append(f"{name}={list(value.shape)}")
            elif value != parameter.default:
                # the repr of a plain function is an address
                shown.append(f"{name}={getattr(value, '__qualname__', repr(value))}")
        return ", ".join(shown)


class CrossEntropyLoss(_Loss):
    """`ual_kernels.cross_entropy`; drop-in for `torch.nn.CrossEntropyLoss`, with the classes last.

    The arguments are that function's, and it checks them when called; `label_smoothing` and `sample_weight`
    are constants or rules here, tensors in `forward`. The state dict holds `weight`, if given.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
        label_smoothing: float | TokenRule = 0.0,
        sample_weight: TokenRule | None = None,
        smoothing_over: SmoothingOver = "all",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        return_statistics: bool = False,
        inplace_backward: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            smoothing_over=smoothing_over,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            return_statistics=return_statistics,
            inplace_backward=inplace_backward,
            backend=backend,
        )

    def forward(
        self,
        input: Tensor,  # [..., V]
        target: Tensor,  # [...]
        *,
        label_smoothing: float | Tensor | TokenRule | None = None,
        sample_weight: Tensor | TokenRule | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenStatistics]:
        """What the function returns; an argument that is not None takes the place of the constructor's."""
        options = self._options(
            label_smoothing=label_smoothing, sample_weight=sample_weight, num_items=num_items
        )
        loss: Tensor | tuple[Tensor, TokenStatistics] = cross_entropy(input, target, **options)
        return loss


class LinearCrossEntropyLoss(_Loss):
    """`ual_kernels.linear_cross_entropy`, the head being an argument of `forward`: a model owns its own.

    The arguments are that function's, and it checks them when called; `label_smoothing` and `sample_weight`
    are constants or rules here, tensors in `forward`. The state dict holds `weight`, if given.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
        label_smoothing: float | TokenRule = 0.0,
        sample_weight: TokenRule | None = None,
        smoothing_over: SmoothingOver = "all",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        return_statistics: bool = False,
        vocab_size: int | None = None,
        compact: bool = True,
        chunk_tokens: int | None = None,
        precision: Precision = "high",
        gradient_filter: float | Literal["off"] = "off",
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            smoothing_over=smoothing_over,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            return_statistics=return_statistics,
            vocab_size=vocab_size,
            compact=compact,
            chunk_tokens=chunk_tokens,
            precision=precision,
            gradient_filter=gradient_filter,
            process_group=process_group,
            backend=backend,
        )

    def forward(
        self,
        input: Tensor,  # [..., D]
        linear_weight: Tensor,  # [V, D]
        target: Tensor,  # [...]
        *,
        linear_bias: Tensor | None = None,  # [V]
        linear_lora: tuple[Tensor, Tensor, float] | None = None,
        label_smoothing: float | Tensor | TokenRule | None = None,
        sample_weight: Tensor | TokenRule | None = None,
        num_items: int | Tensor | None = None,
        live_rows: int | None = None,
    ) -> Tensor | tuple[Tensor, TokenStatistics]:
        """What the function returns; an argument that is not None takes the place of the constructor's."""
        options = self._options(
            linear_bias=linear_bias,
            linear_lora=linear_lora,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            num_items=num_items,
            live_rows=live_rows,
        )
        loss: Tensor | tuple[Tensor, TokenStatistics]
        loss = linear_cross_entropy(input, linear_weight, target, **options)
        return loss

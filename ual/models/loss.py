"""The loss of one labeled call: its arguments as tensors that match the labels, and its computation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ual_kernels.flops  # noqa: F401  registers formulas, so that FLOP counters see the loss
from ual.errors import UserError
from ual.models.head import HeadLoss, Lora
from ual_kernels import (
    IGNORE_INDEX,
    Backend,
    LinearCrossEntropyOptions,
    SparseTarget,
    confidence,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
    losses,
)


@dataclass(frozen=True)
class LossForm:
    """How a model computes its logits from its head, and its loss from its logits."""

    scale: float
    """Logits are softcap(scale * head(hidden))."""
    softcap: float | None
    """softcap(z) = cap * tanh(z / cap); None is the identity."""
    shifts_labels: bool
    """Whether position t is compared with label t + 1, or with label t."""


@dataclass
class TokenLoss:
    """The arguments of a loss; calling it computes the loss of hidden states.

    Args:
        targets: [B, T] the class of each position, or `ignore_index`.
        label_smoothing, sample_weight: numbers, or tensors [B] or [B, T] that match `targets`, or functions
            of the statistics; None is 0 and 1.
        smoothing_over: "all", "others" or "options".
        option_ids: [B, T, K] the classes over which the target of a position is spread, and negative numbers
            after them. A position without any has its class as target.
        option_probabilities: [B, T, K] the target; None is 1 for the class of the position.
        own_share: a number, or a tensor without dimensions, in [0, 1]; the share of the target of a position
            with options that is the model's own prediction. Smoothing is added to the result.
        balance_own: `balance` of `ual_kernels.confidence.target`.
        form: how the model computes logits.
        others: as in `ual_kernels.linear_cross_entropy`.
    """

    targets: Tensor
    form: LossForm
    label_smoothing: Any = None
    sample_weight: Any = None
    smoothing_over: str = "all"
    option_ids: Tensor | None = None
    option_probabilities: Tensor | None = None
    own_share: float | Tensor | None = None
    balance_own: bool = False
    ignore_index: int = IGNORE_INDEX
    num_items: int | Tensor | None = None
    max_loss_tokens: int | None = None
    z_loss: float = 0.0
    backend: Backend = "auto"
    statistics: bool = False

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None) -> HeadLoss:
        """Compute it, with every tensor on the device of `hidden` (`device_map` spreads a model)."""
        device, num_items = hidden.device, self.num_items
        labels = self.targets.to(device)
        targets: Tensor | SparseTarget = labels
        smoothing = 0.0 if self.label_smoothing is None else _on(device, self.label_smoothing)
        if self.smoothing_over == "others":
            smoothing = losses.others(smoothing, len(weight))  # a DTensor's length counts all ranks' classes
        if self.option_ids is not None:
            spread = 0.0
            if self.smoothing_over == "options":
                spread, smoothing = smoothing, 0.0
            ids, p = self.option_ids.to(device), _on(device, self.option_probabilities)
            if p is None:
                p = (ids == labels[..., None]).to(torch.float32)
            if self.own_share is not None:
                valid = (ids >= 0) & (labels != self.ignore_index)[..., None]
                options = SparseTarget(ids.masked_fill(~valid, IGNORE_INDEX), p)
                p = self._with_own(options, hidden, weight, bias, lora)
            targets = decided(labels, ids, p, spread, self.ignore_index)
        group = None
        if isinstance(weight, DTensor):  # tensor parallelism: this rank computes its rows of the head
            group = weight.device_mesh.get_group()
            weight, bias = weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else None
        arguments: dict[str, Any] = {
            "linear_bias": bias,
            "linear_lora": lora,
            "label_smoothing": smoothing,
            "sample_weight": _on(device, self.sample_weight),
            "ignore_index": self.ignore_index,
            "num_items": _on(device, num_items),
            "softcap": self.form.softcap,
            "logit_scale": self.form.scale,
            "z_loss": self.z_loss,
            "options": LinearCrossEntropyOptions(max_loss_tokens=self.max_loss_tokens, process_group=group),
            "backend": self.backend,
        }
        if self.statistics:
            return HeadLoss(*linear_cross_entropy_with_statistics(hidden, weight, targets, **arguments))
        return HeadLoss(linear_cross_entropy(hidden, weight, targets, **arguments), None)

    def _with_own(
        self, options: SparseTarget, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
    ) -> Tensor:
        """Return [B, T, K] probabilities of options, a share of which is the model's own prediction.

        Raises:
            UserError: the head is tensor-parallel.
        """
        if isinstance(weight, DTensor):
            raise UserError(
                "own_share (loss: confidence) needs the rows of the head of all options, and tensor "
                "parallelism splits the head over ranks",
                remedy="train without tensor parallelism, or without own_share",
            )
        own = confidence.target(
            hidden,
            weight,
            options,
            coefficient=1.0,
            balance=self.balance_own,
            linear_bias=bias,
            linear_lora=lora,
            softcap=self.form.softcap,
            logit_scale=self.form.scale,
        )
        p = options.probabilities
        share: float | Tensor = _on(hidden.device, self.own_share)
        if isinstance(share, Tensor):
            share = torch.where((share >= 0) & (share <= 1), share, torch.nan)
        return p + share * (own.probabilities - p)


def decided(
    labels: Tensor,
    option_ids: Tensor,
    option_probabilities: Tensor,
    smoothing: float | Tensor,
    ignore_index: int,
) -> SparseTarget:
    """Return [B, T, K] targets: the options of positions that have some, and the label of all others.

    Args:
        labels: [B, T].
        option_ids, option_probabilities: as in `TokenLoss`.
        smoothing: a number in [0, 1], [B] or [B, T]; the share of the target that is spread evenly over the
            options. Outside [0, 1], the position's probabilities are NaN.
        ignore_index: of labels.
    """
    given = option_ids >= 0
    p = torch.where(given, option_probabilities, 0.0)
    if isinstance(smoothing, Tensor):
        smoothing = torch.where((smoothing >= 0) & (smoothing <= 1), smoothing, torch.nan)
        smoothing = smoothing.reshape(*smoothing.shape, *[1] * (option_ids.ndim - smoothing.ndim))
    p = (1 - smoothing) * p + smoothing * given / given.sum(-1, keepdim=True).clamp(min=1)
    first = torch.zeros_like(given)
    first[..., 0] = True
    alone = first & ~given.any(-1, keepdim=True)
    ignored = first & (labels == ignore_index)[..., None]
    indices = torch.where(alone | ignored, labels[..., None], option_ids * given)
    return SparseTarget(indices, torch.where(alone, 1.0, p))


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return [B, T] targets: each label moved one position to the left.

    The last position predicts nothing. It is dropped with the other ignored tokens, without a copy.
    """
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def column(name: str, value: Any, labels: Tensor, *, shift: bool) -> Any:
    """Return a column of a batch as the loss takes it.

    Args:
        name: for the error.
        value: None, a function of the statistics, a number, or a tensor, array or list [B] or [B, T].
        labels: [B, T].
        shift: whether values [B, T] are moved one position to the left, as the labels are.

    Raises:
        ValueError: the value is not numeric, or has another shape.
    """
    if value is None or callable(value):
        return value
    if isinstance(value, int | float) and name == "label_smoothing":  # a weight must be a tensor
        return float(value)
    if not isinstance(value, Tensor):
        tensors = isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value)
        try:
            value = torch.stack(list(value)) if tensors else torch.as_tensor(value)  # stack keeps gradients
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name} must be numbers [B] or [B, T], got {type(value).__name__}: {error}"
            ) from None
    if not value.is_floating_point():  # JSON's 0 and 1
        value = value.to(torch.float32)
    shapes = [list(labels.shape[:k]) for k in range(labels.ndim + 1)]
    if list(value.shape) not in shapes:
        raise ValueError(
            f"{name} must have shape {shapes[-1]} like the labels, or {shapes[1]}, one value per sample; "
            f"got {list(value.shape)}"
        )
    if shift and value.ndim == labels.ndim:
        return nn.functional.pad(value[..., 1:], (0, 1))
    return value


def options(
    option_ids: Any, option_probabilities: Any, labels: Tensor, *, shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the options of a batch's tokens as the loss takes them.

    Args:
        option_ids, option_probabilities: None, or tensors, arrays or lists [B, T, K], as in `TokenLoss`.
        labels: [B, T].
        shift: whether they are moved one position to the left, as the labels are.

    Raises:
        ValueError: there are probabilities without options, a shape is wrong, or the ids are no integers.
    """
    if option_ids is None:
        if option_probabilities is not None:
            raise ValueError("option_probabilities needs option_ids, the classes that they belong to")
        return None, None
    ids = torch.as_tensor(option_ids)
    if ids.is_floating_point() or ids.ndim != labels.ndim + 1 or ids.shape[:-1] != labels.shape:
        expected = f"integers [{', '.join(map(str, labels.shape))}, K]"
        raise ValueError(f"option_ids must be {expected}, got {ids.dtype} {list(ids.shape)}")
    p = None if option_probabilities is None else torch.as_tensor(option_probabilities)
    if p is not None and p.shape != ids.shape:
        raise ValueError(
            f"option_probabilities must have shape {list(ids.shape)} like option_ids, got {list(p.shape)}"
        )
    if p is not None and not p.is_floating_point():
        p = p.to(torch.float32)
    if shift:
        ids = nn.functional.pad(ids[..., 1:, :], (0, 0, 0, 1), value=-1)
        p = None if p is None else nn.functional.pad(p[..., 1:, :], (0, 0, 0, 1))
    return ids, p


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

"""Per-token operations of every backend: selection of loss tokens, terms of loss and gradient, statistics.

For a token with logits z, target y, smoothing s and class weights c (1 without them), with p = softmax(z),

    nll = -log p_y        lse = log sum exp(z)        t = mean(c z) - mean(c) z_y   (the smoothing term)
    Q   = (1 - s) c_y + s mean(c)                     K = Q + 2 z_loss lse

    loss    = Q nll - s t + z_loss lse^2
    dz_v    = K p_v - (1 - s) c_y [v = y] - s c_v / V
    dloss/ds = (mean(c) - c_y) nll - t

An implementation may exclude the target's column from p, so that 1 is never subtracted from a rounded
probability. In that column dz is then (U - K (1 - p_y)) - s c_y / V, with U = s mean(c) + 2 z_loss lse.
`_triton/math.py` has the same terms for kernels; a test compares both with `reference`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ual_kernels._operands import ALL_TOKENS
from ual_kernels.statistics import TokenFn, TokenStatistics


class LossTokens(NamedTuple):
    """The tokens that a linear loss computes, in order."""

    indices: Tensor  # [M], into the N tokens
    selected: Tensor | None  # [M] bool; None if no ignored token is among them
    complete: Tensor | None  # bool: every loss token is among them; None if that is certain

    def zero_ignored(self, tensor: Tensor, chunk: slice | None = None) -> Tensor:
        """Return `tensor` [..., M] with zeros for ignored tokens."""
        if self.selected is None:
            return tensor
        selected = self.selected if chunk is None else self.selected[chunk]
        return torch.where(selected, tensor, 0.0)


def select_loss_tokens(target: Tensor, ignore_index: int, max_loss_tokens: int) -> LossTokens:
    """Select the tokens that are not ignored.

    Args:
        target: [N].
        ignore_index: the target of ignored tokens.
        max_loss_tokens: the number of tokens to select, loss tokens first. ALL_TOKENS selects all loss
            tokens, which synchronizes with the device.
    """
    selected = target != ignore_index
    if max_loss_tokens == ALL_TOKENS:
        return LossTokens(selected.nonzero().squeeze(1), None, None)
    if max_loss_tokens >= len(target):
        return LossTokens(torch.arange(len(target), device=target.device), selected, None)
    order = selected.logical_not().to(torch.uint8).argsort(stable=True)[: max(max_loss_tokens, 1)]
    return LossTokens(order, selected[order], selected.sum() <= max_loss_tokens)


def mark_missed(tokens: LossTokens, target: Tensor, ignore_index: int, *results: Tensor) -> None:
    """Write NaN to the loss tokens that `max_loss_tokens` excluded; the selected tokens are NaN already.

    Each of `results` is [N, ...] or has no elements.
    """
    if tokens.complete is not None:
        missed = (target != ignore_index) & ~tokens.complete
        for result in results:
            shape = (len(result), *(1,) * (result.ndim - 1))
            result.masked_fill_(missed[: len(result)].view(shape), torch.nan)


class Labels(NamedTuple):
    """Targets as indices that are always in range, with masks."""

    column: Tensor  # [M] int64, in [0, V) for every token
    selected: Tensor  # [M] bool, not ignored
    valid: Tensor  # [M] bool, in [0, V)

    @property
    def nan_mask(self) -> Tensor:
        """0 for valid and ignored targets, NaN for targets out of range."""
        return torch.where(self.valid | ~self.selected, 0.0, torch.nan)


def labels(target: Tensor, vocab: int, ignore_index: int) -> Labels:
    """Split targets [M] into columns and masks."""
    selected = target != ignore_index
    valid = (target >= 0) & (target < vocab)
    return Labels(torch.where(selected & valid, target, 0).long(), selected, valid)


class TokenTerms(NamedTuple):
    """The terms in the docstring of this module, [M] each."""

    loss: Tensor
    k: Tensor  # K, the coefficient of p in dz
    uniform: Tensor  # U = s mean(c) + 2 z_loss lse
    ds: Tensor  # dloss/ds


def token_terms(
    nll: Tensor,
    lse: Tensor,
    smoothing_term: Tensor,
    s: Tensor,
    c_y: Tensor | float,
    c_mean: Tensor | float,
    z_loss: float,
) -> TokenTerms:
    """Compute the loss for a sample weight of 1 and the coefficients of its gradient."""
    k = (1 - s) * c_y + s * c_mean
    # without smoothing the smoothing term must not be used: it may be infinite, and 0 * inf is NaN
    loss = k * nll - torch.where(s == 0, 0.0, s * smoothing_term)
    uniform = s * c_mean
    if z_loss:
        loss = loss + z_loss * lse.square()
        k, uniform = k + 2 * z_loss * lse, uniform + 2 * z_loss * lse
    return TokenTerms(loss, k, uniform, (c_mean - c_y) * nll - smoothing_term)


def token_statistics(
    z_y: Tensor,
    reference: Tensor,
    total: Tensor,
    nll: Tensor,
    moment: Tensor,
    largest: Tensor,
    second: Tensor,
    mean: Tensor,
) -> Tensor:
    """The first seven fields of TokenStatistics, [7, M].

    Args:
        z_y: the target's logit.
        reference: the reference point k of the sums, a logit near the largest.
        total: sum of exp(z - k).
        nll: -log p_y.
        moment: sum of exp(z - k) (z - k).
        largest, second: the two largest logits.
        mean: mean of the logits.
    """
    log_total = total.log()
    return torch.stack(
        [
            reference + log_total,
            -nll,
            log_total - moment / total,
            torch.exp(largest - reference) / total,
            largest - second,
            mean,
            (z_y >= largest).to(z_y.dtype),
        ]
    )


class TokenFns(NamedTuple):
    """The user's functions of the statistics."""

    smoothing_fn: TokenFn | None
    weight_fn: TokenFn | None
    limit: float  # the largest valid smoothing

    def __call__(self, statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return smoothing and weight [M] for statistics [7, M]; None without a function.

        Raises:
            ValueError: a function does not return one floating-point value per token.
        """
        s = _call("label_smoothing", self.smoothing_fn, statistics)
        w = _call("sample_weight", self.weight_fn, statistics)
        return (
            None if s is None else nan_outside(s, self.limit),
            None if w is None else torch.where(w >= 0, w, torch.nan),
        )


def smoothing_limit(vocab: int, dtype: torch.dtype) -> float:
    """The largest valid smoothing, V / (V - 1) plus rounding: there the target has probability zero."""
    return vocab / (vocab - 1) * (1 + 4 * torch.finfo(dtype).eps) if vocab > 1 else 1.0


def nan_outside(smoothing: Tensor, limit: float) -> Tensor:
    """Return the smoothing, NaN where it is outside [0, limit]."""
    return torch.where((smoothing >= 0) & (smoothing <= limit), smoothing, torch.nan)


def _call(name: str, function: TokenFn | None, statistics: Tensor) -> Tensor | None:
    if function is None:
        return None
    value = function(TokenStatistics.unpack(statistics.clone(), statistics.shape[1:]))
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == statistics.shape[1:]):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name}(statistics) must return a floating-point tensor [{statistics.shape[1]}], one value per "
            f"token like the fields of its argument, got {got}"
        )
    return value.detach().to(statistics.dtype)

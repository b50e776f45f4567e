"""Per-token operations of every backend: selection of loss tokens, terms of loss and gradient, statistics.

For a token with logits z, smoothing s and class weights c (1 without them), with p = softmax(z), and a target
of classes i_k with probabilities p_k, of which y is the one with the largest probability,

    nll = -log p_y        lse = log sum exp(z)        t = mean(c z) - mean(c) z_y   (the smoothing term)
    w_k = p_k c_ik        W = sum_k w_k               R = sum_k w_k (z_y - z_ik)
    Q   = (1 - s) W + s mean(c)                       K = Q + 2 z_loss lse

    loss     = Q nll + (1 - s) R - s t + z_loss lse^2
    dz_v     = K p_v - (1 - s) sum_k w_k [v = i_k] - s c_v / V
    dloss/ds  = (mean(c) - W) nll - R - t
    dloss/dp_k = (1 - s) c_ik (nll + z_y - z_ik)

For a class index, W = c_y and R = 0. An implementation may exclude the column of y from p, so that 1 is never
subtracted from a rounded probability. In that column dz is then

    (U + (1 - s) (W - w_y) - K (1 - p_y)) - s c_y / V      U = s mean(c) + 2 z_loss lse

where W - w_y is summed over the other classes. `_triton/math.py` has the same terms for kernels; a test
compares both with `reference`.
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


def other_classes(held: Tensor, probability: Tensor) -> Tensor:
    """See `TargetClasses.others`."""
    others = held & (probability != 0)
    others[:, 0] = False
    return others


class TargetClasses(NamedTuple):
    """The classes of a chunk's targets, [M, K] each; the first is that of the label."""

    column: Tensor  # in this shard, 0 if another shard has the class
    held: Tensor  # bool, whether this shard has the class
    probability: Tensor  # ACC, 0 for padding
    class_weight: Tensor  # ACC
    z: Tensor  # ACC, the logits

    @property
    def weights(self) -> Tensor:
        """w_k, [M, K]."""
        return self.probability * self.class_weight

    @property
    def others(self) -> Tensor:
        """Whether this shard has the class, and it is neither the label's nor padding; [M, K] bool."""
        return other_classes(self.held, self.probability)

    @property
    def z_y(self) -> Tensor:
        return self.z[:, 0]

    @property
    def weight(self) -> Tensor:
        """W, [M]."""
        return self.weights.sum(1)

    @property
    def excess(self) -> Tensor:
        """R, [M]."""
        return self._excess(self.weights)

    def _excess(self, weights: Tensor) -> Tensor:
        # a class of probability 0 may have a logit of -inf; if the label's is -inf, nll is infinite already
        below = torch.where(self.z[:, :1] == -torch.inf, 0.0, self.z[:, :1] - self.z[:, 1:])
        return torch.where(weights[:, 1:] == 0, 0.0, weights[:, 1:] * below).sum(1)

    def log_prob(self, nll: Tensor) -> Tensor:
        """sum_k p_k log p_ik, [M]."""
        return -(self.probability.sum(1) * nll + self._excess(self.probability))

    def probability_gradient(self, nll: Tensor, lse: Tensor, s: Tensor) -> Tensor:
        """dloss/dp_k, [M, K]."""
        return (1 - s)[:, None] * self.class_weight * minus_log_p(self.z, self.z[:, :1], nll, lse)


def minus_log_p(z: Tensor, z_y: Tensor, nll: Tensor, lse: Tensor) -> Tensor:
    """-log p for logits z [M, K], from the label's logit [M, 1]; more accurate than lse - z near p = 1."""
    return torch.where(z_y == -torch.inf, lse[:, None] - z, nll[:, None] + (z_y - z))


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
    weight: Tensor | float,
    excess: Tensor | float,
    c_mean: Tensor | float,
    z_loss: float,
) -> TokenTerms:
    """Compute the loss for a sample weight of 1 and the coefficients of its gradient.

    `weight` is W and `excess` is R.
    """
    k = (1 - s) * weight + s * c_mean
    # without smoothing the smoothing term must not be used: it may be infinite, and 0 * inf is NaN
    loss = k * nll + (1 - s) * excess - torch.where(s == 0, 0.0, s * smoothing_term)
    uniform = s * c_mean
    if z_loss:
        loss = loss + z_loss * lse.square()
        k, uniform = k + 2 * z_loss * lse, uniform + 2 * z_loss * lse
    return TokenTerms(loss, k, uniform, (c_mean - weight) * nll - excess - smoothing_term)


def token_statistics(
    z_y: Tensor,
    reference: Tensor,
    total: Tensor,
    log_prob: Tensor,
    moment: Tensor,
    largest: Tensor,
    second: Tensor,
    mean: Tensor,
    label: Tensor,
    predicted: Tensor,
) -> Tensor:
    """The fields of TokenStatistics without dropped mass, [8, M].

    Args:
        z_y: the target's logit.
        reference: the reference point k of the sums, a logit near the largest.
        total: sum of exp(z - k).
        log_prob: sum_k p_k log p_ik.
        moment: sum of exp(z - k) (z - k).
        largest, second: the two largest logits.
        mean: mean of the logits.
        label: the target's class.
        predicted: a class with the largest logit.
    """
    log_total, correct = total.log(), z_y >= largest
    return torch.stack(
        [
            reference + log_total,
            log_prob,
            log_total - moment / total,
            torch.exp(largest - reference) / total,
            largest - second,
            mean,
            correct.to(z_y.dtype),
            torch.where(correct, label, predicted).to(z_y.dtype),
        ]
    )


class TokenFns(NamedTuple):
    """The user's functions of the statistics."""

    smoothing_fn: TokenFn | None
    weight_fn: TokenFn | None
    limit: float  # the largest valid smoothing

    def __call__(self, statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return smoothing and weight [M] for statistics [8, M]; None without a function.

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

"""How far stated confidence is from accuracy, and the token-level metrics of a held-out set. NumPy only.

Let token i have confidence c_i in [0, 1] (the model's top-1 probability) and correctness y_i in {0, 1} (the
top-1 token is the target). Tokens are put into bins b of about equal mass; with n_b tokens, mean confidence
conf(b) and mean correctness acc(b):

    ECE    = sum_b n_b/n |acc(b) - conf(b)|           Guo et al. 2017, arXiv 1706.04599, equation 3
    RMS-CE = sqrt(sum_b n_b/n (acc(b) - conf(b))^2)   Hendrycks et al. 2019, arXiv 1812.04606
    Brier  = 1/n sum_i (c_i - y_i)^2                  of the top-1 event, not of the whole distribution

Bins of equal mass, not of equal width (Nixon et al. 2019, arXiv 1904.01685), since a language model's
confidences pile up near 1. Confidences that are equal share a bin: with r of the n values below a value that
occurs m times, all m go to bin floor(bins (r + m/2) / n). Without ties, bin sizes differ by at most one; with
ties fewer than `bins` bins may be filled. The result depends on the multiset of pairs only, not on its order.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.errors import UserError

_ROUNDING = 8 * float(np.finfo(np.float32).eps)


class ReliabilityBin(TypedDict):
    """Mean confidence, mean correctness and number of the tokens in one bin."""

    confidence: float
    accuracy: float
    count: int


class SourceEvaluation(TypedDict):
    """The metrics of the held-out samples of one source; `nll` in nats per token."""

    rows: int
    tokens: int
    nll: float
    accuracy: float
    ece: float
    brier: float


class Evaluation(TypedDict):
    """The metrics of a held-out set, as a run's evaluation.json holds them."""

    rows: int
    tokens: int
    nll: float
    perplexity: float
    accuracy: float
    ece: float
    brier: float
    bins: list[ReliabilityBin]
    by_source: dict[str, SourceEvaluation]


def reliability_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> list[ReliabilityBin]:
    """Return the filled bins, of about equal mass, by rising confidence.

    Args:
        confidence: [n], in [0, 1].
        correct: [n], bool or 0/1.
        bins: how many to aim at, >= 1.

    Raises:
        ValueError: nothing to measure, shapes differ, or values out of range.

    >>> reliability_bins([0.75, 0.25, 0.25, 0.25], [1, 0, 0, 0], bins=2)
    [{'confidence': 0.25, 'accuracy': 0.0, 'count': 3}, {'confidence': 0.75, 'accuracy': 1.0, 'count': 1}]
    """
    c, y = _checked(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    value, inverse, mass = np.unique(c, return_inverse=True, return_counts=True)
    below = np.cumsum(mass) - mass
    bin_of_value = (2 * below + mass) * bins // (2 * c.size)
    count = np.bincount(bin_of_value, weights=mass, minlength=bins)
    confidence_sum = np.bincount(bin_of_value, weights=value * mass, minlength=bins)
    correct_sum = np.bincount(bin_of_value[inverse], weights=y, minlength=bins)
    return [
        ReliabilityBin(
            confidence=float(confidence_sum[b] / count[b]),
            accuracy=float(correct_sum[b] / count[b]),
            count=int(count[b]),
        )
        for b in np.flatnonzero(count)
    ]


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the ECE over bins of equal mass, in [0, 1]; arguments and errors as `reliability_bins`.

    >>> round(expected_calibration_error([0.9, 0.2, 0.8, 0.4], [1, 0, 0, 1], bins=2), 3)
    0.275
    """
    return _mean_gap(reliability_bins(confidence, correct, bins), power=1)


def rms_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the RMS calibration error, never below the ECE; arguments and errors as `reliability_bins`."""
    return math.sqrt(_mean_gap(reliability_bins(confidence, correct, bins), power=2))


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean squared difference of confidence [n] and correctness [n], in [0, 1].

    >>> brier([0.9, 0.2], [1, 0])
    0.025
    """
    c, y = _checked(confidence, correct)
    return float(np.mean((c - y) ** 2))


class TokenMetrics:
    """Gathers the loss tokens of samples and returns the metrics of all of them, and of each source.

    The metrics are exact: bins of equal mass need every confidence, so nine bytes are kept for each token.

    >>> metrics = TokenMetrics(bins=2)
    >>> metrics.update("arithmetic", [0.1, 1.2], [0.9, 0.4], [True, False])
    >>> result = metrics.result()
    >>> result["tokens"], round(result["nll"], 3), result["accuracy"]
    (2, 0.65, 0.5)
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        self._by_source: dict[str, _Tally] = {}

    def update(self, source: str, nll: ArrayLike, confidence: ArrayLike, correct: ArrayLike) -> None:
        """Add the loss tokens of one sample.

        Args:
            source: the sample's group.
            nll: [T], -ln p(target), nats.
            confidence: [T], top-1 probability, in [0, 1] up to float32's rounding.
            correct: [T], bool or 0/1: the top-1 token is the target.

        Raises:
            ValueError: shapes differ, T is 0, or a value is out of range.
            UserError: an NLL or a confidence is not finite: the model has diverged.
        """
        nats, c = np.asarray(nll, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
        if not (np.isfinite(nats).all() and np.isfinite(c).all()):
            raise UserError(
                "the model's probabilities on a held-out sample are not finite",
                place=f'source "{source}"',
                remedy="the model has diverged or overflows its dtype: "
                "lower training.learning_rate, or set model.dtype to float32",
            )
        c, y = _checked(np.where(c <= 1 + _ROUNDING, np.minimum(c, 1), c), correct)
        if nats.shape != c.shape:
            raise ValueError(f"nll and confidence must share one shape [T], got {nats.shape} and {c.shape}")
        self._by_source.setdefault(source, _Tally()).add(nats, c, y)

    def result(self) -> Evaluation:
        """Return the metrics; `by_source` is in the order of first appearance.

        Raises:
            UserError: no token was added.
        """
        if not self._by_source:
            raise UserError(
                "the held-out samples hold no loss token to measure",
                remedy="check data.eval, or raise data.max_length so that responses are not cut off",
            )
        by_source = {source: tally.measure(self.bins)[0] for source, tally in self._by_source.items()}
        total, bins = _Tally.merged(self._by_source.values()).measure(self.bins)
        return Evaluation(
            rows=total["rows"],
            tokens=total["tokens"],
            nll=total["nll"],
            perplexity=float(np.exp(min(total["nll"], math.log(np.finfo(np.float64).max)))),
            accuracy=total["accuracy"],
            ece=total["ece"],
            brier=total["brier"],
            bins=bins,
            by_source=by_source,
        )


@dataclass(slots=True)
class _Tally:
    rows: int = 0
    nll: float = 0.0
    confidence: list[NDArray[np.float64]] = field(default_factory=list)
    correct: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, nll: NDArray[np.float64], c: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        self.rows += 1
        self.nll += float(nll.sum())
        self.confidence.append(c)
        self.correct.append(y.astype(bool))

    @classmethod
    def merged(cls, tallies: Iterable[Self]) -> Self:
        total = cls()
        for tally in tallies:
            total.rows += tally.rows
            total.nll += tally.nll
            total.confidence += tally.confidence
            total.correct += tally.correct
        return total

    def measure(self, bins: int) -> tuple[SourceEvaluation, list[ReliabilityBin]]:
        c, y = np.concatenate(self.confidence), np.concatenate(self.correct)
        filled = reliability_bins(c, y, bins)
        metrics = SourceEvaluation(
            rows=self.rows,
            tokens=c.size,
            nll=self.nll / c.size,
            accuracy=float(y.mean()),
            ece=_mean_gap(filled, power=1),
            brier=brier(c, y),
        )
        return metrics, filled


def _mean_gap(bins: Sequence[ReliabilityBin], power: int) -> float:
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) ** power for b in bins)
    return gaps / sum(b["count"] for b in bins)


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if c.ndim != 1 or c.shape != y.shape or not c.size:
        raise ValueError(
            f"confidence and correct must share one shape [n], n > 0, got {c.shape} and {y.shape}"
        )
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError(f"confidence must lie in [0, 1], got values from {c.min()} to {c.max()}")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("correct must be bool or hold only 0 and 1")
    return c, y

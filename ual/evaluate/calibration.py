"""How far stated confidence is from accuracy, and the token-level metrics of a held-out set.

Let prediction i have confidence c_i in [0, 1] (the probability of the top-1 token or option) and correctness
y_i in {0, 1} (it is the target). Predictions are put into bins b; with n_b predictions, mean confidence
conf(b), mean correctness acc(b) and its variance v_b = acc(b) (1 - acc(b)):

    ECE    = sum_b n_b/n |acc(b) - conf(b)|           Guo et al. 2017, arXiv 1706.04599, equation 3
    RMS-CE = sqrt(sum_b n_b/n (acc(b) - conf(b))^2)   Hendrycks et al. 2019, arXiv 1812.04606
    Brier  = 1/n sum_i (c_i - y_i)^2                  of the top-1 event, not of the whole distribution

Bins are of equal mass by default, not of equal width (Nixon et al. 2019, arXiv 1904.01685), since a language
model's confidences pile up near 1. Confidences that are equal share a bin: with r of the n values below a
value that occurs m times, all m go to bin floor(bins (r + m/2) / n). Without ties, bin sizes differ by at
most one; with ties fewer than `bins` bins may be filled. The result depends on the multiset of pairs only,
not on its order.

A perfectly calibrated model has an ECE above 0, since acc(b) is an average of n_b draws. Debiased figures
remove what such noise adds: all of it from the square, about half of it from the ECE of a calibrated model
(Kumar et al. 2019, arXiv 1909.10155):

    RMS-CE^2   the squared gap of bin b less v_b / (n_b - 1); the sum, which may be below 0, is cut at 0
    ECE        the gap of bin b less (E|acc(b) + e - conf(b)| - |acc(b) - conf(b)|), e ~ N(0, v_b / n_b)

The smooth calibration error has no bins (Blasiok and Nakkiran 2023, arXiv 2309.12236): with the Gaussian
kernel K of width h, reflected at 0 and 1,

    smECE(h) = integral over t in [0, 1] of |1/n sum_i K_h(t, c_i) (y_i - c_i)|,    smECE = the h = smECE(h)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypedDict

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


Equal = Literal["mass", "width"]
"""What all bins have in common."""

_CELLS = 2048  # of the grid on which residuals are smoothed


@dataclass(frozen=True, slots=True)
class BrierParts:
    """Brier = reliability - resolution + uncertainty + within.

    `reliability` is the mean squared gap of the bins, 0 is best. `resolution` is the variance of the bins'
    accuracies, higher is better. `uncertainty` is the variance of correctness. `within` is what the spread of
    confidences within bins adds (Murphy 1973; Stephenson et al. 2008). The first three are unbiased, so
    `reliability` may be below 0 (Ferro and Fricker 2012).
    """

    reliability: float
    resolution: float
    uncertainty: float
    within: float


def reliability_bins(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, equal: Equal = "mass"
) -> list[ReliabilityBin]:
    """Return the filled bins by rising confidence.

    Args:
        confidence: [n], in [0, 1].
        correct: [n], bool or 0/1.
        bins: how many to aim at, >= 1.
        equal: mass: about as many predictions in each. width: intervals [b / bins, (b + 1) / bins).

    Raises:
        ValueError: nothing to measure, shapes differ, or values out of range.

    >>> reliability_bins([0.75, 0.25, 0.25, 0.25], [1, 0, 0, 0], bins=2)
    [{'confidence': 0.25, 'accuracy': 0.0, 'count': 3}, {'confidence': 0.75, 'accuracy': 1.0, 'count': 1}]
    """
    c, y = _checked(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    value, inverse, mass = np.unique(c, return_inverse=True, return_counts=True)
    bin_of_value = _bin_of_value(value, mass, bins, equal)
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


def bin_indices(confidence: ArrayLike, bins: int = 15, *, equal: Equal = "mass") -> NDArray[np.intp]:
    """Return the bin [n], from 0, of each confidence [n]; arguments as `reliability_bins`."""
    value, inverse, mass = np.unique(np.asarray(confidence), return_inverse=True, return_counts=True)
    return _bin_of_value(value, mass, bins, equal)[inverse]


def expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    *,
    equal: Equal = "mass",
    debiased: bool = False,
) -> float:
    """Return the ECE, in [0, 1].

    Args:
        confidence, correct, bins, equal: as those of `reliability_bins`.
        debiased: less what the noise of the bins' accuracies adds; may be below 0.

    Raises:
        ValueError: as `reliability_bins`.

    >>> round(expected_calibration_error([0.9, 0.2, 0.8, 0.4], [1, 0, 0, 1], bins=2), 3)
    0.275
    """
    filled = reliability_bins(confidence, correct, bins, equal=equal)
    return _debiased(filled) if debiased else _mean_gap(filled, power=1)


def rms_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    *,
    equal: Equal = "mass",
    debiased: bool = False,
) -> float:
    """Return the RMS calibration error, never below the ECE; arguments as `expected_calibration_error`.

    A bin of one prediction has no estimate of its variance. If `debiased`, its squared gap counts in full.
    """
    filled = reliability_bins(confidence, correct, bins, equal=equal)
    return math.sqrt(max(0.0, _mean_gap(filled, power=2) - (_noise(filled) if debiased else 0.0)))


def smooth_calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the smooth calibration error, in [0, 1], from confidence [n] and correctness [n].

    Residuals are smoothed on a grid of 2048 cells, so errors below 0.0005 are not resolved.

    >>> round(smooth_calibration_error([0.8] * 10, [1] * 5 + [0] * 5), 3)
    0.3
    """
    from scipy.fft import dct, idct

    c, y = _checked(confidence, correct)
    # each residual is shared by the two nearest cells, whose middles are (k + 1/2) / cells
    at = np.clip(c * _CELLS - 0.5, 0, _CELLS - 1)
    cell = np.minimum(at.astype(np.intp), _CELLS - 2)
    share = at - cell
    residual = (y - c) / c.size
    grid = np.bincount(cell, residual * (1 - share), _CELLS) + np.bincount(cell + 1, residual * share, _CELLS)
    waves, number = dct(grid), np.arange(_CELLS)

    def smoothed(width: float) -> float:
        damped = waves * np.exp(-((math.pi * width * number) ** 2) / 2)  # a reflected Gaussian
        return float(np.abs(idct(damped)).sum())

    narrow, wide = 0.0, 1.0
    while wide - narrow > 1e-5:  # the smoothed error falls as the width grows
        middle = (narrow + wide) / 2
        narrow, wide = (middle, wide) if smoothed(middle) > middle else (narrow, middle)
    return smoothed(wide)


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean squared difference of confidence [n] and correctness [n], in [0, 1].

    >>> brier([0.9, 0.2], [1, 0])
    0.025
    """
    c, y = _checked(confidence, correct)
    return float(np.mean((c - y) ** 2))


def brier_parts(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, equal: Equal = "mass"
) -> BrierParts:
    """Return what the Brier score consists of; arguments as `expected_calibration_error`.

    Raises:
        ValueError: as `reliability_bins`, or fewer than two predictions.

    >>> parts = brier_parts([0.8, 0.8, 0.3, 0.3], [1, 1, 1, 0], bins=2)
    >>> round(parts.reliability - parts.resolution + parts.uncertainty + parts.within, 3)
    0.165
    """
    return _parts(reliability_bins(confidence, correct, bins, equal=equal), brier(confidence, correct))


FIGURES = (
    "ece",
    "ece_debiased",
    "ece_width",
    "ece_width_debiased",
    "rms_ce",
    "rms_ce_debiased",
    "smooth_ece",
    "reliability",
    "resolution",
)
"""Names of `figures`; ``width``: bins of equal width, the others of equal mass."""


def figures(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> dict[str, float]:
    """Return all figures of calibration, which share their bins; arguments and errors as `brier_parts`."""
    by_mass = reliability_bins(confidence, correct, bins)
    by_width = reliability_bins(confidence, correct, bins, equal="width")
    parts = _parts(by_mass, brier(confidence, correct))
    square = _mean_gap(by_mass, power=2)
    return {
        "ece": _mean_gap(by_mass, power=1),
        "ece_debiased": _debiased(by_mass),
        "ece_width": _mean_gap(by_width, power=1),
        "ece_width_debiased": _debiased(by_width),
        "rms_ce": math.sqrt(square),
        "rms_ce_debiased": math.sqrt(max(0.0, square - _noise(by_mass))),
        "smooth_ece": smooth_calibration_error(confidence, correct),
        "reliability": parts.reliability,
        "resolution": parts.resolution,
    }


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


def _bin_of_value(
    value: NDArray[np.float64], mass: NDArray[np.intp], bins: int, equal: Equal
) -> NDArray[np.intp]:
    """Return the bin of each distinct value, by rising value; `mass` says how often each occurs."""
    if equal == "width":
        return np.minimum((value * bins).astype(np.intp), bins - 1)
    below = np.cumsum(mass) - mass
    of_equal_mass: NDArray[np.intp] = (2 * below + mass) * bins // (2 * mass.sum())
    return of_equal_mass


def _mean_gap(bins: Sequence[ReliabilityBin], power: int) -> float:
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) ** power for b in bins)
    return gaps / _total(bins)


def _debiased(bins: Sequence[ReliabilityBin]) -> float:
    noisy = math.fsum(b["count"] * _noisy_gap(b) for b in bins) / _total(bins)
    return 2 * _mean_gap(bins, power=1) - noisy


def _noise(bins: Sequence[ReliabilityBin]) -> float:
    """Return what the noise of the bins' accuracies adds to the mean squared gap."""
    return math.fsum(b["count"] * _variance_of_mean(b) for b in bins) / _total(bins)


def _parts(bins: Sequence[ReliabilityBin], score: float) -> BrierParts:
    n = _total(bins)
    if n < 2:
        raise ValueError("the parts of a Brier score need two predictions or more, got 1")
    mean = math.fsum(b["count"] * b["accuracy"] for b in bins) / n
    noise, of_mean = _noise(bins), mean * (1 - mean) / (n - 1)
    reliability = _mean_gap(bins, power=2)
    resolution = math.fsum(b["count"] * (b["accuracy"] - mean) ** 2 for b in bins) / n
    uncertainty = mean * (1 - mean)
    return BrierParts(
        reliability=reliability - noise,
        resolution=resolution - noise + of_mean,
        uncertainty=uncertainty + of_mean,
        within=score - (reliability - resolution + uncertainty),
    )


def _total(bins: Sequence[ReliabilityBin]) -> int:
    return sum(b["count"] for b in bins)


def _variance_of_mean(b: ReliabilityBin) -> float:
    """Return the unbiased variance of a bin's accuracy; 0 if it has one prediction."""
    return b["accuracy"] * (1 - b["accuracy"]) / (b["count"] - 1) if b["count"] > 1 else 0.0


def _noisy_gap(b: ReliabilityBin) -> float:
    """Return E|gap + e| of normal noise e: the mean of a folded normal distribution."""
    gap, sigma = b["accuracy"] - b["confidence"], math.sqrt(b["accuracy"] * (1 - b["accuracy"]) / b["count"])
    if sigma == 0:
        return abs(gap)
    z = gap / sigma
    return sigma * math.sqrt(2 / math.pi) * math.exp(-z * z / 2) + gap * math.erf(z / math.sqrt(2))


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

"""How well an uncertainty ranks wrong responses above right ones. NumPy only.

With uncertainties u and errors e in {0, 1} (1: the response is wrong):

    AUROC  the chance that a wrong response has a larger u than a right one, ties counting one half
    AUPRC  average precision of "wrong" among the most uncertain; its chance level is the share of errors
    PRR    (A(u) - A(random)) / (A(oracle) - A(random)), where A is the mean accuracy of the n most certain
           responses over n = 1 .. N (prediction-rejection ratio): 1 is the best order, 0 a random one

Equal uncertainties are one level: AUPRC takes it as one threshold, PRR the mean over the orders within it. So
every figure is a function of the counts per level, and the bootstrap draws those.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the 2.5 % and 97.5 % quantiles of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """AUROC, AUPRC and PRR of one uncertainty; `errors` of `n` responses are wrong."""

    n: int
    errors: int
    auroc: Estimate
    auprc: Estimate
    prr: Estimate


def ranking(
    uncertainty: ArrayLike, wrong: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Ranking | None:
    """Return how well an uncertainty finds the errors; None where all responses are right, or all wrong.

    Args:
        uncertainty: [n], finite.
        wrong: [n], bool or 0/1.
        resamples: of the bootstrap over responses; those without an error, or without a right response, are
            left out.
        seed: of the bootstrap.

    >>> found = ranking([0.1, 0.2, 0.2, 0.9], [0, 0, 1, 1])
    >>> round(found.auroc.value, 3), round(found.prr.value, 3)
    (0.875, 0.786)
    """
    u, e = np.asarray(uncertainty, dtype=np.float64), np.asarray(wrong, dtype=np.int64)
    if u.ndim != 1 or u.shape != e.shape or not np.isfinite(u).all():
        raise ValueError(
            f"uncertainty and wrong must share one shape [n] and be finite, got {u.shape}, {e.shape}"
        )
    if not 0 < e.sum() < e.size:
        return None
    _, level = np.unique(u, return_inverse=True)
    levels = int(level.max()) + 1
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, e.size + 1))])

    def figures(chosen: NDArray[np.int64] | None) -> Array | None:
        which, error = (level, e) if chosen is None else (level[chosen], e[chosen])
        size = np.bincount(which, minlength=levels).astype(np.float64)
        bad: Array = np.bincount(which, weights=error, minlength=levels).astype(np.float64)
        if not 0 < bad.sum() < e.size:
            return None
        return np.array([_auroc(size, bad), _auprc(size, bad), _prr(size, bad, harmonic)])

    random = np.random.default_rng(seed)
    drawn = [figures(random.integers(0, e.size, e.size)) for _ in range(resamples)]
    kept = [row for row in drawn if row is not None]
    value = figures(None)
    assert value is not None
    low, high = np.quantile(kept, [0.025, 0.975], axis=0) if kept else (value, value)
    auroc, auprc, prr = (
        Estimate(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)
    )
    return Ranking(e.size, int(e.sum()), auroc, auprc, prr)


def accuracy_by_coverage(
    uncertainty: ArrayLike, wrong: ArrayLike, points: int = 100
) -> list[tuple[float, float]]:
    """Return (share kept, accuracy of the kept) as the most uncertain are rejected; ties are even."""
    u, e = np.asarray(uncertainty, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    _, level, size = np.unique(u, return_inverse=True, return_counts=True)
    mean = np.bincount(level, weights=e) / size
    accuracy = 1 - np.cumsum(np.repeat(mean, size)) / np.arange(1, u.size + 1)
    chosen = np.unique(np.linspace(1, u.size, min(points, u.size)).round().astype(int))
    return [(float(n / u.size), float(accuracy[n - 1])) for n in chosen]


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return the rank correlation of two vectors [n], ties sharing their mean rank; None for a constant.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    x, y = _ranks(np.asarray(a, dtype=np.float64)), _ranks(np.asarray(b, dtype=np.float64))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(round(x @ y / scale, 12)) if scale else None


def ties(values: ArrayLike) -> tuple[int, float]:
    """Return how many distinct values there are, and the share of rows on the commonest one."""
    _, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return int(counts.size), float(counts.max() / counts.sum()) if counts.size else 0.0


def bootstrap_spearman(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Estimate | None:
    """Return the rank correlation with its bootstrap interval; None where one vector is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    value = spearman(x, y)
    if value is None:
        return None
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = random.integers(0, x.size, x.size)
        if (one := spearman(x[chosen], y[chosen])) is not None:
            drawn.append(one)
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (value, value)
    return Estimate(value, float(low), float(high))


def _auroc(size: Array, bad: Array) -> float:
    good = size - bad
    below = np.cumsum(good) - good
    return float(bad @ (below + good / 2) / (bad.sum() * good.sum()))


def _auprc(size: Array, bad: Array) -> float:
    found, shown = np.cumsum(bad[::-1]), np.cumsum(size[::-1])
    precision = np.divide(found, shown, out=np.zeros_like(found), where=shown > 0)
    return float(bad[::-1] @ precision / bad.sum())


def _prr(size: Array, bad: Array, harmonic: Array) -> float:
    random = 1 - bad.sum() / size.sum()
    good = size - bad
    best = _area(np.array([good.sum(), bad.sum()]), np.array([0.0, bad.sum()]), harmonic)
    return float((_area(size, bad, harmonic) - random) / (best - random))


def _area(size: Array, bad: Array, harmonic: Array) -> float:
    """Mean over n of the accuracy of the n most certain, each level having its errors spread evenly.

    Within a level of m responses, with n0 before it of which g0 are right, and accuracy a:
    sum_j (g0 + a j) / (n0 + j) = a m + (g0 - a n0) (H(n0 + m) - H(n0)).
    """
    filled = size > 0
    m, good = size[filled], (size - bad)[filled]
    n0, g0, a = np.cumsum(m) - m, np.cumsum(good) - good, good / m
    steps = harmonic[(n0 + m).astype(int)] - harmonic[n0.astype(int)]
    return float((a * m + (g0 - a * n0) * steps).sum() / m.sum())


def _ranks(values: Array) -> Array:
    _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts + 1) / 2)[level]
    return ranks


def interval(estimate: Estimate | None) -> str:
    """Write a figure with its interval.

    >>> interval(Estimate(0.75, 0.7, 0.8125))
    '0.750 [0.700, 0.812]'
    """
    return "" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

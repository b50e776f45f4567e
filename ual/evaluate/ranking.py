"""How well an uncertainty ranks wrong responses above right ones.

With uncertainties u and errors e in {0, 1} (1: the response is wrong):

    AUROC  the chance that a wrong response has a larger u than a right one; ties count one half
    AUPRC  average precision of "wrong" among the most uncertain; its chance level is the share of errors
    PRR    (A(u) - A(random)) / (A(oracle) - A(random)), where A is the mean accuracy of the n most certain
           responses over n = 1 .. N (prediction-rejection ratio): 1 is the best order, 0 a random one
    AURC   1 - A(u), the area under the risk-coverage curve: 0 is best (Geifman and El-Yaniv 2017, arXiv
           1705.08500), computed from `accuracies`

Equal uncertainties are one level: AUPRC takes it as one threshold, PRR and AURC the mean over the orders
within it.
AUROC and AUPRC are scikit-learn's, Spearman's rank correlation is SciPy's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.methods.statistics import Estimate, bootstrap

Array = NDArray[np.float64]


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
        resamples: of the bootstrap over responses, at least 2. Resamples without a wrong or without a right
            response are left out.
        seed: of the bootstrap.

    >>> found = ranking([0.1, 0.2, 0.2, 0.9], [0, 0, 1, 1])
    >>> round(found.auroc.value, 3), round(found.prr.value, 3)
    (0.875, 0.786)
    """
    import sklearn
    from sklearn.metrics import average_precision_score, roc_auc_score

    u, e = np.asarray(uncertainty, dtype=np.float64), np.asarray(wrong, dtype=np.int64)
    if u.ndim != 1 or u.shape != e.shape or not np.isfinite(u).all():
        raise ValueError(
            f"uncertainty and wrong must share one shape [n] and be finite, got {u.shape}, {e.shape}"
        )
    if not 0 < e.sum() < e.size:
        return None

    def estimate(metric: Any) -> Estimate:
        def statistic(e: NDArray[np.int64], u: Array) -> float:
            return float(metric(e, u)) if 0 < e.sum() < e.size else np.nan

        return bootstrap(statistic, e, u, resamples=resamples, seed=seed)

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        auroc, auprc, prr = map(estimate, (roc_auc_score, average_precision_score, _prr))
    return Ranking(e.size, int(e.sum()), auroc, auprc, prr)


def accuracy_by_coverage(
    uncertainty: ArrayLike, wrong: ArrayLike, points: int = 100
) -> list[tuple[float, float]]:
    """Return (share kept, accuracy of the kept) as the most uncertain are rejected; ties are even."""
    accuracy = accuracies(uncertainty, wrong)
    chosen = np.unique(np.linspace(1, accuracy.size, min(points, accuracy.size)).round().astype(int))
    return [(float(n / accuracy.size), float(accuracy[n - 1])) for n in chosen]


def rank_correlation(a: ArrayLike, b: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Estimate | None:
    """Return Spearman's rank correlation of two vectors [n], n >= 2; None where one vector is constant.

    >>> rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]).value
    0.8
    """
    from scipy import stats

    def spearman(x: Array, y: Array) -> float:
        return float(round(stats.spearmanr(x, y).statistic, 12)) if np.ptp(x) and np.ptp(y) else np.nan

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return None if np.isnan(spearman(x, y)) else bootstrap(spearman, x, y, resamples=resamples, seed=seed)


def ties(values: ArrayLike) -> tuple[int, float]:
    """Return how many distinct values there are, and the share of samples on the most common one."""
    _, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return int(counts.size), float(counts.max() / counts.sum()) if counts.size else 0.0


def accuracies(uncertainty: ArrayLike, wrong: ArrayLike) -> Array:
    """Return the accuracy of the n most certain, n = 1 .. N: the mean over the orders within each level."""
    u, e = np.asarray(uncertainty, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    _, level, size = np.unique(u, return_inverse=True, return_counts=True)
    mean = np.bincount(level, weights=e) / size
    accuracy: Array = 1 - np.cumsum(np.repeat(mean, size)) / np.arange(1, u.size + 1)
    return accuracy


def _prr(e: NDArray[Any], u: Array) -> float:
    random = 1 - e.mean()
    return float((accuracies(u, e).mean() - random) / (accuracies(e, e).mean() - random))

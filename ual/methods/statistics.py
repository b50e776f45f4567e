"""Bootstrap intervals, differences of arms on the same samples, and recovered gaps. NumPy and SciPy.

Samples i = 1..n with t_i loss tokens are measured under arm a and baseline b, for seeds k = 1..K. With x_ki
the mean of a metric over the tokens of sample i:

    d_i = 1/K sum_k (a_ki - b_ki)        seeds are averaged within a sample
    D   = sum_i t_i d_i / sum_i t_i      the difference per token: a ratio estimator over samples

The interval is the percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over samples. Tokens of one
sample are not independent, so samples are drawn, each with its numerator and denominator. The interval covers
the choice of held-out samples. It does not cover the randomness of training: the seeds are taken as they are.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-9
"""A difference of accuracies up to here is 0: it is a sum of as many rounding errors as there are items."""
_DRAWN_AT_ONCE = 10_000_000  # values, to bound memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the 2.5 % and 97.5 % quantiles of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference(Estimate):
    """Arm minus baseline per token; the arm is better in `better` of `seeds` seeds."""

    samples: int
    seeds: int
    better: int


def bootstrap(
    statistic: Callable[..., Any],
    *samples: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    centered: bool = False,
) -> Estimate:
    """Return a statistic with its 95 % percentile interval over jointly drawn observations.

    Args:
        statistic: of vectors [n], or of the last axis of arrays if it takes `axis`. Resamples for which it is
            NaN are left out.
        samples: vectors [n], n >= 2, whose elements belong together.
        resamples: at least 2.
        seed: of the draws.
        centered: move the interval so that the mean of the draws is the value. For statistics that noise
            raises, such as calibration errors: a draw repeats observations, so it is noisier than the sample.
    """
    from scipy import stats

    arrays = [np.asarray(sample) for sample in samples]
    value = float(statistic(*arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            arrays,
            statistic,
            paired=True,
            n_resamples=resamples,
            method="percentile",
            batch=max(1, _DRAWN_AT_ONCE // arrays[0].size),
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    return _interval(value, drawn, centered)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What is known of n items, and the figures that follow from it.

    Attributes:
        columns: by name, [n, ...], a number or vector for each item.
        figures: returns figures by name from the columns of some items, with repetitions. NaN: not defined.
        centered: names of figures whose intervals are moved as `bootstrap` says.
    """

    columns: Mapping[str, NDArray[np.float64]]
    figures: Callable[[Mapping[str, NDArray[np.float64]]], Mapping[str, float]]
    centered: Collection[str] = ()

    @property
    def items(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, drawn: NDArray[np.intp]) -> Mapping[str, float]:
        """Return the figures of some items, by index."""
        return self.figures({name: column[drawn] for name, column in self.columns.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Figures of all items, and of resamples of the items.

    Attributes:
        values: by name; NaN where a figure is not defined.
        drawn: by name, [resamples].
        centered: as `Table.centered`.
    """

    values: Mapping[str, float]
    drawn: Mapping[str, NDArray[np.float64]]
    centered: Collection[str]

    @classmethod
    def mean(cls, of: Sequence["Draws"]) -> "Draws":
        """Return means over seeds, which have the same resamples."""
        return cls(
            {name: float(np.mean([one.values[name] for one in of])) for name in of[0].values},
            {name: np.mean([one.drawn[name] for one in of], axis=0) for name in of[0].drawn},
            of[0].centered,
        )

    def estimates(self, minus: "Draws | None" = None) -> dict[str, Estimate | None]:
        """Return figures with intervals, or their differences from others of the same items and seed.

        A figure that is not defined is None.
        """
        found: dict[str, Estimate | None] = {}
        for name, value in self.values.items():
            drawn = self.drawn[name]
            if minus is not None:
                value, drawn = value - minus.values[name], drawn - minus.drawn[name]
            found[name] = None if np.isnan(value) else _interval(value, drawn, name in self.centered)
        return found


def draws(table: Table, *, resamples: int = 1000, seed: int = 0) -> Draws:
    """Return the figures of all items, and of resamples. Many figures share the work of a resample.

    Args:
        table: of two items or more.
        resamples: at least 2.
        seed: of the resamples, which depend on nothing else but the number of items.

    Raises:
        ValueError: there are fewer than two items.
    """
    if table.items < 2:
        raise ValueError(f"an interval needs two items or more, got {table.items}")
    rng = np.random.default_rng(seed)
    values = table.take(np.arange(table.items))
    found = [table.take(rng.integers(0, table.items, table.items)) for _ in range(resamples)]
    drawn = {name: np.array([of[name] for of in found]) for name in values}
    return Draws(values, drawn, frozenset(table.centered))


def exchange_p(
    arm: Sequence[Table], baseline: Sequence[Table], *, permutations: int = 999, seed: int = 0
) -> dict[str, float]:
    """Return the two-sided p-value of the difference of every figure, by exchange of items between two arms.

    If two arms do not differ, each item's answers could as well be those of the other arm. So items are
    exchanged at random, for all seeds of training together. Figures that are no means over items, such as
    calibration errors, are tested alike. The p-value is twice the smaller share of exchanges whose difference
    is as far out on one side, the observed one among them, and at most 1.

    Args:
        arm, baseline: one table for each seed of training, of the same items.
        permutations: random exchanges; the smallest p-value is 2 / (permutations + 1).
        seed: of the exchanges.

    Returns:
        By name; NaN where a figure is not defined.

    Raises:
        ValueError: the arms have other numbers of seeds or items.
    """
    sizes = {table.items for table in (*arm, *baseline)}
    if len(arm) != len(baseline) or len(sizes) != 1:
        seeds = f"{len(arm)} and {len(baseline)} seeds"
        raise ValueError(f"two arms need the same seeds and items, got {seeds}, and {sizes} items")
    [items] = sizes
    rng = np.random.default_rng(seed)

    def difference(exchanged: NDArray[np.bool_]) -> dict[str, float]:
        total: dict[str, float] = {}
        for a, b in zip(arm, baseline, strict=True):
            own, other = a.figures(_mixed(a, b, exchanged)), b.figures(_mixed(b, a, exchanged))
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + (value - other[name]) / len(arm)
        return total

    observed = difference(np.zeros(items, dtype=bool))
    found = [difference(rng.random(items) < 0.5) for _ in range(permutations)]
    return {name: _two_sided(value, [of[name] for of in found]) for name, value in observed.items()}


def _two_sided(value: float, drawn: Sequence[float]) -> float:
    """Return the p-value of an observed value among draws; NaN if it is not defined."""
    if np.isnan(value):
        return float("nan")
    every = np.array([value, *drawn])
    every = every[~np.isnan(every)]
    slack = ROUNDING * max(1.0, abs(value))  # equal patterns differ by rounding
    return float(min(1.0, 2 * min((every >= value - slack).mean(), (every <= value + slack).mean())))


def _mixed(a: Table, b: Table, exchanged: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Return the columns of one table, with the items that are exchanged from the other."""
    return {
        name: np.where(exchanged.reshape(-1, *[1] * (column.ndim - 1)), b.columns[name], column)
        for name, column in a.columns.items()
    }


def paired_difference(
    arm: ArrayLike,
    baseline: ArrayLike,
    tokens: ArrayLike,
    *,
    higher_is_better: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Return how much an arm differs from a baseline per token, see the module.

    Args:
        arm: [K, n], means over each sample's tokens; seed k is the same in both arms.
        baseline: [K, n].
        tokens: [n], positive.
        higher_is_better: of the metric.
        resamples: of the bootstrap over samples.
        seed: of the draws.

    Raises:
        ValueError: shapes differ, fewer than two samples, or a sample without tokens.

    >>> found = paired_difference([[1.0, 2.0, 2.0]], [[2.0, 2.0, 3.0]], [1, 2, 1])
    >>> found.value, found.samples, found.seeds, found.better
    (-0.5, 3, 1, 1)
    """
    a, b = np.asarray(arm, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    t = np.asarray(tokens, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or a.shape[1:] != t.shape or t.size < 2 or not (t > 0).all():
        raise ValueError(
            "arm and baseline must be [seeds, samples], tokens [samples] and positive, with two samples or "
            f"more; got {a.shape}, {b.shape}, {t.shape}"
        )
    found = bootstrap(_per_token, (a - b).mean(axis=0), t, resamples=resamples, seed=seed)
    by_seed = _per_token(a - b, t)
    better = int((by_seed > 0 if higher_is_better else by_seed < 0).sum())
    return PairedDifference(found.value, found.low, found.high, t.size, len(a), better)


def permutation_p(
    difference: ArrayLike, weights: ArrayLike | None = None, *, permutations: int = 9999, seed: int = 0
) -> float:
    """Return the two-sided p-value of a mean paired difference, by exchange of the arms within items.

    If two arms do not differ, each item's difference could as well have the other sign. The p-value is twice
    the smaller share of sign patterns whose mean is as far out on one side, and at most 1. All patterns are
    tried if they are not more than `permutations`, and otherwise as many random ones, with the observed one
    among them.

    Args:
        difference: [n], arm minus baseline for each item, n >= 2.
        weights: [n], positive, such as loss tokens; None weighs all alike.
        permutations: at least 100. The smallest p-value is about 2 / permutations.
        seed: of the random patterns.

    Raises:
        ValueError: shapes differ, fewer than two items, or a weight that is not positive.

    >>> permutation_p([1.0, 2.0, 3.0, 4.0])
    0.125
    """
    from scipy import stats

    d = np.asarray(difference, dtype=np.float64)
    t = np.ones_like(d) if weights is None else np.asarray(weights, dtype=np.float64)
    if d.ndim != 1 or d.shape != t.shape or d.size < 2 or not (t > 0).all():
        raise ValueError(
            "difference and weights must be [items], with two items or more and positive weights; "
            f"got {d.shape}, {t.shape}"
        )
    found = stats.permutation_test(
        (d * t / t.sum(),),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, _DRAWN_AT_ONCE // d.size),
        rng=np.random.default_rng(seed),
    )
    return float(min(1.0, found.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number (Holm 1979), by name.

    A corrected value up to 0.05 is a finding at a family-wise error rate of 5 %, however the tests depend on
    each other.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    corrected, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda of: of[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}


def effect_size(difference: ArrayLike) -> float:
    """Return Cohen's d_z of paired differences [n]: their mean over their standard deviation; NaN if it is 0.

    >>> round(effect_size([0.0, 1.0, 2.0]), 3)
    1.0
    """
    d = np.asarray(difference, dtype=np.float64)
    spread = d.std(ddof=1) if d.size > 1 else 0.0
    return float(d.mean() / spread) if spread > 0 else float("nan")


def performance_gap_recovered(
    arm: ArrayLike,
    weak: ArrayLike,
    ceiling: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Return PGR = (arm - weak) / (ceiling - weak), with the interval of the bootstrap over items.

    PGR is 0 if the strong model is as accurate as its weak supervisor, and 1 if it is as accurate as with
    right labels. It is not clipped (Burns et al., arXiv 2312.09390). Accuracies are means over seeds.

    Args:
        arm: [K, n], whether the strong model's answer to item i is right, for each seed; true or false.
        weak, ceiling: [K, n], the same for the supervisor, and for the strong model trained on right labels.
        resamples: of the bootstrap over items.
        seed: of the draws.

    Returns:
        None if the 95 % interval of (ceiling - weak) reaches 0 or below: then there is no gap to recover,
        and the quotient means nothing.

    Raises:
        ValueError: shapes differ, or fewer than two items.

    >>> right = [[True] * 40]
    >>> half, most = [[True] * 20 + [False] * 20], [[True] * 30 + [False] * 10]
    >>> found = performance_gap_recovered(most, half, right)
    >>> found.value, found.low > 0, performance_gap_recovered(most, half, half)
    (0.5, True, None)
    """
    over_seeds = [np.asarray(rights, dtype=np.float64) for rights in (arm, weak, ceiling)]
    shapes = [rights.shape for rights in over_seeds]
    if len({*shapes}) > 1 or over_seeds[0].ndim != 2 or shapes[0][1] < 2:
        raise ValueError(f"expected three arrays [seeds, items] with two items or more, got {shapes}")
    a, w, c = (rights.mean(axis=0) for rights in over_seeds)
    gap = bootstrap(_mean_difference, c, w, resamples=resamples, seed=seed)
    if gap.low <= ROUNDING:
        return None
    return bootstrap(_share_of_gap, a, w, c, resamples=resamples, seed=seed)


def _interval(value: float, drawn: NDArray[np.float64], centered: bool) -> Estimate:
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (value, value)
    bias = float(known.mean()) - value if centered and known.size else 0.0
    return Estimate(value, float(low) - bias, float(high) - bias)


def _mean_difference(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    difference: NDArray[np.float64] = a.mean(axis) - b.mean(axis)
    return difference


def _share_of_gap(
    a: NDArray[np.float64], w: NDArray[np.float64], c: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    gap = _mean_difference(c, w, axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        share: NDArray[np.float64] = np.where(gap == 0, np.nan, _mean_difference(a, w, axis) / gap)
    return share


def _per_token(
    difference: NDArray[np.float64], tokens: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    total: NDArray[np.float64] = (difference * tokens).sum(axis) / tokens.sum(axis)
    return total

"""Paired differences against token-by-token computation, every resample, the delta method and known truth."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest

from ual.methods.statistics import (
    Draws,
    Table,
    bootstrap,
    draws,
    effect_size,
    exchange_p,
    holm,
    paired_difference,
    performance_gap_recovered,
    permutation_p,
)


@pytest.mark.kills(
    "ual/methods/statistics.py",
    "(difference * tokens).sum(axis) / tokens.sum(axis)",
    "difference.mean(axis)",
)
@pytest.mark.kills("ual/methods/statistics.py", "(a - b).mean(axis=0), t", "(a - b)[0], t")
@pytest.mark.kills(
    "ual/methods/statistics.py", "by_seed > 0 if higher_is_better else by_seed < 0", "by_seed < 0"
)
def test_the_difference_is_that_of_all_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, size=20)
    shift = np.array([-0.5, 0.1, -0.2])
    arm = [[rng.exponential(size=t) + s for t in tokens] for s in shift]
    baseline = [[rng.exponential(size=t) for t in tokens] for _ in shift]
    means = [[[x.mean() for x in seed] for seed in of] for of in (arm, baseline)]
    found = paired_difference(*means, tokens, resamples=2)
    by_seed = [
        np.concatenate(a).mean() - np.concatenate(b).mean() for a, b in zip(arm, baseline, strict=True)
    ]
    assert found.value == pytest.approx(np.mean(by_seed))
    assert (found.samples, found.seeds, found.better) == (20, 3, sum(d < 0 for d in by_seed))
    assert 0 < found.better < 3
    up = paired_difference(*means, tokens, higher_is_better=True, resamples=2)
    assert up.better == 3 - found.better


def test_the_interval_of_three_samples_is_that_of_every_resample() -> None:
    """Each of the 27 resamples has a chance above 2.5 %, so the quantiles are the extremes."""
    difference, tokens = np.array([0.5, -1.0, 2.0]), np.array([1, 4, 2])
    found = paired_difference([difference], [[0.0] * 3], tokens)
    every = [
        difference[list(i)] @ tokens[list(i)] / tokens[list(i)].sum()
        for i in itertools.product(range(3), repeat=3)
    ]
    assert (found.low, found.high) == pytest.approx((min(every), max(every)))


def test_the_interval_is_that_of_the_delta_method_and_holds_the_truth() -> None:
    hits, rng = 0, np.random.default_rng(0)
    for seed in range(100):
        tokens = rng.integers(5, 60, size=200)
        baseline = rng.exponential(size=200)
        arm = baseline - 0.1 + rng.normal(0, 0.4, size=200)
        found = paired_difference([arm], [baseline], tokens, resamples=400, seed=seed)
        error = math.sqrt((((arm - baseline - found.value) * tokens) ** 2).sum()) / tokens.sum()
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.3)
        hits += found.low <= -0.1 <= found.high
    assert 88 <= hits <= 100


def test_equal_arms_do_not_differ() -> None:
    found = paired_difference([[1.0, 2.0]], [[1.0, 2.0]], [3, 4])
    assert (found.value, found.low, found.high, found.better) == (0, 0, 0, 0)


@pytest.mark.kills("ual/methods/statistics.py", "            paired=True,", "            paired=False,")
def test_observations_that_belong_together_are_drawn_together() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = bootstrap(lambda x, y: float((x - y).mean()), values, values + 1)
    assert (found.low, found.high) == pytest.approx((-1, -1))


@pytest.mark.kills("ual/methods/statistics.py", "known = drawn[~np.isnan(drawn)]", "known = drawn")
def test_resamples_without_a_value_are_left_out() -> None:
    found = bootstrap(lambda x: float(x.mean()) if np.ptp(x) else np.nan, [0.0, 1.0, 5.0])
    assert 0 < found.low < found.value == 2 < found.high < 5
    once = bootstrap(lambda x: 7.0 if list(x) == list(range(30)) else np.nan, np.arange(30.0))
    assert once.value == once.low == once.high == 7


@pytest.mark.parametrize(
    ("arm", "baseline", "tokens"),
    [
        ([[1.0]], [[1.0]], [1]),
        ([[1, 2]], [[1, 2]], [1, 0]),
        ([[1, 2]], [[1, 2], [1, 2]], [1, 1]),
        ([1, 2], [1, 2], [1, 1]),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arm: list[float], baseline: list[float], tokens: list[int]
) -> None:
    with pytest.raises(ValueError, match="two samples or more"):
        paired_difference(arm, baseline, tokens)


# ---- performance gap recovered ----


def rights(accuracy: float, difficulty: np.ndarray, seeds: int = 3) -> np.ndarray:
    """Right answers: an item is easier for all models or harder for all; seeds differ on items in between."""
    rng = np.random.default_rng(1)
    return (difficulty < accuracy + rng.normal(0, 0.05, size=(seeds, difficulty.size))).astype(float)


@pytest.mark.kills(
    "ual/methods/statistics.py", "_mean_difference(a, w, axis) / gap", "_mean_difference(c, a, axis) / gap"
)
@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0.6, 0.0), (0.7, 0.5), (0.8, 1.0), (0.84, 1.2), (0.56, -0.2)]
)
def test_pgr_is_not_clipped(accuracy: float, expected: float) -> None:
    difficulty = np.linspace(0, 1, 4000)
    weak, arm, ceiling = (rights(a, difficulty) for a in (0.6, accuracy, 0.8))
    found = performance_gap_recovered(arm, weak, ceiling, resamples=200)
    assert found is not None
    assert found.value == pytest.approx(expected, abs=0.05)
    by_definition = (arm.mean() - weak.mean()) / (ceiling.mean() - weak.mean())
    assert found.value == pytest.approx(by_definition)
    assert found.low <= found.value <= found.high


@pytest.mark.kills("ual/methods/statistics.py", "    if gap.low <= ROUNDING:\n        return None\n", "")
@pytest.mark.parametrize("ceiling", [0.6, 0.605, 0.4])
def test_pgr_needs_a_gap(ceiling: float) -> None:
    """The supervisor is as good as the ceiling, almost as good, or better."""
    rng = np.random.default_rng(0)
    weak, arm, top = ((rng.random((3, 200)) < a).astype(float) for a in (0.6, 0.7, ceiling))
    assert performance_gap_recovered(arm, weak, top, resamples=200) is None


def test_the_interval_of_pgr_is_that_of_the_delta_method_and_holds_the_truth() -> None:
    hits, rng = 0, np.random.default_rng(0)
    for seed in range(100):
        difficulty = rng.random(800)
        weak, arm, ceiling = (
            (difficulty < a + rng.normal(0, 0.1, size=800)).astype(float)[None] for a in (0.4, 0.6, 0.8)
        )
        found = performance_gap_recovered(arm, weak, ceiling, resamples=400, seed=seed)
        assert found is not None
        gap = (ceiling - weak).mean()
        error = ((arm - weak - found.value * (ceiling - weak)) / gap).std() / math.sqrt(800)
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.3)
        hits += found.low <= 0.5 <= found.high
    assert 88 <= hits <= 100


def test_items_are_drawn_together() -> None:
    """An arm that answers as its ceiling does has a PGR of 1 in every resample."""
    difficulty = np.random.default_rng(0).random(300)
    weak, ceiling = rights(0.4, difficulty), rights(0.8, difficulty)
    found = performance_gap_recovered(ceiling, weak, ceiling, resamples=200)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    "shapes", [((3, 10), (3, 10), (2, 10)), ((10,), (10,), (10,)), ((3, 1), (3, 1), (3, 1))]
)
def test_pgr_of_other_shapes_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"expected three arrays \[seeds, items\] with two items or more"):
        performance_gap_recovered(*(np.ones(shape) for shape in shapes))


# ---- tests of differences ----


@pytest.mark.kills("ual/methods/statistics.py", "(d * t / t.sum(),)", "(d,)")
def test_the_p_value_of_few_items_is_that_of_every_pattern() -> None:
    difference, weights = np.array([0.5, -1.0, 2.0, 1.5, 0.3]), np.array([1.0, 9.0, 2.0, 5.0, 1.0])
    patterns = np.array(list(itertools.product([1, -1], repeat=5)))
    means = patterns @ (difference * weights)
    observed = (difference * weights).sum()
    one_sided = min((means >= observed - 1e-12).mean(), (means <= observed + 1e-12).mean())
    assert permutation_p(difference, weights) == pytest.approx(min(1, 2 * one_sided))


@pytest.mark.kills("ual/methods/statistics.py", "n_resamples=permutations,", "n_resamples=10,")
def test_p_values_are_uniform_without_an_effect_and_small_with_one() -> None:
    rng = np.random.default_rng(0)
    found = [permutation_p(rng.normal(0, 1, 60), permutations=499, seed=i) for i in range(300)]
    below = np.mean(np.array(found) <= 0.05)
    assert 0.05 - 4 * math.sqrt(0.05 * 0.95 / 300) <= below <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)
    assert permutation_p(rng.normal(1, 1, 60), permutations=999) <= 2 / 1000
    assert permutation_p(np.zeros(30)) == 1


def spread(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return a figure that is no mean over items."""
    return {"spread": float(columns["x"].std()), "mean": float(columns["x"].mean())}


@pytest.mark.kills(
    "ual/methods/statistics.py",
    "own, other = a.figures(_mixed(a, b, exchanged)), b.figures(_mixed(b, a, exchanged))",
    "own, other = a.figures(_mixed(a, b, exchanged)), b.figures(b.columns)",
)
@pytest.mark.kills("ual/methods/statistics.py", "2 * min((every >=", "min((every >=")
def test_exchange_gives_uniform_p_values_without_an_effect_and_finds_one() -> None:
    rng, found = np.random.default_rng(3), []
    for seed in range(250):
        item = rng.normal(0, 1, 40)
        tables = [Table({"x": item + rng.normal(0, 1, 40)}, spread) for _ in range(4)]
        p = exchange_p(tables[:2], tables[2:], permutations=79, seed=seed)
        found += list(p.values())
    share = np.mean(np.array(found) <= 0.2)
    assert abs(share - 0.2) <= 4 * math.sqrt(0.2 * 0.8 / 250)  # figures of one draw depend on each other
    for one, other in itertools.pairwise(tables):  # the arms have no order
        assert exchange_p([one], [other], permutations=99) == exchange_p([other], [one], permutations=99)
    # of a mean, the exchange of an item is the sign of its difference
    one, other = tables[0], Table({"x": tables[0].columns["x"] + rng.normal(0.25, 1, 40)}, spread)
    by_sign = permutation_p(other.columns["x"] - one.columns["x"])
    assert 0.02 < by_sign < 0.6
    found_p = exchange_p([other], [one], permutations=1999)["mean"]
    assert found_p == pytest.approx(by_sign, abs=8 * math.sqrt(by_sign / 2 / 2000))
    wide = [Table({"x": 1.6 * table.columns["x"] + 1}, spread) for table in tables]
    assert exchange_p(wide, tables, permutations=99) == {
        "spread": pytest.approx(0.02),
        "mean": pytest.approx(0.02),
    }
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        exchange_p(tables[:2], tables[:1])
    with pytest.raises(ValueError, match="items"):
        exchange_p(tables[:1], [Table({"x": np.zeros(3)}, spread)])


def test_means_over_seeds_are_drawn_together() -> None:
    rng = np.random.default_rng(4)
    tables = [Table({"x": rng.normal(i, 1, 60)}, spread) for i in range(3)]
    mean = Draws.mean([draws(table, resamples=300, seed=1) for table in tables]).estimates()["mean"]
    every = bootstrap(np.mean, np.mean([table.columns["x"] for table in tables], axis=0), resamples=300)
    assert mean is not None
    assert mean.value == pytest.approx(every.value)
    assert mean.high - mean.low == pytest.approx(every.high - every.low, rel=0.25)


@pytest.mark.kills("ual/methods/statistics.py", "(len(p_values) - rank) * p", "len(p_values) * p")
@pytest.mark.kills("ual/methods/statistics.py", "highest = max(highest, min(", "highest = max(0.0, min(")
def test_holm_rejects_as_its_procedure_does() -> None:
    """Step down: the smallest p against 5 % / m, the next one against 5 % / (m - 1), until one fails."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = {str(i): float(x) for i, x in enumerate(rng.uniform(size=6) ** 3)}
        rejected = set()
        for rank, (name, value) in enumerate(sorted(p.items(), key=lambda of: of[1])):
            if value > 0.05 / (6 - rank):
                break
            rejected.add(name)
        assert {name for name, value in holm(p).items() if value <= 0.05} == rejected
    assert holm({}) == {}
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_effect_size_is_that_of_the_t_statistic() -> None:
    d = np.random.default_rng(2).normal(0.3, 1, 50)
    from scipy import stats

    assert effect_size(d) == pytest.approx(stats.ttest_1samp(d, 0).statistic / math.sqrt(50))
    assert math.isnan(effect_size([1.0, 1.0]))


def test_refuses_differences_that_are_none() -> None:
    for difference, weights in (([1.0], None), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two items or more"):
            permutation_p(difference, weights)

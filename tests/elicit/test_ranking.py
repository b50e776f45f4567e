"""AUROC, AUPRC and prediction rejection against their definitions, ties included."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ual.evaluate.ranking import accuracy_by_coverage, rank_correlation, ranking, ties

pairs = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=7).filter(
    lambda rows: len({wrong for _, wrong in rows}) == 2
)


def area(order: tuple[bool, ...]) -> float:
    """Mean over n of the accuracy of the first n."""
    return float(np.mean([1 - sum(order[:n]) / n for n in range(1, len(order) + 1)]))


@pytest.mark.kills(
    "ual/evaluate/ranking.py", "    mean = np.bincount(level, weights=e) / size", "    mean = e"
)
@pytest.mark.kills(
    "ual/evaluate/ranking.py", "return float(metric(e, u)) if", "return float(metric(e, -u)) if"
)
@pytest.mark.kills(
    "ual/evaluate/ranking.py",
    "map(estimate, (roc_auc_score, average_precision_score, _prr))",
    "map(estimate, (roc_auc_score, roc_auc_score, _prr))",
)
@settings(phases=[Phase.generate])  # to shrink a failure takes minutes
@given(pairs)
def test_against_the_definitions(rows: list[tuple[int, bool]]) -> None:
    found = ranking([u for u, _ in rows], [w for _, w in rows], resamples=2)
    assert found is not None
    wrong, right = [u for u, w in rows if w], [u for u, w in rows if not w]
    wins = [(a > b) + (a == b) / 2 for a in wrong for b in right]
    assert found.auroc.value == pytest.approx(np.mean(wins))
    precision = [sum(v >= u for v in wrong) / sum(v >= u for v, _ in rows) for u in wrong]
    assert found.auprc.value == pytest.approx(np.mean(precision))
    orders = [
        tuple(w for _, w in order)
        for order in permutations(rows)
        if all(a[0] <= b[0] for a, b in pairwise(order))
    ]
    best, random = area(tuple(sorted(w for _, w in rows))), 1 - len(wrong) / len(rows)
    expected = (np.mean([area(order) for order in orders]) - random) / (best - random)
    assert found.prr.value == pytest.approx(expected)


def test_a_perfect_order_a_reversed_one_and_none() -> None:
    wrong = [0] * 50 + [1] * 50
    best, worst = (ranking(order, wrong, resamples=20) for order in (range(100), range(100, 0, -1)))
    assert best is not None
    assert worst is not None
    assert (best.auroc.value, best.auprc.value, best.prr.value) == pytest.approx((1, 1, 1))
    assert worst.auroc.value == 0
    assert worst.prr.value < -0.9
    constant = ranking([1.0] * 100, wrong, resamples=20)
    assert constant is not None
    assert constant.auroc.value == 0.5
    assert constant.prr.value == pytest.approx(0)
    assert ranking([1.0, 2.0], [0, 0]) is None


@pytest.mark.slow
def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        wrong = random.random(300) < 0.4
        u = random.normal(size=300) + wrong  # AUROC of unit normals one apart: Phi(1 / sqrt 2) = .7602
        found = ranking(u, wrong, resamples=100, seed=seed)
        assert found is not None
        hits += found.auroc.low <= 0.7602 <= found.auroc.high
    assert 51 <= hits <= 60


def test_spearman_and_ties() -> None:
    for a, b, rho in (
        ([1, 2, 3], [1, 4, 9], 1),
        ([1, 2, 2, 3], [4, 3, 3, 1], -1),
        ([1, 2, 2, 3], [1, 2, 3, 4], pytest.approx(0.9486833)),
    ):
        found = rank_correlation(a, b, resamples=2)
        assert found is not None
        assert found.value == rho
    assert rank_correlation([1, 1], [1, 2]) is None
    found = rank_correlation(np.arange(50), np.arange(50) % 10)
    assert found is not None
    assert found.low < found.value < found.high
    assert ties([1, 1, 2, 1]) == (2, 0.75)


def test_the_coverage_curve_ends_at_the_accuracy_of_all() -> None:
    curve = accuracy_by_coverage([1, 2, 2, 3], [0, 1, 0, 1])
    assert curve == [(0.25, 1.0), (0.5, 0.75), (0.75, pytest.approx(2 / 3)), (1.0, 0.5)]

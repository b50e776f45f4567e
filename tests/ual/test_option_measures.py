"""Measures of option probabilities: by hand, against SciPy and scikit-learn, laws, and intervals."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import log_loss, roc_auc_score

from ual.evaluate.calibration import brier_parts
from ual.evaluate.options import HUMAN_MEASURES, MEASURES, Predictions, table, temperature
from ual.evaluate.ranking import accuracies
from ual.methods.statistics import Estimate, Table, draws, exchange_p

OPTIONS = "abcde"


def value(of: Predictions, name: str) -> float:
    return draws(table(of), resamples=2).values[name]


def drawn(rng: np.random.Generator, n: int, *, sharpness: float = 1.0, human: bool = False) -> Predictions:
    """Return predictions p^sharpness of questions whose right option is drawn from p; 2 to 5 options each."""
    shares = [rng.dirichlet(np.ones(rng.integers(2, 6))) for _ in range(n)]
    gold = [OPTIONS[rng.choice(p.size, p=p)] for p in shares]
    rows = [dict(zip(OPTIONS, p**sharpness, strict=False)) for p in shares]
    people = [dict(zip(OPTIONS, rng.dirichlet(np.ones(p.size)), strict=False)) for p in shares]
    return Predictions.of(rows, gold, people if human else None)


# ---- scores ----


@pytest.mark.kills("ual/evaluate/options.py", "== self.gold[:, None]", "== self.gold[0]")
@pytest.mark.kills("ual/evaluate/options.py", "shares: Array = table / total", "shares: Array = table")
def test_two_questions_by_hand() -> None:
    found = Predictions.of([{"a": 3, "b": 1}, {"x": 0.2, "y": 0.5, "z": 0.3}], ["a", "z"])
    assert found.nll() == pytest.approx([-math.log(0.75), -math.log(0.3)])
    assert found.brier() == pytest.approx([2 * 0.25**2, 0.2**2 + 0.5**2 + 0.7**2])
    assert found.correct().tolist() == [True, False]
    assert found.confidence() == pytest.approx([0.75, 0.5])
    assert found.entropy()[0] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert value(found, "accuracy") == 0.5


@pytest.mark.kills(
    "ual/evaluate/options.py",
    "np.where(q > 0, q * (np.log(q) - self.log_probs), 0)",
    "np.where(q > 0, q * np.log(q), 0)",
)
@pytest.mark.kills("ual/evaluate/options.py", "_entropy((p + q) / 2) -", "_entropy(p + q) -")
@pytest.mark.kills(
    "ual/evaluate/options.py", "_correlation(_ranks(model), _ranks(people))", "_correlation(model, people)"
)
@pytest.mark.kills("ual/evaluate/options.py", "positive * (positive + 1) / 2", "0")
def test_agrees_with_scipy_and_scikit_learn() -> None:
    found = drawn(np.random.default_rng(0), 40, human=True)
    assert found.human is not None
    p, q = found.probabilities, found.human
    kl = [stats.entropy(q[i][q[i] > 0], p[i][q[i] > 0]) for i in range(40)]
    assert found.kl() == pytest.approx(kl)
    assert found.jsd() == pytest.approx(jensenshannon(p, q, axis=1) ** 2)
    assert found.entropy() == pytest.approx(stats.entropy(p, axis=1))
    assert value(found, "entropy_pearson") == pytest.approx(
        stats.pearsonr(stats.entropy(p, axis=1), stats.entropy(q, axis=1)).statistic
    )
    assert value(found, "entropy_spearman") == pytest.approx(
        stats.spearmanr(stats.entropy(p, axis=1), stats.entropy(q, axis=1)).statistic
    )
    assert value(found, "auroc") == pytest.approx(roc_auc_score(found.correct(), found.confidence()))
    four = found.take(np.array([(row > 0).sum() == 4 for row in p]))
    assert value(four, "nll") == pytest.approx(
        log_loss(four.gold, four.probabilities[:, :4], labels=range(4))
    )


@given(st.integers(0, 10_000), st.floats(0.05, 20))
def test_laws(seed: int, t: float) -> None:
    found = drawn(np.random.default_rng(seed), 6, human=True)
    assert found.probabilities.sum(1) == pytest.approx(1)
    assert (found.brier() >= 0).all()
    assert (found.brier() <= 2).all()
    assert (found.jsd() >= 0).all()
    assert (found.jsd() <= math.log(2) + 1e-12).all()
    assert (found.kl() >= -1e-12).all()
    again = found.at(t)
    assert again.probabilities.sum(1) == pytest.approx(1)
    assert again.correct().tolist() == found.correct().tolist()
    assert ((again.probabilities > 0) == (found.probabilities > 0)).all()
    assert (again.entropy() >= found.entropy() - 1e-9).all() == (t >= 1) or t == pytest.approx(1, rel=1e-3)


def test_a_right_option_without_probability_costs_what_a_float_can_say() -> None:
    found = Predictions.of([{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}], ["b", "a"])
    assert found.nll()[0] == pytest.approx(744.44, abs=0.01)
    assert math.isfinite(temperature(found))


# ---- temperature ----


@pytest.mark.kills(
    "ual/evaluate/options.py", "logs = self.log_probs / temperature", "logs = self.log_probs * temperature"
)
@pytest.mark.kills(
    "ual/evaluate/options.py", "logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)", ""
)
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_sharpness(sharpness: float) -> None:
    found = drawn(np.random.default_rng(1), 4000, sharpness=sharpness)
    t = temperature(found)
    assert t == pytest.approx(sharpness, rel=0.1)
    best = found.at(t).nll().mean()
    assert best < min(found.at(t * 1.01).nll().mean(), found.at(t / 1.01).nll().mean())


@pytest.mark.kills("ual/evaluate/options.py", ".nll().sum() + log_t**2 / 2)", ".nll().sum())")
def test_a_prior_bounds_the_temperature_of_few_questions() -> None:
    right = Predictions.of([{"a": 0.6, "b": 0.4}] * 3, ["a"] * 3)
    wrong = Predictions.of([{"a": 0.6, "b": 0.4}] * 3, ["b"] * 3)
    for of in (right, wrong):
        t = temperature(of)
        slope = (of.at(t * 1.001).nll().sum() - of.at(t / 1.001).nll().sum()) / (2 * math.log(1.001))
        assert slope == pytest.approx(-math.log(t), abs=1e-4)
    assert 0.3 < temperature(right) < 1 < temperature(wrong) < 3
    many = np.zeros(30_000, dtype=int)
    assert temperature(right.take(many)) < 0.06
    assert temperature(wrong.take(many)) > 20
    with pytest.raises(ValueError, match="fitted"):
        temperature(right.take(np.array([], dtype=int)))


# ---- ranking ----


@pytest.mark.kills(
    "ual/evaluate/options.py", "round(share * right.size / 100)) - 1", "round(share * right.size / 100))"
)
@pytest.mark.kills(
    "ual/evaluate/options.py",
    "ranking.accuracies(-confidence, 1 - right)",
    "ranking.accuracies(confidence, 1 - right)",
)
def test_risk_and_coverage_by_hand() -> None:
    sure = [0.9, 0.8, 0.7, 0.6]
    found = Predictions.of([{"a": p, "b": 1 - p} for p in sure], ["a", "b", "a", "b"])
    assert value(found, "aurc") == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert value(found, "accuracy_at_50") == 0.5
    assert value(found, "accuracy_at_80") == pytest.approx(2 / 3)
    assert accuracies([0.1] * 4, [0, 1, 0, 1]) == pytest.approx([0.5] * 4)  # equal ones have no order


# ---- intervals ----


@pytest.mark.kills("ual/methods/statistics.py", "if centered and known.size", "if False and known.size")
def test_the_interval_of_a_calibration_error_holds_the_truth() -> None:
    """Predictions are calibrated. A percentile interval holds 0 in two of three draws only."""
    rng, hits = np.random.default_rng(2), 0
    for seed in range(60):
        confidence = rng.uniform(0.55, 0.95, size=400)
        right = rng.uniform(size=400) < confidence

        columns = {"confidence": confidence, "right": right.astype(float)}
        table = Table(columns, reliability, ["reliability"])
        estimate = draws(table, resamples=200, seed=seed).estimates()["reliability"]
        assert estimate is not None
        hits += estimate.low <= 0 <= estimate.high
    assert hits >= 53  # 57 of 60 on average; 52 or fewer have a chance of 0.4 %


@pytest.mark.kills(
    "ual/evaluate/options.py", "_figures, bins=bins), calibration.FIGURES)", "_figures, bins=bins))"
)
@pytest.mark.kills(
    "ual/methods/statistics.py",
    "values = table.take(np.arange(table.items))",
    "values = table.take(rng.integers(0, table.items, table.items))",
)
def test_measures_with_intervals() -> None:
    found = drawn(np.random.default_rng(3), 300, human=True)
    estimates = draws(table(found), resamples=60, seed=1).estimates()
    assert list(estimates) == [*MEASURES, *HUMAN_MEASURES]
    for name, estimate in estimates.items():
        assert estimate is not None
        assert estimate.low < estimate.high, name
        assert estimate.low <= estimate.value <= estimate.high, name
    again = draws(table(found), resamples=60, seed=1).estimates()
    assert again == estimates
    assert estimates["nll"] is not None
    assert estimates["nll"].high - estimates["nll"].low == pytest.approx(
        2 * 1.96 * found.nll().std() / math.sqrt(300), rel=0.35
    )


@pytest.mark.kills(
    "ual/methods/statistics.py",
    "value - minus.values[name], drawn - minus.drawn[name]",
    "value - minus.values[name], drawn",
)
def test_differences_are_paired() -> None:
    found = drawn(np.random.default_rng(4), 200)
    sharper = found.at(0.9)
    own, other = (draws(table(of), resamples=50, seed=2) for of in (sharper, found))
    difference = own.estimates(minus=other)
    alone = own.estimates()
    for name in ("nll", "brier"):
        of, single = difference[name], alone[name]
        assert of is not None
        assert single is not None
        assert of.value == pytest.approx(value(sharper, name) - value(found, name))
        assert of.high - of.low < 0.5 * (single.high - single.low)
    assert difference["accuracy"] == Estimate(0.0, 0.0, 0.0)


def test_the_exchange_of_two_models() -> None:
    base = drawn(np.random.default_rng(5), 40)
    sharper = exchange_p([table(base.at(0.4))], [table(base)], permutations=99)
    assert sharper["confidence"] == sharper["entropy"] == pytest.approx(0.02)
    assert sharper["accuracy"] == 1
    assert sharper.keys() == set(MEASURES)
    undefined = table(Predictions.of([{"a": 0.6, "b": 0.4}] * 4, ["a"] * 4))
    assert math.isnan(exchange_p([undefined], [undefined], permutations=5)["auroc"])


def test_measures_that_are_not_defined_are_none() -> None:
    right = Predictions.of([{"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.3}], ["a", "a"], [{"a": 1, "b": 1}] * 2)
    found = draws(table(right), resamples=10).estimates()
    assert found["auroc"] is None
    assert found["entropy_pearson"] is None
    assert found["accuracy"] is not None
    assert found["accuracy"].value == 1


def reliability(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"reliability": brier_parts(columns["confidence"], columns["right"]).reliability}


# ---- refusals ----


@pytest.mark.parametrize(
    ("rows", "gold", "human", "words"),
    [
        ([{"a": 1, "b": 1}], ["c"], None, "right option 'c'"),
        ([{"a": 1, "b": 1}], ["a"], [{"a": 1, "c": 1}], "people answered"),
        ([{"a": 0, "b": 0}], ["a"], None, "positive in sum"),
        ([{"a": -1, "b": 2}], ["a"], None, "not negative"),
        ([{"a": math.nan, "b": 2}], ["a"], None, "finite"),
    ],
)
def test_refuses(rows: list, gold: list, human: list | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Predictions.of(rows, gold, human)


def test_refuses_too_few() -> None:
    with pytest.raises(ValueError, match="two items"):
        draws(table(Predictions.of([{"a": 1, "b": 2}], ["a"])))
    with pytest.raises(ValueError, match="no human answers"):
        Predictions.of([{"a": 1, "b": 2}], ["a"]).kl()

"""Calibration: hand-computed cases, laws, and an independent brute force in exact fractions."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ual.errors import UserError
from ual.evaluate import (
    TokenMetrics,
    brier,
    evaluate,
    expected_calibration_error,
    reliability_bins,
    rms_calibration_error,
)
from ual.evaluate.calibration import FIGURES, brier_parts, figures, smooth_calibration_error
from ual.models.score import TokenScores

# confidences on a coarse grid meet the ties; free ones meet everything else
confidences = st.one_of(st.integers(0, 8).map(lambda k: k / 8), st.floats(0, 1, allow_subnormal=False))
tokens = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=60)
bin_counts = st.integers(1, 20)


def columns(pairs: list[tuple[float, bool]]) -> tuple[list[float], list[bool]]:
    return [c for c, _ in pairs], [y for _, y in pairs]


def brute_force(pairs: list[tuple[float, bool]], bins: int, power: int) -> float:
    """The definition, pair by pair in exact arithmetic, sharing no step with the implementation."""
    n = len(pairs)
    members: dict[int, list[tuple[Fraction, int]]] = {}
    for c, y in pairs:
        below = sum(other < c for other, _ in pairs)
        equal = sum(other == c for other, _ in pairs)
        middle = Fraction(2 * below + equal, 2 * n)
        members.setdefault(math.floor(middle * bins), []).append((Fraction(c), int(y)))
    total = Fraction(0)
    for group in members.values():
        gap = abs(Fraction(sum(y for _, y in group), len(group)) - sum(c for c, _ in group) / len(group))
        total += Fraction(len(group), n) * gap**power
    return float(total)


# ---- hand-computed ----


def test_two_bins_by_hand() -> None:
    confidence, correct = [0.9, 0.2, 0.8, 0.4], [1, 0, 0, 1]
    low, high = reliability_bins(confidence, correct, bins=2)
    assert low == {"confidence": pytest.approx(0.3), "accuracy": 0.5, "count": 2}
    assert high == {"confidence": pytest.approx(0.85), "accuracy": 0.5, "count": 2}
    # gaps .2 and .35, each half of the mass
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.275)
    assert rms_calibration_error(confidence, correct, bins=2) == pytest.approx(math.sqrt(0.08125))
    assert brier(confidence, correct) == pytest.approx((0.01 + 0.04 + 0.64 + 0.36) / 4)


def test_always_sure_and_half_right() -> None:
    assert expected_calibration_error([1.0] * 10, [1, 0] * 5) == 0.5
    assert brier([1.0] * 10, [1, 0] * 5) == 0.5


def test_equal_confidences_share_a_bin_whatever_their_mass() -> None:
    confidence = [0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9]
    filled = reliability_bins(confidence, [0, 1, 1, 1, 0, 0, 0, 1], bins=4)
    assert [(b["confidence"], b["count"]) for b in filled] == [(0.1, 1), (0.5, 6), (0.9, 1)]


def test_equal_mass_sees_what_one_equal_width_bin_near_one_would_average_away() -> None:
    """The lower half is right always (0.0375 too modest), the upper one 19 times of 20 (0.0375 too bold)."""
    confidence = np.linspace(0.95, 1.0, 2000)
    correct = np.ones(2000, dtype=bool)
    correct[1000::20] = False
    assert abs(confidence.mean() - correct.mean()) < 1e-9
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.0375, abs=1e-4)


def test_bins_differ_by_at_most_one_without_ties() -> None:
    confidence = np.random.default_rng(1).permutation(100) / 100
    assert sorted({b["count"] for b in reliability_bins(confidence, np.ones(100), bins=15)}) == [6, 7]


# ---- laws ----


@given(tokens, bin_counts)
def test_agrees_with_brute_force(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = columns(pairs)
    ece, rms = brute_force(pairs, bins, 1), brute_force(pairs, bins, 2)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(ece, abs=1e-12)
    assert rms_calibration_error(confidence, correct, bins) ** 2 == pytest.approx(rms, abs=1e-12)


@given(tokens, bin_counts)
def test_ranges_and_masses(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = columns(pairs)
    filled = reliability_bins(confidence, correct, bins)
    assert sum(b["count"] for b in filled) == len(pairs)
    assert len(filled) <= bins
    means = [b["confidence"] for b in filled]
    assert means == sorted(means)
    ece = expected_calibration_error(confidence, correct, bins)
    assert 0 <= ece <= rms_calibration_error(confidence, correct, bins) + 1e-12 <= 1 + 2e-12
    assert 0 <= brier(confidence, correct) <= 1


@given(tokens, bin_counts, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[float, bool]], bins: int, random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert reliability_bins(*columns(shuffled), bins) == reliability_bins(*columns(pairs), bins)


@given(tokens)
def test_one_bin_is_the_gap_of_the_means(pairs: list[tuple[float, bool]]) -> None:
    confidence, correct = columns(pairs)
    gap = abs(np.mean(confidence) - np.mean(correct))
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(gap, abs=1e-12)


@given(st.integers(1, 19), st.integers(1, 20), bin_counts)
def test_exactly_calibrated_groups_have_no_error(right: int, more: int, bins: int) -> None:
    n = right + more
    correct = [True] * right + [False] * more
    assert expected_calibration_error([right / n] * n, correct, bins) == pytest.approx(0, abs=1e-12)


def test_calibrated_draws_come_close_to_none() -> None:
    """Bins of m tokens have a mean gap of about sqrt(2 p (1-p) / (pi m)), at most .4 / sqrt(m)."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=150_000)
    correct = rng.uniform(size=confidence.size) < confidence
    assert expected_calibration_error(confidence, correct) < 2 * 0.4 / math.sqrt(confidence.size / 15)
    assert expected_calibration_error(confidence, ~correct) > 0.4


# ---- bins of equal width ----


@pytest.mark.kills(
    "ual/evaluate/calibration.py", "(value * bins).astype(np.intp)", "(value * bins).round().astype(np.intp)"
)
@pytest.mark.kills("ual/evaluate/calibration.py", ".astype(np.intp), bins - 1)", ".astype(np.intp), bins)")
def test_bins_of_equal_width_are_intervals() -> None:
    confidence = [0.0, 0.24, 0.25, 0.49, 0.5, 0.99, 1.0]
    filled = reliability_bins(confidence, [0, 0, 1, 0, 1, 1, 1], bins=4, equal="width")
    assert [b["count"] for b in filled] == [2, 2, 1, 2]
    assert [b["accuracy"] for b in filled] == [0, 0.5, 1, 1]
    assert filled[-1]["confidence"] == pytest.approx(0.995)


# ---- without the noise of bins ----


def calibrated(rng: np.random.Generator, n: int, error: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw confidences in [.3, .9] whose true accuracy is higher by `error`."""
    confidence = rng.uniform(0.3, 0.9, size=n)
    return confidence, rng.uniform(size=n) < confidence + error


@pytest.mark.kills(
    "ual/evaluate/calibration.py", '/ (b["count"] - 1) if b["count"] > 1', '/ b["count"] if b["count"] > 1'
)
@pytest.mark.kills(
    "ual/evaluate/calibration.py", "reliability=reliability - noise,", "reliability=reliability,"
)
@pytest.mark.kills(
    "ual/evaluate/calibration.py", "resolution=resolution - noise + of_mean,", "resolution=resolution,"
)
@pytest.mark.kills(
    "ual/evaluate/calibration.py", "uncertainty=uncertainty + of_mean,", "uncertainty=uncertainty,"
)
@pytest.mark.parametrize("error", [0.0, 0.08])
def test_the_parts_of_the_brier_score_are_unbiased(error: float) -> None:
    """30 predictions in 10 bins, so that every correction is large, against the values of infinite data."""
    rng = np.random.default_rng(0)
    found = [brier_parts(*calibrated(rng, 30, error), bins=10) for _ in range(4000)]
    truth = {"reliability": error**2, "resolution": 0.6**2 / 12, "uncertainty": (0.6 + error) * (0.4 - error)}
    for name, value in truth.items():
        drawn = [getattr(parts, name) for parts in found]
        # the means of bins spread less than single values, by a share of 1 / bins^2; their bounds move
        allowed = 4 * np.std(drawn) / math.sqrt(len(drawn)) + 0.002
        assert np.mean(drawn) == pytest.approx(value, abs=allowed), name


@given(st.lists(st.tuples(confidences, st.booleans()), min_size=2, max_size=60), bin_counts)
def test_the_parts_add_up_to_the_brier_score(pairs: list[tuple[float, bool]], bins: int) -> None:
    parts = brier_parts(*columns(pairs), bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert total == pytest.approx(brier(*columns(pairs)), abs=1e-12)


def test_one_bin_has_no_resolution_and_one_prediction_no_parts() -> None:
    assert brier_parts([0.2, 0.9, 0.5], [0, 1, 1], bins=1).resolution == pytest.approx(0)
    with pytest.raises(ValueError, match="two predictions"):
        brier_parts([0.5], [1])


@pytest.mark.kills(
    "ual/evaluate/calibration.py",
    "power=2) - (_noise(filled) if debiased",
    "power=2) + (_noise(filled) if debiased",
)
def test_the_debiased_square_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    squares, plain = [], []
    for _ in range(2000):
        pairs = calibrated(rng, 60, 0.09)
        squares.append(rms_calibration_error(*pairs, bins=5, debiased=True) ** 2)
        plain.append(rms_calibration_error(*pairs, bins=5) ** 2)
    # cut at 0, which raises the mean a little
    assert np.mean(squares) == pytest.approx(0.09**2, rel=0.3)
    assert np.mean(plain) > 2 * 0.09**2
    assert rms_calibration_error([0.5] * 4, [0, 1, 0, 1], debiased=True) == 0


@pytest.mark.kills("ual/evaluate/calibration.py", "sigma * math.sqrt(2 / math.pi)", "sigma")
@pytest.mark.kills(
    "ual/evaluate/calibration.py",
    "return 2 * _mean_gap(bins, power=1) -",
    "return _mean_gap(bins, power=1) -",
)
def test_the_debiased_error_takes_off_the_mean_of_noisy_gaps() -> None:
    """Against the definition: the labels' mean of each bin is drawn anew."""
    rng = np.random.default_rng(2)
    confidence, correct = calibrated(rng, 40, 0.05)
    filled = reliability_bins(confidence, correct, bins=4)
    plain = expected_calibration_error(confidence, correct, bins=4)
    noisy = 0.0
    for b in filled:
        mean, spread = b["accuracy"], math.sqrt(b["accuracy"] * (1 - b["accuracy"]) / b["count"])
        draws = rng.normal(mean, spread, size=200_000)
        noisy += b["count"] / 40 * np.abs(draws - b["confidence"]).mean()
    debiased = expected_calibration_error(confidence, correct, bins=4, debiased=True)
    assert debiased == pytest.approx(plain - (noisy - plain), abs=5 / math.sqrt(200_000))
    assert expected_calibration_error([1.0] * 5, [0] * 5, debiased=True) == 1


def direct_smooth_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The definition by quadrature, with images of each residual at 2k + c and 2k - c."""
    t = (np.arange(4000) + 0.5) / 4000

    def smoothed(width: float) -> float:
        total = np.zeros_like(t)
        for c, y in zip(confidence, correct, strict=True):
            for k in range(-3, 4):
                for image in (2 * k + c, 2 * k - c):
                    z = (t - image) / width
                    total += (y - c) * np.exp(-z * z / 2) / (width * math.sqrt(2 * math.pi))
        return float(np.abs(total / len(confidence)).mean())

    narrow, wide = 0.002, 1.0
    while wide - narrow > 1e-4:
        middle = (narrow + wide) / 2
        narrow, wide = (middle, wide) if smoothed(middle) > middle else (narrow, middle)
    return wide


@pytest.mark.kills(
    "ual/evaluate/calibration.py", "math.pi * width * number) ** 2) / 2)", "math.pi * width * number) ** 2))"
)
@pytest.mark.parametrize("error", [0.0, 0.2, -0.25])
def test_the_smooth_error_is_its_definition(error: float) -> None:
    rng = np.random.default_rng(3)
    confidence = np.concatenate([rng.uniform(0.3, 0.75, size=12), [0.001, 0.999, 1.0]])
    correct = rng.uniform(size=15) < confidence + error
    found = smooth_calibration_error(confidence, correct)
    assert found == pytest.approx(direct_smooth_error(confidence, correct), abs=2e-3)


@pytest.mark.parametrize("level", [0.0, 0.001, 0.3, 1.0])
def test_the_smooth_error_of_one_level_is_the_gap(level: float) -> None:
    assert smooth_calibration_error([level] * 8, [1, 0] * 4) == pytest.approx(abs(level - 0.5), abs=1e-4)
    assert smooth_calibration_error([1.0, 0.0], [1, 0]) == pytest.approx(0, abs=1e-12)


def test_the_smooth_error_of_calibrated_draws_falls_with_their_number() -> None:
    rng = np.random.default_rng(4)
    errors = [
        np.mean([smooth_calibration_error(*calibrated(rng, n)) for _ in range(20)]) for n in (100, 3000)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert smooth_calibration_error(*calibrated(rng, 3000, 0.1)) == pytest.approx(0.1, abs=0.03)


@given(st.lists(st.tuples(confidences, st.booleans()), min_size=2, max_size=60), bin_counts)
def test_figures_together_are_the_figures(pairs: list[tuple[float, bool]], bins: int) -> None:
    given = *columns(pairs), bins
    parts = brier_parts(*given)
    assert figures(*given) == {
        "ece": expected_calibration_error(*given),
        "ece_debiased": expected_calibration_error(*given, debiased=True),
        "ece_width": expected_calibration_error(*given, equal="width"),
        "ece_width_debiased": expected_calibration_error(*given, equal="width", debiased=True),
        "rms_ce": rms_calibration_error(*given),
        "rms_ce_debiased": rms_calibration_error(*given, debiased=True),
        "smooth_ece": smooth_calibration_error(*given[:2]),
        "reliability": parts.reliability,
        "resolution": parts.resolution,
    }
    assert tuple(figures(*given)) == FIGURES


# ---- refusals ----


@pytest.mark.parametrize(
    ("confidence", "correct", "word"),
    [
        ([], [], "n > 0"),
        ([0.5], [1, 0], "one shape"),
        ([[0.5]], [[1]], "one shape"),
        ([1.5], [1], r"\[0, 1\]"),
        ([-0.1], [1], r"\[0, 1\]"),
        ([math.nan], [1], r"\[0, 1\]"),
        ([0.5], [0.5], "0 and 1"),
        ([0.5], [math.nan], "0 and 1"),
    ],
)
def test_refuses_what_is_not_a_probability_or_a_verdict(
    confidence: list[float], correct: list[float], word: str
) -> None:
    for measure in (
        expected_calibration_error,
        rms_calibration_error,
        smooth_calibration_error,
        brier,
        brier_parts,
        reliability_bins,
    ):
        with pytest.raises(ValueError, match=word):
            measure(confidence, correct)


def test_refuses_no_bins() -> None:
    with pytest.raises(ValueError, match="bins"):
        reliability_bins([0.5], [1], bins=0)
    with pytest.raises(ValueError, match="bins"):
        TokenMetrics(bins=0)


# ---- the accumulator ----


def batches(rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
    shape = rows, width
    nll, confidence = rng.exponential(size=shape), rng.uniform(size=shape)
    return nll, confidence, rng.uniform(size=shape) < confidence, rng.uniform(size=shape) < 0.7


def test_accumulates_as_if_all_tokens_came_at_once() -> None:
    rng = np.random.default_rng(0)
    nll, confidence, correct, live = batches(rng, rows=12, width=9)
    live[:, 0] = True
    sources = ["arithmetic", "chat", "arithmetic"] * 4
    metrics = TokenMetrics(bins=5)
    for source, n, c, y, l in zip(sources, nll, confidence, correct, live, strict=True):
        metrics.update(source, n[l], c[l], y[l])
    result = metrics.result()
    assert (result["rows"], result["tokens"]) == (12, live.sum())
    assert result["nll"] == pytest.approx(nll[live].mean())
    assert result["perplexity"] == pytest.approx(math.exp(nll[live].mean()))
    assert result["accuracy"] == correct[live].mean()
    assert result["ece"] == pytest.approx(expected_calibration_error(confidence[live], correct[live], bins=5))
    assert result["brier"] == pytest.approx(brier(confidence[live], correct[live]))
    assert result["bins"] == reliability_bins(confidence[live], correct[live], bins=5)
    assert list(result["by_source"]) == ["arithmetic", "chat"]
    own = live & (np.array(sources) == "chat")[:, None]
    chat = result["by_source"]["chat"]
    assert (chat["rows"], chat["tokens"]) == (4, own.sum())
    assert chat["nll"] == pytest.approx(nll[own].mean())
    assert chat["accuracy"] == correct[own].mean()
    assert chat["ece"] == pytest.approx(expected_calibration_error(confidence[own], correct[own], bins=5))
    assert chat["brier"] == pytest.approx(brier(confidence[own], correct[own]))
    assert json.loads(json.dumps(result)) == result


@pytest.mark.kills("ual/evaluate/held_out.py", "nll=float(nll.mean()),", "nll=float(nll.sum()),")
@pytest.mark.kills(
    "ual/evaluate/held_out.py",
    "confidence=float(scores.top1_prob.mean())",
    "confidence=float(scores.correct.mean())",
)
@pytest.mark.kills(
    "ual/evaluate/held_out.py", "for feature in features if", "for feature in reversed(features) if"
)
def test_samples_add_up_to_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    tokens = {"long": 9, "none": 0, "short": 2, "middle": 5}
    scores = {
        name: TokenScores(
            sample_id=name,
            log_prob=-rng.exponential(size=n),
            entropy=np.zeros(n),
            top1_prob=rng.uniform(size=n),
            margin=np.zeros(n),
            correct=rng.uniform(size=n) < 0.5,
        )
        for name, n in tokens.items()
    }

    def score(*_: Any, **__: Any) -> list[TokenScores]:
        return sorted(scores.values(), key=lambda s: -s.log_prob.size)

    features = [{"id": name} for name in ("short", "none", "long", "middle")]
    sources = {"long": "a", "none": "a", "short": "b", "middle": "b"}
    result, samples = evaluate(torch.nn.Identity(), features, sources, lambda rows: {}, score=score)
    assert [(s["id"], s["source"], s["tokens"]) for s in samples] == [
        ("short", "b", 2), ("long", "a", 9), ("middle", "b", 5)
    ]  # fmt: skip
    assert samples[1]["nll"] == -scores["long"].log_prob.mean()
    assert samples[1]["confidence"] == scores["long"].top1_prob.mean()
    assert samples[1]["accuracy"] == scores["long"].correct.mean()
    for key in ("nll", "accuracy"):
        total = sum(s["tokens"] * s[key] for s in samples)  # type: ignore[literal-required]
        assert total / result["tokens"] == pytest.approx(result[key])  # type: ignore[literal-required]
    assert (result["rows"], result["tokens"]) == (3, 16)
    assert json.loads(json.dumps(samples)) == samples


def test_float32_rounding_above_one_is_forgiven_but_nonsense_is_not() -> None:
    metrics = TokenMetrics()
    metrics.update("a", [0.0], [np.nextafter(np.float32(1), np.float32(2))], [1])
    assert metrics.result()["brier"] == 0
    with pytest.raises(ValueError, match="confidence"):
        metrics.update("a", [0.0], [1.001], [1])


@pytest.mark.parametrize(("nll", "confidence"), [(math.nan, 0.5), (math.inf, 0.5), (0.5, math.nan)])
def test_a_diverged_model_is_told_apart_from_a_wrong_call(nll: float, confidence: float) -> None:
    with pytest.raises(UserError, match="not finite") as caught:
        TokenMetrics().update("chat", [nll], [confidence], [1])
    assert "chat" in caught.value.place
    assert "learning_rate" in caught.value.remedy


@pytest.mark.parametrize(
    "arrays",
    [([0.5], [0.5, 0.5], [1, 1]), ([0.5, 0.5], [0.5], [1, 1]), ([0.5, 0.5], [0.5, 0.5], [1]), ([], [], [])],
)
def test_shapes_must_agree(arrays: tuple[list[float], list[float], list[int]]) -> None:
    with pytest.raises(ValueError, match="shape"):
        TokenMetrics().update("a", *arrays)


def test_nothing_to_measure_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="no loss token"):
        TokenMetrics().result()


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    metrics = TokenMetrics()
    metrics.update("a", [1e6], [0.5], [0])
    assert math.isfinite(metrics.result()["perplexity"])


def test_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, ual.evaluate; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

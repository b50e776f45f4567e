"""Measures of loss tokens: against the plain functions, and intervals over samples."""

import math

import numpy as np
import pytest

from ual.evaluate import calibration
from ual.evaluate.tokens import MEASURES, Tokens, table
from ual.methods.statistics import draws


def drawn(rng: np.random.Generator, samples: int) -> Tokens:
    """Return tokens whose NLL and confidence have a part that their sample decides."""
    lengths = rng.integers(1, 30, size=samples)
    sample = np.repeat(np.arange(samples), lengths)
    own = rng.normal(0, 1, size=samples)[sample]
    confidence = 1 / (1 + np.exp(-own - rng.normal(0, 0.5, size=sample.size)))
    correct = rng.uniform(size=sample.size) < confidence**1.5
    return Tokens(sample, 2 + own + rng.exponential(size=sample.size), confidence, correct, samples)


@pytest.mark.kills(
    "ual/evaluate/tokens.py", 'total["gap"] ** 2 / np.maximum(total["size"], 1)', 'total["gap"] ** 2'
)
@pytest.mark.kills(
    "ual/evaluate/tokens.py",
    "bin_indices(tokens.confidence, bins, equal=equal)",
    "bin_indices(tokens.confidence, bins)",
)
@pytest.mark.kills(
    "ual/evaluate/tokens.py", "tokens.correct - tokens.confidence, n * bins", "tokens.correct, n * bins"
)
def test_figures_are_those_of_all_tokens() -> None:
    tokens = drawn(np.random.default_rng(0), 40)
    found = draws(table(tokens, bins=7), resamples=2).values
    assert set(found) == set(MEASURES)
    c, y = tokens.confidence, tokens.correct
    assert found["nll"] == pytest.approx(tokens.nll.mean())
    assert found["accuracy"] == pytest.approx(y.mean())
    assert found["confidence"] == pytest.approx(c.mean())
    assert found["brier_top1"] == pytest.approx(calibration.brier(c, y))
    assert found["ece"] == pytest.approx(calibration.expected_calibration_error(c, y, 7))
    assert found["ece_width"] == pytest.approx(calibration.expected_calibration_error(c, y, 7, equal="width"))
    assert found["rms_ce"] == pytest.approx(calibration.rms_calibration_error(c, y, 7))


@pytest.mark.kills("ual/evaluate/tokens.py", "total[name] / count", 'total[name] / len(columns["tokens"])')
def test_intervals_are_over_samples() -> None:
    tokens = drawn(np.random.default_rng(1), 150)
    nll = draws(table(tokens), resamples=400, seed=1).estimates()["nll"]
    assert nll is not None
    length = np.bincount(tokens.sample)
    error = (np.bincount(tokens.sample, tokens.nll) - nll.value * length) / length.mean()
    delta = 2 * 1.96 * error.std() / math.sqrt(150)
    assert nll.high - nll.low == pytest.approx(delta, rel=0.2)
    # tokens of one sample are alike: over single tokens, the interval would be much too short
    assert nll.high - nll.low > 2 * 2 * 1.96 * tokens.nll.std() / math.sqrt(tokens.nll.size)


def test_refuses_one_sample() -> None:
    with pytest.raises(ValueError, match="two items"):
        draws(table(drawn(np.random.default_rng(2), 1)))

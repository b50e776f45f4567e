"""Win rates: published ones from recorded preferences, laws, and hand-computed cases."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ual.evaluate.preferences import Preferences, Record, Split, record, records, share_of_second

FILE = "ual/evaluate/preferences.py"
verdicts = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.floats(0, 1))
lengths = st.integers(0, 5)


@st.composite
def preferences(draw: st.DrawFn) -> Preferences:
    n = draw(st.integers(1, 12))
    columns = [draw(st.lists(values, min_size=n, max_size=n)) for values in (verdicts,) * 2 + (lengths,) * 2]
    return Preferences.of(*columns)


def of(first: list[float], second: list[float], longer: list[int] | None = None) -> Preferences:
    """`longer`: by how many characters the model's answers are longer."""
    by = np.array(longer or [0] * len(first))
    return Preferences.of(first, second, 10 + by, np.full(len(first), 10))


# ---- GPT-4's recorded preferences ----


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[tuple[str, ...], Record]:
    with gzip.open(shared / "data" / "alpaca_eval" / "preferences.jsonl.gz", "rt") as file:
        return records(map(json.loads, file), by=("g1", "g2", "annotator", "path"))


# Win rate and standard error in percent; wins, losses, ties, count. From the tables of AlpacaEval's
# repository: leaderboards/data_AlpacaEval/alpaca_eval_gpt4_leaderboard.csv and
# leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv.
FIRST, SECOND = "alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo"
PUBLISHED = [
    ("gpt4", FIRST, 95.27950311, 0.71628144, 761, 32, 12, 805),
    ("alpaca-7b", FIRST, 26.45962733, 1.53571147, 205, 584, 16, 805),
    ("text_davinci_001", FIRST, 15.17412935, 1.235107892, 112, 672, 20, 804),
    ("phi-2", FIRST, 30.663329161451813, 1.6056202651534168, 234, 543, 22, 799),
    ("guanaco-65b", FIRST, 71.80124224, 1.586912361, 578, 227, 0, 805),
    ("claude-2", SECOND, 17.188240356708075, 1.17482825615589, 131, 673, 1, 805),
    ("gpt-3.5-turbo-1106", SECOND, 9.177964561962735, 0.8904117511864436, 64, 737, 4, 805),
    ("gpt4_0613_concise", SECOND, 9.400320574596272, 0.901021275896262, 71, 729, 5, 805),
    ("OpenHermes-2.5-Mistral-7B", SECOND, 10.340415705751552, 0.935655389929366, 75, 727, 3, 805),
    ("gpt35_turbo_instruct", SECOND, 8.462446504415423, 0.8724086933603648, 66, 735, 3, 804),
]


@pytest.mark.kills(FILE, "    if preference == 0:", "    if False:")
@pytest.mark.kills(FILE, "known.std(ddof=1)", "known.std()")
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_win_rates(recorded: dict[tuple[str, ...], Record], row: tuple[Any, ...]) -> None:
    model, annotator, rate, error, *counts = row
    [found] = [r for (_, g2, by, _), r in recorded.items() if (g2, by) == (model, annotator)]
    assert 100 * found.win_rate == pytest.approx(rate, rel=1e-7)
    assert 100 * found.standard_error == pytest.approx(error, rel=1e-7)
    assert [found.wins, found.losses, found.ties, found.count] == counts


def test_a_model_ties_with_itself(recorded: dict[tuple[str, ...], Record]) -> None:
    own = [found for (g1, g2, *_), found in recorded.items() if g1 == g2]
    assert len(own) == 2
    assert {(found.win_rate, found.ties, found.standard_error) for found in own} == {(0.5, 805, 0)}


def test_strong_models_win_more(recorded: dict[tuple[str, ...], Record]) -> None:
    """Generations of one family, against one reference, by one annotator."""
    by = {(g2, annotator): found.win_rate for (_, g2, annotator, _), found in recorded.items()}
    ordered = ["text_davinci_001", "alpaca-7b", "llama-2-7b-chat-hf", "llama-2-13b-chat-hf", "gpt4"]
    rates = [by[model, FIRST] for model in ordered]
    assert rates == sorted(rates)


def test_antisymmetry_of_recorded_preferences(shared: Path) -> None:
    with gzip.open(shared / "data" / "alpaca_eval" / "preferences.jsonl.gz", "rt") as file:
        given = [p for line in file if (p := json.loads(line)["preference"]) is not None]
    forth, back = record(given), record(p and 3 - p for p in given)
    assert forth.win_rate + back.win_rate == pytest.approx(1)
    assert (forth.wins, forth.losses, forth.ties) == (back.losses, back.wins, back.ties)


def test_nothing_recorded() -> None:
    found = record([None, float("nan")])
    assert math.isnan(found.win_rate)
    assert (found.count, found.missing) == (0, 2)
    assert math.isnan(record([2]).standard_error)


@pytest.mark.parametrize("wrong", [-1, 0.5, 2.01, 3, float("inf")])
def test_a_preference_out_of_range(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[1, 2\], or 0 for a tie"):
        share_of_second(wrong)


# ---- both orders ----


@pytest.mark.kills(
    FILE, "return Preferences(1 - self.second, 1 - self.first,", "return Preferences(self.second, self.first,"
)
@settings(max_examples=40)
@given(preferences())
def test_exchanged_sides(mine: Preferences) -> None:
    """The rates add up to 1; what concerns positions and lengths stays."""
    one, other = mine.summary(resamples=2), mine.swapped().summary(resamples=2)
    assert (one.decided, one.missing, one.ties) == (other.decided, other.missing, other.ties)
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.lowest == pytest.approx(1 - other.highest)
    np.testing.assert_equal(one.consistent, other.consistent)
    assert (one.model_longer.instructions, one.model_length) == (
        other.reference_longer.instructions, other.reference_length,
    )  # fmt: skip
    for name, sign in (("win_rate", -1), ("first_wins", 1), ("longer_wins", 1)):
        here, there = getattr(one, name), getattr(other, name)
        assert (here is None) == (there is None)
        if here is not None:
            assert here.value == pytest.approx(there.value if sign > 0 else 1 - there.value)


@settings(max_examples=40)
@given(preferences())
def test_bounds_hold_the_rate_whatever_is_missing(mine: Preferences) -> None:
    found = mine.summary(resamples=2)
    assert 0 <= found.lowest <= found.highest <= 1
    assert found.highest - found.lowest == pytest.approx(found.missing / (2 * found.instructions))
    if not found.missing and found.win_rate is not None:
        assert found.lowest == pytest.approx(found.win_rate.value)


@pytest.mark.kills(FILE, "first_wins=mean((first + 1 - second) / 2)", "first_wins=mean((first + second) / 2)")
def test_a_judge_of_positions_gives_no_win() -> None:
    """It always prefers the first answer."""
    found = of([1.0] * 6, [0.0] * 6).summary()
    assert found.win_rate is not None
    assert found.first_wins is not None
    assert (found.win_rate.value, found.win_rate.low, found.win_rate.high) == (0.5, 0.5, 0.5)
    assert (found.first_wins.value, found.consistent, found.ties) == (1.0, 0.0, 6)


@pytest.mark.kills(FILE, "np.where(longer > 0, won, 1 - won)", "won")
def test_a_judge_of_lengths() -> None:
    found = of([1, 1, 0, 0.5], [1, 1, 0, 0.5], longer=[3, 1, -2, 0]).summary()
    assert found.longer_wins is not None
    assert found.longer_wins.value == 1.0
    assert found.first_wins is not None
    assert found.first_wins.value == 0.5
    assert found.consistent == 1.0
    assert found.model_longer.instructions == 2
    assert found.model_longer.win_rate is not None
    assert found.model_longer.win_rate.value == 1.0
    assert found.reference_longer == Split(1, None)  # one instruction has no interval
    assert (found.model_length, found.reference_length) == (10.5, 10.0)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)


@pytest.mark.kills(FILE, "decided = ~np.isnan(shares)", "decided = ~np.isnan(self.first)")
def test_one_verdict_does_not_decide() -> None:
    """A judge of positions, with replies lost in one order only, still gives no win."""
    found = of([1.0, 1.0, 1.0, math.nan], [0.0, math.nan, 0.0, math.nan]).summary()
    assert (found.instructions, found.decided, found.missing) == (4, 2, 3)
    assert found.win_rate is not None
    assert found.win_rate.value == 0.5
    assert (found.lowest, found.highest) == (3 / 8, 6 / 8)


def test_an_interval_covers_the_rate_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        p = drawn.random(120) < 0.3
        found = of(p.astype(float).tolist(), p.astype(float).tolist()).summary(resamples=300)
        assert found.win_rate is not None
        inside += found.win_rate.low <= 0.3 <= found.win_rate.high
    assert 180 <= inside <= 199  # of a binomial with 0.95: mean 190, standard deviation 3.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([], [], [], []), r"four arrays \[n\] with n >= 1"),
        (([1], [1, 0], [1], [1]), r"four arrays \[n\] with n >= 1"),
        (([1.5], [0], [1], [1]), r"first must be in \[0, 1\] or NaN"),
        (([1], [-0.5], [1], [1]), r"second must be in \[0, 1\] or NaN"),
    ],
)
def test_wrong_arrays(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Preferences.of(*given)

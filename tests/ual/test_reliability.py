import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ual.errors import UserError
from ual.methods import reliability

NAN = math.nan
EPS = np.finfo(np.float64).eps

# For each split of n answers: the temperature, then the weights and the entropy that the authors' code gives.
GOLDEN = [
    ("aaaaa", 0.2, {"a": 1.000}, 0.000),
    ("aaaab", 0.2, {"a": 0.953, "b": 0.047}, 0.500),
    ("aaabb", 0.2, {"a": 0.731, "b": 0.269}, 0.673),
    ("aaabc", 0.2, {"a": 0.787, "b": 0.107, "c": 0.107}, 0.950),
    ("aabbc", 0.2, {"a": 0.422, "b": 0.422, "c": 0.155}, 1.055),
    ("aabcd", 0.2, {"a": 0.475, "b": 0.175, "c": 0.175, "d": 0.175}, 1.332),
    ("abcde", 0.2, dict.fromkeys("abcde", 0.2), 1.609),
    ("aa", 1.0, {"a": 1.0}, 0.0),
    ("ab", 1.0, {"a": 0.5, "b": 0.5}, 0.693),
]
golden = pytest.mark.parametrize(("answers", "temperature", "weights", "entropy"), GOLDEN)

some_answers = st.lists(st.sampled_from(["18", "26", "4", "9", None]), min_size=1, max_size=20)
entropies = st.lists(st.floats(0, 3), max_size=30)


@pytest.mark.kills("ual/methods/reliability.py", "math.log(n / count)", "math.log2(n / count)")
@pytest.mark.kills(
    "ual/methods/reliability.py", "for count in sorted(counts.values())", "for count in counts.values()"
)
class TestEntropy:
    @golden
    def test_published_values(
        self, answers: str, temperature: float, weights: dict[str, float], entropy: float
    ) -> None:
        assert abs(reliability.entropy(list(answers)) - entropy) < 0.0005

    def test_five_answers_have_seven_levels(self) -> None:
        values = [
            reliability.entropy(list(answers)) for answers, temperature, *_ in GOLDEN if temperature == 0.2
        ]
        assert values == sorted(set(values))
        assert reliability.levels(values).tolist() == list(range(7))

    @given(some_answers)
    def test_lies_between_agreement_and_the_uniform(self, answers: list[str | None]) -> None:
        h = reliability.entropy(answers)
        classes = len(set(answers))
        assert 0 <= h <= math.log(classes) + 4 * classes * EPS
        assert (h == 0) == (classes == 1)

    @given(some_answers, st.randoms())
    def test_only_the_counts_matter_to_the_last_bit(self, answers: list[str | None], random: Any) -> None:
        names = ["18", "26", "4", "9", None]
        renamed = dict(zip(names, random.sample(names, k=5), strict=True))
        other = [renamed[answer] for answer in answers]
        random.shuffle(other)
        assert reliability.entropy(other) == reliability.entropy(answers)

    @given(some_answers, st.integers(2, 4))
    def test_asking_more_of_the_same_changes_nothing(self, answers: list[str | None], times: int) -> None:
        once = reliability.entropy(answers)
        assert reliability.entropy(answers * times) == pytest.approx(once, abs=16 * EPS)

    @given(some_answers)
    def test_the_unparsed_are_one_class_or_drop_the_question(self, answers: list[str | None]) -> None:
        named = ["unparsed" if answer is None else answer for answer in answers]
        assert reliability.entropy(answers) == reliability.entropy(named)
        dropped = reliability.entropy(answers, unparsed="drop_question")
        assert math.isnan(dropped) if None in answers else dropped == reliability.entropy(answers)

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="at least one answer"):
            reliability.entropy([])
        with pytest.raises(UserError, match='did you mean "drop_question"'):
            reliability.entropy(["18"], unparsed="drop_questions")  # type: ignore[arg-type]

    def test_the_order_of_the_answers_does_not_change_a_bit(self) -> None:
        """Summed as they come, five answers alike and two others give two different last bits."""
        orders = {tuple(order) for order in itertools.permutations(["a", "b", *"ccccc"])}
        assert len({reliability.entropy(order) for order in orders}) == 1


@pytest.mark.kills("ual/methods/reliability.py", "h <= limit", "h < limit")
class TestKeep:
    @given(entropies)
    def test_the_median_keeps_at_least_half_and_all_ties(self, h: list[float]) -> None:
        kept = reliability.keep(h)
        assert kept.sum() >= len(h) / 2
        assert kept.tolist() == [value <= np.median(h) for value in h]
        np.testing.assert_array_equal(kept, reliability.keep(h, "quantile", 0.5))

    @given(entropies.filter(len), st.floats(0, 1), st.floats(0, 1))
    def test_a_higher_quantile_keeps_no_less(self, h: list[float], one: float, other: float) -> None:
        low, high = sorted((one, other))
        kept = reliability.keep(h, "quantile", high)
        assert (reliability.keep(h, "quantile", low) <= kept).all()
        assert kept.sum() >= math.floor(high * (len(h) - 1)) + 1

    @given(entropies, st.sampled_from([("median", None), ("quantile", 0.3), ("absolute", 1.0)]), st.randoms())
    def test_unlabeled_questions_change_nothing(self, h: list[float], rule: Any, random: Any) -> None:
        kept = reliability.keep(h, *rule)
        with_gaps = list(zip(h, kept, strict=True)) + [(NAN, False)] * 5
        random.shuffle(with_gaps)
        assert reliability.keep([value for value, _ in with_gaps], *rule).tolist() == [
            k for _, k in with_gaps
        ]

    def test_by_hand(self) -> None:
        h = [0.0, 0.5, 0.5, 0.5, 1.6, NAN]
        assert reliability.keep(h).tolist() == [True, True, True, True, False, False]
        assert reliability.keep(h, "quantile", 0).tolist() == [True, False, False, False, False, False]
        assert reliability.keep(h, "absolute", 0.4).tolist() == [True, False, False, False, False, False]
        assert reliability.keep(h, "absolute", 0).tolist() == [True, False, False, False, False, False]
        assert reliability.keep(h, "quantile", 1).tolist() == [True, True, True, True, True, False]

    @pytest.mark.parametrize(
        ("rule", "value", "words"),
        [
            ("median", 0.5, "takes no value, got 0.5"),
            ("quantile", None, 'the rule "quantile" needs a value'),
            ("absolute", None, 'the rule "absolute" needs a value'),
            ("quantile", 1.5, r"quantile must lie in \[0, 1\], got 1.5"),
            ("quantile", NAN, "got nan"),
            ("absolute", -0.1, ">= 0 in nats, got -0.1"),
            ("absolute", NAN, "got nan"),
            ("mean", None, 'did you mean "median"'),
        ],
    )
    def test_refusals(self, rule: Any, value: float | None, words: str) -> None:
        with pytest.raises(UserError, match=words):
            reliability.keep([0.0, 1.0], rule, value)


@pytest.mark.kills(
    "ual/methods/reliability.py",
    "(count - highest) / (len(answers) * temperature)",
    "(count - highest) / temperature",
)
class TestAnswerWeights:
    @golden
    def test_published_values(
        self, answers: str, temperature: float, weights: dict[str, float], entropy: float
    ) -> None:
        found = reliability.answer_weights(list(answers), temperature)
        assert list(found) == list(weights)
        for answer, weight in weights.items():
            assert abs(found[answer] - weight) < 0.0005

    @given(some_answers, st.floats(1e-300, 1e300))
    def test_sum_to_one_and_follow_the_counts(self, answers: list[str | None], temperature: float) -> None:
        weights = reliability.answer_weights(answers, temperature)
        counts = Counter(answers)
        assert set(weights) == set(answers)
        assert sum(weights.values()) == pytest.approx(1, abs=8 * EPS)
        for a in counts:
            for b in counts:
                if counts[a] >= counts[b]:
                    assert weights[a] >= weights[b]

    def test_cold_is_the_majority_and_hot_is_uniform(self) -> None:
        answers = ["a", "a", "b"]
        assert reliability.answer_weights(answers, 1e-3) == {"a": 1.0, "b": pytest.approx(0)}
        assert reliability.answer_weights(answers, 1e9)["a"] == pytest.approx(0.5)

    @pytest.mark.parametrize("temperature", [0, -1, NAN])
    def test_temperature_must_be_positive(self, temperature: float) -> None:
        with pytest.raises(UserError, match=f"temperature must be positive, got {temperature}"):
            reliability.answer_weights(["a"], temperature)


@pytest.mark.kills(
    "ual/methods/reliability.py", "(counts[answer], answer is not None)", "(counts[answer], True)"
)
class TestMajority:
    @given(some_answers)
    def test_no_answer_is_more_frequent(self, answers: list[str | None]) -> None:
        counts = Counter(answers)
        assert counts[reliability.majority(answers)] == max(counts.values())

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [
            (["b", "a", "a"], "a"),
            (["b", "a", "a", "b", "c"], "b"),
            ([None, "a"], "a"),
            ([None, "a", None], None),
            ([None], None),
        ],
    )
    def test_ties_go_to_a_parsed_answer_and_then_to_the_first(
        self, answers: list[str | None], expected: str | None
    ) -> None:
        assert reliability.majority(answers) == expected


class TestLevels:
    @given(entropies, st.integers(1, 8))
    def test_are_few_ordered_and_keep_ties_together(self, h: list[float], most: int) -> None:
        level = reliability.levels(h, most)
        assert set(level.tolist()) == set(range(max(level, default=-1) + 1))
        assert level.max(initial=-1) < most
        order = np.argsort(h)
        assert (np.diff(level[order]) >= 0).all()
        assert all(level[i] == level[j] for i in range(len(h)) for j in range(i) if h[i] == h[j])

    def test_many_distinct_values_are_cut_at_their_quantiles(self) -> None:
        assert Counter(reliability.levels(np.arange(100.0), 10).tolist()) == dict.fromkeys(range(10), 10)

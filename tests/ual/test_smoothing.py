import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ual.config.run import SmoothingConfig
from ual.errors import UserError
from ual.methods import smoothing

EPS = np.finfo(np.float64).eps
NAN = math.nan

# a median of two values near the largest float64 would overflow
uncertainties = st.lists(st.floats(-1e300, 1e300) | st.just(NAN), min_size=1, max_size=30).map(np.array)
scaled = arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1))
seeds = st.integers(0, 2**32)


@st.composite
def bounds(draw: st.DrawFn) -> tuple[float, float]:
    low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return low, high


maps = st.fixed_dictionaries(
    {"map": st.sampled_from(["linear", "power", "step", "constant"])},
    optional={"power": st.floats(1e-3, 1e3), "threshold": st.floats(0, 1)},
)
not_constant = maps.filter(lambda options: options["map"] != "constant")


def assert_order_kept(before: np.ndarray, after: np.ndarray) -> None:
    """No pair is reversed; NaN only where it was."""
    assert (np.isnan(before) == np.isnan(after)).all()
    order = np.argsort(before, kind="stable")[: np.count_nonzero(~np.isnan(before))]
    ties = np.diff(before[order]) == 0
    steps = np.diff(after[order])
    assert (steps >= 0).all()
    assert (steps[ties] == 0).all()


@pytest.mark.kills("ual/methods/smoothing.py", "np.cumsum(count) - (count + 1) / 2", "np.cumsum(count) - 1")
class TestScale:
    @given(uncertainties, st.sampled_from(["rank", "min_max"]))
    @example(np.array([-1.7e308, 1.7e308, 0.0]), "min_max")
    @example(np.array([5e-324, 1e-323]), "min_max")
    def test_is_monotone_and_within_the_unit_interval(self, x: np.ndarray, kind: Any) -> None:
        u = smoothing.scale(x, kind)
        assert_order_kept(x, u)
        known = u[~np.isnan(u)]
        assert ((known >= 0) & (known <= 1)).all()
        if np.unique(x[~np.isnan(x)]).size > 1 and kind == "min_max":
            assert known.min() == 0
            assert known.max() == 1

    @given(uncertainties, seeds, st.sampled_from(["rank", "min_max"]))
    def test_commutes_with_permutations(self, x: np.ndarray, seed: int, kind: Any) -> None:
        order = np.random.default_rng(seed).permutation(x.size)
        np.testing.assert_array_equal(smoothing.scale(x[order], kind), smoothing.scale(x, kind)[order])

    @given(st.lists(st.integers(-500, 500), min_size=1, max_size=30))
    def test_ranks_survive_any_strictly_increasing_transform(self, x: list[int]) -> None:
        transformed = [math.exp(value) for value in x]
        np.testing.assert_array_equal(smoothing.scale(x, "rank"), smoothing.scale(transformed, "rank"))

    @given(st.permutations(range(7)))
    def test_distinct_values_span_zero_to_one_in_equal_steps(self, x: list[int]) -> None:
        np.testing.assert_array_equal(smoothing.scale(x, "rank"), np.array(x) / 6)

    def test_ties_share_their_mean_rank(self) -> None:
        u = smoothing.scale([3, 1, 3, 9, NAN, 3], "rank")
        np.testing.assert_array_equal(u, [0.5, 0, 0.5, 1, NAN, 0.5])

    @pytest.mark.parametrize("kind", ["rank", "min_max"])
    @pytest.mark.parametrize("x", [[4.0], [4.0, 4.0, 4.0], [NAN, 4.0]])
    def test_values_that_do_not_differ_lie_in_the_middle(self, x: list[float], kind: Any) -> None:
        np.testing.assert_array_equal(smoothing.scale(x, kind), np.where(np.isnan(x), NAN, 0.5))

    def test_min_max_keeps_distances(self) -> None:
        np.testing.assert_array_equal(smoothing.scale([-2, 0, 6], "min_max"), [0, 0.25, 1])

    @pytest.mark.parametrize("kind", ["rank", "min_max", "absolute"])
    @pytest.mark.parametrize("x", [[], [NAN, NAN]])
    def test_nothing_to_scale_stays_nothing(self, x: list[float], kind: Any) -> None:
        np.testing.assert_array_equal(smoothing.scale(x, kind), x)

    def test_absolute_is_the_identity(self) -> None:
        np.testing.assert_array_equal(smoothing.scale([0, 0.3, NAN, 1], "absolute"), [0, 0.3, NAN, 1])

    @pytest.mark.parametrize("bad", [-1e-9, 1.0001])
    def test_absolute_refuses_what_is_outside(self, bad: float) -> None:
        with pytest.raises(UserError, match=rf"\[0, 1\].*{bad}.*index 2"):
            smoothing.scale([NAN, 0.5, bad], "absolute")

    @pytest.mark.parametrize("kind", ["rank", "min_max", "absolute"])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf])
    def test_infinity_is_refused(self, bad: float, kind: Any) -> None:
        with pytest.raises(UserError, match=r"uncertainty must be finite, got -?inf at index 1"):
            smoothing.scale([0.5, bad], kind)

    def test_a_matrix_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"one-dimensional, got shape \(1, 2\)"):
            smoothing.scale([[0.5, 0.1]])

    def test_an_unknown_scale_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match='did you mean "rank"'):
            smoothing.scale([0.5], "ranks")  # type: ignore[arg-type]


@pytest.mark.kills(
    "ual/methods/smoothing.py",
    "certain + (uncertain - certain) * values, minimum",
    "uncertain - (uncertain - certain) * values, minimum",
)
@pytest.mark.kills("ual/methods/smoothing.py", "values = values**power", "values = values * power")
class TestSmooth:
    @given(scaled, bounds(), maps)
    def test_is_monotone_and_within_bounds(
        self, u: np.ndarray, bound: tuple[float, float], options: dict[str, Any]
    ) -> None:
        s = smoothing.smooth(u, minimum=bound[0], maximum=bound[1], **options)
        assert_order_kept(u, s)
        assert ((s >= bound[0]) & (s <= bound[1])).all()

    @given(scaled, seeds, maps)
    def test_commutes_with_permutations(self, u: np.ndarray, seed: int, options: dict[str, Any]) -> None:
        order = np.random.default_rng(seed).permutation(u.size)
        np.testing.assert_array_equal(
            smoothing.smooth(u[order], **options), smoothing.smooth(u, **options)[order]
        )

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.1, 0.2, 0.3, NAN]),
            ({"map": "power", "power": 2}, [0.1, 0.15, 0.3, NAN]),
            ({"map": "power", "power": 1}, [0.1, 0.2, 0.3, NAN]),
            ({"map": "step", "threshold": 0.5}, [0.1, 0.3, 0.3, NAN]),
            ({"map": "step", "threshold": 0.6}, [0.1, 0.1, 0.3, NAN]),
            ({"invert": True}, [0.3, 0.2, 0.1, NAN]),
            ({"invert": True, "map": "power", "power": 2}, [0.3, 0.25, 0.1, NAN]),
            ({"invert": True, "map": "step", "threshold": 0.5}, [0.3, 0.1, 0.1, NAN]),
            ({"invert": True, "map": "step", "threshold": 0.6}, [0.3, 0.3, 0.1, NAN]),
            ({"map": "constant"}, [0.2, 0.2, 0.2, 0.2]),
            ({"map": "constant", "constant": 0.25}, [0.25, 0.25, 0.25, 0.25]),
        ],
        ids=str,
    )
    def test_maps_by_hand(self, options: dict[str, Any], expected: list[float]) -> None:
        s = smoothing.smooth([0, 0.5, 1, NAN], minimum=0.1, maximum=0.3, **options)
        np.testing.assert_allclose(s, expected, rtol=2 * EPS)

    @pytest.mark.kills(
        "ual/methods/smoothing.py", "np.where(values >= threshold, uncertain, certain)",
        "np.where(1 - values >= threshold if invert else values >= threshold, maximum, minimum)",
    )  # fmt: skip
    @given(scaled, bounds(), not_constant)
    @example(np.array([0.1, 0.5, 0.9]), (0.0, 0.2), {"map": "step", "threshold": 0.9})
    def test_the_inverse_is_the_range_reflected(
        self, u: np.ndarray, bound: tuple[float, float], options: dict[str, Any]
    ) -> None:
        """s + inverse = minimum + maximum, within a few roundings of numbers of at most 1."""
        s, inverse = (
            smoothing.smooth(u, minimum=bound[0], maximum=bound[1], invert=invert, **options)
            for invert in (False, True)
        )
        np.testing.assert_allclose(s + inverse, sum(bound), rtol=0, atol=8 * EPS)
        assert_order_kept(-u, inverse)
        assert ((inverse >= bound[0]) & (inverse <= bound[1])).all()

    def test_defaults_are_linear_up_to_a_fifth(self) -> None:
        np.testing.assert_array_equal(smoothing.smooth([0, 1]), [0, 0.2])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"map": "linaer"}, 'unknown map.*did you mean "linear"'),
            ({"u": [0.5, 1.5]}, r"u must lie in \[0, 1\], got 1.5 at index 1"),
            ({"minimum": 0.3}, "minimum <= maximum.*minimum=0.3 and maximum=0.2"),
            ({"maximum": 1.1}, "maximum <= 1"),
            ({"minimum": -0.1}, "0 <= minimum"),
            ({"minimum": NAN}, "minimum=nan"),
            ({"map": "power", "power": 0}, "power must be positive, got 0"),
            ({"map": "constant", "invert": True}, 'invert does not change map "constant"'),
            ({"map": "constant", "constant": 0.3}, r"constant must lie in \[0.0, 0.2\], got 0.3"),
        ],
        ids=str,
    )
    def test_bad_arguments_are_named(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            smoothing.smooth(**({"u": [0.5]} | options))


@st.composite
def matchable(draw: st.DrawFn) -> tuple[np.ndarray, float, float, float]:
    low, high = draw(bounds())
    within = st.floats(low, high)
    return draw(arrays(np.float64, st.integers(1, 30), elements=within)), draw(within), low, high


@pytest.mark.kills(
    "ual/methods/smoothing.py",
    "((maximum - target) / (maximum - mean))",
    "((maximum - mean) / (maximum - target))",
)
class TestMatchMean:
    # s and its mean carry a rounding each per sum of at most 30 terms, and the map four more
    BUDGET = 64 * EPS

    @given(matchable())
    @example((np.array([0.1, 0.1, 0.1]), 0.1, 0.1, 0.1))
    @example((np.array([0.1, 0.1, 0.1]), 0.3, 0.1, 0.3))
    def test_meets_the_target_within_bounds_in_order(
        self, case: tuple[np.ndarray, float, float, float]
    ) -> None:
        s, target, low, high = case
        matched = smoothing.match_mean(s, target, minimum=low, maximum=high)
        assert abs(matched.mean() - target) <= self.BUDGET
        assert ((matched >= low) & (matched <= high)).all()
        assert_order_kept(s, matched)

    @given(matchable(), st.data())
    def test_meets_a_weighted_target(
        self, case: tuple[np.ndarray, float, float, float], data: st.DataObject
    ) -> None:
        s, target, low, high = case
        weights = data.draw(arrays(np.float64, s.size, elements=st.integers(0, 1000).map(float)))
        assume(weights.any())
        matched = smoothing.match_mean(s, target, minimum=low, maximum=high, weights=weights)
        assert abs(np.average(matched, weights=weights) - target) <= self.BUDGET
        assert_order_kept(s, matched)

    @given(matchable(), seeds)
    def test_commutes_with_permutations(
        self, case: tuple[np.ndarray, float, float, float], seed: int
    ) -> None:
        s, target, low, high = case
        order = np.random.default_rng(seed).permutation(s.size)
        permuted = smoothing.match_mean(s[order], target, minimum=low, maximum=high)
        expected = smoothing.match_mean(s, target, minimum=low, maximum=high)[order]
        np.testing.assert_allclose(permuted, expected, rtol=0, atol=self.BUDGET)

    @given(scaled)
    def test_a_met_target_changes_nothing(self, s: np.ndarray) -> None:
        np.testing.assert_array_equal(smoothing.match_mean(s, float(s.mean())), s)

    @pytest.mark.parametrize("target", [0.05, 0.15])
    def test_distinct_values_stay_distinct(self, target: float) -> None:
        s = np.linspace(0, 0.2, 101)
        matched = smoothing.match_mean(s, target, maximum=0.2)
        np.testing.assert_allclose(np.diff(matched), 0.5 * np.diff(s), rtol=0, atol=self.BUDGET)

    def test_lowering_from_zero_is_scaling(self) -> None:
        np.testing.assert_allclose(
            smoothing.match_mean([0, 0.1, 0.5], 0.1), [0, 0.05, 0.25], rtol=0, atol=self.BUDGET
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"target": 0.3, "maximum": 0.2}, r"0.3 cannot be reached within \[0.0, 0.2\]"),
            ({"target": NAN}, "nan cannot be reached"),
            ({"s": [0.1, 0.3], "maximum": 0.2}, r"s must lie in .*got 0.3 at index 1"),
            ({"s": [0.1, NAN]}, "got nan at index 1"),
            ({"s": []}, "of no samples"),
            ({"weights": [0, 0]}, "of no samples"),
            ({"weights": [1]}, "expected 2, got 1"),
            ({"weights": [1, -1]}, "weights must be >= 0, got -1.0 at index 1"),
            ({"minimum": 0.5, "maximum": 0.4}, "minimum <= maximum"),
        ],
        ids=str,
    )
    def test_bad_arguments_are_named(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            smoothing.match_mean(**({"s": [0.1, 0.2], "target": 0.1} | arguments))


class TestControls:
    @given(uncertainties, seeds)
    def test_shuffled_keeps_the_multiset_and_repeats(self, x: np.ndarray, seed: int) -> None:
        twin = smoothing.shuffled(x, seed)
        np.testing.assert_array_equal(np.sort(twin), np.sort(x))
        np.testing.assert_array_equal(twin, smoothing.shuffled(x, seed))

    def test_shuffled_moves_values_and_leaves_its_input(self) -> None:
        x = np.arange(100.0)
        assert (smoothing.shuffled(x, 0) != x).any()
        assert (smoothing.shuffled(x, 0) != smoothing.shuffled(x, 1)).any()
        np.testing.assert_array_equal(x, np.arange(100.0))

    @given(st.integers(0, 50), seeds)
    def test_random_repeats_within_the_unit_interval(self, n: int, seed: int) -> None:
        x = smoothing.random(n, seed)
        assert x.shape == (n,)
        assert ((x >= 0) & (x < 1)).all()
        np.testing.assert_array_equal(x, smoothing.random(n, seed))

    def test_random_depends_on_the_seed(self) -> None:
        assert (smoothing.random(10, 0) != smoothing.random(10, 1)).all()


@pytest.mark.kills("ual/methods/smoothing.py", "np.median(values[~missing])", "np.mean(values[~missing])")
class TestFillMissing:
    @given(uncertainties)
    def test_median_fills_only_the_gaps(self, x: np.ndarray) -> None:
        missing = np.isnan(x)
        assume(not missing.all())
        filled, keep, count = smoothing.fill_missing(x, "median")
        assert count == missing.sum()
        assert keep.all()
        np.testing.assert_array_equal(filled[~missing], x[~missing])
        assert (filled[missing] == np.median(x[~missing])).all()

    def test_drop_marks(self) -> None:
        filled, keep, count = smoothing.fill_missing([1, NAN, 3], "drop")
        np.testing.assert_array_equal(filled, [1, NAN, 3])
        assert keep.tolist() == [True, False, True]
        assert count == 1

    @pytest.mark.parametrize("policy", ["median", "drop", "refuse"])
    @pytest.mark.parametrize("x", [[], [1.0, 2.0]])
    def test_nothing_missing_changes_nothing(self, x: list[float], policy: Any) -> None:
        filled, keep, count = smoothing.fill_missing(x, policy)
        np.testing.assert_array_equal(filled, x)
        assert keep.tolist() == [True] * len(x)
        assert count == 0

    @pytest.mark.parametrize(
        ("x", "policy", "words"),
        [
            ([1, NAN, NAN], "refuse", "2 of 3 samples have no uncertainty, first at index 1"),
            ([NAN, NAN], "median", "no sample has an uncertainty"),
            ([1.0], "mean", "unknown policy"),
        ],
    )
    def test_refusals(self, x: list[float], policy: Any, words: str) -> None:
        with pytest.raises(UserError, match=words):
            smoothing.fill_missing(x, policy)


class TestFromConfig:
    def test_defaults_are_ranks_up_to_a_fifth(self) -> None:
        u, s = smoothing.from_config([10, 1, 100], SmoothingConfig())
        np.testing.assert_array_equal(u, [0.5, 0, 1])
        np.testing.assert_allclose(s, [0.1, 0, 0.2], rtol=2 * EPS)

    @pytest.mark.parametrize("scale", ["rank", "min_max", "absolute"])
    @pytest.mark.parametrize("map", ["linear", "power", "step", "constant"])
    def test_every_arm_can_share_one_mean(self, scale: Any, map: Any) -> None:
        config = SmoothingConfig(
            scale=scale, map=map, min=0.02, max=0.3, power=3, threshold=0.7, match_mean=0.1
        )
        x = smoothing.random(50, seed=3)
        u, s = smoothing.from_config(x, config)
        np.testing.assert_array_equal(u, smoothing.scale(x, scale))
        assert abs(s.mean() - 0.1) <= TestMatchMean.BUDGET
        assert s.min() >= 0.02
        assert s.max() <= 0.3
        assert_order_kept(x, s)

    def test_settings_reach_the_map(self) -> None:
        step = SmoothingConfig(scale="absolute", map="step", min=0.1, max=0.4, threshold=0.8)
        np.testing.assert_array_equal(smoothing.from_config([0.7, 0.8], step)[1], [0.1, 0.4])
        power = SmoothingConfig(scale="absolute", map="power", min=0, max=0.4, power=3)
        np.testing.assert_allclose(smoothing.from_config([0.5], power)[1], [0.05], rtol=4 * EPS)

    @pytest.mark.kills("ual/methods/smoothing.py", "invert=config.invert", "invert=False")
    def test_the_inverse_has_the_same_mean(self) -> None:
        """So it is a control of the same total smoothing, also after `match_mean`."""
        x = smoothing.random(50, seed=3)
        _, s = smoothing.from_config(x, SmoothingConfig(match_mean=0.05, invert=True))
        assert abs(s.mean() - 0.05) <= TestMatchMean.BUDGET
        assert_order_kept(-x, s)

    def test_the_inverse_of_a_constant_is_refused(self) -> None:
        with pytest.raises(ValueError, match='invert does not change map "constant"'):
            SmoothingConfig(map="constant", invert=True)

    def test_a_constant_asks_no_uncertainty(self) -> None:
        u, s = smoothing.from_config([NAN, NAN], SmoothingConfig(map="constant", match_mean=0.05))
        assert np.isnan(u).all()
        np.testing.assert_allclose(s, [0.05, 0.05], rtol=4 * EPS)

    def test_a_mean_outside_the_range_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"0\.3 cannot be reached") as caught:
            smoothing.from_config([1, 2], SmoothingConfig(match_mean=0.3))
        assert "smoothing.max" in caught.value.remedy

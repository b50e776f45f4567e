"""From uncertainty to label smoothing: pure functions of arrays.

A sample's uncertainty is first scaled to u in [0, 1], then mapped to its label smoothing s:

    scale   rank      u = mid-rank, counted from 0, / (n - 1)
            min_max   u = (x - min x) / (max x - min x)
            absolute  u = x
    map     linear    s = minimum + (maximum - minimum) u
            power     s = minimum + (maximum - minimum) u^power
            step      s = maximum if u >= threshold, else minimum
            constant  s = one value for all u

`invert` exchanges minimum and maximum in the first three maps: s becomes minimum + maximum - s. The certain
samples are then smoothed most, and `threshold` is still a threshold of u.

Uncertainty-aware learning (arXiv 2406.04854) gives each sample its own smoothing, set from an uncertainty.
The paper's scale and constants are not public, so the choices here and their defaults are this project's.
Ranks are the default because scores of a language model cluster on a few values.

Arrays are float64 and one-dimensional. NaN is a missing uncertainty, and stays NaN until `fill_missing`.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.config.base import nearest
from ual.config.run import CONSTANT_INVERTED, SmoothingConfig
from ual.errors import UserError

__all__ = [
    "fill_missing", "from_config", "is_constant", "match_mean", "random", "scale", "shuffled", "smooth",
]  # fmt: skip

Array = NDArray[np.float64]
Scale = Literal["rank", "min_max", "absolute"]
Map = Literal["linear", "power", "step", "constant"]
Missing = Literal["median", "drop", "refuse"]
_NOISE = 1e-6  # of the largest value: a model that computes in float32 gives one text scores as far apart


def scale(uncertainty: ArrayLike, kind: Scale = "rank") -> Array:
    """Map uncertainties in any units to [0, 1], in the same order.

    Args:
        uncertainty: [n], finite or NaN.
        kind: "rank" is the quantile within the data set. Tied values share their mean rank, and n distinct
            values span exactly 0 to 1. "min_max" keeps the relative distances. "absolute" expects values in
            [0, 1].

    Returns:
        [n] in [0, 1], NaN if missing. If all values are equal, "rank" and "min_max" give 0.5.

    Raises:
        UserError: a value is infinite, or is outside [0, 1] for "absolute".

    >>> scale([7.0, 5.0, 9.0, 5.0]).round(3).tolist()
    [0.667, 0.167, 1.0, 0.167]
    """
    values = _vector(uncertainty, "uncertainty")
    present = ~np.isnan(values)
    known = values[present]
    if kind not in get_args(Scale):
        raise UserError(f"unknown scale {kind!r}; {nearest(kind, get_args(Scale))}")
    if kind == "absolute":
        _refuse(values, (values < 0) | (values > 1), "uncertainty must lie in [0, 1] for the absolute scale")
    elif known.size and known.min() == known.max():
        known = np.full_like(known, 0.5)
    elif kind == "rank" and known.size:
        _, distinct, count = np.unique(known, return_inverse=True, return_counts=True)
        mid_rank = np.cumsum(count) - (count + 1) / 2
        known = mid_rank[distinct] / (known.size - 1)
    elif known.size:
        known = known / np.abs(known).max()  # the difference of huge values would overflow
        known = (known - known.min()) / (known.max() - known.min())
    scaled = np.full_like(values, np.nan)
    scaled[present] = known
    return scaled


def smooth(
    u: ArrayLike,
    *,
    map: Map = "linear",
    minimum: float = 0.0,
    maximum: float = 0.2,
    power: float = 2.0,
    threshold: float = 0.5,
    invert: bool = False,
    constant: float | None = None,
) -> Array:
    """Map scaled uncertainties to label smoothing: the more uncertain, the more smoothing, or the less.

    Args:
        u: [n] in [0, 1], NaN if missing.
        map: see the module's table.
        minimum, maximum: the range of s, 0 <= minimum <= maximum <= 1.
        power: exponent > 0 of "power".
        threshold: the least u for which "step" gives the maximum, or the minimum if inverted.
        invert: the most certain samples get the maximum. Refused under "constant", which it cannot change.
        constant: the smoothing of all samples under "constant"; by default (minimum + maximum) / 2, the mean
            of the linear map of ranks.

    Returns:
        [n] in [minimum, maximum]; NaN if u is NaN, except under "constant", which needs no uncertainty.

    >>> smooth([0.0, 0.5, 1.0]).tolist(), smooth([0.0, 0.5, 1.0], invert=True).tolist()
    ([0.0, 0.1, 0.2], [0.2, 0.1, 0.0])
    """
    values = _vector(u, "u")
    _refuse(values, (values < 0) | (values > 1), "u must lie in [0, 1]")
    _check_bounds(minimum, maximum)
    if map not in get_args(Map):
        raise UserError(f"unknown map {map!r}; {nearest(map, get_args(Map))}")
    if map == "constant":
        if invert:
            raise UserError(CONSTANT_INVERTED)
        value = (minimum + maximum) / 2 if constant is None else constant
        if not minimum <= value <= maximum:
            raise UserError(f"constant must lie in [{minimum}, {maximum}], got {value}")
        return np.full_like(values, value)
    certain, uncertain = (maximum, minimum) if invert else (minimum, maximum)
    if map == "step":
        return np.where(np.isnan(values), np.nan, np.where(values >= threshold, uncertain, certain))
    if map == "power":
        if not power > 0:
            raise UserError(f"power must be positive, got {power}")
        values = values**power
    return np.clip(certain + (uncertain - certain) * values, minimum, maximum)


def match_mean(
    s: ArrayLike,
    target: float,
    *,
    minimum: float = 0.0,
    maximum: float = 1.0,
    weights: ArrayLike | None = None,
) -> Array:
    """Return smoothings with the mean `target`, so that arms are comparable.

    The map is affine, and one bound is its fixed point: the minimum if the mean must fall, and the maximum if
    it must rise. So the bounds hold without clipping, distinct values stay distinct, relative distances stay
    the same, and every target within the bounds is reached.

    Args:
        s: [n] in [minimum, maximum], none missing.
        target: the mean of the result, in [minimum, maximum].
        minimum, maximum: bounds of the result.
        weights: [n] >= 0, of a weighted mean, such as response lengths.

    >>> match_mean([0.0, 0.1, 0.2], 0.05).round(12).tolist()
    [0.0, 0.05, 0.1]
    >>> match_mean([0.0, 0.1, 0.2], 0.15, maximum=0.2).round(12).tolist()
    [0.1, 0.15, 0.2]
    """
    values = _vector(s, "s")
    _check_bounds(minimum, maximum)
    _refuse(values, ~((values >= minimum) & (values <= maximum)), f"s must lie in [{minimum}, {maximum}]")
    if not minimum <= target <= maximum:
        raise UserError(
            f"a mean smoothing of {target} cannot be reached within [{minimum}, {maximum}]",
            remedy="choose match_mean between smoothing.min and smoothing.max",
        )
    if weights is not None:
        weights = _vector(weights, "weights")
        _refuse(weights, ~(weights >= 0), "weights must be >= 0")
        if weights.size != values.size:
            raise UserError(
                f"weights must have one value per sample: expected {values.size}, got {weights.size}"
            )
    if not values.size or (weights is not None and not weights.any()):
        raise UserError("the mean smoothing of no samples cannot be matched")
    mean = float(np.average(values, weights=weights))
    if target < mean:
        values = minimum + (values - minimum) * ((target - minimum) / (mean - minimum))
    elif target > mean:
        values = maximum - (maximum - values) * ((maximum - target) / (maximum - mean))
    return np.clip(values, minimum, maximum)


def is_constant(values: ArrayLike) -> bool:
    """Return whether at least two values are known and all known ones are equal, up to the noise of float32.

    Args:
        values: [n], NaN if missing.

    >>> is_constant([0.3, float("nan"), 0.1 + 0.2]), is_constant([0.3, 0.31]), is_constant([0.3])
    (True, False, False)
    """
    known = _vector(values, "values")
    known = known[~np.isnan(known)]
    return known.size > 1 and bool(known.max() - known.min() <= _NOISE * np.abs(known).max())


def shuffled(values: ArrayLike, seed: int) -> Array:
    """Return the values in a random order: a control with the same smoothings and without the uncertainty.

    If training with the true order is not better than this control, the gain is not from uncertainty.
    """
    return np.random.default_rng(seed).permutation(np.asarray(values, dtype=np.float64))


def random(n: int, seed: int) -> Array:
    """Return [n] uniform in [0, 1): uncertainties that do not depend on the samples."""
    return np.random.default_rng(seed).random(n)


def fill_missing(uncertainty: ArrayLike, policy: Missing = "median") -> tuple[Array, NDArray[np.bool_], int]:
    """Fill in or drop missing uncertainties.

    Args:
        uncertainty: [n], NaN if missing.
        policy: "median" fills in the median of the other samples, "drop" marks samples to drop, "refuse"
            raises.

    Returns:
        The uncertainties [n], the mask [n] of samples to keep, and the number of missing uncertainties. Under
        "drop" these stay NaN, with False in the mask.

    >>> fill_missing([1.0, float("nan"), 3.0])
    (array([1., 2., 3.]), array([ True,  True,  True]), 1)
    """
    if policy not in get_args(Missing):
        raise UserError(f"unknown policy {policy!r}; {nearest(policy, get_args(Missing))}")
    values = _vector(uncertainty, "uncertainty")
    missing = np.isnan(values)
    count = int(missing.sum())
    keep = np.ones(values.size, dtype=np.bool_)
    if not count:
        return values, keep, 0
    if policy == "refuse":
        raise UserError(
            f"{count} of {values.size} samples have no uncertainty, first at index {int(missing.argmax())}",
            remedy='set uncertainty.missing to "median" or "drop"',
        )
    if policy == "drop":
        return values, ~missing, count
    if count == values.size:
        raise UserError(
            "no sample has an uncertainty, so there is no median",
            remedy='add an "uncertainty" column or set uncertainty.estimator to "white_box"',
        )
    return np.where(missing, np.median(values[~missing]), values), keep, count


def from_config(uncertainty: ArrayLike, config: SmoothingConfig) -> tuple[Array, Array]:
    """Return the scaled uncertainty [n] and the label smoothing [n] of a configuration.

    The smoothing of a missing uncertainty is missing, unless the map is "constant". `match_mean` refuses
    missing values: see `fill_missing`.
    """
    scaled = scale(uncertainty, config.scale)
    s = smooth(
        scaled,
        map=config.map,
        minimum=config.min,
        maximum=config.max,
        power=config.power,
        threshold=config.threshold,
        invert=config.invert,
    )
    if config.match_mean is not None:
        s = match_mean(s, config.match_mean, minimum=config.min, maximum=config.max)
    return scaled, s


def _vector(values: ArrayLike, name: str) -> Array:
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1:
        raise UserError(f"{name} must be one-dimensional, got shape {vector.shape}")
    _refuse(vector, np.isinf(vector), f"{name} must be finite")
    return vector


def _check_bounds(minimum: float, maximum: float) -> None:
    if not 0 <= minimum <= maximum <= 1:
        raise UserError(
            f"smoothing needs 0 <= minimum <= maximum <= 1, got minimum={minimum} and maximum={maximum}"
        )


def _refuse(values: Array, bad: NDArray[np.bool_], rule: str) -> None:
    if bad.any():
        index = int(bad.argmax())
        raise UserError(
            f"{rule}, got {values[index]} at index {index}, and {int(bad.sum()) - 1} more like it"
        )

"""Groups of samples by source and by uncertainty, each with training metrics of its own."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.methods import smoothing

QUANTILES = 4
_MOST_SOURCES = 8


class Groups(NamedTuple):
    """The `names` of all groups, and each sample's indices of its source and its quantile; -1 is none."""

    names: tuple[str, ...]
    of_samples: NDArray[np.int64]  # [n, 2]


def assign(sources: Sequence[str], uncertainty: ArrayLike) -> Groups:
    """Name groups ``source/<name>`` and ``uncertainty/q1`` (the most certain quarter) to ``q4``.

    Args:
        sources: [n]; all but the eight largest share ``source/(others)``. A single source is not a group.
        uncertainty: [n], NaN if missing; equal values share a quarter.

    >>> groups = assign(["a", "b", "a", "a"], [0.1, 0.2, 0.3, float("nan")])
    >>> groups.names[:3], groups.of_samples.tolist()
    (('source/a', 'source/b', 'uncertainty/q1'), [[0, 2], [1, 4], [0, 5], [0, -1]])
    """
    sizes = Counter(sources)
    largest = [name for name, _ in sizes.most_common(_MOST_SOURCES)] if len(sizes) > 1 else []
    names = [f"source/{name or '(unnamed)'}" for name in largest]
    others = len(names)
    if len(sizes) > _MOST_SOURCES:
        names.append("source/(others)")
    place = {name: i for i, name in enumerate(largest)}
    of_samples = np.full((len(sources), 2), -1, dtype=np.int64)
    if largest:
        of_samples[:, 0] = [place.get(name, others) for name in sources]
    values = np.asarray(uncertainty, dtype=np.float64)
    known = ~np.isnan(values)
    if known.any():
        quantile = np.minimum(smoothing.scale(values)[known] * QUANTILES, QUANTILES - 1).astype(np.int64)
        of_samples[known, 1] = len(names) + quantile
        names += [f"uncertainty/q{i + 1}" for i in range(QUANTILES)]
    return Groups(tuple(names), of_samples)

"""How tightly a model's hidden states cluster by the token that they predict.

arXiv 2406.04854 reports that tokens cluster better in feature space after UAL than after plain fine-tuning,
and publishes no measure of this. These measures are our choice; none of them is the paper's.

States x_1 .. x_n in R^D belong to C classes, the target tokens. mu_c is the mean of class c, v_c the mean of
||x_i - mu_c||^2 and s_c the mean of ||x_i - mu_c|| over its states, and g the mean of the class means.
Distances are Euclidean:

    silhouette        mean of (b_i - a_i) / max(a_i, b_i), with the mean distance a_i to the other states of
                      i's class, and b_i the smallest mean distance to another class (Rousseeuw 1987)
    davies_bouldin    mean over c of the largest (s_c + s_c') / ||mu_c - mu_c'|| (Davies and Bouldin 1979)
    intra_inter       mean of s_c over classes, divided by the mean of ||mu_c - mu_c'|| over pairs c < c'
    neighbor_purity   mean over i of the share of i's class among the k nearest states of other documents
    cdnv              mean over pairs of (v_c + v_c') / (2 ||mu_c - mu_c'||^2), the class-distance normalized
                      variance (Galanti et al. 2021, arXiv 2112.15121; arXiv 2405.17767)
    gnc2              standard deviation over |mean| of log 1 / ||u_c - u_c'|| over pairs, with
                      u_c = (mu_c - g) / ||mu_c - g||: hyperspherical uniformity, GNC2 of arXiv 2405.17767,
                      with the kernel of Liu et al. 2023, arXiv 2303.06484
    effective_rank    exp(-sum p_i ln p_i) with p_i = sigma_i / sum sigma, for the singular values sigma of
                      the centered states (Roy and Vetterli 2007)

The silhouette is scikit-learn's. In GNC2, the mean is near 0 if distances are near 1, and the
quotient is then unstable. No measure changes if states are rotated, moved, or scaled by one factor.

Neighbors of the same document are left out, the state itself among them. Their contexts are beginnings of one
another, so they are close whatever the model has learned. The other measures average over many states, and
`choose` spreads the states of a class over documents.

The interval covers the choice of documents, for fixed classes. A bootstrap would draw documents twice. A
repeated state has a neighbor at distance 0, which raises silhouette and purity. So each draw takes three
quarters of the documents, without replacement. For a mean, the variance over draws of h of G documents, times
h / (G - h), estimates the variance of the mean (the delete-d jackknife of Shao and Wu 1989). The interval is
the value plus and minus this standard error times the 97.5 % quantile of Student's t with G - 1 degrees of
freedom. With fewer documents, the measures have another bias, which their spread around the mean of the draws
does not contain. So the interval is for the expected value of the measure with this many documents and
states, not with infinitely many. It is not cut at the ends of a measure's range. Draws of a half made the
intervals of the ratios too narrow in simulations.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.errors import UserError
from ual.methods.statistics import Estimate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DOCUMENTS = 8
"""Documents that a class must occur in, at least; few draws then lack two states of the class."""
_LEFT_OUT = 4  # one of so many documents is not in a draw


class Measure(NamedTuple):
    """A measure's name, and which values mean tighter or more even clusters; "" if neither does."""

    name: str
    tighter: Literal["higher", "lower", ""]


MEASURES: Mapping[str, Measure] = {
    "silhouette": Measure("Silhouette", "higher"),
    "davies_bouldin": Measure("Davies-Bouldin", "lower"),
    "intra_inter": Measure("Intra/inter ratio", "lower"),
    "neighbor_purity": Measure("Neighbor purity", "higher"),
    "cdnv": Measure("CDNV", "lower"),
    "gnc2": Measure("GNC2", "lower"),
    "effective_rank": Measure("Effective rank", ""),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The measures of a model minus those of a baseline, from the same draws."""

    model: str
    baseline: str
    measures: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each model's measures, by name, and the differences of every two models, the earlier as baseline."""

    measures: Mapping[str, Mapping[str, Estimate]]
    differences: tuple[Difference, ...]


# ---- which tokens ----


def choose(
    token: ArrayLike,
    document: ArrayLike,
    *,
    classes: int = 20,
    occurrences: int = 50,
    least: int = 30,
    seed: int = 0,
) -> Ints:
    """Return the indices of the occurrences to measure, [classes * n], by class and then in their order.

    Classes are the most frequent tokens with at least `least` occurrences in at least `DOCUMENTS` documents;
    of equally frequent ones, those with smaller ids. Every class has the same number n of occurrences: as
    many as the rarest class has, and at most `occurrences`. A second occurrence from one document is drawn
    only if every document of the class has given one. The result depends on the arguments alone.

    Args:
        token: [M] integers, the class of every occurrence.
        document: [M] integers, its document.
        classes: at most so many, at least 2.
        occurrences: at most so many of each class, at least 2.
        least: of a class, at least 2.
        seed: of the draws.

    Raises:
        ValueError: shapes or limits are wrong.
        UserError: fewer than two tokens are frequent enough.

    >>> chosen = choose([7, 7, 7, 5, 5] * 8, np.arange(40) // 5, least=16)
    >>> chosen.size, np.unique(np.tile([7, 7, 7, 5, 5], 8)[chosen], return_counts=True)[1].tolist()
    (32, [16, 16])
    """
    t, d = np.asarray(token, dtype=np.int64), np.asarray(document, dtype=np.int64)
    if t.ndim != 1 or t.shape != d.shape:
        raise ValueError(f"token and document must share one shape [M], got {t.shape} and {d.shape}")
    if min(classes, occurrences, least) < 2:
        raise ValueError(
            f"classes, occurrences and least must be at least 2, got {classes}, {occurrences} and {least}"
        )
    ids, label, count = np.unique(t, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([label, d]), axis=1)
    spread = np.bincount(pairs[0], minlength=ids.size)
    enough = (count >= least) & (spread >= DOCUMENTS)
    if enough.sum() < 2:
        raise _too_few(count, spread, least, np.unique(d).size)
    by_count = np.argsort(-count, kind="stable")  # ids rise, so ties are in the order of ids
    chosen = by_count[enough[by_count]][:classes]
    each = min(occurrences, int(count[chosen].min()))
    rng = np.random.default_rng(seed)
    return np.concatenate([_spread(np.flatnonzero(label == c), d, each, rng) for c in np.sort(chosen)])


def _spread(of_class: Ints, document: Ints, each: int, rng: np.random.Generator) -> Ints:
    """Draw occurrences of a class: a first one of every document, in random order, then second ones."""
    drawn = rng.permutation(of_class)
    _, label = np.unique(document[drawn], return_inverse=True)
    order = np.argsort(label, kind="stable")
    sizes = np.bincount(label)
    turn = np.empty_like(drawn)
    turn[order] = np.arange(drawn.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(drawn[np.argsort(turn, kind="stable")[:each]])


def _too_few(count: Ints, spread: Ints, least: int, documents: int) -> UserError:
    reached = int(((count >= least) & (spread >= DOCUMENTS)).sum())
    if documents < DOCUMENTS:
        problem = f"the loss tokens are of {documents} document{'s' * (documents != 1)}"
        return UserError(
            f"{problem}, and intervals need at least {DOCUMENTS}",
            remedy="name more data with --data; samples with the same first question are one document",
        )
    frequent = np.sort(count[spread >= DOCUMENTS])[::-1]
    second = int(frequent[1]) if frequent.size > 1 else 0
    remedy = "name more data with --data"
    if second >= 2:
        remedy += f", or lower --least: two tokens occur at least {second} times"
    return UserError(
        f"clusters need two tokens or more, and {reached} of {count.size} occur at least {least} times in at "
        f"least {DOCUMENTS} documents",
        remedy=remedy,
    )


# ---- the measures ----


def measure(
    states: ArrayLike, token: ArrayLike, document: ArrayLike, *, neighbors: int = 10
) -> dict[str, float]:
    """Return every measure of `MEASURES` by its key; NaN where it is not defined.

    A measure is not defined if it divides by 0, for example because all states are equal.

    Args:
        states: [N, D], finite; computed in float64.
        token: [N], the class of each state. Two classes or more, each of two states or more.
        document: [N], the document of each state.
        neighbors: k of the neighbor purity, at least 1. A state with fewer neighbors from other documents has
            those; one without any is left out of the mean.

    Raises:
        ValueError: shapes differ, a state is not finite, or there are too few classes, states or neighbors.

    >>> found = measure([[0, 0], [0, 1], [8, 0], [8, 1]], [1, 1, 2, 2], [1, 2, 3, 4], neighbors=1)
    >>> found["intra_inter"], found["cdnv"], found["neighbor_purity"]
    (0.0625, 0.00390625, 1.0)
    """
    x, label, of = _checked(states, token, document, neighbors)
    return _measure(x, _distances(x), label, of, neighbors)


def compare(
    states: Mapping[str, ArrayLike],
    token: ArrayLike,
    document: ArrayLike,
    *,
    neighbors: int = 10,
    resamples: int = 200,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Return the measures of several models on the same tokens, with 95 % intervals, and their differences.

    Differences are paired: the same documents are drawn for all models.

    Args:
        states: name of a model -> [N, D], as `measure`; D may differ.
        token, document, neighbors: as `measure`. Two documents or more.
        resamples: draws of documents, at least 2. In a draw, classes with fewer than two states are left out.
        seed: of the draws.
        advance: called with the number of draws that are measured, over all models.

    Raises:
        ValueError: as `measure`, or fewer than two documents or resamples.
    """
    names = list(states)
    if not names or resamples < 2:
        raise ValueError(f"expected a model or more and two resamples or more, got {names}, {resamples}")
    value, drawn = {}, {}
    for name in names:
        x, label, of = _checked(states[name], token, document, neighbors)
        distance = _distances(x)
        value[name] = _vector(_measure(x, distance, label, of, neighbors))
        vectors = []
        for part in _draws(label, of, resamples, seed):
            among = distance[np.ix_(part, part)]
            several = np.unique(label[part]).size > 1
            found = _measure(x[part], among, label[part], of[part], neighbors) if several else {}
            vectors.append(_vector(found))
            advance(1)
        drawn[name] = np.array(vectors)
    documents = np.unique(np.asarray(document)).size
    return Comparison(
        {name: _estimates(value[name], drawn[name], documents) for name in names},
        tuple(
            Difference(b, a, _estimates(value[b] - value[a], drawn[b] - drawn[a], documents))
            for a, b in combinations(names, 2)
        ),
    )


def _checked(
    states: ArrayLike, token: ArrayLike, document: ArrayLike, neighbors: int
) -> tuple[Floats, Ints, Ints]:
    x = np.asarray(states, dtype=np.float64)
    t, d = np.asarray(token), np.asarray(document)
    if x.ndim != 2 or t.shape != x.shape[:1] or d.shape != t.shape or not np.isfinite(x).all():
        raise ValueError(
            f"expected finite states [N, D], token [N] and document [N], got {x.shape}, {t.shape}, {d.shape}"
        )
    _, label, count = np.unique(t, return_inverse=True, return_counts=True)
    if count.size < 2 or count.min() < 2 or neighbors < 1:
        raise ValueError(
            f"expected two classes or more of two states or more, and neighbors >= 1, got classes of "
            f"{count.tolist()} states, neighbors {neighbors}"
        )
    return x - x.mean(axis=0), label, np.unique(d, return_inverse=True)[1]


def _distances(x: Floats) -> Floats:
    from scipy.spatial.distance import pdist, squareform

    square: Floats = squareform(pdist(x))  # of differences: products would cancel for near states
    return square


def _measure(x: Floats, distance: Floats, label: Ints, document: Ints, k: int) -> dict[str, float]:
    """Return the measures of checked states [n, D] with their distances [n, n]; labels may skip numbers."""
    import sklearn
    from scipy.spatial.distance import pdist, squareform
    from sklearn.metrics import silhouette_score

    _, label, count = np.unique(label, return_inverse=True, return_counts=True)
    means = np.zeros((count.size, x.shape[1]))
    np.add.at(means, label, x)
    means /= count[:, None]
    to_mean = np.linalg.norm(x - means[label], axis=1)
    between = pdist(means)
    found = dict.fromkeys(MEASURES, math.nan)
    found["neighbor_purity"] = _purity(distance, label, document, k)
    found["effective_rank"] = _effective_rank(x)
    if between.min() == 0:  # two means are equal
        return found
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        found["silhouette"] = float(silhouette_score(distance, label, metric="precomputed"))
    spread = np.bincount(label, to_mean) / count
    first, second = np.triu_indices(count.size, 1)
    found["davies_bouldin"] = float(squareform((spread[first] + spread[second]) / between).max(1).mean())
    found["intra_inter"] = float(spread.mean() / between.mean())
    variance = np.bincount(label, to_mean**2) / count
    found["cdnv"] = float(((variance[first] + variance[second]) / (2 * between**2)).mean())
    found["gnc2"] = _uniformity(means)
    return found


def _purity(distance: Floats, label: Ints, document: Ints, k: int) -> float:
    apart = np.where(document[:, None] == document, np.inf, distance)
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :k]
    present = np.isfinite(np.take_along_axis(apart, nearest, axis=1))
    same = (label[nearest] == label[:, None]) & present
    has = present.any(axis=1)
    return float((same[has].sum(axis=1) / present[has].sum(axis=1)).mean()) if has.any() else math.nan


def _uniformity(means: Floats) -> float:
    from scipy.spatial.distance import pdist

    centered = means - means.mean(axis=0)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    if not length.all():
        return math.nan
    apart = pdist(centered / length)
    if not apart.all():
        return math.nan
    kernel = -np.log(apart)
    return float(kernel.std() / abs(kernel.mean())) if kernel.mean() else math.nan


def _effective_rank(x: Floats) -> float:
    centered = x - x.mean(axis=0)
    small = centered @ centered.T if len(x) <= x.shape[1] else centered.T @ centered
    # eigenvalues of the smaller product: much faster, and the lost digits weigh little in a sum of roots
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(small), 0, None))
    sigma[sigma < sigma.max() * 1e-7] = 0  # rounding errors of the product
    if not sigma.any():
        return math.nan
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# ---- intervals ----


def _taken(documents: int) -> int:
    """Return how many documents a draw takes: three quarters, and all but one of fewer than four."""
    return documents - max(1, documents // _LEFT_OUT)


def _draws(label: Ints, document: Ints, resamples: int, seed: int) -> Iterator[Ints]:
    """Yield the indices of the states of random documents, of classes that have two states there or more."""
    documents = int(document.max()) + 1
    if documents < 2:
        raise ValueError("an interval needs two documents or more, got 1")
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        taken = np.zeros(documents, dtype=bool)
        taken[rng.permutation(documents)[: _taken(documents)]] = True
        inside = taken[document]
        count = np.bincount(label[inside], minlength=int(label.max()) + 1)
        yield np.flatnonzero(inside & (count > 1)[label])


def _estimates(value: Floats, drawn: Floats, documents: int) -> dict[str, Estimate]:
    from scipy.stats import t

    taken = _taken(documents)
    scale = math.sqrt(taken / (documents - taken)) * float(t.ppf(0.975, documents - 1))
    found = {}
    for key, at, draws in zip(MEASURES, value, drawn.T, strict=True):
        known = draws[np.isfinite(draws)]
        reach = scale * float(known.std(ddof=1)) if known.size > 1 else math.nan
        found[key] = Estimate(float(at), float(at) - reach, float(at) + reach)
    return found


def _vector(measures: Mapping[str, float]) -> Floats:
    return np.array([measures.get(key, math.nan) for key in MEASURES])


# ---- two dimensions ----


class Projection(NamedTuple):
    """Points [N, 2] of each model on axes that all models share, and each axis' share of the variance."""

    points: Mapping[str, Floats]
    shares: tuple[float, ...]


def principal_components(states: Mapping[str, ArrayLike]) -> Projection:
    """Return the first two principal components, of one fit to the states of all models together.

    The states of each model are moved to mean 0 before. Otherwise the axes would show how far the means of
    models are apart, which no measure depends on.

    Args:
        states: name -> [N, D], one D >= 3.
    """
    from sklearn.decomposition import PCA

    stacked, ends = _stacked(states)
    fitted = PCA(2, svd_solver="arpack", random_state=0)
    points = np.split(fitted.fit_transform(stacked), ends)
    shares = tuple(map(float, fitted.explained_variance_ratio_))
    return Projection(dict(zip(states, points, strict=True)), shares)


def check_umap() -> None:
    """Refuse UMAP where it is not installed.

    Raises:
        UserError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("umap") is None:
        raise UserError(
            "--umap needs the package umap-learn, which is not installed",
            remedy="pip install umap-learn, or leave out --umap: principal components need no package",
        )


def umap_projection(states: Mapping[str, ArrayLike], *, neighbors: int = 15, seed: int = 0) -> Projection:
    """Return a UMAP embedding (arXiv 1802.03426), of one fit to the states of all models together.

    The states of each model are moved to mean 0 before. Distances between far clusters mean nothing in the
    embedding.

    Args:
        states: name -> [N, D], one D.
        neighbors: UMAP's `n_neighbors`.
        seed: of UMAP.

    Raises:
        UserError: umap-learn is not installed.
    """
    from importlib import import_module

    check_umap()
    stacked, ends = _stacked(states)
    fitted = import_module("umap").UMAP(n_components=2, n_neighbors=neighbors, random_state=seed)
    points = np.split(np.asarray(fitted.fit_transform(stacked), dtype=np.float64), ends)
    return Projection(dict(zip(states, points, strict=True)), ())


def _stacked(states: Mapping[str, ArrayLike]) -> tuple[Floats, Ints]:
    """Return the centered states of all models in one matrix, and where each model but the last ends."""
    each = [np.asarray(x, dtype=np.float64) for x in states.values()]
    return np.concatenate([x - x.mean(axis=0) for x in each]), np.cumsum([len(x) for x in each])[:-1]

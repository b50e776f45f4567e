"""Win rates from preferences between two answers; position bias and answer length. NumPy and SciPy.

A judge compares a model's answer to instruction i with a reference's answer, once in each order. With f_i
the probability that the model's answer is better when it is shown first, and s_i when it is shown second:

    w_i      = (f_i + s_i) / 2                    the model's share of instruction i; a tie is 1/2
    win rate = 1/n sum_i w_i
    first    = 1/n sum_i (f_i + 1 - s_i) / 2      how often the answer shown first wins; 1/2 without bias

Each answer is shown first once, so a preference for a position cancels in the win rate. An instruction with
only one verdict has no share, because its position would not cancel.

Judges prefer longer answers. The win rates where the model's and where the reference's answer is longer show
how much of a win rate may be length. They are no correction: AlpacaEval's length-controlled win rate
(arXiv 2404.04475) is a regression that needs the preferences for many models on each instruction.

AlpacaEval records a preference in [1, 2]: 1 if the first of two outputs is better, 2 if the second one is,
1.5 for a tie, and values between them for probabilities. Its older files have 0 for a tie.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.methods.statistics import Estimate, bootstrap

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Record:
    """Recorded preferences for one model over another.

    Attributes:
        win_rate: the mean share of the second generator, in [0, 1]; NaN if there is no preference.
        standard_error: of the mean; NaN for fewer than two preferences.
        wins, losses, ties: of the second generator: shares above, below and at 1/2.
        missing: instructions without a preference, which are in none of the other figures.
    """

    win_rate: float
    standard_error: float
    wins: int
    losses: int
    ties: int
    missing: int

    @property
    def count(self) -> int:
        """The number of preferences."""
        return self.wins + self.losses + self.ties


def share_of_second(preference: float | None) -> float:
    """Return the share in [0, 1] that AlpacaEval's `preference` gives to its second output.

    None and NaN, which stand for a reply without a verdict, give NaN.

    Raises:
        ValueError: it is neither in [1, 2] nor 0.

    >>> [share_of_second(p) for p in (1, 2.0, 1.5, 0, 1.25, None)]
    [0.0, 1.0, 0.5, 0.5, 0.25, nan]
    """
    if preference is None or math.isnan(preference):
        return math.nan
    if preference == 0:
        return 0.5
    if not 1 <= preference <= 2:
        raise ValueError(f"a preference must be in [1, 2], or 0 for a tie, got {preference!r}")
    return float(preference) - 1


def record(preferences: Iterable[float | None]) -> Record:
    """Return the record of the second generator, from AlpacaEval's preferences.

    Raises:
        ValueError: as `share_of_second`.

    >>> found = record([2, 2, 1, 1.5, None])
    >>> found.win_rate, found.wins, found.losses, found.ties, found.missing
    (0.625, 2, 1, 1, 1)
    """
    shares = np.array([share_of_second(preference) for preference in preferences])
    known = shares[~np.isnan(shares)]
    n = known.size
    return Record(
        float(known.mean()) if n else math.nan,
        float(known.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan,
        int((known > 0.5).sum()),
        int((known < 0.5).sum()),
        int((known == 0.5).sum()),
        shares.size - n,
    )


def records(
    annotations: Iterable[Mapping[str, Any]],
    by: Sequence[str] = ("generator_1", "generator_2", "annotator"),
) -> dict[tuple[str, ...], Record]:
    """Return the record of every pair of generators in AlpacaEval's annotations.

    Args:
        annotations: mappings with "preference" and the fields that `by` names.
        by: what tells pairs apart; annotations that differ in another field are counted together.

    Raises:
        ValueError: as `share_of_second`.
        KeyError: an annotation lacks a field.
    """
    found: dict[tuple[str, ...], list[float | None]] = {}
    for annotation in annotations:
        found.setdefault(tuple(str(annotation[name]) for name in by), []).append(annotation["preference"])
    return {key: record(preferences) for key, preferences in found.items()}


@dataclass(frozen=True, slots=True)
class Split:
    """A win rate where one answer is longer, with the number of these instructions; None below two."""

    instructions: int
    win_rate: Estimate | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What the preferences of one judge say.

    Attributes:
        instructions: n.
        decided: instructions with a verdict in both orders.
        missing: verdicts that are missing, of 2 n.
        win_rate: over the decided instructions, with the interval of the bootstrap over them; None if there
            are fewer than two. The interval does not cover other judges.
        lowest, highest: the win rate if every missing verdict were against the model, and for it.
        wins, losses, ties: decided instructions with a share above, below and at 1/2.
        first_wins: how often the answer shown first wins, over the decided instructions; ties count 1/2.
        consistent: share of decided instructions whose verdict is the same in both orders.
        model_length, reference_length: mean characters of an answer, over all instructions.
        longer_wins: the share of the longer answer, over decided instructions of unequal lengths.
        model_longer, reference_longer: the model's win rate where its answer, or the other one, is longer.
    """

    instructions: int
    decided: int
    missing: int
    win_rate: Estimate | None
    lowest: float
    highest: float
    wins: int
    losses: int
    ties: int
    first_wins: Estimate | None
    consistent: float
    model_length: float
    reference_length: float
    longer_wins: Estimate | None
    model_longer: Split
    reference_longer: Split


@dataclass(frozen=True, slots=True, eq=False)
class Preferences:
    """Verdicts on n instructions in both orders.

    Attributes:
        first: [n], the probability in [0, 1] that the model's answer, shown first, is better; 0, 1/2 and 1
            for verdicts without probabilities; NaN without a verdict.
        second: [n], the same with the model's answer shown second.
        model_length: [n], characters of the model's answers.
        reference_length: [n], characters of the reference's.

    Raises:
        ValueError: shapes differ, there are no instructions, or a value is out of range.
    """

    first: Array
    second: Array
    model_length: Array
    reference_length: Array

    def __post_init__(self) -> None:
        arrays = (self.first, self.second, self.model_length, self.reference_length)
        if len({array.shape for array in arrays}) > 1 or self.first.ndim != 1 or not self.first.size:
            shapes = [array.shape for array in arrays]
            raise ValueError(f"expected four arrays [n] with n >= 1, got {shapes}")
        for name in ("first", "second"):
            values = getattr(self, name)
            if not (np.isnan(values) | ((values >= 0) & (values <= 1))).all():
                raise ValueError(f"{name} must be in [0, 1] or NaN")

    @classmethod
    def of(
        cls, first: ArrayLike, second: ArrayLike, model_length: ArrayLike, reference_length: ArrayLike
    ) -> "Preferences":
        """Return preferences from sequences."""
        given = (first, second, model_length, reference_length)
        return cls(*(np.asarray(values, dtype=np.float64) for values in given))

    def swapped(self) -> "Preferences":
        """Return the same verdicts with the reference as the model.

        >>> mine = Preferences.of([0.9, 1.0], [0.4, 1.0], [3, 3], [5, 2])
        >>> [round(float(p.shares().mean()), 3) for p in (mine, mine.swapped())]
        [0.825, 0.175]
        """
        return Preferences(1 - self.second, 1 - self.first, self.reference_length, self.model_length)

    def shares(self) -> Array:
        """Return the model's share of each instruction, [n]; NaN unless both orders have a verdict."""
        share: Array = (self.first + self.second) / 2
        return share

    def summary(self, *, resamples: int = 1000, seed: int = 0) -> Summary:
        """Return win rate, position bias and figures of length.

        Args:
            resamples: of the bootstrap over instructions, at least 2.
            seed: of its draws.
        """

        def mean(values: Array) -> Estimate | None:
            if values.size < 2:
                return None
            return bootstrap(_mean, values, resamples=resamples, seed=seed)

        shares = self.shares()
        decided = ~np.isnan(shares)
        won, first, second = shares[decided], self.first[decided], self.second[decided]
        longer = np.sign(self.model_length - self.reference_length)[decided]
        of_longer = np.where(longer > 0, won, 1 - won)[longer != 0]
        verdicts = np.concatenate([self.first, self.second])
        missing = np.isnan(verdicts)
        low, high = (float(np.where(missing, value, verdicts).mean()) for value in (0.0, 1.0))
        same = np.sign(first - 0.5) == np.sign(second - 0.5)
        return Summary(
            instructions=shares.size,
            decided=won.size,
            missing=int(missing.sum()),
            win_rate=mean(won),
            lowest=low,
            highest=high,
            wins=int((won > 0.5).sum()),
            losses=int((won < 0.5).sum()),
            ties=int((won == 0.5).sum()),
            first_wins=mean((first + 1 - second) / 2),
            consistent=float(same.mean()) if same.size else math.nan,
            model_length=float(self.model_length.mean()),
            reference_length=float(self.reference_length.mean()),
            longer_wins=mean(of_longer),
            model_longer=Split(int((longer > 0).sum()), mean(won[longer > 0])),
            reference_longer=Split(int((longer < 0).sum()), mean(won[longer < 0])),
        )


def _mean(values: Array, axis: int = -1) -> Array:
    mean: Array = values.mean(axis)
    return mean

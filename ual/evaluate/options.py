"""Measures of the probabilities that a model gives to the options of questions; temperature scaling.

Question i has K_i options with probabilities p_i, renormalized over the options, a right option y_i, and
perhaps the shares q_i of human answers:

    NLL   = 1/n sum_i -ln p_i(y_i)                          a proper score, nats
    Brier = 1/n sum_i sum_k (p_i(k) - [k = y_i])^2          a proper score in [0, 2] (Brier 1950)
    T     = argmin of the NLL of p^(1/T), renormalized      on other questions (Guo et al. 2017)
    KL    = 1/n sum_i sum_k q_i(k) ln(q_i(k) / p_i(k))      nats
    JSD   = 1/n sum_i (KL(q_i | m_i) + KL(p_i | m_i)) / 2   nats, at most ln 2; m_i = (p_i + q_i) / 2

Entropies of p and q are correlated over the questions. Calibration is that of the most probable option
(`ual.evaluate.calibration`), ranking that of its confidence (`ual.evaluate.ranking`). Figures over options
and figures over the vocabulary are different quantities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.evaluate import calibration, ranking
from ual.methods.statistics import Table

Array = NDArray[np.float64]

_SMALLEST = float(np.finfo(np.float64).smallest_subnormal)
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Probabilities of the options of n questions with up to K options.

    Attributes:
        log_probs: [n, K], nats, renormalized over the options; -inf where a question has fewer. The logarithm
            of a probability that is 0 in float64 is -744.
        gold: [n], the right option.
        human: [n, K], shares of human answers, or None.
    """

    log_probs: Array
    gold: NDArray[np.intp]
    human: Array | None = None

    @classmethod
    def of(
        cls,
        probabilities: Sequence[Mapping[str, float]],
        gold: Sequence[str],
        human: Sequence[Mapping[str, float]] | None = None,
    ) -> "Predictions":
        """Return predictions from one mapping for each question, of options to shares.

        Raises:
            ValueError: a right option is not among the options, options of people and model differ, or shares
                are not positive in sum.
        """
        names = [list(of) for of in probabilities]
        width = max(map(len, names), default=0)
        for options, right in zip(names, gold, strict=True):
            if right not in options:
                raise ValueError(f"the right option {right!r} is not among the options {options}")
        p = _table(probabilities, names, width)
        with np.errstate(divide="ignore"):
            logs = np.log(np.where(p == 0, _SMALLEST, p))
        logs[np.arange(width) >= np.array([[len(options)] for options in names])] = -np.inf
        index = np.array([options.index(y) for options, y in zip(names, gold, strict=True)], dtype=np.intp)
        return cls(logs, index, None if human is None else _table(human, names, width))

    @property
    def probabilities(self) -> Array:
        """[n, K]."""
        return np.exp(self.log_probs)

    def at(self, temperature: float) -> "Predictions":
        """Return the predictions at a temperature."""
        logs = self.log_probs / temperature
        logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
        return replace(self, log_probs=logs)

    def take(self, questions: NDArray[Any]) -> "Predictions":
        """Return the predictions of some questions, by index or mask [n]."""
        human = None if self.human is None else self.human[questions]
        return Predictions(self.log_probs[questions], self.gold[questions], human)

    # ---- one figure for each question, [n] ----

    def nll(self) -> Array:
        return -self.log_probs[np.arange(self.gold.size), self.gold]

    def brier(self) -> Array:
        right = np.arange(self.log_probs.shape[1]) == self.gold[:, None]
        score: Array = ((self.probabilities - right) ** 2).sum(1)
        return score

    def correct(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.log_probs.argmax(1) == self.gold
        return right

    def confidence(self) -> Array:
        top: Array = np.exp(np.minimum(self.log_probs.max(1), 0))
        return top

    def entropy(self) -> Array:
        return _entropy(self.probabilities)

    def human_entropy(self) -> Array:
        return _entropy(self._of_people())

    def kl(self) -> Array:
        """KL(human | model)."""
        q = self._of_people()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence: Array = np.where(q > 0, q * (np.log(q) - self.log_probs), 0).sum(1)
        return divergence

    def jsd(self) -> Array:
        p, q = self.probabilities, self._of_people()
        return np.maximum(0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)

    def _of_people(self) -> Array:
        if self.human is None:
            raise ValueError("these predictions have no human answers")
        return self.human


def temperature(predictions: Predictions) -> float:
    """Return the temperature that suits some questions; fit it on others than are measured.

    It minimizes the total NLL plus (ln T)^2 / 2. The second term is a weak prior: ln T is normal with a
    standard deviation of 1. Without it, T would be 0 if all answers are right.

    Raises:
        ValueError: there are no questions.

    >>> sure = Predictions.of([{"a": 0.9, "b": 0.1}] * 400, ["a", "a", "a", "b"] * 100)
    >>> round(temperature(sure), 2), round(float(sure.at(temperature(sure)).probabilities[0, 0]), 2)
    (1.99, 0.75)
    """
    from scipy.optimize import minimize_scalar

    if not predictions.gold.size:
        raise ValueError("a temperature needs questions to be fitted on")

    def objective(log_t: float) -> float:
        return float(predictions.at(float(np.exp(log_t))).nll().sum() + log_t**2 / 2)

    bounds = tuple(np.log(_TEMPERATURES))
    found = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


MEASURES = (
    "nll",
    "brier",
    "accuracy",
    "confidence",
    "entropy",
    *calibration.FIGURES,
    "auroc",
    "aurc",
    "accuracy_at_80",
    "accuracy_at_50",
)
"""Of the probabilities and the right options. ``accuracy_at_80`` is that of the 80 % most confident."""

HUMAN_MEASURES = ("kl", "jsd", "entropy_pearson", "entropy_spearman")
"""Of the probabilities and the shares of human answers."""


def table(predictions: Predictions, *, bins: int = 15) -> Table:
    """Return `MEASURES`, and `HUMAN_MEASURES` if there are human answers, as figures of the questions.

    Args:
        predictions: of two questions or more.
        bins: of calibration errors.

    Returns:
        A table whose figures are NaN where they are not defined, such as AUROC if all answers are right.
    """
    return Table(_columns(predictions), partial(_figures, bins=bins), calibration.FIGURES)


def _columns(of: Predictions) -> dict[str, Array]:
    """Return the figures of each question, [n]."""
    columns = {
        "nll": of.nll(),
        "brier": of.brier(),
        "accuracy": of.correct().astype(np.float64),
        "confidence": of.confidence(),
        "entropy": of.entropy(),
    }
    if of.human is not None:
        columns |= {"kl": of.kl(), "jsd": of.jsd(), "human entropy": of.human_entropy()}
    return columns


def _figures(columns: Mapping[str, Array], bins: int) -> dict[str, float]:
    confidence, right = columns["confidence"], columns["accuracy"]
    found = {name: float(of.mean()) for name, of in columns.items() if name != "human entropy"}
    found |= calibration.figures(confidence, right, bins)
    found["auroc"] = _auroc(confidence, right)
    accuracies = ranking.accuracies(-confidence, 1 - right)
    found["aurc"] = float(1 - accuracies.mean())
    for share in (80, 50):
        found[f"accuracy_at_{share}"] = float(accuracies[max(1, round(share * right.size / 100)) - 1])
    if "human entropy" in columns:
        model, people = columns["entropy"], columns["human entropy"]
        found["entropy_pearson"] = _correlation(model, people)
        found["entropy_spearman"] = _correlation(_ranks(model), _ranks(people))
    order = (*MEASURES, *(HUMAN_MEASURES if "kl" in columns else ()))
    return {name: found[name] for name in order}


def _ranks(values: Array) -> Array:
    from scipy.stats import rankdata

    ranks: Array = rankdata(values)
    return ranks


def _auroc(confidence: Array, right: Array) -> float:
    """Return the chance that a right answer has the higher confidence; NaN if all are right, or all wrong.

    It is the Mann-Whitney statistic. A bootstrap needs it a thousand times, and scikit-learn's function takes
    ten times as long.
    """
    positive = right.sum()
    negative = right.size - positive
    if not positive or not negative:
        return np.nan
    above = _ranks(confidence)[right > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def _correlation(a: Array, b: Array) -> float:
    """Pearson's correlation; NaN if one is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else np.nan


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[Sequence[str]], width: int) -> Array:
    """Return shares [n, width] in the order of the names, each question's with the sum 1."""
    table = np.zeros((len(rows), width))
    for i, (row, options) in enumerate(zip(rows, names, strict=True)):
        if row.keys() != set(options):
            raise ValueError(f"people answered {sorted(row)}, and the options are {sorted(options)}")
        table[i, : len(options)] = [row[option] for option in options]
    total = table.sum(1, keepdims=True)
    if not (np.isfinite(table).all() and (table >= 0).all() and (total > 0).all()):
        raise ValueError("shares must be finite, not negative, and positive in sum")
    shares: Array = table / total
    return shares


def _entropy(p: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        h: Array = -np.where(p > 0, p * np.log(p), 0).sum(1)
    return h + 0.0

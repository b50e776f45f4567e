"""The reliability of several answers to one question: entropy, filter, weights. Pure functions.

n_a of n answers are a; logarithms are natural:

    entropy   H   = -sum_a (n_a / n) ln(n_a / n)
    filter    keep the question if H <= threshold; the default threshold is the median over the questions
    weights   s_a = exp(n_a / (n T)) / sum_b exp(n_b / (n T)) over the distinct answers

Source: reliability-aware weak-to-strong alignment (arXiv 2406.19032). It needs no gold labels.

An answer that could not be parsed is None. Under "class", all such answers together are one more distinct
answer, as in the paper's multiple-choice tasks. Under "drop_question", one such answer drops its question, as
in the paper's GSM8K.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ual.config.base import nearest
from ual.errors import UserError

__all__ = ["answer_weights", "entropy", "keep", "levels", "majority"]

Rule = Literal["median", "quantile", "absolute"]
Unparsed = Literal["class", "drop_question"]


def entropy(answers: Sequence[str | None], *, unparsed: Unparsed = "class") -> float:
    """Return the entropy of the answers to one question in nats: 0 if all agree, ln n if no two agree.

    Args:
        answers: at least one, normalized; equal strings are the same answer.
        unparsed: the meaning of None, see the module.

    Returns:
        A value in [0, ln n], with the same bits for the same counts; NaN if the question is dropped.

    >>> round(entropy(["18", "18", "18", "26", "4"]), 3)
    0.95
    """
    if unparsed not in get_args(Unparsed):
        raise UserError(f"unknown policy {unparsed!r}; {nearest(unparsed, get_args(Unparsed))}")
    counts = _count(answers)
    if unparsed == "drop_question" and None in counts:
        return math.nan
    n = len(answers)
    return sum(count / n * math.log(n / count) for count in sorted(counts.values()))


def keep(entropies: ArrayLike, rule: Rule = "median", value: float | None = None) -> NDArray[np.bool_]:
    """Return which questions are certain enough to train on.

    Args:
        entropies: [n] in nats; NaN is never kept and does not count for the median or quantile.
        rule: the threshold is the median, a quantile, or a number of nats.
        value: the quantile in [0, 1], or the threshold >= 0; none for the median.

    Returns:
        [n], True if the entropy is at most the threshold. Ties with the threshold are kept, so the median may
        keep more than half.

    >>> keep([0.0, 0.5, 0.5, 1.6]).tolist()
    [True, True, True, False]
    """
    if rule not in get_args(Rule):
        raise UserError(f"unknown rule {rule!r}; {nearest(rule, get_args(Rule))}")
    h = np.asarray(entropies, dtype=np.float64)
    known = h[~np.isnan(h)]
    if rule == "median" and value is not None:
        raise UserError(f'the rule "median" takes no value, got {value}', remedy='use the rule "quantile"')
    if rule != "median" and value is None:
        raise UserError(f'the rule "{rule}" needs a value')
    limit = 0.5 if value is None else value
    if rule == "absolute":
        if not limit >= 0:
            raise UserError(f"the threshold must be an entropy >= 0 in nats, got {limit}")
    elif not 0 <= limit <= 1:
        raise UserError(f"the quantile must lie in [0, 1], got {limit}")
    elif known.size:
        limit = float(np.quantile(known, limit))
    kept: NDArray[np.bool_] = h <= limit
    return kept


def answer_weights(answers: Sequence[str | None], temperature: float = 0.2) -> dict[str | None, float]:
    """Return the weight of each distinct answer to one question, in order of first appearance; they sum to 1.

    Args:
        answers: at least one; None is a class of its own.
        temperature: > 0; the paper's is 0.2, and 1.0 for questions with only two answers (ETHICS).

    >>> {answer: round(w, 3) for answer, w in answer_weights(["18", "18", "18", "18", "26"]).items()}
    {'18': 0.953, '26': 0.047}
    """
    if not temperature > 0:
        raise UserError(f"temperature must be positive, got {temperature}")
    counts = _count(answers)
    highest = max(counts.values())
    scores = {
        answer: math.exp((count - highest) / (len(answers) * temperature)) for answer, count in counts.items()
    }
    total = sum(scores.values())
    return {answer: score / total for answer, score in scores.items()}


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer; of equally frequent answers, a parsed one, then the first.

    >>> majority(["4", "18", None, "18", None])
    '18'
    """
    counts = _count(answers)
    return max(counts, key=lambda answer: (counts[answer], answer is not None))


def levels(entropies: ArrayLike, most: int = 10) -> NDArray[np.intp]:
    """Return the level of entropy of each question, from 0, the most certain: the axis of an accuracy curve.

    Args:
        entropies: [n] in nats, no NaN.
        most: the most levels. If there are more distinct entropies (5 answers have 7), levels are between
            their quantiles; equal values share a level.

    >>> levels([0.5, 0.0, 1.6, 0.5]).tolist()
    [1, 0, 2, 1]
    """
    h = np.asarray(entropies, dtype=np.float64)
    distinct, level = np.unique(h, return_inverse=True)
    if distinct.size > most:
        edges = np.quantile(h, np.linspace(0, 1, most + 1)[1:-1])
        _, level = np.unique(np.searchsorted(edges, h), return_inverse=True)
    return level


def _count(answers: Sequence[str | None]) -> Counter[str | None]:
    if not answers:
        raise UserError("a question needs at least one answer")
    return Counter(answers)

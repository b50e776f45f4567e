"""Several answers per question in, weighted training rows out: the first half of weak-to-strong alignment.

`process` reads a file of answers (see `ual.data.questions`) and returns rows in prompt-completion form, which
`ual train` reads:

    {"id", "prompt", "completion", "uncertainty", "sample_weight", "source"}

where `uncertainty` is the entropy of the question's answers in nats. The weights of a question sum to 1
whatever the method, so that arms differ in their labels, not in the scale of their loss.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from ual.config.base import nearest
from ual.data.questions import Candidate, Question, read
from ual.errors import UserError
from ual.files import aside
from ual.methods import reliability
from ual.records import Message

__all__ = ["Group", "Level", "Summary", "process", "write"]

Method = Literal["filter", "reweight", "majority"]


@dataclass(frozen=True, slots=True)
class Group:
    """Means over a group of questions; None where there is nothing, or no gold answer, to take a mean over.

    `answer_accuracy` is the mean share of right answers, a measure of how easy the questions are;
    `label_accuracy` is that of the majority's answer. Lengths are in characters.
    """

    questions: int
    entropy: float | None
    answer_accuracy: float | None
    label_accuracy: float | None
    prompt_length: float | None
    response_length: float | None


@dataclass(frozen=True, slots=True)
class Level:
    """The questions with an entropy in [low, high] nats, and how many of them were kept."""

    low: float
    high: float
    kept: int
    group: Group


@dataclass(frozen=True, slots=True)
class Summary:
    """What came in, what was dropped and why, and how the dropped questions differ from the kept ones.

    Filters on consistency throw away hard questions, so compare `kept` with `dropped`, and see `subjects`,
    which counts (kept, dropped) questions. `levels` is the histogram of entropy with the accuracy over it.
    `unlabelled` questions have no majority to train on, or an unparsed answer under "drop_question";
    `uncertain` ones were filtered out. `row_accuracy` is the share of the rows' weight that lies on right
    answers, None where none is known.
    """

    questions: int
    answers: int
    unparsed: int
    answers_per_question: tuple[int, int]
    unlabelled: int
    uncertain: int
    rows: int
    row_accuracy: float | None
    kept: Group
    dropped: Group
    levels: tuple[Level, ...]
    subjects: Mapping[str, tuple[int, int]]


def process(
    path: str | Path,
    *,
    method: Method = "filter",
    rule: reliability.Rule = "median",
    value: float | None = None,
    temperature: float = 0.2,
    unparsed: reliability.Unparsed = "class",
    every_answer: bool = False,
) -> tuple[list[dict[str, Any]], Summary]:
    """Turn a file of answers into training rows.

    Args:
        path: see the module.
        method: "majority" gives one row per question, labelled with its most frequent answer; "filter" gives
            those of them that `reliability.keep` keeps; "reweight" gives the questions of "majority" one row
            per distinct parsed answer, weighted by `reliability.answer_weights`.
        rule, value: the filter's threshold.
        temperature: of the weights.
        unparsed: what an answer that could not be parsed means, see `ual.methods.reliability`. It is never
            trained on; a question whose majority it is gives no row.
        every_answer: the authors' arms instead, for comparison: one row per parsed answer, repetitions
            included, with weight 1 or, under "reweight", that of its value. Arms then differ in size and in
            the scale of their loss.

    Returns:
        The rows in the order of the questions, and their summary. The completion of a row that stands for
        several equal answers is the text of the first.

    Raises:
        UserError: see `read` and `ual.methods.reliability`; also if no question is left.
    """
    if method not in get_args(Method):
        raise UserError(f"unknown method {method!r}; {nearest(method, get_args(Method))}")
    questions = read(path)
    labels = [reliability.majority(question.values) for question in questions]
    entropies = [
        math.nan if label is None else reliability.entropy(question.values, unparsed=unparsed)
        for question, label in zip(questions, labels, strict=True)
    ]
    kept = [not math.isnan(entropy) for entropy in entropies]
    if method == "filter":
        kept = [bool(keep) for keep in reliability.keep(entropies, rule, value)]

    rows: list[dict[str, Any]] = []
    trained: list[tuple[Candidate, float]] = []
    for question, label, entropy, keep in zip(questions, labels, entropies, kept, strict=True):
        chosen = _choose(question, label, method, temperature, every_answer) if keep else []
        for k, (candidate, weight) in enumerate(chosen, start=1):
            prompt, completion = _prompt_completion(candidate)
            rows.append(
                {
                    "id": question.id if len(chosen) == 1 else f"{question.id}#{k}",
                    "prompt": prompt,
                    "completion": completion,
                    "uncertainty": entropy,
                    "sample_weight": weight,
                    "source": candidate.answer.source,
                }
            )
        trained += chosen
    summary = _summarize(questions, labels, entropies, kept, trained)
    if not rows:
        raise UserError(
            f"no question is left: of {summary.questions}, {summary.unlabelled} have no usable majority and "
            f"{summary.uncertain} are above the threshold",
            place=str(path),
            remedy='raise the threshold, or set unparsed to "class"',
        )
    return rows, summary


def write(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as JSONL; the file is whole or, where that fails, what it was before.

    Raises:
        UserError: the folder is missing, the disk is full, or the like.
    """
    path = Path(path)
    try:
        # A lone surrogate, which JSON may hold but UTF-8 may not, is escaped, and so reads back as it was.
        with aside(path) as scratch, scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write the rows: {error.strerror}", place=str(path)) from error


def _choose(
    question: Question, label: str | None, method: Method, temperature: float, every_answer: bool
) -> list[tuple[Candidate, float]]:
    """Return the candidates to train on, each with its weight."""
    weights: dict[str | None, float]
    if method == "reweight":
        weights = reliability.answer_weights(question.values, temperature)
    else:
        weights = dict.fromkeys(question.values if every_answer else [label], 1.0)
    weights.pop(None, None)
    if every_answer:
        return [(c, weights[c.answer.value]) for c in question.candidates if c.answer.value in weights]
    total = sum(weights.values())
    return [(question.first(value), weight / total) for value, weight in weights.items()]


def _prompt_completion(
    candidate: Candidate,
) -> tuple[str, str] | tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return plain strings for a lone user turn, lists of messages for any other conversation."""
    match candidate.prompt:
        case [Message(role="user", content=content)]:
            return content, candidate.answer.text
        case messages:
            response = Message("assistant", candidate.answer.text)
            return [message.as_dict() for message in messages], [response.as_dict()]


_Verdict = tuple[Question, str | None, float, bool]


def _summarize(
    questions: Sequence[Question],
    labels: Sequence[str | None],
    entropies: Sequence[float],
    kept: Sequence[bool],
    trained: Sequence[tuple[Candidate, float]],
) -> Summary:
    verdicts: list[_Verdict] = list(zip(questions, labels, entropies, kept, strict=True))
    labelled = [verdict for verdict in verdicts if not math.isnan(verdict[2])]
    by_level: dict[int, list[_Verdict]] = defaultdict(list)
    for level, verdict in zip(reliability.levels([v[2] for v in labelled]), labelled, strict=True):
        by_level[int(level)].append(verdict)
    sizes = [len(question.candidates) for question in questions]
    subjects = Counter((question.subject, keep) for question, _, _, keep in verdicts if question.subject)
    judged = [(candidate.correct, weight) for candidate, weight in trained if candidate.correct is not None]
    return Summary(
        questions=len(questions),
        answers=sum(sizes),
        unparsed=sum(question.values.count(None) for question in questions),
        answers_per_question=(min(sizes), max(sizes)),
        unlabelled=len(questions) - len(labelled),
        uncertain=len(labelled) - sum(kept),
        rows=len(trained),
        row_accuracy=sum(c * w for c, w in judged) / sum(w for _, w in judged) if judged else None,
        kept=_group([verdict for verdict in verdicts if verdict[3]]),
        dropped=_group([verdict for verdict in verdicts if not verdict[3]]),
        levels=tuple(
            Level(
                low=min(entropy for _, _, entropy, _ in members),
                high=max(entropy for _, _, entropy, _ in members),
                kept=sum(keep for _, _, _, keep in members),
                group=_group(members),
            )
            for _, members in sorted(by_level.items())
        ),
        subjects={
            name: (subjects[name, True], subjects[name, False]) for name in sorted({s for s, _ in subjects})
        },
    )


def _group(members: Sequence[_Verdict]) -> Group:
    candidates = [candidate for question, *_ in members for candidate in question.candidates]
    return Group(
        questions=len(members),
        entropy=_mean(entropy for _, _, entropy, _ in members if not math.isnan(entropy)),
        answer_accuracy=_mean(_mean(c.correct for c in question.candidates) for question, *_ in members),
        label_accuracy=_mean(
            question.first(label).correct for question, label, *_ in members if label is not None
        ),
        prompt_length=_mean(sum(len(message.content) for message in c.prompt) for c in candidates),
        response_length=_mean(len(c.answer.text) for c in candidates),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

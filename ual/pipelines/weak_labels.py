"""Weighted training samples from several answers per question: the first half of weak-to-strong alignment.

`process` reads a file of answers (see `ual.data.questions`) and returns samples in prompt-completion form,
which `ual train` reads:

    {"id", "prompt", "completion", "uncertainty", "sample_weight", "source"}

`uncertainty` is the entropy of the question's answers in nats. With every method, the weights of a question
sum to 1, so that arms differ in their labels and not in the scale of their loss.
"""

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
from ual.files import write_jsonl, writing
from ual.methods import reliability
from ual.records import Message

__all__ = ["Group", "Level", "Summary", "process", "write"]

Method = Literal["filter", "reweight", "majority"]


@dataclass(frozen=True, slots=True)
class Group:
    """Means over a group of questions. None: the group is empty, or has no gold answers.

    `answer_accuracy` is the mean share of right answers, which says how easy the questions are.
    `label_accuracy` is the accuracy of the majority's answers. Lengths are in characters.
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
    """What was read, what was dropped and why, and how dropped questions differ from kept questions.

    Filters on consistency drop hard questions, so compare `kept` with `dropped`, and see `subjects`, which
    counts (kept, dropped) questions. `levels` is the histogram of entropy, with accuracies. `unlabeled`
    questions have no majority to train on, or an unparsed answer under "drop_question". `uncertain` questions
    are filtered out. `sample_accuracy` is the share of the samples' weight on right answers; None if no gold
    answer is known.
    """

    questions: int
    answers: int
    unparsed: int
    answers_per_question: tuple[int, int]
    unlabeled: int
    uncertain: int
    samples: int
    sample_accuracy: float | None
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
    """Turn a file of answers into training samples.

    Args:
        path: see the module.
        method: "majority" makes one sample of each question, labeled with its most frequent answer. "filter"
            selects from these samples with `reliability.keep`. "reweight" makes one sample of each distinct
            parsed answer, weighted by `reliability.answer_weights`.
        rule, value: the filter's threshold.
        temperature: of the weights.
        unparsed: the meaning of an answer that could not be parsed, see `ual.methods.reliability`. Such an
            answer is never trained on. If it is the majority, the question makes no sample.
        every_answer: the arms of the paper's authors, for comparison: one sample per parsed answer, with
            repetitions. Its weight is 1 or, under "reweight", the weight of its value. The arms differ in
            size and in the scale of their loss.

    Returns:
        The samples in the order of the questions, and their summary. The completion for several equal answers
        is the text of the first.

    Raises:
        UserError: as `read` and `ual.methods.reliability`, or no question is left.
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

    samples: list[dict[str, Any]] = []
    trained: list[tuple[Candidate, float]] = []
    for question, label, entropy, keep in zip(questions, labels, entropies, kept, strict=True):
        chosen = _choose(question, label, method, temperature, every_answer) if keep else []
        for k, (candidate, weight) in enumerate(chosen, start=1):
            prompt, completion = _prompt_completion(candidate)
            samples.append(
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
    if not samples:
        raise UserError(
            f"no question is left: of {summary.questions}, {summary.unlabeled} have no usable majority and "
            f"{summary.uncertain} are above the threshold",
            place=str(path),
            remedy='raise the threshold, or set unparsed to "class"',
        )
    return samples, summary


def write(samples: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write samples as JSONL. After an error, the file is what it was before.

    Raises:
        UserError: the file cannot be written.
    """
    with writing("the samples", Path(path)):
        write_jsonl(Path(path), samples)


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
    labeled = [verdict for verdict in verdicts if not math.isnan(verdict[2])]
    by_level: dict[int, list[_Verdict]] = defaultdict(list)
    for level, verdict in zip(reliability.levels([v[2] for v in labeled]), labeled, strict=True):
        by_level[int(level)].append(verdict)
    sizes = [len(question.candidates) for question in questions]
    subjects = Counter((question.subject, keep) for question, _, _, keep in verdicts if question.subject)
    judged = [(candidate.correct, weight) for candidate, weight in trained if candidate.correct is not None]
    return Summary(
        questions=len(questions),
        answers=sum(sizes),
        unparsed=sum(question.values.count(None) for question in questions),
        answers_per_question=(min(sizes), max(sizes)),
        unlabeled=len(questions) - len(labeled),
        uncertain=len(labeled) - sum(kept),
        samples=len(trained),
        sample_accuracy=sum(c * w for c, w in judged) / sum(w for _, w in judged) if judged else None,
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

"""Several answers per question in, weighted training rows out: the first half of weak-to-strong alignment.

`process` reads ANSWERS.jsonl (or .jsonl.gz) in either form, and groups answers by their question's id, never
by position:

    one question per line   {"id"?, "question" | "prompt" | "messages", "answers" | "samples": [...], "gold"?,
    "source"?,
                            "subject"?}, each answer a string, a number, null (it could not be parsed) or
                            {"value" | "answer" | "text", "source"?, "correct"?}: the value is what is
                            compared, the text what is trained on
    one answer per line     "question_id", the other fields of a question and those of one answer; rewordings
    of a
                            question share its id, and each answer is trained on with the wording it answered

and returns rows in prompt-completion form, which `ual train` reads:

    {"id", "prompt", "completion", "uncertainty", "sample_weight", "source"}

where `uncertainty` is the entropy of the question's answers in nats. The weights of a question sum to 1
whatever the method, so that arms differ in their labels, not in the scale of their loss.
"""

import gzip
import json
import math
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from pathlib import Path
from statistics import fmean
from typing import IO, Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ual import reliability
from ual.config import nearest
from ual.errors import UserError
from ual.files import aside
from ual.records import Answer, Message, Role

__all__ = ["Candidate", "Group", "Level", "Question", "Summary", "normalise", "process", "read", "write"]

Method = Literal["filter", "reweight", "majority"]

_NUMBER = re.compile(r"([+-]?)[$€£]?(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?(e[+-]?\d{1,3})?")
_TWELVE_DIGITS = Context(prec=12)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer, the wording of the question that it answers, and whether it is right, if known."""

    answer: Answer
    prompt: tuple[Message, ...]
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Question:
    """A question with at least two candidates."""

    id: str
    candidates: tuple[Candidate, ...]
    subject: str
    place: str

    @property
    def values(self) -> list[str | None]:
        """The normalised answers, None where unparsed."""
        return [candidate.answer.value for candidate in self.candidates]

    def first(self, value: str | None) -> Candidate:
        """Return the first candidate that answers `value`."""
        return next(candidate for candidate in self.candidates if candidate.answer.value == value)


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


def normalise(value: str | float | None) -> str | None:
    """Write a value such that equal answers are equal strings; None where there is nothing to compare.

    Numbers lose thousands separators, a currency sign and trailing zeros, and fractions are rounded to 12
    significant digits, so that 3.9999999999999996 is 4. Texts lose case, repeated white space and a final
    full stop.

    >>> normalise(18.0), normalise("$1,800.00"), normalise(" New  York. "), normalise(float("nan"))
    ('18', '1800', 'new york', None)
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    text = " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split())
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or (number[3] or "").strip(".")):
        return text.rstrip(". ") or None
    sign, whole, fraction, exponent = (part or "" for part in number.groups())
    decimal = Decimal(sign + whole.replace(",", "") + fraction + exponent)
    if decimal != decimal.to_integral_value():
        decimal = _TWELVE_DIGITS.plus(decimal)
    digits = f"{abs(decimal) if decimal.is_zero() else decimal:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def read(path: str | Path) -> list[Question]:
    """Read the questions of a file in either form, in order of first appearance.

    Raises:
        UserError: the file cannot be read, a line is not valid, an id is used twice, or a question has fewer
            than two answers; it names the file, the line and the field.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    open_ids: set[str] = set()
    for number, record in _records(path):
        question, single = _question(record, number, f"{path}, line {number}")
        earlier = questions.get(question.id)
        if earlier is None:
            questions[question.id] = question
            if single:
                open_ids.add(question.id)
        elif single and question.id in open_ids:
            questions[question.id] = replace(earlier, candidates=earlier.candidates + question.candidates)
        else:
            raise UserError(f"{question.id!r} is already the id of {earlier.place}", place=question.place)
    if not questions:
        raise UserError("there is no question in the file", place=str(path))
    for question in questions.values():
        if (count := len(question.candidates)) < 2:
            raise UserError(
                f"question {question.id!r} has {count} answer{'s' * (count != 1)}; wanted at least two",
                place=question.place,
                remedy="ask again, in another wording or at a temperature above 0, or remove the question",
            )
    return list(questions.values())


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
            those of them that `ual.reliability.keep` keeps; "reweight" gives the questions of "majority" one
            row per distinct parsed answer, weighted by `ual.reliability.answer_weights`.
        rule, value: the filter's threshold.
        temperature: of the weights.
        unparsed: what an answer that could not be parsed means, see `ual.reliability`. It is never trained
            on; a question whose majority it is gives no row.
        every_answer: the authors' arms instead, for comparison: one row per parsed answer, repetitions
            included, with weight 1 or, under "reweight", that of its value. Arms then differ in size and in
            the scale of their loss.

    Returns:
        The rows in the order of the questions, and their summary. The completion of a row that stands for
        several equal answers is the text of the first.

    Raises:
        UserError: see `read` and `ual.reliability`; also if no question is left.
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
    summary = _summarise(questions, labels, entropies, kept, trained)
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
) -> tuple[str, str] | tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return plain strings for a lone user turn, lists of messages for any other conversation."""
    match candidate.prompt:
        case [Message(role="user", content=content)]:
            return content, candidate.answer.text
        case messages:
            prompt = [{"role": str(message.role), "content": message.content} for message in messages]
            return prompt, [{"role": "assistant", "content": candidate.answer.text}]


_Verdict = tuple[Question, str | None, float, bool]


def _summarise(
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


def _identifier(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError("wanted a non-empty string or an integer")
    return str(value)


def _scalar(value: object) -> object:
    if not isinstance(value, str | int | float | None):
        raise ValueError("wanted a string, a number or null")
    return value


def _messages(value: object) -> object:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("wanted a non-empty string or list of messages")
    if isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        raise ValueError("wanted messages that end before the assistant's answer")
    return value


_Scalar = Annotated[Any, BeforeValidator(_scalar)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True)


class _MessageFields(_Fields):
    role: Role
    content: str


class _AnswerFields(_Fields):
    value: _Scalar = None
    answer: _Scalar = None
    text: str | None = None
    source: str | None = None
    correct: bool | None = None

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if not {"value", "answer", "text"} & self.model_fields_set:
            raise ValueError('wanted an answer: one of "value", "answer" and "text"')
        return self

    @property
    def raw(self) -> str | float | None:
        """The value before it is normalised."""
        name = next(name for name in ("value", "answer", "text") if name in self.model_fields_set)
        return cast("str | float | None", getattr(self, name))

    @property
    def written(self) -> str:
        """What to train on: the text, or the answer as it was written."""
        texts = [t for t in (self.text, self.answer, self.value) if isinstance(t, str) and t.strip()]
        return texts[0] if texts else normalise(self.raw) or ""


def _as_fields(answer: object) -> object:
    return answer if isinstance(answer, dict) else {"value": answer}


class _QuestionFields(_Fields):
    id: Annotated[str, BeforeValidator(_identifier)] = Field(
        "", validation_alias=AliasChoices("question_id", "id")
    )
    prompt: Annotated[list[_MessageFields], BeforeValidator(_messages)] = Field(
        validation_alias=AliasChoices("messages", "prompt", "question")
    )
    answers: list[Annotated[_AnswerFields, BeforeValidator(_as_fields)]] | None = Field(
        None, validation_alias=AliasChoices("answers", "samples")
    )
    gold: _Scalar = None
    source: str | None = None
    subject: str | None = None


def _question(record: Mapping[str, Any], number: int, place: str) -> tuple[Question, bool]:
    """Return the question of one line, and whether the line is one answer of possibly several."""
    single = not {"answers", "samples"} & record.keys()
    if single and "question_id" not in record:
        raise UserError(
            f"neither a question nor an answer; its fields are: {', '.join(record)}",
            place=place,
            remedy='a question has "answers" or "samples", a single answer has "question_id"',
        )
    try:
        fields = _QuestionFields.model_validate(record)
        answers = [_AnswerFields.model_validate(record)] if single else fields.answers or []
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        got = json.dumps(first["input"], ensure_ascii=False)
        got = got if len(got) <= 80 else f"{got[:77]}..."
        raise UserError(
            problem + ("" if first["type"] == "missing" else f", got {got}"),
            place=f'{place}, field "{field}"' if field else place,
        ) from error
    id = fields.id or f"line-{number}"
    prompt = tuple(Message(message.role, message.content) for message in fields.prompt)
    gold = normalise(fields.gold)
    candidates = []
    for given in answers:
        answer = Answer(id, given.written, normalise(given.raw), given.source or fields.source or "")
        correct = given.correct if given.correct is not None or gold is None else answer.value == gold
        candidates.append(Candidate(answer, prompt, correct))
    return Question(id, tuple(candidates), fields.subject or "", place), single


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the objects of a JSONL file, gzipped or not, with their line numbers."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"not valid JSON: {error}", place=f"{path}, line {number}") from error
                if not isinstance(record, dict):
                    raise UserError(
                        f"wanted an object {{...}}, got {type(record).__name__}",
                        place=f"{path}, line {number}",
                    )
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot read the answers: {reason}", place=str(path)) from error

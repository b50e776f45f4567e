"""Several answers per question, read from JSONL in either of two forms.

Answers are grouped by their question's id, never by position:

    one question per line   {"id"?, "question" | "prompt" | "messages", "answers" | "samples": [...], "gold"?,
                            "source"?, "subject"?}, each answer a string, a number, null (it could not be
                            parsed) or {"value" | "answer" | "text", "source"?, "correct"?}: the value is what
                            is compared, the text what is trained on
    one answer per line     "question_id", the other fields of a question and those of one answer; rewordings
                            of a question share its id, and each answer is trained on with the wording it
                            answered
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, Self, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ual.errors import UserError
from ual.methods.answers import normalize
from ual.records import Answer, Message, Role


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
        """The normalized answers, None where unparsed."""
        return [candidate.answer.value for candidate in self.candidates]

    def first(self, value: str | None) -> Candidate:
        """Return the first candidate that answers `value`."""
        return next(candidate for candidate in self.candidates if candidate.answer.value == value)


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
        """The value before it is normalized."""
        name = next(name for name in ("value", "answer", "text") if name in self.model_fields_set)
        return cast("str | float | None", getattr(self, name))

    @property
    def written(self) -> str:
        """What to train on: the text, or the answer as it was written."""
        texts = [t for t in (self.text, self.answer, self.value) if isinstance(t, str) and t.strip()]
        return texts[0] if texts else normalize(self.raw) or ""


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
    gold = normalize(fields.gold)
    candidates = []
    for given in answers:
        answer = Answer(id, given.written, normalize(given.raw), given.source or fields.source or "")
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

"""Several answers per question, read from JSONL in one of two forms.

Answers are grouped by their question's id, never by their position:

    one question per line   {"id"?, "question" | "prompt" | "messages", "answers" | "samples": [...], "gold"?,
                            "source"?, "subject"?}. An answer is a string, a number, null (not parsed) or
                            {"value" | "answer" | "text", "source"?, "correct"?}. Values are compared, texts
                            are trained on.
    one answer per line     "question_id", the other fields of a question, and those of one answer.
                            Paraphrases of a question share its id, and an answer is trained on with the
                            wording that it answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ual.data.schema import AnswerRecord, FieldError, QuestionRecord, check, turns
from ual.errors import UserError
from ual.files import read_jsonl
from ual.methods.answers import normalize
from ual.records import Answer, Message

_PROMPTS = ("messages", "prompt", "question")  # the first that a record has is read
_VALUES = ("value", "answer", "text")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer, the wording of the question that it answers, and whether it is right (None: unknown)."""

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
        """The normalized answers; None is an answer that was not parsed."""
        return [candidate.answer.value for candidate in self.candidates]

    def first(self, value: str | None) -> Candidate:
        """Return the first candidate that answers `value`."""
        return next(candidate for candidate in self.candidates if candidate.answer.value == value)


def read(path: str | Path) -> list[Question]:
    """Return the questions of a file in either form, in order of first appearance.

    Raises:
        UserError: the file cannot be read, a line is invalid, an id is used twice, or a question has fewer
            than two answers. The error names the file, the line and the field.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    open_ids: set[str] = set()
    for number, record in read_jsonl(path):
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
        raise UserError("the file has no questions", place=str(path))
    for question in questions.values():
        if (count := len(question.candidates)) < 2:
            raise UserError(
                f"expected at least two answers to question {question.id!r}, got {count}",
                place=question.place,
                remedy="ask again with a paraphrase or at a temperature above 0, or remove the question",
            )
    return list(questions.values())


def _question(record: Mapping[str, Any], number: int, place: str) -> tuple[Question, bool]:
    """Return the question of one line, and whether the line holds a single answer."""
    single = not {"answers", "samples"} & record.keys()
    if single and "question_id" not in record:
        raise UserError(
            f"expected a question or an answer, got the fields {', '.join(record)}",
            place=place,
            remedy='a question has "answers" or "samples", a single answer has "question_id"',
        )
    try:
        question = check(QuestionRecord, record)
        answers = [check(AnswerRecord, record)] if single else question.answers
        field = next((key for key in _PROMPTS if record.get(key) is not None), _PROMPTS[0])
        prompt = tuple(turns(record.get(field), field, "user"))
        if prompt[-1].role == "assistant":
            raise FieldError(field, "expected messages that end before the assistant's answer")
    except FieldError as fault:
        place = f'{place}, field "{fault.field}"' if fault.field else place
        raise UserError(fault.problem, place=place) from fault
    id = question.id or f"line-{number}"
    gold = normalize(question.gold)
    candidates = []
    for given in answers:
        raw = next(getattr(given, name) for name in _VALUES if name in given.model_fields_set)
        texts = [t for t in (given.text, given.answer, given.value) if isinstance(t, str) and t.strip()]
        value = normalize(raw)
        written = texts[0] if texts else value or ""
        answer = Answer(id, written, value, given.source or question.source or "")
        correct = given.correct if given.correct is not None or gold is None else value == gold
        candidates.append(Candidate(answer, prompt, correct))
    return Question(id, tuple(candidates), question.subject or "", place), single

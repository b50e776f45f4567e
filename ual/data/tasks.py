"""Questions with known answers, read from public files as they are published.

A task is a few lines of YAML on top of `data.columns`: columns of the file, or templates over them.

    kind: choice                          # options with letters
    question: ctx
    options: endings                      # a column that holds a list, or a list of columns
    gold: label
    gold_is: index                        # or letter, or text

    kind: words                           # the answer is one of a few words
    question: passage
    words: ["yes", "no"]
    gold: label

    kind: number                          # the answer is a number at the end of a worked solution
    question: question
    gold: "{{ answer.split('####')[1] }}"
    solution: answer

A question is posed in several wordings, for the same answer: options or words in another order, or the
question paraphrased. Each wording says which reply means which option.
"""

import fnmatch
import importlib.resources
import json
import math
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import factorial
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from ual.config.base import Section, explain, nearest
from ual.config.run import COLUMNS
from ual.data.columns import template
from ual.data.load import expand, stream
from ual.data.schema import show
from ual.errors import UserError
from ual.methods.answers import normalize

_FILES = importlib.resources.files("ual.data") / "task_files"
SHIPPED = tuple(sorted(file.name.removesuffix(".yaml") for file in _FILES.iterdir()))
"""Names of the shipped tasks."""
_OWN = ("id", "gold", "solution", "subject", "human")  # columns that a task may name
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_PROMPTS = {
    "choice": "{{ question }}\n\n{% for o in options %}{{ o.letter }}. {{ o.text }}\n{% endfor %}\n"
    "Answer with the letter of the right option.",
    "words": "{{ question }}\n\nAnswer with {{ options | map(attribute='text') | join(' or ') }}.",
    "number": "{{ question }}",
}
_REPLIES = {"choice": "{{ letter }}", "words": "{{ option }}"}


class Task(Section):
    """How the records of a file become questions. Columns may be templates, see `ual.data.columns`."""

    kind: Literal["choice", "words", "number"]
    question: str
    gold: str | None = Field(None, description="the right answer; null: unknown")
    gold_is: Literal["index", "letter", "text"] = Field(
        "text", description="index: from 0. letter: A is the first option, and so is 1"
    )
    options: str | list[str] | None = Field(
        None, description="of a choice: the column of a list, or a column for each option"
    )
    words: Annotated[list[str], Field(min_length=2)] | None = Field(
        None, description="the possible answers; YAML needs quotes around yes and no"
    )
    human: str | None = Field(
        None, description="shares or counts of human answers: a list in the order of options, or a mapping"
    )
    solution: str | None = Field(None, description="of a number: what a model is trained to write")
    subject: str | None = None
    id: str | None = Field(None, description="null: a hash of the question")
    shuffle: bool = Field(False, description="the first option of the file is always the right one")
    members: str = Field("*", description="the files of an archive that are read, as a pattern")
    prompt: str | None = Field(
        None, description="a template over question and options (letter, text); null: that of the kind"
    )
    reply: str | None = Field(
        None, description="a template over letter and option; null: the letter of a choice, or the word"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"choice": "options", "words": "words", "number": "solution"}
        for kind, name in needed.items():
            given = getattr(self, name) is not None
            if kind == self.kind and not given:
                raise ValueError(f'kind "{kind}" needs "{name}"')
            if given and kind != self.kind:
                raise ValueError(f'"{name}" belongs to kind "{kind}", and the kind is "{self.kind}"')
        if self.kind == "number" and (self.gold_is != "text" or self.shuffle or self.reply):
            raise ValueError("gold_is, shuffle and reply are for choices and words")
        if self.kind == "number" and self.human is not None:
            raise ValueError("human is for choices and words")
        if self.words is not None and len({*self.words}) < len(self.words):
            raise ValueError(f"words must be distinct, got {self.words}")
        for name in ("prompt", "reply"):
            if (text := getattr(self, name)) is not None:
                template(text, f"task, {name}")
        return self


@dataclass(frozen=True, slots=True)
class Item:
    """A question, its options (none for a number), and the right answer: an option, or a normalized number.

    `solution` is what a model is trained to write for a number, "" for other kinds. `human` has the share of
    people who gave each option, if the file says so.
    """

    id: str
    question: str
    options: tuple[str, ...]
    gold: str | None
    solution: str
    subject: str
    place: str
    human: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """A question as it is posed, and the option that each reply means; no replies for a number."""

    prompt: str
    replies: Mapping[str, str]

    def reply(self, option: str) -> str:
        """Return the reply that means an option; the first one, if several options have the same text."""
        return {meant: reply for reply, meant in reversed(list(self.replies.items()))}[option]


def load_task(name: str) -> Task:
    """Return a shipped task, or that of a YAML file.

    Raises:
        UserError: there is no such task or file, or it is not valid.
    """
    path = Path(name).expanduser()
    if name in SHIPPED:
        text = (_FILES / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the task: {error}", place=name) from error
    else:
        raise UserError(
            f"no shipped task is named {name!r}; {nearest(name, SHIPPED)}",
            remedy="name a shipped task, or a file that ends in .yaml",
        )
    try:
        raw = yaml.safe_load(text)
        if not isinstance(raw, dict):
            raise UserError("a task is a mapping of keys", place=name, remedy="see `ual.data.tasks`")
        return Task.model_validate(raw)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", place=name) from error
    except ValidationError as error:
        raise UserError(
            "\n  ".join(explain(fault, Task) for fault in error.errors()),
            place=name,
            remedy="`ual.data.tasks.Task` describes every key",
        ) from error


def read(task: Task, path_or_name: str | Sequence[str], *, split: str = "train") -> list[Item]:
    """Return the questions of files, in order.

    Args:
        task: says what is in the columns.
        path_or_name: as `ual.data.load`; also ``.tar``, ``.tar.gz`` and ``.tgz`` archives of such files,
            of which `task.members` are read in the order of their names.
        split: of a hub data set.

    Raises:
        UserError: as `ual.data.load`; or an option or a gold answer is missing or wrong, with its place.
    """
    given = [task.options] if isinstance(task.options, str) else task.options or []
    # no other column of the file is read as a part of a sample
    columns: dict[str, str | None] = dict.fromkeys(COLUMNS)
    columns |= {"prompt": task.question} | {name: getattr(task, name) for name in _OWN}
    columns |= {f"option {i}": column for i, column in enumerate(given)}
    items = []
    with _unpacked(expand(path_or_name), task.members) as (names, shown):
        try:
            for row, sample in stream(names, columns=columns, split=split, unanswered=True):
                place = shown(sample.place)
                values = [row[f"option {i}"] for i in range(len(given))]
                options = _options(task, values, place)
                order = list(range(len(options)))
                if task.shuffle:
                    random.Random(sample.id).shuffle(order)  # noqa: S311
                items.append(
                    Item(
                        id=sample.id,
                        question=sample.prompt[-1].content.strip(),
                        options=tuple(options[i] for i in order),
                        gold=_gold(task, row["gold"], options, place),
                        solution=_text(row, "solution"),
                        subject=_text(row, "subject"),
                        place=place,
                        human=_human(row.get("human"), options, place),
                    )
                )
        except UserError as error:
            # in the words of a task: it has no `data` section, and its question is the prompt of a sample
            place = shown(error.place).replace('field "prompt"', 'field "question"')
            remedy = error.remedy.replace('set data.invalid to "drop"', "correct the task")
            if error.problem.startswith("no columns to make"):  # the first prompt is null
                problem = f"the question is null: {show(task.question)}"
                raise UserError(problem, place=place, remedy="correct the file or the task") from error
            raise UserError(error.problem, place=place, remedy=remedy) from error
    return items


def wordings(task: Task, item: Item, times: int, *, seed: int = 0) -> list[Wording]:
    """Return several wordings of a question: its options or words in orders that all differ.

    The first order is the item's own. The others are drawn by the seed and the item's id.

    Raises:
        UserError: there are fewer orders than `times`, or the question has no options.
    """
    count = len(item.options)
    possible = factorial(count) if count else 0
    if times > possible:
        raise UserError(
            f"{count} options have {possible} orders, and {times} wordings were asked for",
            place=item.place,
            remedy="ask fewer times, or ask by paraphrases or at a temperature above 0",
        )
    draw = random.Random(f"{seed} {item.id}")  # noqa: S311
    orders = {tuple(range(count)): None}
    while len(orders) < times:
        orders[tuple(draw.sample(range(count), count))] = None
    return [pose(task, item, order) for order in orders]


def pose(
    task: Task, item: Item, order: Sequence[int] | None = None, *, question: str | None = None
) -> Wording:
    """Return a wording of a question.

    Args:
        task: has the templates of prompt and reply.
        item: the question.
        order: of the options; None is the item's own.
        question: a paraphrase; None is the item's own question.
    """
    texts = [item.options[i] for i in (range(len(item.options)) if order is None else order)]
    options = [{"letter": ascii_uppercase[i], "text": text} for i, text in enumerate(texts)]
    prompt = template(task.prompt or _PROMPTS[task.kind], "task, prompt")
    if task.kind == "number":
        return Wording(prompt({"question": question or item.question, "options": []}), {})
    reply = template(task.reply or _REPLIES[task.kind], "task, reply")
    replies: dict[str, str] = {}
    for option in options:
        replies.setdefault(reply({"letter": option["letter"], "option": option["text"]}), option["text"])
    return Wording(prompt({"question": question or item.question, "options": options}), replies)


def _text(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else str(row[column]).strip()


def _options(task: Task, values: Sequence[Any], place: str) -> list[str]:
    if task.words is not None:
        return list(task.words)
    if task.kind == "number":
        return []
    if isinstance(task.options, str):
        [found] = values
        if isinstance(found, str) and found.lstrip().startswith("["):
            try:
                found = json.loads(found)
            except ValueError as error:
                raise UserError(f"options: invalid JSON: {error}", place=place) from error
        if not isinstance(found, list | tuple):
            raise UserError(
                f"options: expected a list of texts, got {show(found)}",
                place=place,
                remedy="name a column that holds a list, or a list of columns",
            )
        values = found
    texts = ["" if value is None else str(value).strip() for value in values]
    if len(texts) < 2 or not all(texts):
        raise UserError(f"options: expected at least two texts that are not blank, got {texts}", place=place)
    if len(texts) > len(ascii_uppercase):
        raise UserError(f"options: expected at most 26, got {len(texts)}", place=place)
    return texts


def _gold(task: Task, value: Any, options: Sequence[str], place: str) -> str | None:
    """Return the right answer, or None if the file does not say."""
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if task.kind == "number":
        return normalize(text)
    index = -1
    if task.gold_is == "text":
        index = list(options).index(text) if text in options else -1
    elif text.isdecimal():
        index = int(text) - (task.gold_is == "letter")
    elif task.gold_is == "letter" and len(text) == 1:
        index = ascii_uppercase.find(text.upper())
    if not 0 <= index < len(options):
        raise UserError(
            f"gold: expected the {task.gold_is} of one of {len(options)} options, got {show(value)}",
            place=place,
            remedy='set gold_is to "index", "letter" or "text", or correct the file',
        )
    return options[index]


def _human(value: Any, options: Sequence[str], place: str) -> dict[str, float] | None:
    """Return the share of people who gave each option, or None if the file does not say."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"human: invalid JSON: {error}", place=place) from error
    counts = value
    if isinstance(value, list | tuple) and len(value) == len(options):
        counts = dict(zip(options, value, strict=True))
    if not isinstance(counts, Mapping) or not counts.keys() <= {*options}:
        raise UserError(
            f"human: expected {len(options)} shares in the order of the options, or a mapping of options to "
            f"shares, got {show(value)}",
            place=place,
            remedy=f"the options are {', '.join(options)}; a template can rename the keys of a mapping",
        )
    numbers = [counts.get(option, 0) for option in options]
    if (
        not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
        or not 0 < sum(numbers) < math.inf
    ):
        raise UserError(
            f"human: expected numbers of 0 or more, with a positive sum, got {show(value)}", place=place
        )
    shares: dict[str, float] = {}
    for option, n in zip(options, numbers, strict=True):
        shares[option] = shares.get(option, 0.0) + n / sum(numbers)
    return shares


@contextmanager
def _unpacked(names: Sequence[str], members: str) -> Iterator[tuple[list[str], Any]]:
    """Yield the files to read, with archives unpacked, and a function that names them as the user did."""
    with TemporaryDirectory() as folder:
        found: list[str] = []
        archive_of: dict[str, str] = {}
        for number, name in enumerate(names):
            if not name.lower().endswith(_ARCHIVES):
                found.append(name)
                continue
            inside = Path(folder, str(number))
            try:
                with tarfile.open(Path(name).expanduser()) as archive:
                    kept = [
                        member
                        for member in archive
                        if member.isfile() and fnmatch.fnmatch(member.name.removeprefix("./"), members)
                    ]
                    archive.extractall(inside, kept, filter="data")
            except (OSError, tarfile.TarError, EOFError) as error:
                raise UserError(f"cannot read the archive: {error}", place=name) from error
            if not kept:
                raise UserError(f"the archive has no file that matches {members!r}", place=name)
            archive_of[f"{inside}/"] = f"{name}: "
            found += sorted(str(path) for path in inside.rglob("*") if path.is_file())

        def shown(text: str) -> str:
            for inside, archive in archive_of.items():
                text = text.replace(inside, archive)
            return text

        yield found, shown

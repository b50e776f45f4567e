"""A small mixed data set: tasks with one right answer beside prompts with several good ones.

It is the mixed scenario of arXiv 2406.04854 in miniature: low-entropy rows from reasoning-gym and
high-entropy rows from ``open_ended.jsonl``, whose prompts and responses were written for this project.
"""

import importlib.resources
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ual.errors import UserError
from ual.files import aside

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym, its options, and how an assistant words the answer.

    `reply` is filled from the item's metadata and from `answer`.
    """

    generator: str
    reply: str = "{answer}"
    options: Mapping[str, Any] = field(default_factory=dict)


_WEEKDAYS = ["weekday_offset", "weekday_of_date", "weekday_of_date_from_first_date", "is_leap_year"]
# Small enough that a model of 135M parameters gets some of them right.
TASKS = (
    Task("chain_sum", "{expression} = {answer}", {"max_terms": 3, "max_digits": 2}),
    Task("products", "{expression} = {answer}", {"max_digits": 2}),
    Task(
        "simple_equations",
        "The solution of {equation} is {variable} = {answer}.",
        {"max_terms": 2, "max_value": 20},
    ),
    Task("lcm", "The least common multiple of {numbers[0]} and {numbers[1]} is {answer}.", {"max_value": 20}),
    Task(
        "gcd", "The greatest common divisor of {numbers[0]} and {numbers[1]} is {answer}.", {"max_value": 50}
    ),
    Task("prime_factorization", "The prime factorization of {number} is {answer}.", {"max_value": 200}),
    Task(
        "letter_counting",
        'The number of times the letter "{target_letter}" appears in the text is {answer}.',
        {"max_words": 8},
    ),
    Task("spell_backward", 'The word "{word}" spelled backward is "{answer}".', {"max_word_len": 6}),
    Task("word_sorting", options={"max_words": 5}),
    Task("number_filtering", options={"max_numbers": 6, "max_decimals": 0}),
    Task("calendar_arithmetic", options={"tasks": _WEEKDAYS}),
    Task("syllogism"),
)
_HELD_OUT = 5  # one open-ended prompt in so many is for evaluation only


def write(folder: Path, *, train_rows: int = 288, eval_rows: int = 96, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl`` and return their paths.

    Half of either file's rows have the source ``open-ended``, half ``reasoning``. No prompt is in both
    files, and which prompts are held out depends on `seed` alone. A row has `id`, `source` and
    `messages`, and no uncertainty: that is for an estimator to find. Equal arguments give equal bytes.

    Raises:
        UserError: reasoning-gym is not installed, there are not enough open-ended rows, or `folder`
            cannot be written.
    """
    rng = random.Random(seed)  # noqa: S311
    open_eval, open_train = _open_ended(rng)
    reasoning = _reasoning(seed)
    eval_path, train_path = folder / "eval.jsonl", folder / "train.jsonl"
    for path, count, open_rows in ((eval_path, eval_rows, open_eval), (train_path, train_rows, open_train)):
        if not 2 <= count <= 2 * len(open_rows):
            raise UserError(f"{path.stem}_rows must be in [2, {2 * len(open_rows)}], got {count}")
        half = count // 2
        rows = open_rows[:half] + list(itertools.islice(reasoning, count - half))
        rng.shuffle(rows)
        _write(path, rows)
    return train_path, eval_path


def open_ended() -> list[tuple[str, list[str]]]:
    """Return the open-ended prompts, each with its three to five good responses."""
    source = importlib.resources.files("ual.pipelines.quickstart") / "open_ended.jsonl"
    items = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return [(item["prompt"], item["responses"]) for item in items]


def dataset(task: Task, seed: int) -> Any:
    """Return the reasoning-gym data set behind the rows ``{task.generator}-{index}`` of `seed`.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            'the tasks come from the package "reasoning-gym", which is not installed',
            remedy="pip install reasoning-gym",
        ) from error
    # reasoning-gym seeds item i with seed + i, so neighbouring seeds are sent far apart.
    start = random.Random(seed).getrandbits(48)  # noqa: S311
    return reasoning_gym.create_dataset(task.generator, seed=start, size=1_000_000, **task.options)


def _open_ended(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Return the rows of the held-out prompts and of the others, each in random order."""
    prompts = list(enumerate(open_ended()))
    rng.shuffle(prompts)
    sides: tuple[list[Row], list[Row]] = [], []
    for place, (number, (prompt, responses)) in enumerate(prompts):
        for letter, response in zip("abcde", responses, strict=False):
            row = _row(f"open-ended-{number + 1:03d}{letter}", "open-ended", prompt, response)
            sides[place % _HELD_OUT > 0].append(row)
    for rows in sides:
        rng.shuffle(rows)
    return sides


def _reasoning(seed: int) -> Iterator[Row]:
    """Yield rows of all tasks in turn, never the same question twice."""
    datasets = [dataset(task, seed) for task in TASKS]
    seen = set()
    for index in itertools.count():
        for task, items in zip(TASKS, datasets, strict=True):
            item = items[index]
            if item["question"] not in seen:
                seen.add(item["question"])
                reply = task.reply.format(**{**item["metadata"], "answer": item["answer"]})
                yield _row(f"{task.generator}-{index}", "reasoning", item["question"].strip(), reply)


def _row(id: str, source: str, prompt: str, response: str) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"id": id, "source": source, "messages": messages}


def _write(path: Path, rows: list[Row]) -> None:
    """Write the rows as JSONL; the file appears whole or not at all."""
    try:
        with aside(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write the data: {error.strerror}", place=str(path)) from error

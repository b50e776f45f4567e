"""A small mixed data set: tasks with one right answer beside prompts with several good ones.

It is the mixed scenario of arXiv 2406.04854 in miniature: low-entropy samples from reasoning-gym, and
high-entropy samples from ``open_ended.jsonl``, whose prompts and responses were written for this project.
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
from ual.files import write_jsonl, writing

Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym, its options, and a template for the assistant's reply.

    `reply` is filled in from the item's metadata and from `answer`.
    """

    generator: str
    reply: str = "{answer}"
    options: Mapping[str, Any] = field(default_factory=dict)


_WEEKDAYS = ["weekday_offset", "weekday_of_date", "weekday_of_date_from_first_date", "is_leap_year"]
# Small numbers: a model of 135M parameters solves some of these tasks.
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
_HELD_OUT = 5  # one in five open-ended prompts is for evaluation only


def write(folder: Path, *, train_rows: int = 288, eval_rows: int = 96, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl`` and return their paths.

    Half of the samples of each file have the source ``open-ended``, half ``reasoning``. No prompt is in both
    files, and the held-out prompts depend on `seed` alone. A sample has `id`, `source` and `messages`; its
    uncertainty is left to an estimator. Equal arguments give equal bytes.

    Raises:
        UserError: reasoning-gym is not installed, there are not enough open-ended samples, or `folder`
            cannot be written.
    """
    rng = random.Random(seed)  # noqa: S311
    open_eval, open_train = _open_ended(rng)
    reasoning = _reasoning(seed)
    eval_path, train_path = folder / "eval.jsonl", folder / "train.jsonl"
    sides = ((eval_path, eval_rows, open_eval), (train_path, train_rows, open_train))
    for path, count, open_samples in sides:
        if not 2 <= count <= 2 * len(open_samples):
            raise UserError(f"{path.stem}_rows must be in [2, {2 * len(open_samples)}], got {count}")
        half = count // 2
        samples = open_samples[:half] + list(itertools.islice(reasoning, count - half))
        rng.shuffle(samples)
        with writing("the data", path):
            write_jsonl(path, samples)
    return train_path, eval_path


def open_ended() -> list[tuple[str, list[str]]]:
    """Return the open-ended prompts, each with its three to five good responses."""
    source = importlib.resources.files("ual.pipelines.quickstart") / "open_ended.jsonl"
    items = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return [(item["prompt"], item["responses"]) for item in items]


def dataset(task: Task, seed: int) -> Any:
    """Return the reasoning-gym data set whose items are the samples ``{task.generator}-{index}`` of `seed`.

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
    # reasoning-gym seeds item i with seed + i, so consecutive seeds are mapped far apart.
    start = random.Random(seed).getrandbits(48)  # noqa: S311
    return reasoning_gym.create_dataset(task.generator, seed=start, size=1_000_000, **task.options)


def _open_ended(rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of held-out prompts and those of other prompts, both in random order."""
    prompts = list(enumerate(open_ended()))
    rng.shuffle(prompts)
    sides: tuple[list[Sample], list[Sample]] = [], []
    for place, (number, (prompt, responses)) in enumerate(prompts):
        for letter, response in zip("abcde", responses, strict=False):
            sample = _sample(f"open-ended-{number + 1:03d}{letter}", "open-ended", prompt, response)
            sides[place % _HELD_OUT > 0].append(sample)
    for side in sides:
        rng.shuffle(side)
    return sides


def _reasoning(seed: int) -> Iterator[Sample]:
    """Yield samples of all tasks in turn, never the same question twice."""
    datasets = [dataset(task, seed) for task in TASKS]
    seen = set()
    for index in itertools.count():
        for task, items in zip(TASKS, datasets, strict=True):
            item = items[index]
            if item["question"] not in seen:
                seen.add(item["question"])
                reply = task.reply.format(**{**item["metadata"], "answer": item["answer"]})
                yield _sample(f"{task.generator}-{index}", "reasoning", item["question"].strip(), reply)


def _sample(id: str, source: str, prompt: str, response: str) -> Sample:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"id": id, "source": source, "messages": messages}

"""The questions of a study: which ones the supervisor learns, which it answers, and which are tests."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ual.config.weak_to_strong import ARMS, WeakToStrongConfig
from ual.data import Renderer, expand
from ual.data.tasks import Item, Task, pose, read, wordings
from ual.errors import UserError
from ual.evaluate.tasks import Posed
from ual.runs.environment import digest


class Gold(NamedTuple):
    """What an unsupervised question hides: the right answer, and the solution of a worked one."""

    answer: str | None
    solution: str


@dataclass(frozen=True, slots=True)
class Split:
    """The questions of a study.

    `supervised` have their right answers. `unsupervised` have none: those are in `hidden`, by id, for the
    ceiling and for figures. `dropped` counts questions that no arm uses, by the reason.
    """

    supervised: list[Item]
    unsupervised: list[Item]
    test: list[Item]
    hidden: Mapping[str, Gold]
    dropped: Mapping[str, int]

    def ids(self) -> dict[str, Any]:
        """Return the split as JSON data."""
        parts = {"supervised": self.supervised, "unsupervised": self.unsupervised, "test": self.test}
        return {"dropped": dict(self.dropped)} | {
            name: [item.id for item in items] for name, items in parts.items()
        }


def sources(config: WeakToStrongConfig) -> dict[str, Any]:
    """Return the hashes of the data files; names for data sets of the hub."""
    data = config.data
    found = {
        part: {Path(name).name: digest(name) or name for name in expand(files)}
        for part, files in (("train", data.train), ("test", data.test))
    }
    return found | {"splits": [data.train_split, data.test_split]}


def divide(
    config: WeakToStrongConfig,
    task: Task,
    weak: Renderer | None,
    strong: Renderer | None,
    recorded: Mapping[str, Any] | None = None,
) -> Split:
    """Read the questions and divide them at random, as `config.split` says.

    A question that is also a test question, that appears again, or that is too long for a model is dropped.
    If an arm needs options that differ at one token, a question without such options is dropped too. So all
    arms see the same questions, in training and in the test.

    Args:
        config: of the study.
        task: says what is in the files.
        weak, strong: renderers with ``overlong`` and ``undecided`` "drop"; None drops no question for its
            tokens.
        recorded: `Split.ids` of an earlier division of the same files; it is repeated.

    Raises:
        UserError: see `ual.data.tasks.read`; a supervised or a test question has no right answer, or too few
            questions are left.
    """
    dropped = Counter[str](recorded["dropped"] if recorded else ())
    decides = any(ARMS[name].needs_options for name in config.arms)

    def fits(item: Item) -> bool:
        why = _misfit(task, item, weak, strong, decides)
        dropped.update([why] if why else [])
        return not why

    data, split = config.data, config.split
    test, train = read(task, data.test, split=data.test_split), read(task, data.train, split=data.train_split)
    if recorded:
        of_test, of_train = ({item.id: item for item in items} for items in (test, train))
        held_out = [of_test[id] for id in recorded["test"]]
        chosen = [of_train[id] for id in (*recorded["supervised"], *recorded["unsupervised"])]
        count = len(recorded["supervised"])
    else:
        test, train = _distinct(test, dropped), _distinct(train, dropped)
        shared = set(map(_content, test))
        dropped["also a test question"] += sum(_content(item) in shared for item in train)
        train = [item for item in train if _content(item) not in shared]
        chosen = _first(train, split.limit, fits, split.seed)
        held_out = _first(test, split.test_limit, fits, split.seed)
        count = round(split.supervised * len(chosen))
    if min(count, len(chosen) - count) < 2 or len(held_out) < 2:
        raise UserError(
            f"too few questions: {count} supervised, {len(chosen) - count} unsupervised, {len(held_out)} "
            f"test questions, and each part needs two; dropped: {_said(dropped)}",
            place="configuration, data",
            remedy="name larger files, or change split",
        )
    supervised, others = chosen[:count], chosen[count:]
    for item in (*supervised, *held_out):
        if item.gold is None:
            raise UserError(
                "the question has no right answer, and supervised and test questions need one",
                place=item.place,
                remedy="correct the file or the task's `gold`",
            )
    return Split(
        supervised=supervised,
        unsupervised=[replace(item, gold=None, solution="") for item in others],
        test=held_out,
        hidden={item.id: Gold(item.gold, item.solution) for item in others},
        dropped={why: number for why, number in dropped.items() if number},
    )


def posed(
    task: Task,
    items: Sequence[Item],
    times: int,
    *,
    seed: int,
    paraphrases: Mapping[str, Sequence[str]] | None,
) -> list[Posed]:
    """Return every question in several wordings; the first one is its own.

    The key of wording k of a question is its id, ``#`` and k.

    Args:
        task, items: the questions.
        times: wordings of each.
        seed: of the orders of options.
        paraphrases: other wordings by id, at least ``times - 1`` each; None reorders options.
    """
    found = []
    for item in items:
        if paraphrases is None:
            made = wordings(task, item, times, seed=seed)
        else:
            others = paraphrases[item.id][: times - 1]
            made = [pose(task, item), *(pose(task, item, question=text) for text in others)]
        found += [Posed(f"{item.id}#{k}", wording, item.place) for k, wording in enumerate(made)]
    return found


def _distinct(items: Iterable[Item], dropped: Counter[str]) -> list[Item]:
    """Return the questions, each once: public files repeat some."""
    found: dict[tuple[str, ...], Item] = {}
    for item in items:
        if found.setdefault(_content(item), item) is not item:
            dropped["a repetition"] += 1
    return list(found.values())


def _content(item: Item) -> tuple[str, ...]:
    return (item.question, *sorted(item.options))


def _first(items: list[Item], limit: int | None, fits: Callable[[Item], bool], seed: int) -> list[Item]:
    """Return the first questions that fit, in an order drawn by the seed."""
    order = random.Random(seed).sample(range(len(items)), len(items))  # noqa: S311
    found: list[Item] = []
    for i in order:
        if limit is not None and len(found) == limit:
            break
        if fits(items[i]):
            found.append(items[i])
    return found


def _misfit(task: Task, item: Item, weak: Renderer | None, strong: Renderer | None, decides: bool) -> str:
    """Return why a model cannot be trained on a question; "" if it can."""
    wording = pose(task, item)
    question = Posed(item.id, wording, item.place)
    longest = max(wording.replies, key=len) if wording.replies else item.solution or "0"
    if any(renderer and renderer.render(question.sample(longest)) is None for renderer in (weak, strong)):
        return "too long"
    if decides and strong and strong.render(question.sample(longest, options=list(wording.replies))) is None:
        return "options do not differ at one token"
    return ""


def _said(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} ({why})" for why, number in dropped.items() if number) or "none"

"""The questions of a study: which ones the supervisor learns, which it answers, and which are tests."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ual.config.weak_to_strong import ARMS, WeakToStrongConfig
from ual.data import Renderer, expand
from ual.data.tasks import Item, Task, pose, read, wordings
from ual.errors import UserError
from ual.evaluate.tasks import Posed
from ual.methods.answers import normalize
from ual.runs.environment import digest
from ual.uncertainty.estimators.parsing import last_number


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

    def contents(self, part: str) -> list[Any]:
        """Return what models see of the questions of a part, as JSON data."""
        return [[item.id, item.question, item.options, item.subject] for item in getattr(self, part)]

    def ids(self) -> dict[str, Any]:
        """Return the split as JSON data."""
        parts = {"supervised": self.supervised, "unsupervised": self.unsupervised, "test": self.test}
        return {"dropped": dict(self.dropped)} | {
            name: [item.id for item in items] for name, items in parts.items()
        }


def sources(config: WeakToStrongConfig) -> dict[str, Any]:
    """Return the hashes of the data files in their order; names for data sets of the hub."""
    data = config.data
    found = {
        part: [digest(name) or name for name in expand(files)]
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
        why = _misfit(task, item, weak, strong, decides, config.ask.max_tokens)
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
            remedy="name larger files, or change split; if most are too long, raise data.max_length; if "
            "their options do not differ at one token, change the task's reply, or remove the arms "
            "soft_labels and confidence",
        )
    supervised, others = chosen[:count], chosen[count:]
    if config.ask.by == "order":
        fewest = min(others, key=lambda item: len(item.options))
        wordings(task, fewest, config.ask.times)  # raises an error if it has fewer orders
    for solved, items in ((True, supervised), (False, held_out)):
        for item in items:
            _check_gold(task, item, solved=solved)
    if not recorded:
        fitting = [item for item in supervised if not _solution_too_long(task, item, weak, strong)]
        dropped["the solution is too long"] += len(supervised) - len(fitting)
        supervised = fitting
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
        paraphrases: other wordings by id, of which ``times - 1`` are used; None reorders options.
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


def _check_gold(task: Task, item: Item, *, solved: bool) -> None:
    """Refuse a right answer that is missing, or that no reply could have.

    Args:
        task: of the item.
        item: a supervised or a test question.
        solved: whether its solution is trained.
    """
    problem = ""
    if item.gold is None:
        problem = "the question has no right answer, and supervised and test questions need one"
    elif task.kind == "number" and normalize(last_number(f"#### {item.gold}")) != item.gold:
        problem = f"the right answer is not a number that a reply can have, got {item.gold!r}"
    elif task.kind == "number" and solved and normalize(last_number(item.solution)) != item.gold:
        problem = f"the solution does not end with the right answer {item.gold!r}"
    if problem:
        raise UserError(
            problem, place=item.place, remedy="correct the file or the task's `gold` and `solution`"
        )


def _misfit(
    task: Task, item: Item, weak: Renderer | None, strong: Renderer | None, decides: bool, max_tokens: int
) -> str:
    """Return why a model cannot be trained on a question, by what is known without its right answer."""
    wording = pose(task, item)
    question = Posed(item.id, wording, item.place)
    replies = list(wording.replies)
    if task.kind != "number" and len(replies) < 2:
        return "fewer than two different options"
    longest, room = (max(replies, key=len), 0) if replies else ("0", max_tokens)
    for renderer in (weak, strong):
        if renderer is not None:
            rendered = renderer.render(question.sample(longest))
            if rendered is None or len(rendered.input_ids) + room > renderer.max_length:
                return "too long" + f" with ask.max_tokens {max_tokens}" * bool(room)
    if decides and strong is not None and strong.render(question.sample(longest, options=replies)) is None:
        return "options do not differ at one token"
    return ""


def _solution_too_long(task: Task, item: Item, *renderers: Renderer | None) -> bool:
    solved = Posed(item.id, pose(task, item), item.place).sample(item.solution)
    return bool(item.solution) and any(r is not None and r.render(solved) is None for r in renderers)


def _said(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} ({why})" for why, number in dropped.items() if number) or "none"

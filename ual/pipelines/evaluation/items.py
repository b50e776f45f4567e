"""The tasks of an evaluation: what models are asked, what is stored, and what is measured of it.

`Choices` are questions with options, `Numbers` questions with worked answers, and `Texts` samples whose loss
tokens are measured.
"""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ual.config.evaluate import EvaluateConfig, TaskData
from ual.data import Collator, Renderer, load
from ual.data.tasks import Item, Task, Wording, load_task, pose, read
from ual.data.training_set import features
from ual.errors import UserError
from ual.evaluate import options, tokens
from ual.evaluate.tasks import Posed, choose, work_out
from ual.methods.answers import normalize
from ual.methods.statistics import Table
from ual.models.score import TokenScores, score
from ual.pipelines.learner import Learner
from ual.records import Sample
from ual.uncertainty.estimators.parsing import last_number

Record: TypeAlias = dict[str, Any]
Records: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Answers by the ids of items."""

FEWEST_TO_FIT = 10
"""Items that a temperature needs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How items are put to a model: batches whose items are all known are skipped."""

    learner: Learner
    batch_size: int
    known: Collection[str] = ()
    advance: Callable[[int], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Choices:
    """Questions with options, answered by the likelihoods of their options."""

    kind: ClassVar = "options"
    name: str
    task: Task
    items: Sequence[Item]
    fit: frozenset[str]

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]

    @property
    def content(self) -> Any:
        """What models see of the items, as JSON data."""
        return [self.task.model_dump(), [[item.id, item.question, item.options] for item in self.items]]

    def answers(self, asked: Asked) -> Iterator[list[Record]]:
        """Yield records, a batch at a time."""
        posed = [Posed(item.id, pose(self.task, item), item.place) for item in self.items]
        answered = choose(
            asked.learner.model,
            asked.learner.renderer,
            posed,
            batch_size=asked.batch_size,
            known=asked.known,
            advance=asked.advance,
        )
        for batch in answered:
            yield [{"key": a.key, "probabilities": a.probabilities, "mass": a.mass} for a in batch]

    def too_long(self, renderer: Renderer) -> frozenset[str]:
        """Return the ids of items that are beyond a model's context."""
        return frozenset(
            item.id for item in self.items if _length(renderer, self.task, item) > renderer.max_length
        )

    def temperature(self, records: Records) -> float | None:
        """Return the temperature that suits the items of `fit`; None if they are too few."""
        chosen = [item for item in self.items if item.id in self.fit]
        return options.temperature(_predictions(chosen, records)) if len(chosen) >= FEWEST_TO_FIT else None

    def evidence(self, records: Records) -> options.Predictions:
        """Return the answers to the items that are measured."""
        return _predictions([item for item in self.items if item.id not in self.fit], records)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Questions with worked answers, generated greedily; the number at the end is right or wrong."""

    kind: ClassVar = "number"
    name: str
    task: Task
    items: Sequence[Item]
    max_tokens: int
    fit: frozenset[str] = frozenset()

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]

    @property
    def content(self) -> Any:
        """What models see of the items, and how long they answer, as JSON data."""
        items = [[item.id, item.question] for item in self.items]
        return [self.task.model_dump(), self.max_tokens, items]

    def answers(self, asked: Asked) -> Iterator[list[Record]]:
        """Yield records, a batch at a time."""
        answered = work_out(
            asked.learner.model,
            asked.learner.renderer,
            [Posed(item.id, pose(self.task, item), item.place) for item in self.items],
            read=lambda text: normalize(last_number(text)),
            max_tokens=self.max_tokens,
            batch_size=asked.batch_size,
            known=asked.known,
            advance=asked.advance,
        )
        for batch in answered:
            yield [{"key": a.key, "text": a.text, "value": a.value, "finished": a.finished} for a in batch]

    def too_long(self, renderer: Renderer) -> frozenset[str]:
        """Return the ids of items that are beyond a model's context, with the answer."""
        room = renderer.max_length - self.max_tokens
        return frozenset(item.id for item in self.items if _length(renderer, self.task, item) > room)

    def evidence(self, records: Records) -> Mapping[str, NDArray[np.float64]]:
        """Return whether each answer is right, and whether it was finished, [n]."""
        found = [records[item.id] for item in self.items]
        right = [record["value"] == item.gold for record, item in zip(found, self.items, strict=True)]
        finished = [record["finished"] for record in found]
        return {"accuracy": np.array(right, dtype=np.float64), "finished": np.array(finished, np.float64)}


@dataclass(frozen=True, slots=True)
class Instructions:
    """Instructions without a right answer; a judge compares the answers with those of a reference."""

    name: ClassVar = "instructions"
    texts: Sequence[str]
    max_tokens: int

    @property
    def ids(self) -> list[str]:
        return [str(number) for number in range(len(self.texts))]

    @property
    def content(self) -> Any:
        """What models see, and how long they answer, as JSON data."""
        return [self.max_tokens, [*self.texts]]

    def answers(self, asked: Asked) -> Iterator[list[Record]]:
        """Yield records of greedy answers, a batch at a time."""
        answered = work_out(
            asked.learner.model,
            asked.learner.renderer,
            [Posed(id, Wording(text, {})) for id, text in zip(self.ids, self.texts, strict=True)],
            read=lambda _: None,
            max_tokens=self.max_tokens,
            batch_size=asked.batch_size,
            known=asked.known,
            advance=asked.advance,
        )
        for batch in answered:
            yield [{"key": a.key, "text": a.text, "finished": a.finished} for a in batch]

    def too_long(self, renderer: Renderer) -> frozenset[int]:
        """Return the numbers of instructions that are beyond a model's context, with the answer."""
        tokenizer: Any = renderer.tokenizer
        prompts = [renderer.render_prompt(Posed("", Wording(text, {})).sample("")) for text in self.texts]
        lengths = map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"])
        room = renderer.max_length - self.max_tokens
        return frozenset(number for number, length in enumerate(lengths) if length > room)


@dataclass(frozen=True, slots=True)
class Texts:
    """Samples, whose loss tokens are measured over the vocabulary."""

    kind: ClassVar = "samples"
    name: str
    items: Sequence[Sample]
    fit: frozenset[str]

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.items]

    @property
    def content(self) -> Any:
        """What models see of the samples, as JSON data."""
        return [[s.id, [turn.as_dict() for turn in s.messages], [*s.tools]] for s in self.items]

    def answers(self, asked: Asked, temperature: float = 1.0) -> Iterator[list[Record]]:
        """Yield records of all samples, or at another temperature of those that are measured."""
        chosen = [s for s in self.items if temperature == 1 or s.id not in self.fit]
        for scores in self._scores(chosen, asked, temperature):
            yield [
                {
                    "key": of.sample_id,
                    "nll": (-of.log_prob).tolist(),
                    "confidence": of.top1_prob.tolist(),
                    "correct": of.correct.astype(int).tolist(),
                }
                for of in scores
            ]

    def too_long(self, renderer: Renderer) -> frozenset[str]:
        """Return the ids of samples that are beyond a model's context."""
        return frozenset(sample.id for sample in self.items if renderer.render(sample) is None)

    def temperature(self, asked: Asked) -> float | None:
        """Return the temperature that suits the samples of `fit`; None if they are too few.

        As `ual.evaluate.options.temperature`, it minimizes the total NLL plus (ln T)^2 / 2. The derivative of
        the NLL by ln T is entropy minus NLL, so T is the root of NLL - entropy - ln T, in sums over tokens.
        Each try takes a pass over the samples.
        """
        from scipy.optimize import brentq

        chosen = [sample for sample in self.items if sample.id in self.fit]
        if len(chosen) < FEWEST_TO_FIT:
            return None

        def excess(log_t: float) -> float:
            total = -log_t
            for scores in self._scores(chosen, asked, float(np.exp(log_t))):
                total += sum(float((-of.log_prob - of.entropy).sum()) for of in scores)
            return total

        low, high = np.log(_TEMPERATURES)
        if excess(low) < 0:
            return _TEMPERATURES[0]
        if excess(high) > 0:
            return _TEMPERATURES[1]
        return float(np.exp(brentq(excess, low, high, xtol=1e-3)))

    def evidence(self, records: Records) -> tokens.Tokens:
        """Return the loss tokens of the samples that are measured."""
        found = [records[s.id] for s in self.items if s.id not in self.fit]

        def column(key: str, dtype: Any) -> NDArray[Any]:
            return np.concatenate([np.asarray(record[key], dtype=dtype) for record in found])

        sample = np.repeat(np.arange(len(found)), [len(record["nll"]) for record in found])
        nll, confidence = column("nll", np.float64), column("confidence", np.float64)
        return tokens.Tokens(sample, nll, np.minimum(confidence, 1), column("correct", bool), len(found))

    def _scores(
        self, samples: Sequence[Sample], asked: Asked, temperature: float
    ) -> Iterator[list[TokenScores]]:
        """Yield scores a batch at a time, longest first; batches depend on the samples alone."""
        learner = asked.learner
        rendered = []
        for sample in samples:
            found = learner.renderer.render(sample)
            assert found is not None  # a learner's renderer refuses overlong samples
            rendered.append(features(found))
        rendered.sort(key=lambda of: -len(of["input_ids"]))
        pad: Any = learner.renderer.tokenizer.pad_token_id
        collate = Collator(learner.renderer.tokenizer.eos_token_id if pad is None else pad)
        for start in range(0, len(rendered), asked.batch_size):
            batch = rendered[start : start + asked.batch_size]
            if any(of["id"] not in asked.known for of in batch):
                yield list(
                    score(learner.model, batch, collate, batch_size=asked.batch_size, temperature=temperature)
                )
            asked.advance(len(batch))


_TEMPERATURES = (0.1, 10.0)

Items: TypeAlias = Choices | Numbers | Texts
Evidence: TypeAlias = options.Predictions | tokens.Tokens | Mapping[str, NDArray[np.float64]]


def table(evidence: Evidence, bins: int) -> Table:
    """Return the figures of a model's answers to one kind of items; calibration errors have so many bins.

    Scores by name have their means as figures.
    """
    if isinstance(evidence, options.Predictions):
        return options.table(evidence, bins=bins)
    if isinstance(evidence, tokens.Tokens):
        return tokens.table(evidence, bins=bins)
    return Table(evidence, lambda columns: {name: float(of.mean()) for name, of in columns.items()})


def comparable(one: Evidence, other: Evidence) -> bool:
    """Return whether two models answered in the same terms: loss tokens depend on tokenizer and template."""
    if isinstance(one, tokens.Tokens) and isinstance(other, tokens.Tokens):
        return np.array_equal(one.sample, other.sample)
    return True


def read_items(name: str, data: TaskData, config: EvaluateConfig) -> Items:
    """Return the items of a task.

    Raises:
        UserError: see `ual.data.tasks.read` and `ual.data.load`; an item has no right answer, or there are
            too few.
    """
    task = None if data.task is None else load_task(data.task)
    found: list[Any] = [*_read(task, data)]
    if data.limit is not None and data.limit < len(found):
        chosen = random.Random(config.seed).sample(range(len(found)), data.limit)  # noqa: S311
        found = [found[i] for i in sorted(chosen)]
    fit = frozenset[str]()
    if task is None or task.kind != "number":
        fit = frozenset(of.id for of in found if fits_temperature(_question(of), config))
    if len(fit) < FEWEST_TO_FIT:
        fit = frozenset()  # then all items are measured
    items: Items
    if task is None:
        items = Texts(name, found, fit)
    elif task.kind == "number":
        items = Numbers(name, task, found, data.max_tokens)
    else:
        items = Choices(name, task, found, fit)
    _check_number(items)
    return items


def without(items: Items, dropped: Collection[str]) -> Items:
    """Return the items without those that are too long.

    Raises:
        UserError: fewer than two are left to measure.
    """
    left: Any = [item for item in items.items if item.id not in dropped]
    fit = items.fit - {*dropped}
    kept = replace(items, items=left, fit=fit if len(fit) >= FEWEST_TO_FIT else frozenset())
    _check_number(kept, len(dropped))
    return kept


def _check_number(items: Items, too_long: int = 0) -> None:
    measured = len(items.ids) - len(items.fit)
    if measured >= 2:
        return
    problem = f"{measured} items are left to measure, and two are needed"
    remedy = "name a larger file, or lower fit"
    if too_long:
        problem += f"; {too_long} are too long for a model"
        if isinstance(items, Numbers):
            problem += f" with max_tokens {items.max_tokens}"
            remedy = "lower max_tokens, or name a model with a longer context"
    raise UserError(problem, place=f"configuration, tasks.{items.name}", remedy=remedy)


def _length(renderer: Renderer, task: Task, item: Item) -> int:
    """Return the tokens of a question with its longest reply, or of a worked question's prompt."""
    wording = pose(task, item)
    text = renderer.render_prompt(Posed(item.id, wording, item.place).sample(""))
    tokenizer: Any = renderer.tokenizer
    texts = [text + reply for reply in wording.replies] or [text]
    count = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return count + bool(wording.replies)  # the end of turn


def _read(task: Task | None, data: TaskData) -> Sequence[Item | Sample]:
    if task is None:
        reading: dict[str, Any] = {"format": data.format, "columns": data.columns, "invalid": data.invalid}
        return load(data.data, split=data.split, **reading)
    items = read(task, data.data, split=data.split)
    for item in items:
        _check(task, item)
    asked = [item for item in items if item.human is None]
    if task.human is not None and 0 < len(asked) < len(items):
        raise UserError(
            f"{len(asked)} of {len(items)} questions have no human answers (`human`)",
            place=asked[0].place,
            remedy="remove them from the file, or set human to null",
        )
    return items


def _question(of: Item | Sample) -> str:
    """Return what two items must not share if one is measured and the other fits the temperature."""
    return of.question if isinstance(of, Item) else json.dumps([turn.as_dict() for turn in of.prompt])


def fits_temperature(question: str, config: EvaluateConfig) -> bool:
    """Return whether a question only fits the temperature; this does not depend on the other questions."""
    digest = hashlib.sha256(f"{config.seed} {question}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < config.fit


def _check(task: Task, item: Item) -> None:
    problem = ""
    if item.gold is None:
        problem = "the question has no right answer"
    elif task.kind == "number" and normalize(last_number(f"#### {item.gold}")) != item.gold:
        problem = f"the right answer is not a number that a reply can have, got {item.gold!r}"
    elif task.kind != "number" and len({*item.options}) < 2:
        problem = "the question has fewer than two different options"
    if problem:
        raise UserError(problem, place=item.place, remedy="correct the file or the task")


def _predictions(items: Sequence[Item], records: Records) -> options.Predictions:
    human = [item.human for item in items if item.human is not None]
    return options.Predictions.of(
        [records[item.id]["probabilities"] for item in items],
        [item.gold or "" for item in items],
        human or None,
    )

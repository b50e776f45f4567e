"""The method: the reliability of a supervisor's answers, and the samples on which each arm is trained.

Several answers to a question have an entropy H, a majority, and a weight for each distinct answer
(`ual.methods.reliability`). The filter selects the questions with the lowest entropies. Nothing here reads a
right answer, except the ceiling's samples.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ual.config.weak_to_strong import Arm, ReliabilityConfig
from ual.data.tasks import Item, Task, pose
from ual.errors import UserError
from ual.methods import reliability
from ual.pipelines.weak_to_strong.questions import Gold


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with a supervisor's answers to its wordings, in order.

    `values` are options or normalized numbers, None where an answer could not be parsed. `texts` are the
    replies. `probabilities` are the options' means over the wordings; empty for worked answers. `entropy` is
    NaN if the question has no usable majority. `selected` says whether the filter selects the question.
    """

    item: Item
    values: tuple[str | None, ...]
    texts: tuple[str, ...]
    probabilities: Mapping[str, float]
    entropy: float
    selected: bool = False

    @property
    def first(self) -> str | None:
        return self.values[0]

    @property
    def majority(self) -> str | None:
        return reliability.majority(self.values)

    def weights(self, temperature: float) -> dict[str, float]:
        """Return the weight of each distinct parsed answer; they sum to 1, or there is none."""
        found = reliability.answer_weights(self.values, temperature)
        parsed = {value: weight for value, weight in found.items() if value is not None}
        total = sum(parsed.values())
        return {value: weight / total for value, weight in parsed.items()}


def measure(
    items: Sequence[Item], answers: Iterable[Mapping[str, Any]], config: ReliabilityConfig, place: str
) -> list[Asked]:
    """Return the questions with their answers and reliability, in the order of `items`.

    Args:
        items: the unsupervised questions, in any order.
        answers: objects of the file of answers: `question_id`, `wording`, `value`, `text`, `probabilities`.
        config: filter and policy for answers that were not parsed.
        place: of the answers, for errors.

    Raises:
        UserError: an item has no answer, or no answer of any question was parsed.
    """
    of_question: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for answer in answers:
        of_question[answer["question_id"]][answer["wording"]] = answer
    found = [_asked(item, of_question[item.id], config, place) for item in items]
    if all(math.isnan(question.entropy) for question in found):
        alone = all(len(question.values) < 2 for question in found)
        why = "each has one answer only" if alone else "too few answers could be parsed"
        raise UserError(
            f"none of the {len(found)} questions has a usable majority: {why}",
            place=place,
            remedy="read the texts there; then correct the task's prompt, train the supervisor longer, raise "
            'ask.max_tokens, or set reliability.unparsed to "class"',
        )
    kept = reliability.keep([question.entropy for question in found], config.rule, config.value)
    return [
        Asked(q.item, q.values, q.texts, q.probabilities, q.entropy, bool(keep))
        for q, keep in zip(found, kept, strict=True)
    ]


def _asked(
    item: Item, answers: Mapping[int, Mapping[str, Any]], config: ReliabilityConfig, place: str
) -> Asked:
    ordered = [answers[wording] for wording in sorted(answers)]
    if not ordered:
        raise UserError(
            f"question {item.id!r} has no answer", place=place, remedy="run the stage `answers` again"
        )
    values = tuple(answer["value"] for answer in ordered)
    usable = len(values) > 1 and reliability.majority(values) is not None
    return Asked(
        item=item,
        values=values,
        texts=tuple(answer["text"] for answer in ordered),
        probabilities={
            option: math.fsum(answer["probabilities"].get(option, 0.0) for answer in ordered) / len(ordered)
            for option in (item.options if ordered[0]["probabilities"] else ())
        },
        entropy=reliability.entropy(values, unparsed=config.unparsed) if usable else math.nan,
    )


def training_samples(
    name: str,
    arm: Arm,
    task: Task,
    asked: Sequence[Asked],
    hidden: Mapping[str, Gold],
    config: ReliabilityConfig,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the samples of an arm, as `ual train` reads them, in the order of the questions.

    Args:
        name, arm: of the arm.
        task: poses the questions, with options in their own order.
        asked: the unsupervised questions.
        hidden: right answers by id; only the ceiling reads them.
        config: temperature of the weights.
        seed: of a random selection.

    Raises:
        UserError: no sample is left, or a right answer that the ceiling needs is unknown.
    """
    samples = [
        sample
        for question in _selected(arm, asked, seed)
        for sample in _of_question(arm, task, question, hidden, config.temperature)
    ]
    if not samples:
        certain = min((q.entropy for q in asked if not math.isnan(q.entropy)), default=math.nan)
        raise UserError(
            f"arm {name} has no training sample: the filter selects none of {len(asked)} questions, whose "
            f"lowest entropy is {certain:.3f} nats",
            place="configuration, reliability",
            remedy="raise the threshold, or use the rule median",
        )
    return samples


def _selected(arm: Arm, asked: Sequence[Asked], seed: int) -> Iterator[Asked]:
    count = sum(question.selected for question in asked)
    usable = [i for i, question in enumerate(asked) if not math.isnan(question.entropy)]
    drawn = set(random.Random(seed).sample(usable, count))  # noqa: S311
    for i, question in enumerate(asked):
        if arm.labels in ("majority", "distinct") and math.isnan(question.entropy):
            continue
        if {"all": True, "consistent": question.selected, "random": i in drawn}[arm.select]:
            yield question


def _of_question(
    arm: Arm, task: Task, question: Asked, hidden: Mapping[str, Gold], temperature: float
) -> Iterator[dict[str, Any]]:
    item = question.item
    wording = pose(task, item)

    def sample(value: str, text: str = "", **columns: Any) -> dict[str, Any]:
        completion = wording.reply(value) if wording.replies else text
        shared = {"id": item.id, "prompt": wording.prompt, "completion": completion, "source": item.subject}
        options = {"options": list(wording.replies)} if wording.replies else {}
        return shared | options | columns

    match arm.labels:
        case "gold":
            answer, solution = hidden[item.id]
            if answer is None:
                raise UserError(
                    "the question has no right answer, which the ceiling is trained on",
                    place=item.place,
                    remedy="correct the file, or remove the arm `ceiling`",
                )
            yield sample(answer, solution)
        case "distribution":
            likeliest = max(question.probabilities, key=question.probabilities.__getitem__)
            sharing = Counter(wording.replies.values())  # replies that mean the same option
            by_reply = {
                reply: question.probabilities[option] / sharing[option]
                for reply, option in wording.replies.items()
            }
            yield sample(likeliest, label_distribution=by_reply)
        case "distinct":
            for k, (value, weight) in enumerate(question.weights(temperature).items(), start=1):
                text = question.texts[question.values.index(value)]
                yield sample(value, text, sample_weight=weight) | {"id": f"{item.id}#{k}"}
        case "first" | "majority":
            chosen = question.first if arm.labels == "first" else question.majority
            if chosen is not None:
                text = question.texts[question.values.index(chosen)]
                yield sample(chosen, text, uncertainty=question.entropy)

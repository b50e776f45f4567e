"""Answers of every model, compared with those of a reference by a judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ual.config.evaluate import ComparedConfig
from ual.config.judge import JudgeConfig
from ual.errors import UserError
from ual.files import write_json
from ual.pipelines.evaluation.items import Instructions, Record
from ual.pipelines.evaluation.models import Model
from ual.pipelines.judge import judge
from ual.pipelines.outputs import read_outputs
from ual.runs.progress import Progress


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's answers, the instructions that all models are asked, and how many were too long."""

    answers: list[dict[str, Any]]
    instructions: Instructions
    too_long: int


def asked(config: ComparedConfig, models: Sequence[Model]) -> Reference:
    """Return what is asked: the reference's instructions, without those that are too long for a model.

    Raises:
        UserError: as `ual.pipelines.outputs.read_outputs`, or fewer than two instructions are left.
    """
    answers = read_outputs(Path(config.reference))[: config.limit]
    every = Instructions([answer["instruction"] for answer in answers], config.answer_tokens)
    too_long = frozenset[int]().union(*(every.too_long(model.renderer) for model in models))
    left = [answer for number, answer in enumerate(answers) if number not in too_long]
    if len(left) < 2:
        raise UserError(
            f"{len(left)} instructions are left, and two are needed; {len(too_long)} are too long for a "
            f"model with answer_tokens {config.answer_tokens}",
            place="configuration, judge",
            remedy="lower answer_tokens, or name another reference",
        )
    instructions = Instructions([answer["instruction"] for answer in left], config.answer_tokens)
    return Reference(left, instructions, len(too_long))


def compare(
    model: Model,
    records: list[Record],
    reference: Reference,
    config: ComparedConfig,
    folder: Path,
    environment: Mapping[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """Write a model's answers and their comparison into `folder`, and return its summary.

    Raises:
        UserError: as `ual.pipelines.judge.judge`.
    """
    answers = [
        {"dataset": of.get("dataset"), "instruction": of["instruction"], "output": record["text"]}
        | {"generator": model.name}
        for of, record in zip(reference.answers, records, strict=True)
    ]
    write_json(folder / "outputs.json", answers)
    write_json(folder / "reference.json", reference.answers)
    task = progress.task(f"{model.name}, comparisons", 2 * len(answers))
    how = JudgeConfig.model_validate(config.model_dump(include=set(JudgeConfig.model_fields)))
    summary = judge(
        folder / "outputs.json",
        folder / "reference.json",
        how,
        folder,
        environment=environment,
        trust_remote_code=model.trust_remote_code,
        progress=lambda completed, total, _: task.update(completed, total),
        notice=progress.say,
    )
    cut_off = sum(not record["finished"] for record in records)
    return summary | {"cut_off": cut_off, "too_long": reference.too_long}

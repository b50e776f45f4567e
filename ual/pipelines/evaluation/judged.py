"""Answers of every model, compared with those of a reference by a judge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ual.config.evaluate import ComparedConfig
from ual.config.judge import JudgeConfig
from ual.files import write_json
from ual.pipelines.evaluation.items import Instructions, Record
from ual.pipelines.evaluation.models import Model
from ual.pipelines.judge import judge
from ual.pipelines.outputs import read_outputs
from ual.runs.progress import Progress


def asked(config: ComparedConfig) -> tuple[list[dict[str, Any]], Instructions]:
    """Return the reference's answers, and their instructions.

    Raises:
        UserError: as `ual.pipelines.outputs.read_outputs`.
    """
    answers = read_outputs(Path(config.reference))[: config.limit]
    return answers, Instructions([answer["instruction"] for answer in answers], config.answer_tokens)


def compare(
    model: Model,
    records: list[Record],
    reference: list[dict[str, Any]],
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
        for of, record in zip(reference, records, strict=True)
    ]
    write_json(folder / "outputs.json", answers)
    write_json(folder / "reference.json", reference)
    advance = progress.task(f"{model.name}, comparisons", 2 * len(reference))
    done = 0

    def counted(completed: int, total: int, counts: Any) -> None:
        nonlocal done
        advance(completed - done)
        done = completed

    how = JudgeConfig.model_validate(config.model_dump(include=set(JudgeConfig.model_fields)))
    summary = judge(
        folder / "outputs.json",
        folder / "reference.json",
        how,
        folder,
        environment=environment,
        trust_remote_code=model.trust_remote_code,
        progress=counted,
        notice=progress.say,
    )
    return summary | {"cut_off": sum(not record["finished"] for record in records)}

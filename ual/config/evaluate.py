"""The configuration of an evaluation: models x tasks (`ual evaluate`)."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ual.config.base import CommandConfig, Fraction, UserPath, from_name
from ual.config.experiment import Name
from ual.config.run import Files, ModelConfig, Reading
from ual.errors import UserError


class TaskData(Reading):
    """Questions or samples that are measured; `format` and `columns` are for samples."""

    data: Files
    task: UserPath | None = Field(
        None, description="a shipped task, or a YAML file; null: samples, whose loss tokens are measured"
    )
    split: str = Field("test", description="of hub data sets")
    limit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="questions or samples that are used, drawn by the seed; null: all"
    )
    max_tokens: Annotated[int, Field(ge=1)] = Field(256, description="of a worked answer")

    @model_validator(mode="after")
    def _columns_of_the_task(self) -> Self:
        if self.task is not None and (self.columns or self.format != "auto"):
            raise ValueError(
                "format and columns are for samples; the columns of questions are in the task's file"
            )
        return self


class EvaluateConfig(CommandConfig):
    """Models that answer the same questions; the first one is the baseline."""

    command = "evaluate"
    example = "models: {base: PATH, ual: runs/ual} / tasks: {sciq: {task: sciq, data: test.jsonl}}"

    models: dict[Name, Annotated[ModelConfig, from_name("path")]] = Field(
        min_length=1, description="name -> the folder of a run, or a model"
    )
    tasks: dict[Name, Annotated[TaskData, from_name("data")]] = Field(
        min_length=1, description="name -> what is measured"
    )
    fit: Annotated[Fraction, Field(lt=1)] = Field(
        0.2, description="share of the items that are not measured, but fit the temperature; 0: none"
    )
    bins: Annotated[int, Field(ge=2)] = 15
    resamples: Annotated[int, Field(ge=100)] = Field(1000, description="of the bootstrap")
    seed: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 16
    chat_template: UserPath | None = Field(
        None, description="'chatml', 'plain', or a Jinja file, for models that are no runs; None: their own"
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="for models that are no runs")
    system_prompt: str | None = Field(None, description="for models that are no runs")
    date: datetime.date | None = Field(
        None, description="the day that templates read; None: that on which the evaluation began"
    )


def of_models(
    models: Sequence[str], task: str | None, data: Sequence[str], limit: int | None
) -> dict[str, Any]:
    """Return the configuration that measures models on one task, as a mapping.

    Args:
        models: paths or hub names, each with ``NAME=`` before it or named by its last part.
        task: as `TaskData.task`.
        data: files.
        limit: as `TaskData.limit`.

    Raises:
        UserError: no file is named, or two models have one name.
    """
    named: dict[str, str] = {}
    for model in models:
        before, equals, after = model.partition("=")
        name, path = (before, after) if equals else (Path(model).name, model)
        if name in named:
            raise UserError(
                f"two models are named {name!r}: {named[name]} and {path}",
                place="arguments",
                remedy=f"give one of them a name: {name}2={path}",
            )
        named[name] = path
    if not data:
        raise UserError(
            "no data is named",
            place="arguments",
            remedy="add --data FILE, or name a YAML file with models and tasks",
        )
    files: str | list[str] = data[0] if len(data) == 1 else [*data]
    measured = Path(task).stem if task else Path(data[0]).name.partition(".")[0]
    return {"models": named, "tasks": {measured: {"task": task, "data": files, "limit": limit}}}

"""The configuration of an evaluation: models x tasks (`ual evaluate`)."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from ual.config.base import CommandConfig, Fraction, Section, UserPath, from_name
from ual.config.experiment import Name
from ual.config.judge import JudgeConfig
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


class HarnessConfig(Section):
    """Tasks of the lm-evaluation-harness."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(
        description="tasks, groups and tags, or YAML files; task files can contain code, which is run"
    )
    include_path: UserPath | None = Field(None, description="a folder of more task files")
    limit: Annotated[int, Field(ge=2)] | None = Field(None, description="only the first items of each task")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="null: the task's own number")
    apply_chat_template: bool | str = False


class ComparedConfig(JudgeConfig):
    """A judge that compares every model's answers with those of a reference."""

    reference: UserPath = Field(description="answers in AlpacaEval's format; its instructions are asked")
    limit: Annotated[int, Field(ge=2)] | None = Field(None, description="only the first instructions")
    answer_tokens: Annotated[int, Field(ge=1)] = Field(512, description="of a model's answer")


class EvaluateConfig(CommandConfig):
    """Models that answer the same questions; the first one is the baseline."""

    command = "evaluate"
    example = "models: {base: PATH, ual: runs/ual} / tasks: {sciq: {task: sciq, data: test.jsonl}}"

    models: dict[Name, Annotated[ModelConfig, from_name("path")]] = Field(
        min_length=1, description="name -> the folder of a run, or a model"
    )
    tasks: dict[Name, Annotated[TaskData, from_name("data")]] = Field(
        {}, description="name -> what is measured"
    )
    lm_eval: HarnessConfig | None = None
    judge: ComparedConfig | None = None
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

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.tasks or self.lm_eval or self.judge):
            raise ValueError("name what is measured: tasks, lm_eval or judge")
        for name in (*self.models, *self.tasks):
            if name.startswith("."):
                raise ValueError(
                    f"a name must not begin with a dot: it is the name of a folder, got {name!r}"
                )
        if "judge" in self.tasks:
            raise ValueError(
                "a task must not be named judge, which is the folder of the judge's instructions"
            )
        return self


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says is measured."""

    task: str | None = None
    data: Sequence[str] = ()
    limit: int | None = None
    lm_eval: str | None = None
    include_path: Path | None = None
    judge: Path | None = None
    reference: Path | None = None
    chat_template: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that are given."""
        return [
            f"--{of.name.replace('_', '-')}"
            for of in fields(self)
            if getattr(self, of.name) not in (None, [], ())
        ]


def of_models(models: Sequence[str], asked: Asked) -> dict[str, Any]:
    """Return the configuration that measures models, as a mapping.

    Args:
        models: paths or hub names, each with ``NAME=`` before it or named by its last part.
        asked: what is measured.

    Raises:
        UserError: nothing is measured, two models have one name, or an option lacks another.
    """
    named: dict[str, str] = {}
    for model in models:
        before, equals, after = model.partition("=")
        if before in EvaluateConfig.model_fields:
            raise UserError(
                f"{before} is a key of a configuration, and models are named here, got {model!r}",
                place="arguments",
                remedy="name a YAML file first, or write its keys there",
            )
        alone = not equals or Path(model).exists()
        name, path = (named_by(Path(model).resolve().name), model) if alone else (before, after)
        if name in named:
            raise UserError(
                f"two models are named {name!r}: {named[name]} and {path}",
                place="arguments",
                remedy=f"give one of them a name: {name}2={path}",
            )
        named[name] = path
    for option, needed in (
        ("--task", "--data"),
        ("--include-path", "--lm-eval"),
        ("--judge", "--reference"),
        ("--reference", "--judge"),
    ):
        if option in asked.given and needed not in asked.given:
            raise UserError(f"{option} needs {needed}", place="arguments")
    if not {"--data", "--lm-eval", "--judge"} & {*asked.given}:
        raise UserError(
            "nothing is measured",
            place="arguments",
            remedy="add --data, --lm-eval or --judge, or name a YAML file with models and tasks",
        )
    raw: dict[str, Any] = {"models": named, "chat_template": asked.chat_template}
    if asked.data:
        files: str | list[str] = asked.data[0] if len(asked.data) == 1 else [*asked.data]
        name = Path(asked.task).stem if asked.task else Path(asked.data[0]).name.partition(".")[0]
        raw["tasks"] = {named_by(name): {"task": asked.task, "data": files, "limit": asked.limit}}
    if asked.lm_eval:
        folder = str(asked.include_path) if asked.include_path else None
        names = [name.strip() for name in asked.lm_eval.split(",") if name.strip()]
        raw["lm_eval"] = {"tasks": names, "include_path": folder, "limit": asked.limit}
    if asked.judge:
        try:
            judge = yaml.safe_load(asked.judge.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read the judge: {error}", place=str(asked.judge)) from error
        if not isinstance(judge, dict):
            raise UserError("a judge is a mapping with a backend", place=str(asked.judge))
        if "reference" in judge:
            raise UserError("`reference` is given twice, here and by --reference", place=str(asked.judge))
        limit = {} if asked.limit is None else {"limit": asked.limit}
        raw["judge"] = judge | {"reference": str(asked.reference)} | limit
    return raw


def named_by(text: str) -> str:
    """Return a name that a folder can have."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"

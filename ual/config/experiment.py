"""The configuration of an experiment: arms x seeds around one training run (`ual compare`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ual.config.base import CommandConfig, merged, parse_as
from ual.config.run import RunConfig
from ual.errors import UserError

Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
BUDGET = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of `training` that must be the same in every arm."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of an experiment."""

    arm: str
    seed: int
    config: RunConfig


class ExperimentConfig(CommandConfig):
    """Arms that differ in what they override, trained at equal budgets with each seed."""

    command = "compare"
    example = "base: {model: PATH, data: FILE.jsonl} / arms: {sft: {loss: sft}, ual: {}}"

    base: dict[str, Any] = Field(description="a run as for `ual train`, without output_dir and name")
    arms: dict[Name, dict[str, Any]] = Field(
        min_length=1, description="name -> what the arm overrides; the first arm is the baseline"
    )
    budget: Literal["steps", "tokens"] = Field(
        "steps",
        description="what is equal in all arms; tokens: max_steps may differ, so that loss tokens do not",
    )
    seeds: list[int] = Field([42], min_length=1, description="each arm is trained once with each")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct")
        return self

    def cells(self) -> Iterator[Cell]:
        """Yield the runs, seed by seed, each with its configuration.

        Raises:
            UserError: an arm is not a valid run, sets what the experiment sets, or has a budget of its own.
        """
        budgets: dict[str, tuple[str, Any]] = {}
        for seed in self.seeds:
            for arm, overrides in self.arms.items():
                yield Cell(arm, seed, self._config(arm, seed, overrides, budgets))

    def _config(
        self, arm: str, seed: int, overrides: dict[str, Any], budgets: dict[str, tuple[str, Any]]
    ) -> RunConfig:
        place = f"experiment, arms.{arm}"
        raw = merged(self.base, overrides)
        training = raw.get("training") or {}
        for key, section in (("output_dir", raw), ("name", raw), ("seed", training)):
            if key in section:
                raise UserError(
                    f'"{key}" is set by the experiment',
                    place=place,
                    remedy="remove it; `seeds` and the names of `arms` decide",
                )
        for key in BUDGET:
            if key == "max_steps" and self.budget == "tokens":
                continue
            first, value = budgets.setdefault(key, (arm, training.get(key)))
            if training.get(key) != value:
                raise UserError(
                    f"budgets differ: training.{key} is {training.get(key)} here and {value} in arm {first}",
                    place=place,
                    remedy="set it once, in base.training",
                )
        folder = arm if len(self.seeds) == 1 else f"{arm}-seed{seed}"
        own = {"name": arm, "output_dir": str(Path(self.output_dir) / folder)}
        return parse_as(RunConfig, merged(raw, own | {"training": training | {"seed": seed}}), place=place)

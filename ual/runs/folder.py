"""A run is a folder that explains itself: configuration, versions, hashes, history, checkpoints, report."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ual.config import run as configuration
from ual.config.base import dump
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.files import aside


class RunFolder:
    """The files of one run. Every file is written aside and renamed, so a reader never sees half of one.

    config.yaml, environment.json, uncertainty.jsonl, samples.jsonl, history.jsonl, evaluation.json,
    metrics.json, train.log, adapter/ (or model/), checkpoints/checkpoint-N, tensorboard/, plots/, report.html

    Args:
        path: of the folder, which all processes of a run see.
        writes: False for all but one of them; theirs do nothing where one would write.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self._writes = writes
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "train.log"
        self.history = self.path / "history.jsonl"

    def check(self, config: RunConfig, *, resume: bool | Literal["auto"]) -> None:
        """Find out whether `create` would refuse, and write nothing.

        Raises:
            UserError: it holds a run and `resume` is False; it holds none and `resume` is True ("auto"
                takes either); it holds another configuration's run; it cannot be written.
        """
        existing = self.path / "config.yaml"
        if existing.exists():
            if not resume:
                raise UserError(
                    f"{self.path} already holds a run",
                    remedy="pass --resume to go on with it, or choose another output_dir",
                )
            if _what_must_match(configuration.load(existing)) != _what_must_match(config):
                raise UserError(
                    f"{existing} differs from this configuration, so its checkpoints do not fit",
                    remedy="resume with the configuration of the run, or choose another output_dir",
                )
        elif resume is True:
            raise UserError(
                f"{self.path} holds no run to go on with", remedy="leave out --resume, or pass --resume auto"
            )
        for folder in (self.path, self.checkpoints):
            above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
            if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
                problem = "no write permission" if above.is_dir() else f"{above} is not a folder"
                raise UserError(f"cannot write to {folder}: {problem}", place="configuration, output_dir")

    def create(self, config: RunConfig, *, resume: bool | Literal["auto"]) -> None:
        """Make the folder, or open it again to resume.

        Raises:
            UserError: as `check`.
        """
        if not self._writes:
            return
        self.check(config, resume=resume)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write("config.yaml", dump(config))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}", place="configuration, output_dir"
            ) from error

    def write(self, name: str, content: str) -> Path:
        """Write a text file whole or not at all."""
        target = self.path / name
        if not self._writes:
            return target
        with aside(target) as scratch:
            scratch.write_text(content, encoding="utf-8")
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write indented JSON whole or not at all; NaN becomes null."""
        return self.write(name, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write JSON lines whole or not at all."""
        target = self.path / name
        if not self._writes:
            return target
        with aside(target) as scratch, scratch.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")
        return target

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Read JSON lines; an absent file has none."""
        path = self.path / name
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add one step to history.jsonl."""
        if not self._writes:
            return
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the history of steps that a resumed run will make again."""
        self.write_rows(
            "history.jsonl", [row for row in self.read_rows("history.jsonl") if row["step"] <= step]
        )


def _what_must_match(config: RunConfig) -> dict[str, Any]:
    """Everything but the length of the run, what is only watched, and how a step's rows are spread.

    The rows of a step are compared with those of the checkpoint instead (`UALTrainer.train`).
    """
    values = config.model_dump(exclude={"name", "output_dir", "evaluation", "deepspeed"})
    free = {
        "max_steps", "num_train_epochs", "report_to", "logging_steps", "save_steps", "save_total_limit",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    }  # fmt: skip
    values["training"] = {k: v for k, v in values["training"].items() if k not in free}
    return values


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

"""The folder of a run: configuration, environment, history, metrics, checkpoints, report."""

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from ual.config import run as configuration
from ual.config.base import dump
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.files import json_line, read_jsonl, write_json, write_jsonl, write_text


class File(StrEnum):
    """The files of a run folder, by their names."""

    CONFIG = "config.yaml"
    ENVIRONMENT = "environment.json"
    UNCERTAINTY = "uncertainty.jsonl"
    SAMPLES = "samples.jsonl"
    HISTORY = "history.jsonl"
    EVALUATION = "evaluation.json"
    HELD_OUT = "held_out.jsonl"
    METRICS = "metrics.json"
    LOG = "train.log"
    REPORT = "report.html"


class RunFolder:
    """The folder of one run. Each `File` is written to a scratch file and renamed: readers see it complete.

    Beside the files: adapter/ or model/, checkpoints/checkpoint-N, tensorboard/, plots/.

    Args:
        path: of the folder, on a disk that all processes of the run share.
        writes: True in one process. In the others, methods that write do nothing.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self._writes = writes
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / File.LOG
        self.history = self.path / File.HISTORY

    def check(self, config: RunConfig, *, resume: bool | Literal["auto"]) -> None:
        """Check what `create` checks, and write nothing.

        Raises:
            UserError: the folder holds a run and `resume` is False; it holds none and `resume` is True
                ("auto" accepts both); its run has another configuration; it cannot be written.
        """
        existing = self.path / File.CONFIG
        if existing.exists():
            if not resume:
                raise UserError(
                    f"{self.path} already holds a run",
                    remedy="pass --resume to continue it, or choose another output_dir",
                )
            if _what_must_match(configuration.load(existing)) != _what_must_match(config):
                raise UserError(
                    f"{existing} differs from this configuration, so its checkpoints do not fit",
                    remedy="resume with the configuration of the run, or choose another output_dir",
                )
        elif resume is True:
            raise UserError(
                f"{self.path} holds no run to resume", remedy="remove --resume, or pass --resume auto"
            )
        for folder in (self.path, self.checkpoints):
            above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
            if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
                problem = "no write permission" if above.is_dir() else f"{above} is not a folder"
                raise UserError(f"cannot write to {folder}: {problem}", place="configuration, output_dir")

    def create(self, config: RunConfig, *, resume: bool | Literal["auto"]) -> None:
        """Create the folder, or open it to resume.

        Raises:
            UserError: as `check`.
        """
        if not self._writes:
            return
        self.check(config, resume=resume)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write(File.CONFIG, dump(config))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}", place="configuration, output_dir"
            ) from error

    def write(self, name: str, content: str) -> Path:
        """Write a text file, complete or not at all."""
        if self._writes:
            write_text(self.path / name, content)
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        """Write indented JSON, complete or not at all. NaN becomes null."""
        if self._writes:
            write_json(self.path / name, value)
        return self.path / name

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write JSON lines, complete or not at all."""
        if self._writes:
            write_jsonl(self.path / name, rows)
        return self.path / name

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a file of JSON lines; none if it is absent."""
        path = self.path / name
        return [record for _, record in read_jsonl(path)] if path.exists() else []

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add one step to history.jsonl."""
        if not self._writes:
            return
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json_line(row))

    def forget_after(self, step: int) -> None:
        """Remove the history of steps that a resumed run will repeat."""
        kept = [row for row in self.read_rows(File.HISTORY) if row["step"] <= step]
        self.write_rows(File.HISTORY, kept)


def _what_must_match(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a configuration that a resumed run may not change.

    Samples per step are compared with the checkpoint's instead (`CheckpointingTrainer.train`).
    """
    values = config.model_dump(exclude={"name", "output_dir", "evaluation", "deepspeed"})
    free = {
        "max_steps", "num_train_epochs", "report_to", "logging_steps", "save_steps", "save_total_limit",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    }  # fmt: skip
    values["training"] = {k: v for k, v in values["training"].items() if k not in free}
    return values

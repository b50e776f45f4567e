"""The folder of a run: configuration, environment, history, metrics, checkpoints, report."""

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

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


_WEIGHTS = ("adapter", "model")


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

    def date(self) -> datetime.date:
        """Return the date that templates read in this folder's run; of a new run, today."""
        existing = self.path / File.CONFIG
        began = configuration.load(existing).data.date if existing.exists() else None
        return began or datetime.date.today()

    def check_writable(self) -> None:
        """Check that the folder can be written, and write nothing.

        Raises:
            UserError: it cannot.
        """
        for folder in (self.path, self.checkpoints):
            above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
            if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
                problem = "no write permission" if above.is_dir() else f"{above} is not a folder"
                raise UserError(f"cannot write to {folder}: {problem}", place="configuration, output_dir")

    def create(self, config: RunConfig) -> None:
        """Create the folder, or open it to resume. Its configuration is from now on `config`.

        Raises:
            UserError: the folder cannot be written.
        """
        if not self._writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write(File.CONFIG, dump(config))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}", place="configuration, output_dir"
            ) from error

    @property
    def weights(self) -> Path | None:
        """The folder of the trained weights, if it holds any."""
        folders = (self.path / name for name in _WEIGHTS)
        return next((path for path in folders if any(path.glob("*.safetensors"))), None)

    def holds_run(self) -> bool:
        """Return whether a step of a run is recorded here: logged, saved, or in trained weights.

        A folder of a run that was refused, or that failed before its first step, holds none.
        """
        return (
            self.weights is not None
            or any(self.checkpoints.glob("checkpoint-*"))
            or any(row.get("step") for row in self.read_history() if "event" not in row)
        )

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

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object of a file; an empty one if the file is absent.

        Metrics may be removed: all but the time of training is computed again from the other files.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / name
        remedy = "restore or remove the file" if name == File.METRICS else "restore the file"
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"not valid JSON: {error}", place=str(path), remedy=remedy) from error
        if not isinstance(value, dict):
            raise UserError("expected a JSON object", place=str(path), remedy=remedy)
        return value

    def read_history(self) -> list[dict[str, Any]]:
        """Return the intact lines of history.jsonl; a killed run may have written half a line."""
        if not self.history.exists():
            return []
        found = []
        for line in self.history.read_bytes().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    found.append(row)
        return found

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add one step to history.jsonl."""
        if not self._writes:
            return
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json_line(row))

    def begin_leg(self, step: int) -> None:
        """Record that training begins after `step`; remove the history of steps that will be repeated."""
        kept = [row for row in self.read_history() if "event" in row or 0 < row["step"] <= step]
        leg = {"event": "resume" if step else "start", "step": step, "time": now()}
        self.write_rows(File.HISTORY, [*kept, leg])


def now() -> str:
    """Return the time of day in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

"""Read a run folder, complete or not. What is absent or damaged becomes a sentence in `Run.missing`."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ual.config import run as configuration
from ual.config.objectives import LOSS_KINDS
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.files import shown
from ual.methods import smoothing
from ual.runs.folder import File

_EVALUATION = ("rows", "tokens", "nll", "perplexity", "accuracy", "ece", "brier")
_MARKS = (File.CONFIG, File.METRICS, File.HISTORY)


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one training sample; its texts stay on disk, at byte `offset` of samples.jsonl."""

    source: str
    uncertainty: float | None
    label_smoothing: float | None
    offset: int


class HeldOut(NamedTuple):
    """One held-out sample under the trained model; means are over its loss tokens."""

    tokens: float
    nll: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder in memory. Absent files give empty mappings and tuples.

    `losses` holds (step, loss) by rising step. `series` holds what else was logged of the tokens: their loss
    without smoothing by group (``nll/source/...``) and their statistics (``token_entropy``). `before` and
    `after` are evaluations as `ual.evaluate.Evaluation` describes them, or None.
    """

    path: Path
    name: str
    config: RunConfig | None
    config_text: str
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    losses: tuple[tuple[int, float], ...]
    series: Mapping[str, tuple[tuple[int, float], ...]]
    rows: tuple[Row, ...]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    missing: tuple[str, ...]

    @property
    def status(self) -> str:
        return text(self.metrics, "status") or "unknown"

    @property
    def loss_kind(self) -> str:
        return text(self.metrics, "loss_kind") or (self.config.loss.kind if self.config else "")

    @property
    def smoothing(self) -> str:
        """`LossKind.smoothing`, "uniform" also if all smoothings are equal; empty for an unknown kind."""
        kind = LOSS_KINDS.get(self.loss_kind)
        if kind is None:
            return ""
        return "uniform" if kind.smoothing == "own" and self.is_constant else kind.smoothing

    @property
    def is_constant(self) -> bool:
        """Whether all samples, if more than one, have the same smoothing; False if this is not recorded."""
        recorded = self.metrics.get("smoothing_range")
        return (
            isinstance(recorded, list)
            and (number(self.metrics, "trained_rows") or 0) > 1
            and smoothing.is_constant(recorded)
        )

    @property
    def steps(self) -> int | None:
        steps = number(self.metrics, "steps")
        if steps is None and self.losses:
            return self.losses[-1][0]
        return None if steps is None else int(steps)

    def sample(self, row: Row) -> Mapping[str, Any]:
        """Read one line of samples.jsonl, with its texts."""
        with (self.path / File.SAMPLES).open("rb") as file:
            file.seek(row.offset)
            value: dict[str, Any] = json.loads(file.readline())
        return value

    def held_out(self) -> dict[str, HeldOut]:
        """Read the trained model's metrics of each held-out sample, by id; empty without held_out.jsonl."""
        keys = HeldOut._fields
        return {
            text(entry, "id"): HeldOut(*(number(entry, key) or 0.0 for key in keys))
            for _, entry in _lines(self.path / File.HELD_OUT, [])
            if all(number(entry, key) is not None for key in keys)
        }


def read(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: `path` is not a folder that `ual train` wrote.
    """
    _check(path)
    missing: list[str] = []
    metrics = _object(path / File.METRICS, missing)
    evaluation = _object(path / File.EVALUATION, missing)
    environment = _object(path / File.ENVIRONMENT, missing)
    config, config_text = _config(path / File.CONFIG, missing)
    losses: dict[int, float] = {}
    series: dict[str, dict[int, float]] = {}
    for _, entry in _lines(path / File.HISTORY, missing):
        step, loss = number(entry, "step"), entry.get("loss")
        if step is None:
            continue
        if isinstance(loss, int | float):
            losses[int(step)] = float(loss)  # a resumed run logs a step again: the later value counts
        for key in entry:
            if key.startswith(("nll/", "token_")) and (value := number(entry, key)) is not None:
                series.setdefault(key, {})[int(step)] = value
    if not losses:
        missing.append(f"{File.HISTORY} holds no training loss, so there is no curve to draw.")
    elif unbounded := sum(not math.isfinite(loss) for loss in losses.values()):
        subject = "1 logged loss is" if unbounded == 1 else f"{unbounded} logged losses are"
        missing.append(f"{subject} not finite and not drawn.")
    rows = tuple(
        Row(text(entry, "source"), number(entry, "uncertainty"), number(entry, "label_smoothing"), offset)
        for offset, entry in _lines(path / File.SAMPLES, missing)
    )
    before, after = (_evaluation(evaluation.get(when), missing) for when in ("before", "after"))
    missing.extend(_unfinished(metrics, before, after))
    return Run(
        path=path,
        name=text(metrics, "name") or (config.label if config else "") or path.resolve().name,
        config=config,
        config_text=config_text,
        environment=environment,
        metrics=metrics,
        losses=tuple(sorted(losses.items())),
        series={key: tuple(sorted(points.items())) for key, points in series.items()},
        rows=rows,
        before=before,
        after=after,
        missing=tuple(missing),
    )


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under a key, or None."""
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def text(mapping: Mapping[str, Any], key: str) -> str:
    """Return the string under a key, or the empty one."""
    value = mapping.get(key)
    return value if isinstance(value, str) else ""


def section(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under a key, or an empty one."""
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _check(path: Path) -> None:
    remedy = "pass the folder that `ual train` wrote, its output_dir"
    if not path.is_dir():
        problem = "this is a file, not a run folder" if path.exists() else "there is no such folder"
        raise UserError(problem, place=shown(path), remedy=remedy)
    if not any((path / mark).is_file() for mark in _MARKS):
        inside = sorted(child.name for child in path.iterdir() if (child / File.CONFIG).is_file())
        if inside:
            remedy = f"it holds runs; name those: {', '.join(inside[:5])}"
        raise UserError(
            f"not a run folder: it has none of {', '.join(_MARKS)}", place=str(path), remedy=remedy
        )


def _object(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        missing.append(f"{path.name} is missing.")
        return {}
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    missing.append(f"{path.name} is damaged and was ignored.")
    return {}


def _lines(path: Path, missing: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte offset, object) of every intact line; a killed run may have left half of one."""
    if not path.is_file():
        missing.append(f"{path.name} is missing.")
        return
    damaged = offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield offset, value
            elif line.strip():
                damaged += 1
            offset += len(line)
    if damaged:
        lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
        missing.append(f"{lines} of {path.name} ignored.")


def _config(path: Path, missing: list[str]) -> tuple[RunConfig | None, str]:
    if not path.is_file():
        missing.append(f"{path.name} is missing.")
        return None, ""
    shown = path.read_text(encoding="utf-8", errors="replace")
    try:
        return configuration.load(path), shown
    except UserError as error:
        missing.append(f"{path.name} cannot be read by this version: {error.problem}")
        return None, shown


def _evaluation(value: Any, missing: list[str]) -> Mapping[str, Any] | None:
    """Return a complete evaluation, or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or any(number(value, key) is None for key in _EVALUATION):
        missing.append(f"{File.EVALUATION} holds an incomplete evaluation, which was ignored.")
        return None
    return value


def _unfinished(
    metrics: Mapping[str, Any], before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> Iterator[str]:
    status = text(metrics, "status")
    if status == "interrupted":
        yield f"The run was stopped after {number(metrics, 'steps') or 0:,.0f} steps."
    elif status == "running":
        yield "The run was in progress, or had been killed, when this page was written."
    if after is None and before is None:
        yield "Nothing was measured on held-out samples: set data.eval or data.eval_fraction."
    elif after is None:
        yield "The trained model was not measured on the held-out samples, only the model before training."

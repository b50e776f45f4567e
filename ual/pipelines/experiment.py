"""An experiment: arms x seeds at equal budgets, trained one by one, resumable, compared on one page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ual.config.base import dump
from ual.config.experiment import BUDGET, Cell, ExperimentConfig
from ual.config.run import load
from ual.errors import Stopped, UserError
from ual.files import sha256, write_text
from ual.pipelines.train import run as train
from ual.report import write as write_report
from ual.runs.folder import File, RunFolder
from ual.train.matching import check_configuration


@dataclass(frozen=True, slots=True)
class Comparison:
    """The metrics of every run, the arms' paired differences from the baseline, and the page.

    A difference is as `ual.methods.statistics.PairedDifference`, for `nll` and `accuracy`.
    """

    metrics: list[dict[str, Any]]
    paired: list[dict[str, Any]]
    report: Path


def run(
    config: ExperimentConfig,
    *,
    command: Sequence[str] = (),
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
    before_each: Callable[[Path], None] = lambda _: None,
) -> Comparison:
    """Train the runs that are not finished, and write the page that compares all.

    The folder `config.output_dir` holds a run folder and a YAML file for each run. Called again, `run`
    resumes the run that was interrupted and skips those that are finished.

    Args:
        config: see `ual.config.experiment`.
        command, trust_remote_code, console, cache: as those of `ual.pipelines.train.run`.
        before_each: called with the folder of each run before it is trained.

    Raises:
        UserError: as `checked`; or an upload failed, after the page was written.
        Stopped: a signal arrived, and the step was saved.
    """
    say = (console or Console(quiet=True)).print
    metrics = []
    failed: UserError | None = None
    cells = checked(config)
    for number, cell in enumerate(cells, start=1):
        folder = Path(cell.config.output_dir)
        write_text(folder.with_suffix(".yaml"), dump(cell.config))
        done = _finished(cell)
        if done is None:
            before_each(folder)
            sentence = cell.config.loss.about.sentence
            say(f"\n[bold]{cell.arm}[/bold]  run {number} of {len(cells)}. {sentence}.", highlight=False)
            result = train(
                cell.config,
                command=command,
                resume="auto",
                trust_remote_code=trust_remote_code,
                console=console,
                cache=cache,
            )
            if result.stopped_by is not None:
                raise Stopped(
                    result.stopped_by,
                    f"in arm {cell.arm}, seed {cell.seed}, after step {result.metrics['steps']}; the same "
                    "command resumes",
                )
            done = result.metrics
            failed = failed or result.unpublished
        several = f" (seed {cell.seed})" if len(config.seeds) > 1 else ""
        metrics.append(done | {"name": cell.arm + several})
    report = write_report(
        [Path(cell.config.output_dir) for cell in cells], Path(config.output_dir) / "report.html"
    )
    if failed is not None:  # every arm is trained and compared
        raise failed
    return Comparison(metrics, _paired(cells, report) if len(cells) > 1 else [], report)


def _paired(cells: Sequence[Cell], report: Path) -> list[dict[str, Any]]:
    """Return the paired differences beside the report, with the names of arms in place of folders."""
    arms = {cell.arm: cell.arm for cell in cells} | {
        Path(cell.config.output_dir).name: cell.arm for cell in cells
    }
    figures = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    return [pair | {side: arms[pair[side][0]] for side in ("arm", "baseline")} for pair in figures["paired"]]


def checked(config: ExperimentConfig) -> list[Cell]:
    """Return the runs of an experiment, after a look at their folders.

    Raises:
        UserError: a configuration is wrong, or an earlier run had another one, another budget or other data.
    """
    cells = list(config.cells())
    dates = [RunFolder(cell.config.output_dir).date() for cell in cells]
    cells = [replace(cell, config=cell.config.on(min(dates))) for cell in cells]  # the same in all runs
    for cell in cells:
        _check_earlier(cell)
    return cells


def _finished(cell: Cell) -> dict[str, Any] | None:
    """Return the metrics of a run that is complete, with its evaluation if there are held-out samples."""
    folder = RunFolder(cell.config.output_dir)
    if not (folder.path / File.METRICS).exists() or folder.weights is None:
        return None
    metrics = folder.read_json(File.METRICS)
    evaluated = metrics["eval"] or not (cell.config.data.eval or cell.config.data.eval_fraction)
    return metrics if metrics["status"] == "completed" and evaluated else None


def _check_earlier(cell: Cell) -> None:
    """Refuse a run folder that was made with another budget or configuration, or from other data."""
    folder = Path(cell.config.output_dir)
    remedy = "choose another output folder, or remove this one"
    if not RunFolder(folder).holds_run():
        return
    if (folder / File.CONFIG).exists():
        earlier = load(folder / File.CONFIG).training
        for key in BUDGET:
            if earlier.get(key) != cell.config.training.get(key):
                raise UserError(
                    f"training.{key} was {earlier.get(key)} in this run, and the experiment has "
                    f"{cell.config.training.get(key)}",
                    place=str(folder),
                    remedy=remedy,
                )
    check_configuration(RunFolder(folder), cell.config)
    if (folder / File.ENVIRONMENT).exists():
        recorded = json.loads((folder / File.ENVIRONMENT).read_text(encoding="utf-8"))
        for path, digest in recorded["data_sha256"].items():
            if Path(path).is_file() and sha256(Path(path)) != digest:
                raise UserError(f"{path} has changed since this run", place=str(folder), remedy=remedy)

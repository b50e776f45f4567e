"""An evaluation, as a line: read -> answer -> fit temperatures -> measure.

    answers   every model answers the items of every task; answers are stored as they are computed
    fit       a share of the items fits a temperature, and is not measured
    measure   figures with intervals, as they are and at the temperature; differences from the first model

The folder of an evaluation:

    config.yaml, stages.json            the configuration; the inputs of every file of answers
    answers/MODEL/TASK.jsonl            an answer per line
    answers/MODEL/TASK.fitted.json      of samples: the temperature, and
    answers/MODEL/TASK.tempered.jsonl   their answers at it
    evaluation.json, evaluation.csv     the figures
"""

import csv
import datetime
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ual.config.base import dump, load_as
from ual.config.evaluate import EvaluateConfig
from ual.files import read_jsonl, write_json, write_text, writing
from ual.methods.statistics import Draws, Estimate, draws
from ual.pipelines.evaluation.items import (
    Asked,
    Choices,
    Items,
    Record,
    Records,
    Texts,
    read_items,
    table,
    without,
)
from ual.pipelines.evaluation.models import Model
from ual.pipelines.learner import Learner
from ual.pipelines.stages import Ledger, Step, appending, intact, read_object
from ual.runs.environment import environment, files
from ual.runs.lock import holding
from ual.runs.progress import Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What was found, as in evaluation.json, and the folder."""

    summary: dict[str, Any]
    folder: Path


def run(
    config: EvaluateConfig,
    *,
    command: Sequence[str] = (),
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Result:
    """Compute the answers that are missing, and all figures. Called again, `run` resumes.

    Args:
        config: see `ual.config.evaluate`.
        command: the words of the command line, for the record.
        trust_remote_code: run code from the models' repositories.
        console: where progress is drawn; None is silent.

    Raises:
        UserError: a model, a task or a file is wrong; or answers in the folder were computed with other
            settings. What was computed is kept.
    """
    folder = Path(config.output_dir)
    say = (console or Console(quiet=True)).print
    with holding(folder, "an evaluation", say), writing("the evaluation", folder):
        config = config.model_copy(update={"date": _date(config)})
        models = [
            Model.of(name, model, config, trust_remote_code=trust_remote_code)
            for name, model in config.models.items()
        ]
        tasks, dropped = [], {}
        for name, data in config.tasks.items():
            items = read_items(name, data, config)
            dropped[name] = frozenset[str]().union(*(items.too_long(model.renderer) for model in models))
            tasks.append(without(items, dropped[name]))
        work = _Work(config, Ledger(folder / "stages.json"), console)
        write_text(folder / "config.yaml", dump(config))
        outcomes = {(model.name, task.name): work.outcome(model, task) for model in models for task in tasks}
        summary = _summary(config, models, tasks, dropped, outcomes, command)
        write_json(folder / "evaluation.json", summary)
        write_text(folder / "evaluation.csv", _csv(summary))
    return Result(summary, folder)


def _date(config: EvaluateConfig) -> datetime.date:
    """Return the day that chat templates read: that on which the evaluation began."""
    earlier = Path(config.output_dir) / "config.yaml"
    began = load_as(EvaluateConfig, earlier).date if earlier.exists() else None
    return config.date or began or datetime.date.today()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model's answers to the items of a task that are measured, as they are and at the temperature."""

    plain: Any
    temperature: float | None
    tempered: Any


@dataclass(slots=True)
class _Work:
    """Computes answers, with one model in memory at a time."""

    config: EvaluateConfig
    ledger: Ledger
    console: Console | None
    _loaded: tuple[str, Learner] | None = field(default=None)

    def outcome(self, model: Model, task: Items) -> Outcome:
        """Return the answers of a model to a task; compute what is missing."""
        inputs = {"model": model.identity, "items": task.content}
        step = self._step(model, task, "jsonl", inputs)
        records = self._records(step, model, task, task.answers)
        plain: Any = task.evidence(records)
        if isinstance(task, Choices):
            temperature = task.temperature(records)
            return Outcome(plain, temperature, None if temperature is None else plain.at(temperature))
        if isinstance(task, Texts):
            temperature = self._fitted(model, task, inputs | {"fit": sorted(task.fit)})
            if temperature is not None:
                at = float(temperature)
                step = self._step(model, task, "tempered.jsonl", inputs | {"temperature": at})
                tempered = self._records(step, model, task, lambda asked: task.answers(asked, at))
                return Outcome(plain, at, task.evidence(tempered))
        return Outcome(plain, None, None)

    def _step(self, model: Model, task: Items, ending: str, inputs: dict[str, Any]) -> Step:
        path = Path(self.config.output_dir) / "answers" / model.name / f"{task.name}.{ending}"
        return Step(f"{model.name}, {task.name}.{ending}", path, inputs)

    def _records(
        self, step: Step, model: Model, task: Items, answers: Callable[[Asked], Iterator[list[Record]]]
    ) -> Records:
        """Return the records of a file, after those that are missing were computed and appended."""
        if self.ledger.begin(step):
            known = {record["key"] for record in intact(step.output)}
            with Progress(self.console) as progress, appending(step.output) as file:
                advance = progress.task(f"{model.name}, {task.name}", len(task.ids))
                for batch in answers(Asked(self._learner(model), self.config.batch_size, known, advance)):
                    file.add(record for record in batch if record["key"] not in known)
            self.ledger.finish(step)
        return {record["key"]: record for _, record in read_jsonl(step.output)}

    def _fitted(self, model: Model, task: Texts, inputs: dict[str, Any]) -> float | None:
        """Return the temperature of samples, which takes some passes over those of `fit`."""
        step = self._step(model, task, "fitted.json", inputs)
        if self.ledger.begin(step):
            with Progress(self.console) as progress:
                advance = progress.task(f"{model.name}, {task.name}: temperature", None)
                found = task.temperature(Asked(self._learner(model), self.config.batch_size, (), advance))
            write_json(step.output, {"temperature": found})
            self.ledger.finish(step)
        temperature: float | None = read_object(step.output)["temperature"]
        return temperature

    def _learner(self, model: Model) -> Learner:
        if self._loaded is None or self._loaded[0] != model.name:
            self._loaded = None  # before the next one is loaded
            self._loaded = model.name, model.load()
        return self._loaded[1]


# ---- figures ----


def _summary(
    config: EvaluateConfig,
    models: Sequence[Model],
    tasks: Sequence[Items],
    dropped: dict[str, frozenset[str]],
    outcomes: dict[tuple[str, str], Outcome],
    command: Sequence[str],
) -> dict[str, Any]:
    found = []
    for task in tasks:
        baselines: dict[str, Draws] = {}
        for model in models:
            outcome = outcomes[model.name, task.name]
            for version, evidence in (("plain", outcome.plain), ("tempered", outcome.tempered)):
                if evidence is None:
                    continue
                measured = table(evidence, config.bins)
                drawn = draws(measured, resamples=config.resamples, seed=config.seed)
                baseline = baselines.get(version)
                baselines.setdefault(version, drawn)
                found.append(
                    {
                        "task": task.name,
                        "model": model.name,
                        "version": version,
                        "temperature": outcome.temperature if version == "tempered" else 1.0,
                        "measures": _plain(drawn.estimates()),
                        "minus": models[0].name if baseline else "",
                        "differences": _plain(drawn.estimates(baseline)) if baseline else {},
                    }
                )
    about = environment(models[0].config, command, files(models[0].config), earlier={}, step=0)
    return {
        "name": Path(config.output_dir).name,
        "models": {model.name: {"source": model.source, "trained": model.trained} for model in models},
        "tasks": {
            task.name: {
                "kind": task.kind,
                "measured": len(task.ids) - len(task.fit),
                "fit": len(task.fit),
                "too_long": len(dropped[task.name]),
            }
            for task in tasks
        },
        "figures": found,
        "environment": {
            key: about[key] for key in ("command", "created", "versions", "machine", "git_commit")
        },
        "config": dump(config),
    }


def _plain(figures: dict[str, Estimate | None]) -> dict[str, Any]:
    return {name: None if of is None else asdict(of) for name, of in figures.items()}


def _csv(summary: dict[str, Any]) -> str:
    """Return the figures with one line for each measure and difference."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["task", "model", "minus", "version", "temperature", "measure", "value", "low", "high"])
    for entry in summary["figures"]:
        for minus, measures in (("", entry["measures"]), (entry["minus"], entry["differences"])):
            for name, of in measures.items():
                ends = [of[key] for key in ("value", "low", "high")] if of else ["", "", ""]
                about = [entry["task"], entry["model"], minus, entry["version"], entry["temperature"]]
                lines.writerow([*about, name, *ends])
    return text.getvalue()

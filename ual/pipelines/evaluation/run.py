"""An evaluation, as a line: read -> answer -> fit temperatures -> measure -> judge.

    answers   every model answers the items of every task; answers are stored as they are computed
    fit       a share of the items fits a temperature, and is not measured
    measure   figures with intervals, as they are and at the temperature; differences from the first model
    judge     a judge compares answers to instructions with those of a reference

The folder of an evaluation:

    config.yaml, stages.json            the configuration; the inputs of every file of answers
    answers/MODEL/TASK/answers.jsonl    an answer per line
    answers/MODEL/TASK/fitted.json      of samples: the temperature, and
    answers/MODEL/TASK/tempered.jsonl   their answers at it
    answers/MODEL/judge/answers.jsonl   answers to the instructions of the judge's reference
    answers/MODEL/lm_eval.json          what the lm-evaluation-harness found
    judge/MODEL/                        what the judge found, see `ual.pipelines.judge`
    evaluation.json, evaluation.csv     the figures
"""

import csv
import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from ual.config.base import dump, load_as
from ual.config.evaluate import EvaluateConfig
from ual.errors import UserError
from ual.files import write_json, write_text, writing
from ual.methods.statistics import Draws, Estimate, draws
from ual.pipelines.evaluation import harness, judged
from ual.pipelines.evaluation.answers import Answers, Outcome
from ual.pipelines.evaluation.items import Items, comparable, read_items, table, without
from ual.pipelines.evaluation.models import Model
from ual.pipelines.stages import Ledger
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
    keys: Mapping[str, str] = MappingProxyType({}),
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Result:
    """Compute the answers that are missing, and all figures. Called again, `run` resumes.

    Args:
        config: see `ual.config.evaluate`.
        command: the words of the command line, for the record.
        keys: environment variables; one of them may hold the key of the judge's server.
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
        compared = judged.asked(config.judge, models) if config.judge else None
        write_text(folder / "config.yaml", dump(config))
        answers = Answers(config, Ledger(folder / "stages.json"), console)
        found = _Found({task.name: _about(task, dropped[task.name]) for task in tasks})
        instructed = {}
        for model in models:  # one after the other, because one is in memory at a time
            for task in tasks:
                found.add(model.name, task.name, answers.of_task(model, task))
            if config.lm_eval:
                found.add_harness(model.name, answers.of_harness(model), config)
            if compared:
                instructed[model.name] = answers.to_instructions(model, compared.instructions)
        answers.release()  # a judge may be a local model
        summary = _summary(config, models, found, command)
        write_text(folder / "evaluation.csv", _csv(summary))
        write_json(folder / "evaluation.json", summary)  # before a judge fails
        if config.judge and compared:
            for model in models:
                with Progress(console) as progress:
                    of = instructed[model.name], compared, config.judge, folder / "judge" / model.name
                    summary["judged"][model.name] = judged.compare(model, *of, keys, progress)
                write_json(folder / "evaluation.json", summary)
    return Result(summary, folder)


def _date(config: EvaluateConfig) -> datetime.date:
    """Return the day that chat templates read: that on which the evaluation began."""
    earlier = Path(config.output_dir) / "config.yaml"
    try:
        began = load_as(EvaluateConfig, earlier).date if earlier.exists() else None
    except UserError as error:
        raise UserError(
            "the folder holds something else than an evaluation",
            place=config.output_dir,
            remedy="choose another output_dir",
        ) from error
    return config.date or began or datetime.date.today()


# ---- figures ----


@dataclass(slots=True)
class _Found:
    """Answers by task and model, and what is known of each task."""

    about: dict[str, dict[str, Any]]
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)

    def add(self, model: str, task: str, outcome: Outcome) -> None:
        self.outcomes.setdefault(task, {})[model] = outcome

    def add_harness(self, model: str, found: dict[str, Any], config: EvaluateConfig) -> None:
        """Add the tasks of the harness, named as ``lm_eval/TASK``."""
        self.harness[model] = {name: of for name, of in found.items() if name != "tasks"}
        self.harness[model]["tasks"] = {
            name: {
                key: task[key] for key in ("version", "kind", "shots", "items", "available", "metrics", "why")
            }
            for name, task in found["tasks"].items()
        }
        for name, task in found["tasks"].items():
            if (first := self.ids.setdefault(name, task["ids"])) != task["ids"]:
                raise UserError(
                    f"{model} answered {len(task['ids'])} items of {name}, and the first model {len(first)} "
                    "others: the task's data have changed",
                    place=f"answers/{model}/lm_eval.json",
                    remedy="choose another output_dir, or remove lm_eval.json of all models",
                )
            plain, temperature, tempered, fit = harness.evidence(task, config)
            about = {"kind": "lm_eval", "measured": task["items"] - fit, "fit": fit, "too_long": 0}
            self.about.setdefault(f"lm_eval/{name}", about)
            if plain:  # a task may have no score of single items
                self.add(model, f"lm_eval/{name}", Outcome(plain, temperature, tempered))


def _about(task: Items, too_long: frozenset[str]) -> dict[str, Any]:
    measured = len(task.ids) - len(task.fit)
    return {"kind": task.kind, "measured": measured, "fit": len(task.fit), "too_long": len(too_long)}


def _summary(
    config: EvaluateConfig, models: Sequence[Model], found: _Found, command: Sequence[str]
) -> dict[str, Any]:
    about = environment(models[0].config, command, files(models[0].config), earlier={}, step=0)
    return {
        "name": Path(config.output_dir).name,
        "models": {model.name: {"source": model.source, "trained": model.trained} for model in models},
        "tasks": {name: of for name, of in found.about.items() if name in found.outcomes},
        "figures": [
            entry for task, outcomes in found.outcomes.items() for entry in _figures(task, outcomes, config)
        ],
        "lm_eval": found.harness,
        "judged": {},
        "environment": {
            key: about[key] for key in ("command", "created", "versions", "machine", "git_commit")
        },
        "config": dump(config),
    }


def _figures(task: str, outcomes: Mapping[str, Outcome], config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """Yield the figures of every model, and their differences from those of the first."""
    baselines: dict[str, tuple[str, Draws, Outcome]] = {}
    for model, outcome in outcomes.items():
        for version, evidence in (("plain", outcome.plain), ("tempered", outcome.tempered)):
            if evidence is None:
                continue
            drawn = draws(table(evidence, config.bins), resamples=config.resamples, seed=config.seed)
            minus, baseline, of_baseline = baselines.setdefault(version, (model, drawn, outcome))
            alike = minus != model and comparable(outcome.plain, of_baseline.plain)
            yield {
                "task": task,
                "model": model,
                "version": version,
                "temperature": outcome.temperature if version == "tempered" else 1.0,
                "measures": _plain(drawn.estimates()),
                "minus": minus if alike else "",
                "differences": _plain(drawn.estimates(baseline)) if alike else {},
                "not_compared": "" if alike or minus == model else f"other tokens than {minus}",
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

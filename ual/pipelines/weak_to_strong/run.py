"""A weak-to-strong study, as a line: split -> weak -> answers -> arms -> strong -> evaluation -> report.

    split        divide the questions: right answers for the supervisor, questions for it to answer, test
    weak         train the supervisor on the right answers
    answers      ask it every other question several times
    arms         measure the reliability of its answers; choose labels, questions and weights (`arms.py`)
    strong       train the strong model on the samples of each arm, at equal budgets
    evaluation   answer the test questions with every trained model
    report       figures and page

Labels, reliability and every arm but the ceiling are computed without the right answers to the unsupervised
questions: `Split.unsupervised` does not have them.

The study's folder:

    config.yaml, stages.json        the configuration; the inputs of each stage that has begun
    split.json, supervised.jsonl    ids of the questions; the supervisor's training samples
    weak/seed1/weak/                training runs of supervisors
    answers/weak-seed1.jsonl        one answer per line, which `ual reliability` also reads
    arms/seed1/filter.jsonl         training samples of an arm
    strong/seed1/filter/            its training run
    evaluation/filter-seed1.jsonl   its answers to the test questions
    report.html, report.json        what was found
"""

import datetime
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from rich.console import Console

from ual.config.base import dump, merged
from ual.config.experiment import ExperimentConfig
from ual.config.run import RunConfig, parse
from ual.config.weak_to_strong import ARMS, WeakToStrongConfig
from ual.data.tasks import Task, load_task, pose, wordings
from ual.errors import UserError
from ual.evaluate.tasks import Answered, Posed, choose, work_out
from ual.files import read_jsonl, sha256, write_json, write_jsonl, write_text, writing
from ual.methods.answers import normalize
from ual.pipelines import experiment
from ual.pipelines.weak_to_strong import figures
from ual.pipelines.weak_to_strong.arms import Asked, measure, training_samples
from ual.pipelines.weak_to_strong.learner import Learner, renderer, weights
from ual.pipelines.weak_to_strong.paraphrase import paraphrase
from ual.pipelines.weak_to_strong.questions import Split, divide, posed, sources
from ual.pipelines.weak_to_strong.stages import Ledger, appending, intact
from ual.records import Message, Sample
from ual.report import weak_to_strong as report
from ual.runs.environment import digest
from ual.runs.folder import File, RunFolder
from ual.runs.lock import holding
from ual.runs.progress import Progress
from ual.uncertainty.estimators.parsing import last_number

Stage = Literal["split", "weak", "answers", "arms", "strong", "evaluation", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Who = Literal["weak", "self"]
WHO: tuple[Literal["weak", "strong"], ...] = ("weak", "strong")
TOLERANCE = 0.05
"""The share by which the loss tokens of an arm may differ from the first arm's."""


@dataclass(frozen=True, slots=True)
class Result:
    """What was found, as in report.json, and the page; None before the stage `report`."""

    summary: dict[str, Any] | None
    report: Path | None


def run(
    config: WeakToStrongConfig,
    *,
    only: Stage | None = None,
    command: Sequence[str] = (),
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
    before_each: Callable[[Path], None] = lambda _: None,
) -> Result:
    """Compute every stage that is not complete, seed by seed. Called again, `run` resumes.

    Args:
        config: see `ual.config.weak_to_strong`.
        only: the stage to compute; those before it must be complete. None: all.
        command, trust_remote_code, console, cache, before_each: as those of `ual.pipelines.experiment.run`.

    Raises:
        UserError: an error that the user can correct. What was computed is kept, and the same command
            resumes.
        Stopped: a signal arrived during training, and the step was saved.
    """
    task = checked(config)
    folder = Path(config.output_dir)
    common = {"command": command, "trust_remote_code": trust_remote_code, "cache": cache}
    common |= {"console": console, "before_each": before_each}
    say = (console or Console(quiet=True)).print
    with holding(folder, "a study", say), writing("the study", folder, "free some space, then run it again"):
        study = _divided(config, task, common)
        if not (folder / "config.yaml").exists():
            write_text(folder / "config.yaml", dump(config))
        result = Result(None, None)
        for seed in config.seeds:
            for stage, compute in _STAGES.items():
                if only in (None, stage):
                    say(f"\n[bold]{stage}[/bold], seed {seed}", highlight=False)
                    compute(study, seed)
            if only in (None, "report"):
                result = _reported(study)
        write_text(folder / "config.yaml", dump(config))  # a changed one only now: a stage may refuse it
    return result


def checked(config: WeakToStrongConfig) -> Task:
    """Return the task of a study, after a look at its configuration.

    Raises:
        UserError: the task, a training run or a way of asking is not possible; or several processes run.
    """
    task = load_task(config.task)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "`ual w2s` runs in one process, and a launcher has started several",
            remedy="start `ual w2s` alone; its stages split and arms write the configuration of each run "
            "beside its folder, and a launcher can train it: `-m ual train FILE --resume auto`",
        )
    if task.kind == "number":
        if config.ask.by == "order":
            raise UserError(
                "answers that are numbers have no options to reorder",
                place="configuration, ask.by",
                remedy='set it to "paraphrase" or "sample"',
            )
        if needy := [name for name in config.arms if ARMS[name].needs_options]:
            raise UserError(
                f"arm {needy[0]} needs probabilities of options, and the answers of this task are numbers",
                place="configuration, arms",
                remedy="remove the arm",
            )
    for who in WHO:
        checked_run(config, who)
    return task


# ---- the study, its runs and files ----


@dataclass(frozen=True, slots=True)
class Study:
    """A configuration with its task and questions, and what every stage needs.

    `common` are arguments of `ual.pipelines.experiment.run`. `date` is the day that chat templates read.
    """

    config: WeakToStrongConfig
    task: Task
    split: Split
    date: str
    ledger: Ledger
    common: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def answers(self, who: Who, seed: int) -> Path:
        return self.folder / "answers" / f"{who}-seed{seed}.jsonl"

    def samples(self, arm: str, seed: int) -> Path:
        return self.folder / "arms" / f"seed{seed}" / f"{arm}.jsonl"

    def evaluation(self, name: str, seed: int) -> Path:
        return self.folder / "evaluation" / f"{name}-seed{seed}.jsonl"

    def trained(self, name: str, seed: int) -> RunConfig:
        """Return the training run of an arm or, as "supervisor-weak", of a supervisor."""
        if name.startswith(SUPERVISOR):
            [cell] = self.supervisor(name.removeprefix(SUPERVISOR), seed).cells()
            return cell.config
        return next(cell.config for cell in self.strong(seed).cells() if cell.arm == name)

    def supervisor(self, who: str, seed: int) -> ExperimentConfig:
        """Return the training of a supervisor: an experiment with one arm."""
        raw = self.config.weak if who == "weak" else self.config.strong
        own = {"data": {"train": str(self.folder / "supervised.jsonl"), "date": self.date}}
        return ExperimentConfig(
            output_dir=str(self.folder / who / f"seed{seed}"),
            base=merged(merged({"loss": "sft"}, raw), own),
            arms={who: {}},
            seeds=[seed],
        )

    def strong(self, seed: int) -> ExperimentConfig:
        """Return the training of the arms. A budget of loss tokens changes their steps."""
        arms = {}
        for name, overrides in self.config.arms.items():
            arm = merged(
                merged(ARMS[name].run, overrides), {"data": {"train": str(self.samples(name, seed))}}
            )
            if self.config.budget == "tokens":
                arm = merged(arm, {"training": {"max_steps": self._steps(name, seed)}})
            arms[name] = arm
        return ExperimentConfig(
            output_dir=str(self.folder / "strong" / f"seed{seed}"),
            base=merged(self.config.strong, {"data": {"date": self.date}}),
            arms=arms,
            seeds=[seed],
            budget="tokens" if self.config.budget == "tokens" else "steps",
        )

    def _steps(self, name: str, seed: int) -> int:
        tokens = self.loss_tokens(seed)
        steps: int = self.config.strong["training"]["max_steps"]
        return max(1, round(steps * tokens[next(iter(self.config.arms))] / tokens[name]))

    def loss_tokens(self, seed: int) -> dict[str, float]:
        """Return the mean number of loss tokens of each arm's samples."""
        path = self.folder / "arms" / f"seed{seed}" / "loss_tokens.json"
        _require(path, "arms")
        found: dict[str, float] = json.loads(path.read_bytes())
        return found


SUPERVISOR = "supervisor-"
"""Precedes the names of supervisors among trained models."""


def checked_run(config: WeakToStrongConfig, who: Literal["weak", "strong"]) -> RunConfig:
    """Return the training run of a model, before its samples are known.

    Raises:
        UserError: a key of `weak`, `strong` or an arm is wrong.
    """
    raw = config.weak if who == "weak" else config.strong
    own = {"data": {"train": "supervised.jsonl"}, "output_dir": str(Path(config.output_dir) / who)}
    checked = parse(merged(raw, own), place=f"configuration, {who}")
    if who == "strong":
        for name, overrides in config.arms.items():
            parse(
                merged(merged(raw, own), merged(ARMS[name].run, overrides)),
                place=f"configuration, arms.{name}",
            )
    return checked


def _require(path: Path, stage: Stage) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing", remedy=f"run the stage `{stage}` first, or all stages")


# ---- split ----


def _divided(config: WeakToStrongConfig, task: Task, common: Mapping[str, Any]) -> Study:
    """Divide the questions, or read how they were divided."""
    folder = Path(config.output_dir)
    path, ledger = folder / "split.json", Ledger(folder / "stages.json")
    lengths = {who: checked_run(config, who).data.model_dump() for who in WHO}
    known = ledger.begin(
        "split",
        path,
        data=sources(config),
        task=task.model_dump(),
        split=config.split.model_dump(),
        arms=any(ARMS[name].needs_options for name in config.arms),
        lengths=lengths,
    )
    recorded = json.loads(path.read_bytes()) if known else {"date": datetime.date.today().isoformat()}
    date = recorded["date"]
    weak, strong = (
        renderer(
            checked_run(config, who).on(datetime.date.fromisoformat(date)),
            fitting=True,
            trust_remote_code=common["trust_remote_code"],
        )
        for who in WHO
    )
    split = divide(config, task, weak, strong, recorded=recorded if known else None)
    if config.ask.by == "order":  # a question with too few options is found before training
        wordings(task, min(split.unsupervised, key=lambda item: len(item.options)), config.ask.times)
    if not known:
        samples = []
        for item in split.supervised:
            assert item.gold is not None
            wording = pose(task, item)
            completion = wording.reply(item.gold) if wording.replies else item.solution
            samples.append({"id": item.id, "prompt": wording.prompt, "completion": completion})
        write_jsonl(folder / "supervised.jsonl", samples)
        write_json(path, recorded | split.ids())
        ledger.finish("split")
    study = Study(config, task, split, date, ledger, common)
    for seed in config.seeds:
        for who in config.supervisors:
            _write_runs(study.supervisor(who, seed))
    return study


def _write_runs(trained: ExperimentConfig) -> None:
    """Write the configuration of each run beside its folder, where a launcher can use it."""
    for cell in trained.cells():
        write_text(Path(cell.config.output_dir).with_suffix(".yaml"), dump(cell.config))


# ---- weak, answers ----


def _train_supervisors(study: Study, seed: int) -> None:
    for who in study.config.supervisors:
        experiment.run(study.supervisor(who, seed), **study.common)


def _ask(study: Study, seed: int) -> None:
    for who in study.config.supervisors:
        trained = study.supervisor(who, seed)
        [cell] = trained.cells()
        path, ask = study.answers(who, seed), study.config.ask
        of = {"split": study.split.ids(), "task": study.task.model_dump(), "ask": ask.model_dump()}
        stage = f"answers of {who}, seed {seed}"
        if study.ledger.begin(stage, path, **of, weights=digest(weights(cell.config))):
            continue
        others = _paraphrased(study) if ask.by == "paraphrase" else None
        if ask.by == "sample":
            count = ask.times if study.task.kind == "number" else 1  # options are drawn from one reply
            questions = [
                Posed(f"{item.id}#{k}", pose(study.task, item), item.place)
                for item in study.split.unsupervised
                for k in range(count)
            ]
        else:
            questions = posed(
                study.task, study.split.unsupervised, ask.times, seed=ask.seed, paraphrases=others
            )
        _append(study, cell.config, questions, path, f"asking {who}", _Draws(study, seed), trained=True)
        study.ledger.finish(stage)


def _paraphrased(study: Study) -> dict[str, list[str]]:
    ask = study.config.ask
    assert ask.backend is not None
    with Progress(study.common["console"]) as progress:
        return paraphrase(
            study.split.unsupervised,
            ask.times - 1,
            ask.backend,
            study.folder / "paraphrases.sqlite",
            max_tokens=ask.max_tokens,
            environment=os.environ,
            trust_remote_code=study.common["trust_remote_code"],
            notice=progress.say,
            advance=progress.task("writing paraphrases", len(study.split.unsupervised)),
        )


@dataclass(frozen=True, slots=True)
class _Draws:
    """The records of a supervisor's answer: one, or several draws from the probabilities of the options."""

    study: Study
    seed: int

    def keys(self, key: str) -> list[str]:
        """Return the keys of the records that an answer makes."""
        ask = self.study.config.ask
        if ask.by != "sample" or self.study.task.kind == "number":
            return [key]
        return [f"{key.rpartition('#')[0]}#{k}" for k in range(ask.times)]

    def __call__(self, question: Posed, answered: Answered) -> list[dict[str, Any]]:
        keys = self.keys(question.key)
        values: Sequence[str | None] = [answered.value]
        if len(keys) > 1:
            ask, p = self.study.config.ask, answered.probabilities
            draw = random.Random(f"{ask.seed} {self.seed} {question.key}")  # noqa: S311
            values = draw.choices(list(p), [x ** (1 / ask.temperature) for x in p.values()], k=len(keys))
        records = []
        for key, value in zip(keys, values, strict=True):
            id, _, wording = key.rpartition("#")
            text = (
                answered.text if value == answered.value or value is None else question.wording.reply(value)
            )
            records.append(
                {
                    "key": key,
                    "question_id": id,
                    "wording": int(wording),
                    "prompt": question.wording.prompt,
                    "text": text,
                    "value": value,
                    "probabilities": answered.probabilities,
                    "mass": answered.mass,
                }
            )
        return records


def _append(
    study: Study,
    config: RunConfig,
    questions: Sequence[Posed],
    path: Path,
    what: str,
    records: "_Draws | _Plain",
    *,
    trained: bool,
) -> None:
    """Answer the questions whose records are not in a file of JSON lines, and append them.

    Args:
        study: has the task and how it is asked.
        config: the training run of the model.
        questions: with distinct keys.
        path: of the file.
        what: is done, for progress.
        records: make an answer's records.
        trained: by the run, or as it was downloaded.
    """
    known = {record["key"] for record in intact(path)}
    done = {q.key for q in questions if known.issuperset(records.keys(q.key))}
    by_key = {question.key: question for question in questions}
    with Progress(study.common["console"]) as progress, appending(path) as file:
        advance = progress.task(what, len(questions))
        if len(done) == len(questions):
            return
        learner = Learner.load(config, trained=trained, trust_remote_code=study.common["trust_remote_code"])
        options: dict[str, Any] = {"batch_size": study.config.batch_size, "known": done, "advance": advance}
        if study.task.kind == "number":
            ask = study.config.ask
            sampled = isinstance(records, _Draws) and ask.by == "sample"
            answers = work_out(
                learner.model,
                learner.renderer,
                questions,
                read=lambda text: normalize(last_number(text)),
                max_tokens=ask.max_tokens,
                temperature=ask.temperature if sampled else 0.0,
                seeds=[_number(f"{ask.seed} {config.training['seed']} {q.key}") for q in questions],
                **options,
            )
        else:
            answers = choose(learner.model, learner.renderer, questions, **options)
        for batch in answers:
            made = (record for a in batch for record in records(by_key[a.key], a))
            file.add(record for record in made if record["key"] not in known)


def _number(text: str) -> int:
    """Return a number for a text, as a seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


# ---- arms, strong ----


def _asked(study: Study, who: Who, seed: int) -> list[Asked]:
    path = study.answers(who, seed)
    if not study.ledger.complete(f"answers of {who}, seed {seed}", path):
        raise UserError(f"{path} is not complete", remedy="run the stage `answers` first, or all stages")
    answers = (answer for _, answer in read_jsonl(path))
    return measure(study.split.unsupervised, answers, study.config.reliability, str(path))


def _choose_samples(study: Study, seed: int) -> None:
    tokens = {}
    reader = renderer(
        checked_run(study.config, "strong").on(datetime.date.fromisoformat(study.date)),
        fitting=True,
        trust_remote_code=study.common["trust_remote_code"],
    )
    asked = {who: _asked(study, who, seed) for who in study.config.supervisors}
    for name in study.config.arms:
        arm, path = ARMS[name], study.samples(name, seed)
        of: dict[str, Any] = {"answers": sha256(study.answers(arm.supervisor, seed))}
        if arm.labels == "gold":
            of = {"right answers": {id: gold._asdict() for id, gold in study.split.hidden.items()}}
        of |= {"reliability": study.config.reliability.model_dump(), "task": study.task.model_dump()}
        stage = f"samples of {name}, seed {seed}"
        if not study.ledger.begin(stage, path, **of):
            found = training_samples(
                name,
                arm,
                study.task,
                asked[arm.supervisor],
                study.split.hidden,
                study.config.reliability,
                seed=seed,
            )
            write_jsonl(path, found)
            study.ledger.finish(stage)
        tokens[name] = fmean(_loss_tokens(reader, sample) for _, sample in read_jsonl(path))
    if study.config.budget == "samples":
        _check_budget(tokens, seed)
    write_json(study.folder / "arms" / f"seed{seed}" / "loss_tokens.json", tokens)
    _write_runs(study.strong(seed))


def _loss_tokens(reader: Any, sample: Mapping[str, Any]) -> int:
    turns = Message("user", sample["prompt"]), Message("assistant", sample["completion"])
    rendered = reader.render(Sample(sample["id"], turns))
    return rendered.loss_tokens if rendered else 0


def _check_budget(tokens: Mapping[str, float], seed: int) -> None:
    """Refuse arms whose loss tokens differ at equal samples."""
    (first, reference), *others = tokens.items()
    for name, mean in others:
        if abs(mean - reference) > TOLERANCE * reference:
            raise UserError(
                f"arm {name} has {mean:.2f} loss tokens per sample and arm {first} has {reference:.2f} (seed "
                f"{seed}): at equal samples their loss tokens differ by more than {TOLERANCE:.0%}",
                place="configuration, budget",
                remedy="set budget to `tokens`, which scales the steps of each arm; or use replies of one "
                "length, such as letters",
            )


def _train_arms(study: Study, seed: int) -> None:
    for name in study.config.arms:
        _require(study.samples(name, seed), "arms")
    experiment.run(study.strong(seed), **study.common)


# ---- evaluation, report ----


class _Plain:
    """The record of an answer to a test question."""

    def keys(self, key: str) -> list[str]:
        return [key]

    def __call__(self, question: Posed, answered: Answered) -> list[dict[str, Any]]:
        record = {"key": answered.key, "value": answered.value, "probabilities": answered.probabilities}
        return [
            record | {"mass": answered.mass} | ({} if answered.probabilities else {"text": answered.text})
        ]


def _evaluated(study: Study) -> list[str]:
    """Return the names of the trained models: supervisors and arms."""
    return [*(SUPERVISOR + who for who in study.config.supervisors), *study.config.arms]


def _evaluate(study: Study, seed: int) -> None:
    test = [Posed(item.id, pose(study.task, item), item.place) for item in study.split.test]
    ids = [item.id for item in study.split.test]
    for name in _evaluated(study):
        config, path = study.trained(name, seed), study.evaluation(name, seed)
        stage = f"evaluation of {name}, seed {seed}"
        of = {"questions": ids, "task": study.task.model_dump(), "weights": digest(weights(config))}
        if not study.ledger.begin(stage, path, **of):
            _append(study, config, test, path, f"evaluating {name}", _Plain(), trained=True)
            study.ledger.finish(stage)
    if study.task.kind != "number":
        _measure_difficulty(study, seed)


def _measure_difficulty(study: Study, seed: int) -> None:
    """Answer the unsupervised questions with the untrained strong model, once."""
    path = study.folder / "evaluation" / "untrained.jsonl"
    of = {"split": study.split.ids(), "task": study.task.model_dump(), "model": study.config.strong["model"]}
    if study.ledger.begin("difficulty", path, **of):
        return
    items = study.split.unsupervised
    questions = [Posed(item.id, pose(study.task, item), item.place) for item in items]
    config = study.trained(next(iter(study.config.arms)), seed)
    _append(study, config, questions, path, "asking the untrained model", _Plain(), trained=False)
    study.ledger.finish("difficulty")


def _reported(study: Study) -> Result:
    """Write what is known: of a study that is not finished, the figures of complete stages."""
    found = figures.Found(config=study.config, kind=study.task.kind, split=study.split)
    for seed in study.config.seeds:
        for who in study.config.supervisors:
            if study.ledger.complete(f"answers of {who}, seed {seed}", study.answers(who, seed)):
                found.asked.setdefault(who, {})[seed] = _asked(study, who, seed)
        for name in _evaluated(study):
            path = study.evaluation(name, seed)
            if study.ledger.complete(f"evaluation of {name}, seed {seed}", path):
                folder = RunFolder(study.trained(name, seed).output_dir)
                found.answers.setdefault(name, {})[seed] = {r["key"]: r for _, r in read_jsonl(path)}
                found.metrics.setdefault(name, {})[seed] = folder.read_json(File.METRICS)
                found.environment = folder.read_json(File.ENVIRONMENT)
    path = study.folder / "evaluation" / "untrained.jsonl"
    if study.ledger.complete("difficulty", path):
        found.untrained = {record["key"]: record for _, record in read_jsonl(path)}
    summary = found.summary()
    write_json(study.folder / "report.json", summary)
    return Result(summary, report.write(summary, study.folder / "report.html"))


_STAGES: dict[Stage, Callable[[Study, int], None]] = {
    "weak": _train_supervisors,
    "answers": _ask,
    "arms": _choose_samples,
    "strong": _train_arms,
    "evaluation": _evaluate,
}

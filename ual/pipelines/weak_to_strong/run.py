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
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from rich.console import Console

from ual.config.base import dump, merged
from ual.config.experiment import ExperimentConfig
from ual.config.run import RunConfig, parse
from ual.config.weak_to_strong import ARMS, WeakToStrongConfig
from ual.data.tasks import Task, load_task, pose
from ual.errors import UserError
from ual.evaluate.tasks import Answered, Posed, choose, work_out
from ual.files import read_jsonl, sha256, write_json, write_jsonl, write_text, writing
from ual.methods.answers import normalize
from ual.pipelines import experiment
from ual.pipelines.learner import Learner, renderer, weights_digest
from ual.pipelines.stages import Ledger, Step, appending, intact, read_object
from ual.pipelines.weak_to_strong import figures
from ual.pipelines.weak_to_strong.arms import Asked, measure, training_samples
from ual.pipelines.weak_to_strong.paraphrase import paraphrase
from ual.pipelines.weak_to_strong.questions import Split, divide, posed, sources
from ual.records import Message, Sample
from ual.report import weak_to_strong as report
from ual.runs.folder import File, RunFolder
from ual.runs.lock import holding
from ual.runs.progress import Progress
from ual.uncertainty.estimators.parsing import last_number

Stage = Literal["split", "weak", "answers", "arms", "strong", "evaluation", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Who = Literal["weak", "self"]
WHO: tuple[Literal["weak", "strong"], ...] = ("weak", "strong")


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
        result = _reported(study) if only == "report" else Result(None, None)
        for seed in config.seeds:
            for stage, compute in _STAGES.items():
                if only in (None, stage):
                    say(f"\n[bold]{stage}[/bold], seed {seed}", highlight=False)
                    compute(study, seed)
            if only is None:
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

    def answers(self, who: Who, seed: int) -> Step:
        """Return the step that asks a supervisor."""
        inputs = {
            "questions": self.split.contents("unsupervised"),
            "task": self.task.model_dump(),
            "ask": self.config.ask.model_dump(),
            "weights": weights_digest(self.trained(SUPERVISOR + who, seed)),
        }
        path = self.folder / "answers" / f"{who}-seed{seed}.jsonl"
        return Step(f"answers of {who}, seed {seed}", path, inputs)

    def samples(self, arm: str, seed: int) -> Path:
        """Return the file of an arm's training samples."""
        return self.folder / "arms" / f"seed{seed}" / f"{arm}.jsonl"

    def choice(self, name: str, seed: int) -> Step:
        """Return the step that makes the training samples of an arm, with what this arm uses."""
        arm, config = ARMS[name], self.config.reliability
        used: dict[str, Any] = {"unparsed": config.unparsed} if arm.labels in ("majority", "distinct") else {}
        if arm.select != "all":
            used |= {"unparsed": config.unparsed, "rule": config.rule, "value": config.value}
        if arm.labels == "distinct":
            used["temperature"] = config.temperature
        inputs: dict[str, Any] = {"task": self.task.model_dump(), "reliability": used}
        if arm.labels == "gold":
            inputs["questions"] = self.split.contents("unsupervised")
            inputs["right answers"] = {id: list(gold) for id, gold in self.split.hidden.items()}
        else:
            inputs["answers"] = sha256(self.answers(arm.supervisor, seed).output)
        return Step(f"samples of {name}, seed {seed}", self.samples(name, seed), inputs)

    def evaluation(self, name: str, seed: int) -> Step:
        """Return the step that evaluates a trained model."""
        inputs: dict[str, Any] = {
            "questions": self.split.contents("test"),
            "task": self.task.model_dump(),
            "weights": weights_digest(self.trained(name, seed)),
        }
        if self.task.kind == "number":
            inputs["ask.max_tokens"] = self.config.ask.max_tokens
        path = self.folder / "evaluation" / f"{name}-seed{seed}.jsonl"
        return Step(f"evaluation of {name}, seed {seed}", path, inputs)

    @property
    def difficulty(self) -> Step:
        """The step that asks the untrained strong model."""
        inputs = {
            "questions": self.split.contents("unsupervised"),
            "task": self.task.model_dump(),
            "model": self.config.strong["model"],
        }
        return Step("the untrained model", self.folder / "evaluation" / "untrained.jsonl", inputs)

    def trained(self, name: str, seed: int) -> RunConfig:
        """Return the training run of an arm or, as "supervisor-weak", of a supervisor."""
        if name.startswith(SUPERVISOR):
            [cell] = self.supervisor(name.removeprefix(SUPERVISOR), seed).cells()
            return cell.config
        return next(cell.config for cell in self.strong(seed).cells() if cell.arm == name)

    def has_weights(self, name: str, seed: int) -> bool:
        """Return whether a supervisor or an arm is trained."""
        folder = self.folder / "strong" / f"seed{seed}" / name
        if name.startswith(SUPERVISOR):
            folder = Path(self.trained(name, seed).output_dir)
        return RunFolder(folder).weights is not None

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
        found = read_object(path) if path.exists() else {}
        if missing := [name for name in self.config.arms if name not in found]:
            problem = f"the samples of {missing[0]}, seed {seed}, have not been chosen yet"
            raise UserError(problem, place=str(path), remedy="run the stage `arms` first, or all")
        return {name: float(found[name]) for name in self.config.arms}


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
        arms = {name: merged(ARMS[name].run, of) for name, of in config.arms.items()}
        base = merged(raw, {"data": own["data"]})
        list(ExperimentConfig(output_dir=config.output_dir, base=base, arms=arms).cells())
    return checked


# ---- split ----


_LENGTHS = {"chat_template", "chat_template_kwargs", "system_prompt", "max_length"}
"""Keys of `data` that decide how long a question is."""


def _divided(config: WeakToStrongConfig, task: Task, common: Mapping[str, Any]) -> Study:
    """Divide the questions, or read how they were divided."""
    folder = Path(config.output_dir)
    ledger = Ledger(folder / "stages.json")
    inputs: dict[str, Any] = {
        "data": sources(config),
        "task": task.model_dump(),
        "split": config.split.model_dump(),
        "arms that need options": any(ARMS[name].needs_options for name in config.arms),
        "lengths": {who: checked_run(config, who).data.model_dump(include=_LENGTHS) for who in WHO},
    }
    if task.kind == "number":
        inputs["ask.max_tokens"] = config.ask.max_tokens
    step = Step("split", folder / "split.json", inputs)
    known = ledger.complete(step)
    recorded = read_object(step.output) if known else {"date": datetime.date.today().isoformat()}
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
    if not known:
        samples = []
        for item in split.supervised:
            assert item.gold is not None
            wording = pose(task, item)
            completion = wording.reply(item.gold) if wording.replies else item.solution
            samples.append({"id": item.id, "prompt": wording.prompt, "completion": completion})
        ledger.begin(step)
        write_jsonl(folder / "supervised.jsonl", samples)
        write_json(step.output, recorded | split.ids())
        ledger.finish(step)
    study = Study(config, task, split, date, ledger, common)
    for seed in config.seeds:
        for who in config.supervisors:
            _write_runs(study.supervisor(who, seed))
    return study


def _write_runs(trained: ExperimentConfig) -> None:
    """Write the configuration of each run that has not begun beside its folder, for a launcher."""
    for cell in trained.cells():
        if not RunFolder(cell.config.output_dir).holds_run():
            write_text(Path(cell.config.output_dir).with_suffix(".yaml"), dump(cell.config))


# ---- weak, answers ----


def _train_supervisors(study: Study, seed: int) -> None:
    for who in study.config.supervisors:
        experiment.run(study.supervisor(who, seed), **study.common)


def _ask(study: Study, seed: int) -> None:
    for who in study.config.supervisors:
        [cell] = experiment.checked(study.supervisor(who, seed))
        step, ask = study.answers(who, seed), study.config.ask
        if not study.ledger.begin(step):
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
        _append(study, cell.config, questions, step, f"asking {who}", _Draws(study, seed), trained=True)


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
    """The records of a supervisor's answer: one, or its most probable option and draws of others."""

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
            best = max(p.values())
            odds = [(x / best) ** (1 / ask.temperature) for x in p.values()]
            values = [answered.value, *draw.choices(list(p), odds, k=len(keys) - 1)]
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
    step: Step,
    what: str,
    records: "_Draws | _Plain",
    *,
    trained: bool,
) -> None:
    """Finish a step: answer the questions whose records are not in its file of JSON lines, and append them.

    Args:
        study: has the task and how it is asked.
        config: the training run of the model.
        questions: with distinct keys.
        step: that has begun.
        what: is done, for progress.
        records: make an answer's records.
        trained: by the run, or as it was downloaded.
    """
    known = {record["key"] for record in intact(step.output)}
    done = {q.key for q in questions if known.issuperset(records.keys(q.key))}
    by_key = {question.key: question for question in questions}
    with Progress(study.common["console"]) as progress, appending(step.output) as file:
        advance = progress.task(what, len(questions))
        if len(done) < len(questions):
            learner = Learner.load(
                config, trained=trained, trust_remote_code=study.common["trust_remote_code"]
            )
            answers = _answers(study, learner, questions, records, seed=config.training["seed"])
            for batch in answers(batch_size=study.config.batch_size, known=done, advance=advance):
                made = (record for a in batch for record in records(by_key[a.key], a))
                file.add(record for record in made if record["key"] not in known)
    study.ledger.finish(step)


def _answers(
    study: Study, learner: Learner, questions: Sequence[Posed], records: "_Draws | _Plain", *, seed: int
) -> Callable[..., Iterator[list[Answered]]]:
    """Return the function that yields a model's answers, batch by batch."""
    if study.task.kind != "number":
        return partial(choose, learner.model, learner.renderer, questions)
    ask = study.config.ask
    sampled = isinstance(records, _Draws) and ask.by == "sample"
    draws = [
        (
            0.0 if not sampled or q.key.endswith("#0") else ask.temperature,
            _number(f"{ask.seed} {seed} {q.key}"),
        )
        for q in questions
    ]
    return partial(
        work_out,
        learner.model,
        learner.renderer,
        questions,
        read=lambda text: normalize(last_number(text)),
        max_tokens=ask.max_tokens,
        draws=draws,
    )


def _number(text: str) -> int:
    """Return a number for a text, as a seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


# ---- arms, strong ----


def _asked(study: Study, who: Who, seed: int) -> list[Asked]:
    step = study.answers(who, seed)
    study.ledger.require(step, "answers")
    answers = (answer for _, answer in read_jsonl(step.output))
    return measure(study.split.unsupervised, answers, study.config.reliability, str(step.output))


def _choose_samples(study: Study, seed: int) -> None:
    reader = renderer(
        checked_run(study.config, "strong").on(datetime.date.fromisoformat(study.date)),
        fitting=True,
        trust_remote_code=study.common["trust_remote_code"],
    )
    for who in study.config.supervisors:
        experiment.checked(study.supervisor(who, seed))
    asked = {who: _asked(study, who, seed) for who in study.config.supervisors}
    tokens: dict[str, float] = {}
    for name in study.config.arms:
        arm, step = ARMS[name], study.choice(name, seed)
        trained = RunFolder(study.folder / "strong" / f"seed{seed}" / name).holds_run()
        if study.ledger.begin(step, replace=not trained):
            of = asked[arm.supervisor], study.split.hidden, study.config.reliability
            found = training_samples(name, arm, study.task, *of, seed=seed)
            # a worked answer may be longer than training can use
            write_jsonl(step.output, [sample for sample in found if _loss_tokens(reader, sample)])
            study.ledger.finish(step)
        counts = [_loss_tokens(reader, sample) for _, sample in read_jsonl(step.output)]
        if not counts:
            raise UserError(
                f"arm {name} has no training sample: all are longer than {reader.max_length} tokens",
                place=str(step.output),
                remedy="raise strong.data.max_length",
            )
        tokens[name] = fmean(counts)
    write_json(study.folder / "arms" / f"seed{seed}" / "loss_tokens.json", tokens)
    _check_budget(study, seed)
    _write_runs(study.strong(seed))


def _loss_tokens(reader: Any, sample: Mapping[str, Any]) -> int:
    turns = Message("user", sample["prompt"]), Message("assistant", sample["completion"])
    rendered = reader.render(Sample(sample["id"], turns))
    return rendered.loss_tokens if rendered else 0


def _check_budget(study: Study, seed: int) -> None:
    """Refuse arms whose loss tokens differ at equal samples, unless the budget is in loss tokens."""
    if study.config.budget == "tokens":
        return
    (first, reference), *others = study.loss_tokens(seed).items()
    for name, mean in others:
        if abs(mean - reference) > figures.TOLERANCE * reference:
            raise UserError(
                f"arm {name} has {mean:.2f} loss tokens per sample and arm {first} has {reference:.2f} (seed "
                f"{seed}): at equal samples their loss tokens differ by more than {figures.TOLERANCE:.0%}",
                place="configuration, budget",
                remedy="set budget to `tokens`, which scales the steps of each arm; or use replies of one "
                "length, such as letters",
            )


def _train_arms(study: Study, seed: int) -> None:
    for name in study.config.arms:
        if ARMS[name].labels != "gold":
            study.ledger.require(study.answers(ARMS[name].supervisor, seed), "answers")
        study.ledger.require(study.choice(name, seed), "arms")
    _check_budget(study, seed)
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
    _check_runs(study, seed)
    for name in _evaluated(study):
        step = study.evaluation(name, seed)
        if study.ledger.begin(step):
            config = study.trained(name, seed)
            _append(study, config, test, step, f"evaluating {name}", _Plain(), trained=True)
    if study.task.kind != "number" and study.ledger.begin(study.difficulty):
        items = study.split.unsupervised
        questions = [Posed(item.id, pose(study.task, item), item.place) for item in items]
        config, step = study.trained(next(iter(study.config.arms)), seed), study.difficulty
        _append(study, config, questions, step, "asking the untrained model", _Plain(), trained=False)


def _check_runs(study: Study, seed: int) -> None:
    """Refuse runs that were trained with other settings."""
    for who in study.config.supervisors:
        experiment.checked(study.supervisor(who, seed))
    if all(study.samples(name, seed).exists() for name in study.config.arms):
        experiment.checked(study.strong(seed))


def _reported(study: Study) -> Result:
    """Write what is known: of a study that is not finished, the figures of complete steps."""
    found = figures.Found(config=study.config, kind=study.task.kind, split=study.split)
    for seed in study.config.seeds:
        _check_runs(study, seed)
        for who in study.config.supervisors:
            if study.has_weights(SUPERVISOR + who, seed) and study.ledger.complete(study.answers(who, seed)):
                found.asked.setdefault(who, {})[seed] = _asked(study, who, seed)
        for name in _evaluated(study):
            if not (
                study.has_weights(name, seed) and study.ledger.complete(step := study.evaluation(name, seed))
            ):
                continue
            if name in study.config.arms:
                study.ledger.require(study.choice(name, seed), "arms")
            folder = RunFolder(study.trained(name, seed).output_dir)
            found.answers.setdefault(name, {})[seed] = {r["key"]: r for _, r in read_jsonl(step.output)}
            found.metrics.setdefault(name, {})[seed] = folder.read_json(File.METRICS)
            found.environment = folder.read_json(File.ENVIRONMENT)
    if study.ledger.complete(study.difficulty):
        found.untrained = {record["key"]: record for _, record in read_jsonl(study.difficulty.output)}
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

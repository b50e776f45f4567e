"""One training run from configuration to report: the main job.

load rows -> render -> uncertainty -> smoothing -> LoRA -> UALTrainer -> adapter -> evaluation -> report
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ual import smoothing
from ual.config import RunConfig
from ual.data import Collator, Renderer, Tokenised, hold_out, load
from ual.errors import UserError
from ual.evaluate import Evaluation, evaluate
from ual.models import TokenScores, attach_lora, fuse, load_model, load_tokenizer, score
from ual.records import Elicited, Sample, Scored
from ual.report import write as write_report
from ual.train import RunFolder, UALTrainer, training_arguments
from ual.train.callbacks import History, ProgressBar, StopOnNonFinite, StopOnSignal
from ual.train.folder import environment
from ual.train.trainer import Features
from ual.uncertainty import Column, Estimator, WhiteBox

log = logging.getLogger(__name__)

_TEXT_SHOWN = 2000  # characters of a prompt or response kept in samples.jsonl


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: its folder, the figures of metrics.json, and the signal that stopped it, if any."""

    folder: Path
    metrics: dict[str, Any]
    report: Path
    stopped_by: int | None


def run(
    config: RunConfig,
    *,
    command: Sequence[str] = (),
    resume: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Result:
    """Train as `config` says, into the folder `config.output_dir`.

    Args:
        config: see `ual.config`.
        command: the words that started this, recorded for whoever wants to do it again.
        resume: go on from the last checkpoint of a run that stopped, reusing its uncertainties.
        trust_remote_code: run model code that comes with the weights.
        console: where progress is drawn; None is silent.

    Raises:
        UserError: anything a user can mend; the run folder is whole and, after the first checkpoint,
            resumable.
    """
    folder = RunFolder(config.output_dir)
    arguments = training_arguments(config, folder.checkpoints)
    folder.create(config, resume=resume)
    with _log_file(folder.log), _Progress(console) as progress:
        log.info("command: %s", " ".join(command))
        transformers.set_seed(arguments.seed)
        job = _prepare(config, arguments.device, trust_remote_code, progress)

        scored = score_rows(job.train, _elicit(job, folder, progress), config)
        folder.write_rows("samples.jsonl", _sample_rows(scored, job))
        before = _evaluate_before(job, folder, progress, resume=resume)

        model = attach_lora(job.model, config.lora) if config.lora else job.model
        folder.write_json("environment.json", _environment(config, command, model))
        metrics = _facts(config, scored, job, before)
        stopped_by, metrics = _train(job, model, scored, arguments, folder, metrics, progress, resume=resume)
        if stopped_by is None:
            after = _evaluate(job, model, "evaluating the trained model", progress)
            folder.write_json("evaluation.json", {"before": before, "after": after})
            metrics["eval"] = _headline(after)
            folder.write_json("metrics.json", metrics)
        report = write_report([folder.path])
    return Result(folder.path, metrics, report, stopped_by)


def score_rows(
    samples: Sequence[Sample], elicited: Mapping[str, Elicited], config: RunConfig
) -> list[Scored]:
    """Turn uncertainties into each sample's smoothing and weight.

    Args:
        samples: training rows. Under loss.kind "ual" a row's own `label_smoothing` wins over what is derived.
        elicited: records by sample id; only "ual" needs them.
        config: `loss.kind`, `uncertainty.missing` and `smoothing` decide.
    """
    n = len(samples)
    own = np.array([_nan_if_none(s.label_smoothing) for s in samples])
    values = np.array([_nan_if_none(e.value if (e := elicited.get(s.id)) else None) for s in samples])
    keep, scaled, derived = np.ones(n, dtype=bool), np.full(n, np.nan), np.zeros(n)
    if config.loss.kind == "uniform":
        derived[:] = _uniform(config)
    elif config.loss.kind == "ual" and np.isnan(own).any():
        filled, keep, missing = smoothing.fill_missing(values, config.uncertainty.missing)
        if missing:
            log.warning("%d of %d rows have no uncertainty: %s", missing, n, config.uncertainty.missing)
        scaled[keep], derived[keep] = smoothing.from_config(filled[keep], config.smoothing)
    if config.loss.kind == "ual":
        keep |= ~np.isnan(own)
        derived = np.where(np.isnan(own), derived, own)
    return [
        Scored(
            sample=sample,
            uncertainty=_none_if_nan(values[i]),
            scaled_uncertainty=_none_if_nan(scaled[i]),
            label_smoothing=float(derived[i]),
            sample_weight=sample.sample_weight,
        )
        for i, sample in enumerate(samples)
        if keep[i]
    ]


# ---- the steps ----


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows and model, ready: what every step works on."""

    config: RunConfig
    model: Any
    tokenizer: Any
    renderer: Renderer
    collate: Collator
    train: list[Sample]
    held_out: list[Sample]
    tokenised: dict[str, Tokenised]

    def features(self, samples: Iterable[Sample]) -> list[dict[str, Any]]:
        """Rows as the collator wants them, without smoothing and of weight 1."""
        return [
            {
                "id": sample.id,
                "input_ids": self.tokenised[sample.id].input_ids,
                "labels": self.tokenised[sample.id].labels,
                "label_smoothing": 0.0,
                "sample_weight": 1.0,
            }
            for sample in samples
        ]


def _prepare(config: RunConfig, device: Any, trust_remote_code: bool, progress: "_Progress") -> _Job:
    data = config.data
    train = load(data.train, format=data.format, split=data.train_split)
    if data.eval is not None:
        held_out = load(data.eval, format=data.format, split=data.eval_split)
    else:
        train, held_out = hold_out(train, data.eval_fraction) if data.eval_fraction else (train, [])
    shared = {s.id for s in train} & {s.id for s in held_out}
    if shared:
        raise UserError(
            f"{len(shared)} ids are in both the training and the held-out rows, such as {min(shared)!r}",
            place=f"{data.train} and {data.eval}",
            remedy="remove them from one of the files",
        )
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
    model.to(device)
    renderer = Renderer(
        tokenizer,
        chat_template=data.chat_template,
        max_length=data.max_length,
        context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        overlong=data.overlong,
    )
    advance = progress.task("rendering", len(train) + len(held_out))
    tokenised = {}
    for sample in (*train, *held_out):
        if (row := renderer.render(sample)) is not None:
            tokenised[sample.id] = row
        advance(1)
    log.info("rows: %s", dict(renderer.counts))
    if renderer.counts["dropped"] or renderer.counts["truncated"]:
        progress.say(
            f"{renderer.counts['dropped']} rows dropped and {renderer.counts['truncated']} truncated at "
            f"{renderer.max_length} tokens (data.overlong: {data.overlong})"
        )
    train = [s for s in train if s.id in tokenised]
    if not train:
        raise UserError("no training row is left", place=data.train, remedy="raise data.max_length")
    return _Job(
        config=config,
        model=fuse(model, smoothing_over=config.smoothing.over, backend=config.loss.backend),
        tokenizer=tokenizer,
        renderer=renderer,
        collate=Collator(tokenizer.pad_token_id, average=config.loss.average),
        train=train,
        held_out=[s for s in held_out if s.id in tokenised],
        tokenised=tokenised,
    )


def _elicit(job: _Job, folder: RunFolder, progress: "_Progress") -> dict[str, Elicited]:
    """Ask for uncertainties once: a resumed run reads what the first one wrote."""
    if job.config.loss.kind != "ual" or all(s.label_smoothing is not None for s in job.train):
        return {}
    elicited = [Elicited(**row) for row in folder.read_rows("uncertainty.jsonl")]
    if {e.sample_id for e in elicited} != {s.id for s in job.train}:
        elicited = list(_estimator(job, progress).estimate(job.train))
        folder.write_rows("uncertainty.jsonl", map(asdict, elicited))
    return {e.sample_id: e for e in elicited}


def _estimator(job: _Job, progress: "_Progress") -> Estimator:
    if job.config.uncertainty.estimator == "column":
        return Column()

    def scores(samples: Sequence[Sample]) -> Iterator[TokenScores]:
        advance = progress.task("asking the base model for uncertainty", len(samples))
        size = job.config.uncertainty.batch_size
        return score(job.model, job.features(samples), job.collate, batch_size=size, advance=advance)

    return WhiteBox(scores)


def _evaluate_before(
    job: _Job, folder: RunFolder, progress: "_Progress", *, resume: bool
) -> Evaluation | None:
    path = folder.path / "evaluation.json"
    if resume and path.exists():
        before: Evaluation | None = json.loads(path.read_text(encoding="utf-8"))["before"]
        return before
    wanted = job.config.evaluation.before
    before = _evaluate(job, job.model, "evaluating the base model", progress) if wanted else None
    folder.write_json("evaluation.json", {"before": before, "after": None})
    return before


def _evaluate(job: _Job, model: Any, what: str, progress: "_Progress") -> Evaluation | None:
    if not job.held_out:
        return None
    return evaluate(
        model,
        job.features(job.held_out),
        {s.id: s.source or "all" for s in job.held_out},
        job.collate,
        bins=job.config.evaluation.bins,
        batch_size=job.config.evaluation.batch_size,
        advance=progress.task(what, len(job.held_out)),
    )


def _train(
    job: _Job,
    model: Any,
    scored: Sequence[Scored],
    arguments: transformers.TrainingArguments,
    folder: RunFolder,
    metrics: dict[str, Any],
    progress: "_Progress",
    *,
    resume: bool,
) -> tuple[int | None, dict[str, Any]]:
    """Train and save; return the signal that stopped it, if any, and the metrics so far."""
    rows = job.features(s.sample for s in scored)
    for row, s in zip(rows, scored, strict=True):
        row |= {"label_smoothing": s.label_smoothing, "sample_weight": s.sample_weight}
    stop = StopOnSignal()
    trainer = UALTrainer(
        model=model,
        args=arguments,
        average=job.config.loss.average,
        train_dataset=Features(rows),
        eval_dataset=Features(job.features(job.held_out)) if job.held_out else None,
        data_collator=job.collate,
        processing_class=job.tokenizer,
        callbacks=[History(folder), ProgressBar(progress.bars), StopOnNonFinite(), stop],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    checkpoint = folder.last_checkpoint() if resume else None
    log.info("starting from %s", checkpoint or "the base model")
    folder.forget_after(int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    folder.write_json("metrics.json", metrics | {"status": "running"})
    started = time.monotonic()
    status = "interrupted"
    stop.install()
    try:
        if checkpoint is None or not trainer.is_finished(checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        target = folder.path / ("adapter" if job.config.lora else "model")
        trainer.save_model(str(target))
        (target / transformers.trainer.TRAINING_ARGS_NAME).unlink(
            missing_ok=True
        )  # a pickle, of no use there
        status = "interrupted" if stop.received else "completed"
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder: {error.strerror or error}",
            place=str(error.filename or folder.path),
            remedy="free some space, then pass --resume to go on from the last checkpoint",
        ) from error
    finally:
        stop.restore()
        spent = time.monotonic() - started
        metrics = metrics | _speed(folder, spent) | {"steps": trainer.state.global_step, "status": status}
        folder.write_json("metrics.json", metrics)
    return stop.received, metrics


# ---- what is written down ----


def _sample_rows(scored: Iterable[Scored], job: _Job) -> Iterator[dict[str, Any]]:
    for s in scored:
        yield {
            "id": s.sample.id,
            "source": s.sample.source,
            "uncertainty": s.uncertainty,
            "scaled_uncertainty": s.scaled_uncertainty,
            "label_smoothing": s.label_smoothing,
            "sample_weight": s.sample_weight,
            "response_tokens": job.tokenised[s.sample.id].live_tokens,
            "prompt": job.renderer.render_prompt(s.sample)[:_TEXT_SHOWN],
            "response": s.sample.response[:_TEXT_SHOWN],
        }


def _environment(config: RunConfig, command: Sequence[str], model: Any) -> dict[str, Any]:
    files = [Path(p) for p in (config.data.train, config.data.eval) if p is not None]
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return environment(
        config,
        command,
        [file for file in files if file.is_file()],
        model={
            "path": config.model.path,
            "parameters": sum(n for n, _ in parameters),
            "trainable_parameters": sum(n for n, trainable in parameters if trainable),
        },
    )


def _facts(
    config: RunConfig, scored: Sequence[Scored], job: _Job, before: Evaluation | None
) -> dict[str, Any]:
    return {
        "name": config.label,
        "loss_kind": config.loss.kind,
        "trained_rows": len(scored),
        "tokens_per_epoch": sum(job.tokenised[s.sample.id].live_tokens for s in scored),
        "mean_smoothing": float(np.mean([s.label_smoothing for s in scored])),
        "eval_before": _headline(before),
        "eval": None,
    }


def _speed(folder: RunFolder, seconds: float) -> dict[str, Any]:
    logged = [row for row in folder.read_rows("history.jsonl") if "live_tokens" in row]
    tokens = sum(row["live_tokens"] for row in logged)
    busy = sum(row["live_tokens"] / row["tokens_per_second"] for row in logged)
    return {
        "train_loss_first": logged[0]["loss"] if logged else None,
        "train_loss_last": logged[-1]["loss"] if logged else None,
        "trained_tokens": tokens,
        "tokens_per_second": tokens / busy if busy else None,
        "seconds": seconds,
    }


def _headline(evaluation: Evaluation | None) -> dict[str, float] | None:
    if evaluation is None:
        return None
    return {
        "nll": evaluation["nll"],
        "perplexity": evaluation["perplexity"],
        "accuracy": evaluation["accuracy"],
        "ece": evaluation["ece"],
        "brier": evaluation["brier"],
    }


def _uniform(config: RunConfig) -> float:
    matched = config.smoothing.match_mean
    return (config.smoothing.min + config.smoothing.max) / 2 if matched is None else matched


def _nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else value


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---- what is seen ----


class _Progress:
    """Progress bars on a console, or nowhere."""

    def __init__(self, console: Console | None) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
        )

    def __enter__(self) -> "_Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def task(self, what: str, total: int) -> Callable[[int], None]:
        """Add a bar; return what moves it on."""
        task = self.bars.add_task(what, total=total)
        return lambda done: self.bars.advance(task, done)

    def say(self, line: str) -> None:
        self.bars.console.print(line, highlight=False)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Send every logger, and warnings, to the run's log file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", error)
        raise
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()

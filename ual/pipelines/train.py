"""One training run from configuration to report: the main job.

load rows -> render -> uncertainty -> smoothing -> LoRA -> UALTrainer -> adapter -> evaluation -> report
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from rich.console import Console

from ual.config.run import RunConfig
from ual.data import Collator, PackedCollator, Renderer, Tokenised, tokenise
from ual.data import training_set as rows
from ual.errors import UserError
from ual.evaluate import Evaluation, evaluate
from ual.models import (
    TokenScores,
    attach_lora,
    check_head,
    check_isolation,
    check_logits,
    fuse,
    is_padding_free,
    load_config,
    load_model,
    load_tokenizer,
    score,
)
from ual.models.memory import empty_model
from ual.pipelines.plan import Plan, make_plan
from ual.records import Elicited, Sample
from ual.report import card
from ual.report import write as write_report
from ual.report.publish import publish
from ual.runs.environment import environment
from ual.runs.folder import RunFolder
from ual.runs.progress import Progress, log_file
from ual.train import UALTrainer, deepspeed, distributed
from ual.train.arguments import training_arguments
from ual.train.callbacks import History, ProgressBar, StopOnNonFinite, StopOnSignal
from ual.train.checkpoint import copy_model, newest_whole
from ual.train.objective import objective
from ual.uncertainty.estimators import column, white_box

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
    resume: bool | Literal["auto"] = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
) -> Result:
    """Train as `config` says, into the folder `config.output_dir`.

    Args:
        config: see `ual.config.run`.
        command: the words that started this, recorded for whoever wants to do it again.
        resume: go on from the last checkpoint of a run that stopped, reusing its uncertainties; "auto"
            begins a run where there is none.
        trust_remote_code: run model code that comes with the weights.
        console: where progress is drawn; None is silent.
        cache: where tokenised rows are kept for the next run; None keeps none.

    Raises:
        UserError: anything a user can mend; the run folder is whole and, after the first checkpoint,
            resumable.
    """
    _check_model(config, trust_remote_code)
    arguments = training_arguments(config, RunFolder(config.output_dir).checkpoints)
    folder = RunFolder(config.output_dir, writes=distributed.is_writer())
    folder.create(config, resume=resume)
    going_on = bool(resume)
    distributed.wait()  # until the folder is there, or its refusal ends the run
    with log_file(folder.log, distributed.is_writer()), Progress(console) as progress:
        log.info("command: %s", " ".join(command))
        transformers.set_seed(arguments.seed)
        job = _prepare(
            config, _read(config, trust_remote_code, progress, cache), arguments, trust_remote_code
        )

        with _computing(job, arguments):
            training = _rows(job, folder, progress)
            folder.write_rows("samples.jsonl", _sample_rows(training, job))
            before = _evaluate_before(job, folder, progress, resume=going_on)

        model = attach_lora(job.model, config.lora) if config.lora else job.model
        folder.write_json("environment.json", _environment(config, command, model))
        metrics = _facts(config, training, before)
        stopped_by, metrics = _train(
            job, model, training, arguments, folder, metrics, progress, resume=going_on
        )
        if stopped_by is None:
            with _computing(job, arguments):
                after = _evaluate(job, model, "evaluating the trained model", progress)
            folder.write_json("evaluation.json", {"before": before, "after": after})
            metrics["eval"] = _headline(after)
            folder.write_json("metrics.json", metrics)
            if distributed.is_writer():
                about = card(
                    config, metrics, json.loads((folder.path / "environment.json").read_text("utf-8"))
                )
                folder.write(f"{_weights(config)}/README.md", about)
                if config.training.get("push_to_hub"):
                    name = config.training.get("hub_model_id") or config.label
                    url = publish(
                        folder.path / _weights(config), name, config.training.get("hub_private_repo")
                    )
                    progress.say(f"published at {url}")
        report = distributed.from_first(lambda: write_report([folder.path]))
    return Result(folder.path, metrics, report, stopped_by)


def plan(
    config: RunConfig,
    *,
    resume: bool | Literal["auto"] = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
) -> Plan:
    """Do all that `run` does before it loads weights, with the same errors, and write nothing.

    Args: as those of `run`.
    """
    empty = _check_model(config, trust_remote_code)
    folder = RunFolder(config.output_dir, writes=distributed.is_writer())
    arguments = training_arguments(config, folder.checkpoints)
    folder.check(config, resume=resume)
    with Progress(console) as progress:
        read = _read(config, trust_remote_code, progress, cache)
    asked = _asks_the_model(config, read.train)
    features = [rows.features(read.tokenised[s.id]) for s in read.train]
    if not asked and not config.data.streaming:
        scored = rows.score_rows(read.train, _column(config, read.train), config)
        features = [
            rows.features(
                read.tokenised[s.sample.id], label_smoothing=s.label_smoothing, sample_weight=s.sample_weight
            )
            for s in scored
        ]
    return make_plan(
        config,
        arguments,
        empty,
        features,
        held_out=len(read.held_out),
        max_length=read.renderer.max_length,
        world_size=distributed.world_size(),
        smoothing_known=not asked,
    )


# ---- the steps ----


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows and model, ready: what every step works on."""

    config: RunConfig
    model: Any
    tokenizer: Any
    renderer: Renderer
    collate: Collator | PackedCollator
    train: list[Sample]
    held_out: list[Sample]
    tokenised: dict[str, Tokenised]

    def features(self, samples: Iterable[Sample]) -> list[dict[str, Any]]:
        """Rows to measure: without smoothing, each of weight 1."""
        return [rows.features(self.tokenised[sample.id]) for sample in samples]


@contextmanager
def _computing(job: "_Job", arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Let the model compute outside of training: weights in ZeRO-3 partitions need an engine for that."""
    if not _is_partitioned(arguments) or deepspeed.can_compute(job.model):
        yield
        return
    with deepspeed.computing(job.model, arguments.hf_deepspeed_config.config):
        check_logits(job.model)
        yield


def _is_partitioned(arguments: transformers.TrainingArguments) -> bool:
    return bool(arguments.deepspeed) and arguments.hf_deepspeed_config.is_zero3()


def _check_model(config: RunConfig, trust_remote_code: bool) -> Any:
    """Build the model and its adapter without weights: what does not fit is found here."""
    empty = fuse(empty_model(config.model, config.lora, trust_remote_code=trust_remote_code), verify=False)
    check_head(empty)
    return empty


@dataclass(frozen=True, slots=True)
class _Read:
    """The rows, rendered, and what rendered them."""

    tokenizer: Any
    renderer: Renderer
    train: list[Sample]
    held_out: list[Sample]
    tokenised: dict[str, Tokenised]


def _read(config: RunConfig, trust_remote_code: bool, progress: Progress, cache: Path | None) -> _Read:
    data = config.data
    train, held_out = rows.read(config)
    rows.check_weights(train, config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    of_model = load_config(config.model, trust_remote_code=trust_remote_code)
    renderer = rows.renderer(config, tokenizer, of_model)
    advance = progress.task("rendering", len(train) + len(held_out))
    folder = None if cache is None else cache / "tokenised"
    tokenised = tokenise([*train, *held_out], renderer, folder, advance)
    log.info("rows: %s", dict(renderer.counts))
    if renderer.counts["dropped"] or renderer.counts["truncated"]:
        progress.say(
            f"{renderer.counts['dropped']} rows dropped and {renderer.counts['truncated']} truncated at "
            f"{renderer.max_length} tokens (data.overlong: {data.overlong})"
        )
    train = [s for s in train if s.id in tokenised]
    if not train and not data.streaming:
        raise UserError("no training row is left", place=data.train, remedy="raise data.max_length")
    if not _asks_the_model(config, train):
        rows.score_rows(train, _column(config, train), config)  # what is wrong with uncertainties shows now
    return _Read(tokenizer, renderer, train, [s for s in held_out if s.id in tokenised], tokenised)


def _prepare(
    config: RunConfig, read: _Read, arguments: transformers.TrainingArguments, trust_remote_code: bool
) -> _Job:
    model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
    if not (_is_partitioned(arguments) or config.model.quantization):  # whose weights are where they belong
        model.to(arguments.device)
    if config.data.packing:
        check_isolation(model)
    return _Job(
        config=config,
        model=fuse(
            model,
            smoothing_over=config.smoothing.over,
            backend=config.loss.backend,
            verify=not _is_partitioned(arguments),
        ),
        tokenizer=read.tokenizer,
        renderer=read.renderer,
        collate=_collator(config, read.tokenizer.pad_token_id, model),
        train=read.train,
        held_out=read.held_out,
        tokenised=read.tokenised,
    )


def _asks_the_model(config: RunConfig, train: Sequence[Sample]) -> bool:
    if not config.loss.about.needs_uncertainty or config.uncertainty.estimator == "column":
        return False
    return any(s.label_smoothing is None for s in train)


def _column(config: RunConfig, train: Sequence[Sample]) -> dict[str, Elicited]:
    if not config.loss.about.needs_uncertainty or all(s.label_smoothing is not None for s in train):
        return {}
    return {e.sample_id: e for e in column.own_uncertainties(train)}


def _collator(config: RunConfig, pad_token_id: int, model: Any) -> Collator | PackedCollator:
    if not config.data.packing:
        return Collator(pad_token_id, average=config.loss.average)
    padding_free = is_padding_free(model)
    return PackedCollator(pad_token_id, average=config.loss.average, padding_free=padding_free)


def _rows(job: _Job, folder: RunFolder, progress: Progress) -> rows.TrainingRows:
    if job.config.data.streaming:
        advance = progress.task("reading every row once", None)
        return rows.streamed(job.config, job.renderer, advance)
    elicited = _elicit(job, folder, progress)
    found = rows.in_memory(job.config, job.train, elicited, job.tokenised, job.renderer.max_length)
    if job.config.data.packing:
        progress.say(f"{found.count} rows packed into {len(found.dataset)} sequences")  # type: ignore[arg-type]
    return found


def _elicit(job: _Job, folder: RunFolder, progress: Progress) -> dict[str, Elicited]:
    """Ask for uncertainties once: a resumed run reads what the first one wrote."""
    if not job.config.loss.about.needs_uncertainty or all(s.label_smoothing is not None for s in job.train):
        return {}
    written = distributed.from_first(lambda: folder.read_rows("uncertainty.jsonl"))
    elicited = [Elicited(**row) for row in written]
    if {e.sample_id for e in elicited} != {s.id for s in job.train}:
        elicited = list(_ask(job, progress))
        folder.write_rows("uncertainty.jsonl", map(asdict, elicited))
    return {e.sample_id: e for e in elicited}


def _ask(job: _Job, progress: Progress) -> Iterable[Elicited]:
    if job.config.uncertainty.estimator == "column":
        return column.own_uncertainties(job.train)
    advance = progress.task("asking the base model for uncertainty", len(job.train))
    size = job.config.uncertainty.batch_size
    scores = _shared(score)(job.model, job.features(job.train), job.collate, batch_size=size, advance=advance)
    return white_box.estimate(job.train, scores)


def _shared(score: Callable[..., Iterator[TokenScores]]) -> Callable[..., Iterator[TokenScores]]:
    """Share the batches out over the processes of the run; each gets the scores of all."""

    def scores(*args: Any, advance: Callable[[int], None], **options: Any) -> Iterator[TokenScores]:
        share = distributed.rank(), distributed.world_size()
        mine = list(score(*args, share=share, advance=lambda n: advance(n * share[1]), **options))
        return itertools.chain.from_iterable(distributed.gather(mine))

    return scores


def _evaluate_before(job: _Job, folder: RunFolder, progress: Progress, *, resume: bool) -> Evaluation | None:
    path = folder.path / "evaluation.json"

    def saved() -> tuple[bool, Evaluation | None]:
        known = resume and path.exists()
        return known, json.loads(path.read_text(encoding="utf-8"))["before"] if known else None

    known, earlier = distributed.from_first(saved)
    if known:
        return earlier
    wanted = job.config.evaluation.before
    before = _evaluate(job, job.model, "evaluating the base model", progress) if wanted else None
    folder.write_json("evaluation.json", {"before": before, "after": None})
    return before


def _evaluate(job: _Job, model: Any, what: str, progress: Progress) -> Evaluation | None:
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
        score=_shared(score),
    )


def _train(
    job: _Job,
    model: Any,
    training: rows.TrainingRows,
    arguments: transformers.TrainingArguments,
    folder: RunFolder,
    metrics: dict[str, Any],
    progress: Progress,
    *,
    resume: bool,
) -> tuple[int | None, dict[str, Any]]:
    """Train and save; return the signal that stopped it, if any, and the metrics so far."""
    stop = StopOnSignal()
    trainer = UALTrainer(
        model=model,
        args=arguments,
        average=job.config.loss.average,
        groups=training.groups.names,
        statistics=job.config.statistics,
        train_dataset=training.dataset,
        eval_dataset=rows.Features(job.features(job.held_out)) if job.held_out else None,
        data_collator=job.collate,
        processing_class=job.tokenizer,
        objective=objective(job.config.loss),
        callbacks=[History(folder), ProgressBar(progress.bars), stop],
    )
    trainer.add_callback(StopOnNonFinite(trainer.suspects))
    trainer.remove_callback(transformers.PrinterCallback)
    checkpoint = distributed.from_first(lambda: newest_whole(folder.checkpoints)) if resume else None
    log.info("starting from %s", checkpoint or "the base model")
    folder.forget_after(int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    folder.write_json("metrics.json", metrics | {"status": "running"})
    started = time.monotonic()
    status = "interrupted"
    stop.install()
    try:
        target = folder.path / _weights(job.config)
        if checkpoint is not None and trainer.is_finished(checkpoint):
            if distributed.is_writer():
                copy_model(checkpoint, target)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.save_model(str(target))
            if distributed.is_writer():  # a pickle, of no use there
                (target / transformers.trainer.TRAINING_ARGS_NAME).unlink(missing_ok=True)
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


def _weights(config: RunConfig) -> str:
    """The folder, within the run's, of what was trained."""
    return "adapter" if config.lora else "model"


# ---- what is written down ----


def _sample_rows(training: rows.TrainingRows, job: _Job) -> Iterator[dict[str, Any]]:
    for s in training.shown:
        yield {
            "id": s.sample.id,
            "source": s.sample.source,
            "uncertainty": s.uncertainty,
            "scaled_uncertainty": s.scaled_uncertainty,
            "label_smoothing": s.label_smoothing,
            "sample_weight": s.sample_weight,
            "response_tokens": training.live_tokens[s.sample.id],
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


def _facts(config: RunConfig, training: rows.TrainingRows, before: Evaluation | None) -> dict[str, Any]:
    return {
        "name": config.label,
        "loss_kind": config.loss.kind,
        "trained_rows": training.count,
        "tokens_per_epoch": training.tokens,
        "mean_smoothing": training.mean_smoothing,
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

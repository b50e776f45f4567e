"""One training run, as a line: read -> render -> ask -> score -> pack -> train -> evaluate -> report."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import transformers
from rich.console import Console

from ual.config.run import RunConfig
from ual.data import Collator, PackedCollator, decision, training_set
from ual.data.training_set import Scores, TrainingSet
from ual.errors import UserError
from ual.evaluate import Evaluation, SampleEvaluation, evaluate
from ual.models import check_logits, fuse
from ual.models.load import attach_lora, load_model
from ual.models.packing_check import check_isolation, is_padding_free
from ual.models.score import TokenScores, score
from ual.pipelines import samples
from ual.pipelines.publish import publish
from ual.pipelines.samples import Rendered
from ual.records import Elicited
from ual.report import card
from ual.report import write as write_report
from ual.runs.environment import environment
from ual.runs.folder import File, RunFolder
from ual.runs.lock import Lock
from ual.runs.progress import Progress, log_file
from ual.train import UALTrainer, deepspeed, distributed
from ual.train.arguments import training_arguments
from ual.train.callbacks import History, ShowProgress, StopOnNonFinite, StopOnSignal
from ual.train.checkpoint import copy_model, load_weights
from ual.train.objective import objective
from ual.train.resume import Resume, Start, decide
from ual.uncertainty.estimators import white_box

log = logging.getLogger(__name__)
T = TypeVar("T")

_TEXT_SHOWN = 2000  # characters of a prompt or response kept in samples.jsonl


@dataclass(frozen=True, slots=True)
class Result:
    """A run's folder, the figures of metrics.json, its report, and the signal that stopped it, if any.

    `unpublished` is the error of a failed upload; the run is complete nevertheless.
    """

    folder: Path
    metrics: dict[str, Any]
    report: Path
    stopped_by: int | None
    unpublished: UserError | None = None


def run(
    config: RunConfig,
    *,
    command: Sequence[str] = (),
    resume: Resume = False,
    accept_changed_data: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
) -> Result:
    """Train as `config` says, into the folder `config.output_dir`.

    Args:
        config: see `ual.config.run`.
        command: the words of the command line, recorded in environment.json.
        resume: continue from the last checkpoint of an interrupted run, with the uncertainties that it asked
            for; "auto" begins a run if there is none. A finished run is left as it is.
        accept_changed_data: resume although data files have changed; both hashes are recorded.
        trust_remote_code: run code from the model's repository.
        console: where progress is drawn; None is silent.
        cache: the folder of tokenized samples; None keeps none.

    Raises:
        UserError: an error that the user can correct. The run folder is complete and, after the first
            checkpoint, can be resumed. What is refused before weights are loaded writes nothing.
    """
    empty = samples.check_model(config, trust_remote_code=trust_remote_code)
    arguments = training_arguments(
        config, RunFolder(config.output_dir).checkpoints
    )  # starts the process group
    samples.check_training(config, arguments, empty)
    folder = RunFolder(config.output_dir, writes=distributed.is_writer())
    config = config.on(distributed.from_first(folder.date))
    stop = StopOnSignal()
    with stop.listening(), _claimed(folder) as taken, Progress(console) as progress:
        start = distributed.from_first(
            lambda: decide(folder, config, arguments, resume=resume, accept_changed_data=accept_changed_data)
        )
        for note in (*taken, *start.notes, *([start.sentence] if resume else [])):
            progress.say(note)
        if start.action == "finished":
            return Result(folder.path, start.metrics, folder.path / File.REPORT, None)
        with log_file(folder.log, distributed.is_writer()) as begin_log:
            log.info("command: %s", " ".join(command))
            for note in (*start.notes, start.sentence):
                log.info(note)
            transformers.set_seed(arguments.seed)
            rendered = _render(config, trust_remote_code, progress, cache)
            samples.check_rendered(rendered, arguments, empty)
            known = _known(rendered, folder, start, progress)
            # what is wrong with known uncertainties is found before weights are loaded
            ready = None if known is None else _ready(rendered, known, progress)
            with _writing(folder):
                folder.create(config)
                distributed.wait()
                begin_log()
            loaded = _load(rendered, arguments, progress, trust_remote_code)
            with _writing(folder):
                metrics, stopped_by = _trained(loaded, folder, start, ready, command, stop)
                report = distributed.from_first(lambda: write_report([folder.path]))
            unpublished = None if stopped_by else _publish(config, folder, progress)
    return Result(folder.path, metrics, report, stopped_by, unpublished)


@contextmanager
def _claimed(folder: RunFolder) -> Iterator[list[str]]:
    """Hold the folder's lock; yield what is to say of it."""
    lock = Lock(folder.path, "a run")
    try:
        note = distributed.from_first(lock.acquire)
        yield [note] if note else []
    finally:
        lock.release()


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    """Turn an OSError within, such as that of a full disk, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder: {error.strerror or error}",
            place=str(error.filename or folder.path),
            remedy="free some space, then pass --resume auto, which continues from the last complete "
            "checkpoint or, without one, begins again",
        ) from error


def _trained(
    loaded: "_Loaded",
    folder: RunFolder,
    start: Start,
    ready: "_Ready | None",
    command: Sequence[str],
    stop: StopOnSignal,
) -> tuple[dict[str, Any], int | None]:
    """Train and evaluate, or what remains of that; return the metrics, and the signal that stopped it."""
    rendered = loaded.rendered
    config = rendered.config
    with _computing(loaded):
        ready = ready or _ready(rendered, _ask(loaded), loaded.progress)
        training = ready.training
        if ready.elicited:
            folder.write_rows(File.UNCERTAINTY, map(asdict, ready.elicited))
        folder.write_rows(File.SAMPLES, _described(rendered, training))
        before = _evaluate_before(loaded, folder, reuse=start.reuse)
    model = attach_lora(loaded.model, config.lora) if config.lora else loaded.model
    folder.write_json(File.ENVIRONMENT, _environment(config, command, model, folder, start))
    metrics, stopped_by = _summary(rendered, training, before), None
    if start.action == "finish":
        metrics = _restore(model, folder, folder.path / _weights(config), start, metrics)
    else:
        with stop.deferred():
            stopped_by, metrics = _train(loaded, model, training, folder, metrics, start, stop)
    if stopped_by is None:
        metrics = _finish(loaded, model, folder, metrics, before)
    return metrics, stopped_by


# ---- samples: read, render, ask, score, pack ----


def _render(config: RunConfig, trust_remote_code: bool, progress: Progress, cache: Path | None) -> Rendered:
    read = training_set.read(config)
    rendered = samples.render(
        config,
        read,
        trust_remote_code=trust_remote_code,
        cache=cache,
        advance=progress.task("rendering", len(read.train) + len(read.held_out)),
    )
    for note in read.notes:
        progress.say(f"warning: {note}")
    _say_dropped(read.dropped, progress)
    counts = rendered.renderer.counts
    if counts["dropped"] or counts["truncated"]:
        progress.say(
            f"{_samples(counts['dropped'])} dropped and {counts['truncated']} truncated at "
            f"{rendered.renderer.max_length} tokens (data.overlong: {config.data.overlong})"
        )
    if counts["undecided"]:
        progress.say(f"{_samples(counts['undecided'])} dropped: {samples.UNDECIDED}")
    samples.check_left(config, rendered.train)
    return rendered


def _say_dropped(dropped: Mapping[str, int], progress: Progress) -> None:
    for reason, count in dropped.items():
        progress.say(f"{_samples(count)} dropped: {reason}")


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def _known(rendered: Rendered, folder: RunFolder, start: Start, progress: Progress) -> list[Elicited] | None:
    """Return the recorded uncertainties of these samples, or their own; None if a model must be asked."""
    rows = distributed.from_first(
        lambda: _intact(lambda: folder.read_rows(File.UNCERTAINTY), progress) if start.reuse else None
    )
    if rows and {row["sample_id"] for row in rows} == {s.id for s in rendered.train}:
        return [Elicited(**row) for row in rows]
    return samples.own_uncertainties(rendered.config, rendered.train)


def _intact(read: Callable[[], T], progress: Progress) -> T | None:
    """Return what a file of the run records; None, and a warning, if it is damaged: it is computed again."""
    try:
        return read()
    except UserError as error:
        progress.say(f"warning: {error.place}: {error.problem}; what it recorded is computed again")
        return None


def _ask(loaded: "_Loaded") -> list[Elicited]:
    """Return the uncertainty of every training sample under the base model."""
    rendered = loaded.rendered
    scores = _shared(score)(
        loaded.model,
        rendered.features(),
        loaded.collate,
        batch_size=rendered.config.uncertainty.batch_size,
        advance=loaded.progress.task("asking the base model for uncertainty", len(rendered.train)),
    )
    return list(white_box.estimate(rendered.train, scores))


@dataclass(frozen=True, slots=True)
class _Ready:
    """The samples' uncertainties, and the training set that they make."""

    elicited: Sequence[Elicited]
    training: TrainingSet


def _ready(rendered: Rendered, elicited: Sequence[Elicited], progress: Progress) -> _Ready:
    """Derive each sample's smoothing and weight from its uncertainty, and pack."""
    scores = training_set.score(rendered.train, elicited, rendered.config)
    samples.check_left(rendered.config, [scored.sample for scored in scores.samples])
    for note in scores.notes:
        progress.say(f"warning: {note}")
    return _Ready(elicited, _pack(rendered, scores, progress))


def _pack(rendered: Rendered, scores: Scores, progress: Progress) -> TrainingSet:
    config = rendered.config
    if config.data.streaming:
        advance = progress.task("reading all samples once", None)
        held_out = rendered.read.held_out
        training = training_set.streamed(config, rendered.renderer, held_out, advance)
        for note in training.notes:
            progress.say(f"warning: {note}")
        _say_dropped(training.dropped, progress)
        return training
    training = training_set.in_memory(config, scores, rendered.tokens, rendered.renderer.max_length)
    if config.data.packing:
        progress.say(f"{training.count} samples packed into {len(training.dataset)} sequences")  # type: ignore[arg-type]
    return training


# ---- the model ----


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The fused base model, and everything that a stage needs to compute with it."""

    rendered: Rendered
    model: Any
    collate: Collator | PackedCollator
    arguments: transformers.TrainingArguments
    progress: Progress

    @property
    def is_partitioned(self) -> bool:
        return _is_partitioned(self.arguments)


def _load(
    rendered: Rendered,
    arguments: transformers.TrainingArguments,
    progress: Progress,
    trust_remote_code: bool,
) -> _Loaded:
    config = rendered.config
    partitioned = _is_partitioned(arguments)
    model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
    if not (partitioned or config.model.quantization):  # those are on their devices already
        model.to(arguments.device)
    if config.data.packing:
        check_isolation(model)
    collate = _collator(config, rendered.tokenizer.pad_token_id, model)
    fuse(model, backend=config.loss.backend, verify=not partitioned)
    return _Loaded(rendered, model, collate, arguments, progress)


def _collator(config: RunConfig, pad_token_id: int, model: Any) -> Collator | PackedCollator:
    options: dict[str, Any] = {"average": config.loss.average, "smoothing_over": config.smoothing_over}
    if not config.data.packing:
        return Collator(pad_token_id, **options)
    return PackedCollator(pad_token_id, padding_free=is_padding_free(model), **options)


def _is_partitioned(arguments: transformers.TrainingArguments) -> bool:
    return bool(arguments.deepspeed) and arguments.hf_deepspeed_config.is_zero3()


@contextmanager
def _computing(loaded: _Loaded) -> Iterator[None]:
    """Let the model compute outside of training. Weights in ZeRO-3 partitions need an engine for that."""
    if not loaded.is_partitioned or deepspeed.can_compute(loaded.model):
        yield
        return
    with deepspeed.computing(loaded.model, loaded.arguments.hf_deepspeed_config.config):
        check_logits(loaded.model)
        yield


def _shared(score: Callable[..., Iterator[TokenScores]]) -> Callable[..., Iterator[TokenScores]]:
    """Distribute the batches over the processes of the run. Every process receives all scores."""

    def scores(*args: Any, advance: Callable[[int], None], **options: Any) -> Iterator[TokenScores]:
        share = distributed.rank(), distributed.world_size()
        mine = list(score(*args, share=share, advance=lambda n: advance(n * share[1]), **options))
        return itertools.chain.from_iterable(distributed.gather(mine))

    return scores


# ---- evaluation ----


def _evaluate_before(loaded: _Loaded, folder: RunFolder, *, reuse: bool) -> Evaluation | None:
    def saved() -> tuple[bool, Evaluation | None]:
        known = _intact(lambda: folder.read_json(File.EVALUATION), loaded.progress) if reuse else None
        return known is not None and "before" in known, (known or {}).get("before")

    known, earlier = distributed.from_first(saved)
    if known:
        return earlier
    wanted = loaded.rendered.config.evaluation.before
    before = _evaluate(loaded, loaded.model, "evaluating the base model")[0] if wanted else None
    folder.write_json(File.EVALUATION, {"before": before, "after": None})
    return before


def _evaluate(loaded: _Loaded, model: Any, what: str) -> tuple[Evaluation | None, list[SampleEvaluation]]:
    rendered = loaded.rendered
    if not rendered.held_out:
        return None, []
    return evaluate(
        model,
        rendered.held_out_features(),
        {s.id: s.source or "all" for s in rendered.held_out},
        loaded.collate,
        bins=rendered.config.evaluation.bins,
        batch_size=rendered.config.evaluation.batch_size,
        advance=loaded.progress.task(what, len(rendered.held_out)),
        score=_shared(score),
    )


# ---- training ----


def _train(
    loaded: _Loaded,
    model: Any,
    training: TrainingSet,
    folder: RunFolder,
    metrics: dict[str, Any],
    start: Start,
    stop: StopOnSignal,
) -> tuple[int | None, dict[str, Any]]:
    """Train and save; return the signal that stopped it, if any, and the metrics so far."""
    seconds = _clock(folder, start)
    trainer = _trainer(loaded, model, training, folder, stop, seconds)
    log.info("starting from %s", start.checkpoint.path if start.checkpoint else "the base model")
    folder.begin_leg(start.step)
    metrics = metrics | {"steps_per_epoch": trainer.steps_per_epoch}
    folder.write_json(File.METRICS, metrics | {"status": "running", "seconds": seconds()})
    status = "interrupted"
    try:
        trainer.train_to_the_end(start.checkpoint, folder.path / _weights(loaded.rendered.config))
        status = "interrupted" if stop.agree() else "completed"
    finally:
        spent = {"seconds": seconds(), "steps": trainer.state.global_step}
        metrics = metrics | _speed(folder) | spent | {"status": status}
        folder.write_json(File.METRICS, metrics)
    return stop.received, metrics


def _clock(folder: RunFolder, start: Start) -> Callable[[], float]:
    """Return a function that returns the seconds of training so far, of earlier starts of the run too."""
    earlier, since = _spent(folder, start), time.monotonic()
    return lambda: earlier + time.monotonic() - since


def _spent(folder: RunFolder, start: Start) -> float:
    """Return the seconds of training that are recorded: at the end of a start, or by its last log entry."""
    if start.action == "begin":
        return 0.0
    logged = [row["seconds"] for row in folder.read_history() if "seconds" in row]
    return float(max([start.metrics.get("seconds") or 0.0, *logged]))


def _trainer(
    loaded: _Loaded,
    model: Any,
    training: TrainingSet,
    folder: RunFolder,
    stop: StopOnSignal,
    seconds: Callable[[], float],
) -> UALTrainer:
    rendered = loaded.rendered
    trainer = UALTrainer(
        model=model,
        args=loaded.arguments,
        average=rendered.config.loss.average,
        groups=training.groups.names,
        statistics=rendered.config.statistics,
        train_dataset=training.dataset,
        eval_dataset=rendered.held_out_features() or None,
        data_collator=loaded.collate,
        processing_class=rendered.tokenizer,
        objective=objective(rendered.config.loss),
        callbacks=[History(folder, seconds), ShowProgress(loaded.progress), stop],
    )
    trainer.add_callback(StopOnNonFinite(trainer.suspects))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _restore(
    model: Any, folder: RunFolder, target: Path, start: Start, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Load the weights of a run that was interrupted after its last step; return the metrics so far."""
    if start.weights is not None:
        source = start.weights
        distributed.from_first(lambda: copy_model(source, target))
    load_weights(model, target)
    recorded = start.metrics
    if recorded.get("status") != "completed":
        seconds = _spent(folder, start)
        folder.begin_leg(start.step)
        recorded = recorded | _speed(folder) | {"seconds": seconds, "status": "completed"}
    metrics = recorded | metrics
    folder.write_json(File.METRICS, metrics)
    return metrics


def _finish(
    loaded: _Loaded, model: Any, folder: RunFolder, metrics: dict[str, Any], before: Evaluation | None
) -> dict[str, Any]:
    """Evaluate the trained model and write its model card."""
    config = loaded.rendered.config
    with _computing(loaded):
        after, measured = _evaluate(loaded, model, "evaluating the trained model")
    folder.write_json(File.EVALUATION, {"before": before, "after": after})
    if measured:
        folder.write_rows(File.HELD_OUT, measured)
    metrics = metrics | {"eval": _headline(after)}
    folder.write_json(File.METRICS, metrics)
    if distributed.is_writer():
        about = json.loads((folder.path / File.ENVIRONMENT).read_text("utf-8"))
        folder.write(f"{_weights(config)}/README.md", card(config, metrics, about))
    return metrics


def _publish(config: RunConfig, folder: RunFolder, progress: Progress) -> UserError | None:
    """Upload the finished run if `push_to_hub` is set. Return the error of a failed upload."""
    if not (distributed.is_writer() and config.training.get("push_to_hub")):
        return None
    try:
        progress.say(f"published at {publish(folder.path)}")
    except UserError as error:
        log.error("%s", error)
        return error
    return None


def _weights(config: RunConfig) -> str:
    """Return the name of the folder of the trained weights, within the run folder."""
    return "adapter" if config.lora else "model"


# ---- records ----


def _described(rendered: Rendered, training: TrainingSet) -> Iterator[dict[str, Any]]:
    over = rendered.config.smoothing_over
    for s in training.shown:
        target = decision.spread(s.sample.options, s.label_smoothing, over)
        yield {
            "id": s.sample.id,
            "source": s.sample.source,
            "uncertainty": s.uncertainty,
            "scaled_uncertainty": s.scaled_uncertainty,
            "label_smoothing": s.label_smoothing,
            "sample_weight": s.sample_weight,
            "response_tokens": training.loss_tokens[s.sample.id],
            "prompt": rendered.renderer.render_prompt(s.sample)[:_TEXT_SHOWN],
            "response": s.sample.response[:_TEXT_SHOWN],
        } | ({"options": target} if target else {})


def _environment(
    config: RunConfig, command: Sequence[str], model: Any, folder: RunFolder, start: Start
) -> dict[str, Any]:
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return environment(
        config,
        command,
        start.contents.data,
        earlier={} if start.action == "begin" else folder.read_json(File.ENVIRONMENT),
        step=start.step,
        model={
            "path": config.model.path,
            "fingerprint": start.contents.model,
            "parameters": sum(n for n, _ in parameters),
            "trainable_parameters": sum(n for n, trainable in parameters if trainable),
        },
    )


def _summary(rendered: Rendered, training: TrainingSet, before: Evaluation | None) -> dict[str, Any]:
    config, smoothing = rendered.config, training.smoothing
    streamed = config.data.streaming
    return {
        "name": config.label,
        "loss_kind": config.loss.kind,
        "trained_rows": training.count,
        "not_trained": {
            **(training.dropped if streamed else samples.not_trained(rendered, set(training.loss_tokens)))
        },
        "truncated": None if streamed else sum(t.truncated for t in rendered.tokens.values()),
        "tokens_per_epoch": training.tokens,
        "mean_smoothing": training.mean_smoothing,
        "smoothing_range": [float(smoothing.min()), float(smoothing.max())],
        "own_smoothing": training.own_smoothing,
        "notes": [*rendered.read.notes, *training.notes],
        "eval_before": _headline(before),
        "eval": None,
    }


def _speed(folder: RunFolder) -> dict[str, Any]:
    logged = [row for row in folder.read_history() if "live_tokens" in row]
    tokens = sum(row["live_tokens"] for row in logged)
    busy = sum(row["live_tokens"] / row["tokens_per_second"] for row in logged if row["live_tokens"])
    return {
        "train_loss_first": logged[0]["loss"] if logged else None,
        "train_loss_last": logged[-1]["loss"] if logged else None,
        "trained_tokens": tokens,
        "tokens_per_second": tokens / busy if busy else None,
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

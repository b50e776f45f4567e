"""What `ual train` does with its folder, decided before anything is written."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ual.config.run import RunConfig
from ual.errors import UserError
from ual.runs.folder import File, RunFolder
from ual.train import checkpoint, deepspeed
from ual.train.checkpoint import Checkpoint, Found
from ual.train.matching import Contents, can_reuse, check_configuration, check_contents

Resume = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Start:
    """What a command does with the folder of its run.

    `action`: "begin" trains from the base model; "resume" trains from `checkpoint`; "finish" evaluates and
    reports, because all steps are trained; "finished" does nothing. Under "finish", `weights` is the
    checkpoint whose weights are the result, or None if they are in the run folder already.
    `reuse`: the recorded uncertainties and the base model's evaluation are those of this run.
    `metrics`: the recorded ones. `notes`: sentences for the screen.
    """

    action: Literal["begin", "resume", "finish", "finished"]
    contents: Contents
    checkpoint: Checkpoint | None = None
    weights: Path | None = None
    reuse: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The step after which training begins."""
        if self.action in ("finish", "finished"):
            return int(self.metrics["steps"])
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def sentence(self) -> str:
        """What is done, in words."""
        return {
            "begin": "training begins from the base model",
            "resume": f"training resumes after step {self.step}",
            "finish": f"all {self.step} steps are trained; evaluation and report remain",
            "finished": f"the run is finished: all {self.step} steps are trained",
        }[self.action]


def decide(
    folder: RunFolder,
    config: RunConfig,
    arguments: TrainingArguments,
    *,
    resume: Resume,
    accept_changed_data: bool = False,
) -> Start:
    """Return what to do with the folder, from what is recorded there. Nothing is written.

    Args:
        folder: of the run, which may not exist.
        config, arguments: of the run.
        resume: False accepts only a folder without a run, True only one with a run, "auto" both.
        accept_changed_data: resume although data files do not have the recorded hashes.

    Raises:
        UserError: the folder cannot be written; it holds a run, or none; its run cannot be resumed with this
            configuration, data, number of processes or these checkpoints.
    """
    folder.check_writable()
    if not folder.holds_run():
        if resume is True:
            raise UserError(
                f"{folder.path} holds no run to resume", remedy="remove --resume, or pass --resume auto"
            )
        return _begin(folder, config, arguments)
    if not resume:
        raise UserError(
            f"{folder.path} already holds a run",
            remedy="pass --resume to continue it, or choose another output_dir",
        )
    check_configuration(folder, config)
    metrics = folder.read_json(File.METRICS)
    found = checkpoint.find(folder.checkpoints)
    notes = tuple(f"passed over the damaged checkpoint {path}: {why}" for path, why in found.damaged.items())
    trained = _trained(folder, metrics, found.newest, _planned(arguments, metrics, found.newest))
    if trained is not None:
        metrics = metrics | {"steps": trained}
        weights = _final_weights(folder, config, metrics, found)
        if weights is not None and metrics.get("status") == "completed":
            notes = (*notes, f"the trained weights are missing, and restored from {weights}")
        if weights is None and _is_reported(folder, config, metrics):
            return Start("finished", Contents({}, None), metrics=metrics, notes=notes)
    contents = Contents.of(config)
    check_contents(folder, config, contents, accept_changed_data=accept_changed_data)
    reuse = can_reuse(folder, config, contents)
    if trained is not None:
        return Start("finish", contents, None, weights, reuse, metrics, notes)
    if found.newest is None:
        if resume == "auto" and not found.damaged and folder.weights is None:
            return _begin(folder, config, arguments, again=True)
        raise _nothing_to_resume(folder, found, metrics)
    _check_resumable(found.newest, arguments)
    return Start("resume", contents, found.newest, None, reuse, metrics, (*notes, *_warnings(arguments)))


def _begin(
    folder: RunFolder, config: RunConfig, arguments: TrainingArguments, *, again: bool = False
) -> Start:
    contents = Contents.of(config)
    notes = _warnings(arguments)
    if again:
        notes = (f"{folder.path} holds no checkpoint: the run begins again from the base model", *notes)
    return Start("begin", contents, reuse=can_reuse(folder, config, contents), notes=notes)


def _warnings(arguments: TrainingArguments) -> tuple[str, ...]:
    if not arguments.save_only_model:
        return ()
    return (
        "this run cannot be resumed: under training.save_only_model, checkpoints hold neither optimizer nor "
        "schedule",
    )


def _planned(arguments: TrainingArguments, metrics: dict[str, Any], newest: Checkpoint | None) -> int | None:
    """Return the steps of the complete run; None if nothing is recorded of the length of an epoch."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    if per_epoch := metrics.get("steps_per_epoch"):
        return math.ceil(arguments.num_train_epochs * float(per_epoch))
    state = _state(newest) if newest else {}
    if state.get("num_train_epochs") == math.ceil(arguments.num_train_epochs):
        return int(state["max_steps"])
    return None


def _state(saved: Checkpoint) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((saved.path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return state


def _trained(
    folder: RunFolder, metrics: dict[str, Any], newest: Checkpoint | None, planned: int | None
) -> int | None:
    """Return the steps of the run if all of them are trained: their weights are in the folder or saved."""
    steps = int(metrics.get("steps") or 0)
    completed = metrics.get("status") == "completed"
    planned = steps if completed and planned is None else planned
    if planned is None:
        return None
    if completed and steps >= planned and (folder.weights is not None or newest is None):
        return steps
    return newest.step if newest is not None and newest.step >= planned else None


def _final_weights(
    folder: RunFolder, config: RunConfig, metrics: dict[str, Any], found: Found
) -> Path | None:
    """Return the checkpoint with the final weights; None if the run has written them to its folder."""
    if metrics.get("status") == "completed" and folder.weights is not None:
        return None
    newest = found.newest
    if newest is None:
        raise UserError(
            "the run is finished, but its weights are gone, and there is no complete checkpoint",
            place=str(folder.path),
            remedy="choose another output_dir to train again",
        )
    if not config.training.get("load_best_model_at_end"):
        return newest.path
    step = _state(newest).get("best_global_step")
    if not step:
        return newest.path
    best = newest.path.with_name(f"checkpoint-{step}")
    if problem := checkpoint.damage(best):
        raise UserError(
            f"the best checkpoint cannot be used: {problem}",
            place=str(best),
            remedy="restore it, or set training.load_best_model_at_end to false to take the last one",
        )
    return best


def _is_reported(folder: RunFolder, config: RunConfig, metrics: dict[str, Any]) -> bool:
    """Return whether evaluation and report are written."""
    evaluated = metrics.get("eval") or not (config.data.eval or config.data.eval_fraction)
    return bool(evaluated) and (folder.path / File.REPORT).exists()


def _nothing_to_resume(folder: RunFolder, found: Found, metrics: dict[str, Any]) -> UserError:
    remedy = "choose another output_dir to train from the base model"
    if found.damaged:
        listed = "\n".join(f"{path.name}: {why}" for path, why in list(found.damaged.items())[:5])
        problem = f"every checkpoint is damaged, so the run cannot be resumed:\n{listed}"
        return UserError(problem, place=str(folder.checkpoints), remedy=f"restore the files, or {remedy}")
    if metrics.get("status") == "completed":
        problem = (
            f"the run is finished after {metrics.get('steps')} steps, and there is no checkpoint to train "
            "more steps from"
        )
        return UserError(problem, place=str(folder.checkpoints), remedy=remedy)
    if folder.weights is None:
        remedy = f"pass --resume auto to begin again in this folder, or {remedy}"
    return UserError("there is no checkpoint to resume from", place=str(folder.checkpoints), remedy=remedy)


def _check_resumable(newest: Checkpoint, arguments: TrainingArguments) -> None:
    if not checkpoint.resumable(newest):
        raise UserError(
            "the checkpoint holds weights only (training.save_only_model): optimizer and schedule would "
            "start again",
            place=str(newest.path),
            remedy="choose another output_dir to train from the base model",
        )
    per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
    checkpoint.check_fit(
        newest,
        samples_per_step=per_process * arguments.world_size,
        world_size=arguments.world_size,
        zero_stage=deepspeed.stage(arguments.hf_deepspeed_config.config if arguments.deepspeed else None),
    )

"""`CheckpointingTrainer`: checkpoints are complete or absent, and training resumes from any that fits."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ual.errors import UserError
from ual.train import adapter_state, distributed
from ual.train.checkpoint import Checkpoint, check_fit, damage, publish, require_room, rotate, seal

log = logging.getLogger(__name__)

_PARTIAL = ".partial"


class CheckpointingTrainer(Trainer):
    """transformers.Trainer with sealed checkpoints.

    An adapter's state under ZeRO is gathered, so that it fits any number of processes and any stage
    (`ual.train.adapter_state`); everything else is saved and loaded by transformers and DeepSpeed.
    """

    _partial: Path | None = None
    _last_size: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._written: set[Path] = set()  # complete checkpoints of this process, and the resumed one
        super().__init__(*args, **kwargs)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that trains; 0 without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return int(plugin.zero_stage) if plugin is not None else 0

    @property
    def samples_per_step(self) -> int:
        """Samples (or packed sequences) of one optimizer step, over micro-batches and processes."""
        samples: int = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        return samples

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of one pass over the data; None for a stream."""
        dataset: Any = self.train_dataset
        try:
            return math.ceil(len(dataset) / self.samples_per_step)
        except TypeError:
            return None

    def train_to_the_end(self, checkpoint: Checkpoint | None, target: Path) -> None:
        """Train, from a checkpoint if one is given, and write the trained weights to the folder `target`.

        Args:
            checkpoint: of a step before the last one: transformers, asked to resume from the last step,
                would train one step too many.
            target: the folder of the weights.

        Raises:
            UserError: see `train`.
        """
        self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        self.save_model(str(target))
        if distributed.is_writer():  # a pickle, of no use there
            (target / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save in a scratch folder, seal, rename: a kill or a full disk produces no partial checkpoint."""
        checkpoints = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero():
            checkpoints.mkdir(parents=True, exist_ok=True)
            require_room(checkpoints, self._bytes_to_write())
            shutil.rmtree(checkpoints / _PARTIAL, ignore_errors=True)  # of a process that was killed
        distributed.wait()
        self._partial = checkpoints / _PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            distributed.wait()
            if self.state.best_model_checkpoint == str(self._partial / name):  # every process may load it
                self.state.best_model_checkpoint = str(checkpoints / name)
            if self.is_world_process_zero():
                self._publish(self._partial / name, checkpoints / name)
            distributed.wait()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # the last two wrap the disk's
            problem = f"the checkpoint of step {self.state.global_step} could not be written: {error}"
            remedy = (
                "free some space, then pass --resume auto, which continues from the last complete checkpoint "
                "or, without one, begins again"
            )
            if distributed.is_lost(error):
                problem = (
                    f"another process of the run ended while the checkpoint of step {self.state.global_step} "
                    "was written"
                )
                remedy = "its own messages say why; --resume continues from the last complete checkpoint"
            raise UserError(problem, place=str(checkpoints), remedy=remedy) from error
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            self._written.add(checkpoints / name)
            rotate(
                checkpoints,
                limit=self.args.save_total_limit,
                until=self.state.global_step,
                complete=self._written,
                best=Path(best) if best else None,
            )
        distributed.wait()

    def _publish(self, scratch: Path, target: Path) -> None:
        self.state.save_to_json(str(scratch / TRAINER_STATE_NAME))  # refers to the final name of the best one
        (scratch / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that is never read
        step, world_size = self.state.global_step, self.args.world_size
        seal(Checkpoint(scratch, step, world_size, self.samples_per_step, self.zero_stage))
        publish(scratch, target)
        self._last_size = Checkpoint.read(target).size

    def _bytes_to_write(self) -> int:
        """The next checkpoint's size: the last one's, or trained weights, master weights and two moments."""
        if self._last_size is not None:
            return self._last_size
        model: Any = self.model
        trained = [p for p in model.parameters() if p.requires_grad]
        return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 12) for p in trained)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save an adapter's gathered optimizer state; everything else as transformers and DeepSpeed do."""
        if not self._has_adapter_state:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        path = Path(output_dir, adapter_state.FILE) if self.is_world_process_zero() else None
        adapter_state.save(path, self._module, self._zero)
        if path is not None:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), path.with_name(SCHEDULER_NAME))

    def _load_best_model(self) -> None:
        """Load an adapter that ZeRO trains from its gathered weights; DeepSpeed would look for partitions."""
        path = Path(self.state.best_model_checkpoint or "", adapter_state.FILE)
        if self._has_adapter_state and path.is_file():
            adapter_state.restore_weights(path, self._module)
        else:
            super()._load_best_model()

    # ---- resuming ----

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, once training has begun."""
        engine: Any = self.deepspeed
        return engine.optimizer

    @property
    def _has_adapter_state(self) -> bool:
        """Whether ZeRO trains an adapter, whose state is small enough to gather."""
        return self.zero_stage > 0 and isinstance(self.model, PeftModel)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint if one is given.

        Raises:
            UserError: the checkpoint has another number of samples in a step or, if partitions were saved,
                another number of processes.
        """
        if resume_from_checkpoint is not None:
            check_fit(
                Checkpoint.read(Path(resume_from_checkpoint)),
                samples_per_step=self.samples_per_step,
                world_size=self.args.world_size,
                zero_stage=self.zero_stage,
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        steps_per_epoch: int,
        epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        """Load the state; the best checkpoint lies beside the resumed one, also in a run that was moved."""
        if resume_from_checkpoint is not None:
            self._written = {Path(resume_from_checkpoint)}
        init: Any = super()._init_training_state
        started = init(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None and self.state.best_global_step:
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            path = Path(resume_from_checkpoint).with_name(best)
            problem = distributed.from_first(lambda: damage(path))
            self.state.best_model_checkpoint = None if problem else str(path)
            if problem:
                self.state.best_metric = self.state.best_global_step = None
                log.warning("the best model so far, %s, cannot be used: %s", path, problem)
        return started

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Load the best model if wanted. The newest checkpoint stays: --resume needs it, if not for this run.

        transformers removes it under `save_total_limit: 1` if it is not the best.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            finalize: Any = super()._finalize_training
            return finalize(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Load an adapter's gathered state if there is one, else what transformers loads."""
        prepare: Any = super()._prepare_for_training
        path = Path(resume_from_checkpoint or "", adapter_state.FILE)
        if resume_from_checkpoint is None or not path.is_file():
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        adapter_state.load_weights(path, self._module)
        prepared = prepare(max_steps, train_dataloader, None)
        adapter_state.load_moments(path, self._module, self._zero)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)  # under DeepSpeed the scheduler alone
        scheduler: Any = self.lr_scheduler
        for group, rate in zip(self._zero.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # a scheduler sets the rate only when it steps
        return prepared

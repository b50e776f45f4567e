"""`CheckpointingTrainer`: checkpoints are complete or absent, and training resumes from any that fits."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ual.errors import UserError
from ual.train import adapter_state, distributed
from ual.train.checkpoint import Checkpoint, copy_model, publish, require_room, seal

_PARTIAL = ".partial"


class CheckpointingTrainer(Trainer):
    """transformers.Trainer with sealed checkpoints.

    An adapter's state under ZeRO is gathered, so that it fits any number of processes and any stage
    (`ual.train.adapter_state`); everything else is saved and loaded by transformers and DeepSpeed.
    """

    _partial: Path | None = None
    _last_size: int | None = None

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
    def planned_steps(self) -> int:
        """Optimizer steps of the complete run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        dataset: Any = self.train_dataset
        batches = math.ceil(len(dataset) / (self.args.train_batch_size * self.args.world_size))
        per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
        steps: int = math.ceil(self.args.num_train_epochs * per_epoch)
        return steps

    def train_to_the_end(self, checkpoint: Checkpoint | None, target: Path) -> None:
        """Train, from a checkpoint if one is given, and write the trained weights to the folder `target`.

        A checkpoint of the last step is copied: transformers, asked to resume from it, would train one step
        too many.

        Raises:
            UserError: see `train`.
        """
        if checkpoint is None or checkpoint.step < self.planned_steps:
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            self.save_model(str(target))
            if distributed.is_writer():  # a pickle, of no use there
                (target / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            return
        if self.zero_stage == 3 and not isinstance(self.model, PeftModel):
            raise UserError(f"the run is finished; {checkpoint.path} holds its model")
        self._load_from_checkpoint(str(checkpoint.path))
        self.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
        if distributed.is_writer():
            copy_model(checkpoint.path, target)

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
            if self.is_world_process_zero():
                self._publish(self._partial / name, checkpoints / name)
            distributed.wait()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # the last two wrap the disk's
            problem = f"the checkpoint of step {self.state.global_step} could not be written: {error}"
            remedy = "free some space, then pass --resume to continue from the last complete checkpoint"
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
            rotate_checkpoints(
                output_dir=str(checkpoints),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        distributed.wait()

    def _publish(self, scratch: Path, target: Path) -> None:
        if self.state.best_model_checkpoint == str(scratch):  # refer to the final name
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
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
            self._check_fit(Checkpoint.read(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_fit(self, saved: Checkpoint) -> None:
        if saved.samples_per_step != self.samples_per_step:
            raise UserError(
                f"the checkpoint has {saved.samples_per_step} samples per step, this run has "
                f"{self.samples_per_step} (samples per device x accumulation x processes)",
                place=str(saved.path),
                remedy="choose training.per_device_train_batch_size and gradient_accumulation_steps so that "
                "the product is the same",
            )
        same = (saved.world_size, saved.zero_stage) == (self.args.world_size, self.zero_stage)
        gathered = (saved.path / adapter_state.FILE).is_file() and self.zero_stage
        if not same and not gathered and (saved.zero_stage or self.zero_stage):
            raise UserError(
                f"the checkpoint has partitions of ZeRO-{saved.zero_stage} in {saved.world_size} processes; "
                f"this run uses ZeRO-{self.zero_stage} in {self.args.world_size}",
                place=str(saved.path),
                remedy="resume with the same number of processes and the same stage; only an adapter's ZeRO "
                "checkpoints fit any number and stage",
            )

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

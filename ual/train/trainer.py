"""`UALTrainer`: transformers.Trainer whose model computes the fused, per-sample loss."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ual.errors import UserError
from ual.train import adapter_state, distributed
from ual.train import checkpoint as sealed
from ual.train.metrics import BatchStatistics, spread
from ual.train.objective import PLAIN, Objective
from ual_kernels import IGNORE_INDEX

_PARTIAL = ".partial"
_IDS = "sample_ids"
_PER_SAMPLE = ("label_smoothing", "sample_weight")


class UALTrainer(Trainer):
    """Train a model prepared by `ual.models.fuse`, on batches with `label_smoothing` and `sample_weight`.

    The model never computes logits. The loss of an accumulated batch is one mean over all its live tokens on
    all devices, however they are spread over micro-batches, as in transformers.

    Args:
        average: what the sum of weighted token losses is divided by. "weights": the sum of the tokens'
            weights. "tokens": the number of live tokens, so that weights below 1 also lower the loss.
            "samples": as "weights", where the collator has divided each sample's weight by its tokens.
        groups: names of what the batches' `groups` count; logs then have the plain loss of each.
        statistics: at which steps entropy, margin, probability and loss by group are taken from the
            loss's own pass (docs/training.md says what that costs).
        objective: weights that the loss makes from the model's own prediction of each token.
        data_collator: as `ual.data.Collator`, called with features that have an `id`.
        *args, **kwargs: as `transformers.Trainer`.

    Raises:
        UserError: several GPUs in one process (DataParallel), for which per-sample losses are not defined.
    """

    def __init__(
        self,
        *args: Any,
        data_collator: Callable[[list[Any]], dict[str, Any]],
        average: Literal["weights", "tokens", "samples"] = "weights",
        objective: Objective = PLAIN,
        groups: Sequence[str] = (),
        statistics: Literal["every", "logged", "never"] = "never",
        **kwargs: Any,
    ) -> None:
        kwargs["data_collator"] = _WithIds(data_collator, objective.token_weight is not None)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"one process drives {self.args.n_gpu} GPUs (DataParallel)",
                remedy="start one process per GPU: torchrun --nproc_per_node N, or deepspeed --num_gpus N",
            )
        self.average = average
        self.objective: Objective = objective
        self.seen = BatchStatistics(groups)
        self._statistics = statistics
        self._since = time.monotonic()
        self._partial: Path | None = None
        self._last_size: int | None = None
        self._window: list[tuple[list[str], Tensor]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Count what the batch holds (on the device, unread), then let the model compute its loss."""
        ids, groups = inputs.pop(_IDS, []), inputs.pop("groups", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.seen.is_empty:
            self._since = time.monotonic()
        live = inputs["labels"][:, 1:] != IGNORE_INDEX
        self.seen.count(live, inputs["label_smoothing"], inputs["sample_weight"])
        wanted = self._statistics == "every" or (self._statistics == "logged" and self._will_be_logged())
        inputs = self.objective.prepare(inputs)
        loss, outputs = super().compute_loss(
            model, inputs | {"return_statistics": True} if wanted else inputs, True, num_items_in_batch
        )
        if wanted:
            self.seen.observe(live, outputs.statistics, groups)
        loss = self.objective.finish(loss, outputs)
        self._window.append((ids, loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def _will_be_logged(self) -> bool:
        step, every = self.state.global_step + 1, max(1, round(self.state.logging_steps))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def suspects(self) -> list[str]:
        """Return the ids of this process's samples of the running step.

        Those of micro-batches whose loss is not finite, or of all where every loss is.
        """
        guilty = [ids for ids, loss in self._window if not torch.isfinite(loss)]
        return [name for ids in guilty or [ids for ids, _ in self._window] for name in ids]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep smoothing and weight in float32: transformers rounds what is floating to DeepSpeed's dtype."""
        exact = {name: inputs[name].to(self.args.device) for name in _PER_SAMPLE if name in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a step: forget what the last one held."""
        self._window = []
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Sum the weights of live tokens in place of counting them, over micro-batches and devices."""
        if self.average == "tokens" or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum(
            spread(batch["sample_weight"], batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            for batch in batch_samples
        )
        assert isinstance(total, Tensor)
        total = total.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        total = total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        # all rows ignored, or of weight 0: their sum is 0 whatever divides it
        return torch.where(total == 0, 1.0, total)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the batches since the last log held, on all devices, and how fast they went."""
        if "loss" in logs and not self.seen.is_empty:
            seconds = time.monotonic() - self._since
            seen = self.seen.read(lambda totals: self.accelerator.reduce(totals, "sum"))
            logs |= seen | {"tokens_per_second": seen["live_tokens"] / max(seconds, 1e-9)}
            self._since = time.monotonic()
        super().log(logs, *args, **kwargs)

    def is_finished(self, checkpoint: Path) -> bool:
        """Take a checkpoint's weights and state and return True if no step is left to train after it.

        transformers, asked to resume from its own last step, trains one step too many.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return self._finish(checkpoint, state) if state.global_step >= self.args.max_steps else False
        rows = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))  # type: ignore[arg-type]
        per_epoch = math.ceil(rows / self.args.gradient_accumulation_steps)
        planned = self.args.max_steps
        if planned <= 0:
            planned = math.ceil(self.args.num_train_epochs * per_epoch)
        return self._finish(checkpoint, state) if state.global_step >= planned else False

    def _finish(self, checkpoint: Path, state: TrainerState) -> bool:
        if self.zero_stage == 3 and not isinstance(self.model, PeftModel):
            raise UserError(f"the run is finished; {checkpoint} holds its model")
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    # ---- checkpoints are whole or absent ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save aside, seal, rename: a kill or a full disk leaves no half checkpoint under its final name."""
        checkpoints = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero():
            checkpoints.mkdir(parents=True, exist_ok=True)
            sealed.require_room(checkpoints, self._bytes_to_write())
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
        ) as error:  # torch and safetensors wrap what the disk said
            if distributed.is_lost(error):
                raise UserError(
                    f"another process of the run ended while the checkpoint of step {self.state.global_step} "
                    "was written",
                    place=str(checkpoints),
                    remedy="its own last words say why; --resume goes on from the last whole checkpoint",
                ) from error
            raise UserError(
                f"the checkpoint of step {self.state.global_step} could not be written: {error}",
                place=str(checkpoints),
                remedy="free some space, then pass --resume to go on from the last whole checkpoint",
            ) from error
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
        if self.state.best_model_checkpoint == str(scratch):  # name it as it will be called
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
        (scratch / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody reads
        facts = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "rows_per_step": self.rows_per_step,
            "zero_stage": self.zero_stage,
        }
        sealed.seal(scratch, facts)
        sealed.publish(scratch, target)
        self._last_size = sum(file["bytes"] for file in sealed.facts(target)["files"].values())

    def _bytes_to_write(self) -> int:
        """Of the next checkpoint: as the last one, or trained weights, master weights and two moments."""
        if self._last_size is not None:
            return self._last_size
        model: Any = self.model
        trained = [p for p in model.parameters() if p.requires_grad]
        return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 12) for p in trained)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save an adapter's optimizer whole; all else as transformers and DeepSpeed do."""
        if not self._has_adapter_state:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        path = Path(output_dir, adapter_state.FILE) if self.is_world_process_zero() else None
        adapter_state.save(path, self._module, self._zero)
        if path is not None:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), path.with_name(SCHEDULER_NAME))

    # ---- going on ----

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
            UserError: the checkpoint was made with other rows in a step or, where partitions were saved, by
                another number of processes.
        """
        if resume_from_checkpoint is not None:
            self._check_fit(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_fit(self, folder: Path) -> None:
        recorded = sealed.facts(folder)
        remedy = (
            "choose training.per_device_train_batch_size and gradient_accumulation_steps that make as many"
        )
        if recorded["rows_per_step"] != self.rows_per_step:
            raise UserError(
                f"a step of this checkpoint has {recorded['rows_per_step']} rows, a step of this run "
                f"{self.rows_per_step} (rows of a device x accumulation x processes)",
                place=str(folder),
                remedy=remedy,
            )
        same = (recorded["world_size"], recorded["zero_stage"]) == (self.args.world_size, self.zero_stage)
        whole = (folder / adapter_state.FILE).is_file() and self.zero_stage
        if not same and not whole and (recorded["zero_stage"] or self.zero_stage):
            raise UserError(
                f"this checkpoint holds the partitions of ZeRO-{recorded['zero_stage']} in "
                f"{recorded['world_size']} processes, and this run is ZeRO-{self.zero_stage} in "
                f"{self.args.world_size}",
                place=str(folder),
                remedy="go on with as many processes and the same stage; only an adapter's ZeRO checkpoints "
                "fit any number and stage",
            )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Load an adapter's gathered state where there is one, else what transformers loads."""
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
            group["lr"] = rate  # a schedule knows the rate of now, but sets it only when it moves on
        return prepared

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that trains; 0 without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return int(plugin.zero_stage) if plugin is not None else 0

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over micro-batches and processes."""
        rows: int = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows


class _WithIds:
    """A collator whose batches say which samples they hold; picklable, for workers of a data loader."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], makes_weights: bool) -> None:
        self._collate = collate
        self._makes_weights = makes_weights

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        rows = [row for feature in features for row in feature.get("rows", [feature])]  # packed, or one each
        if self._makes_weights:
            for row in rows:
                if row["sample_weight"] != 1:
                    raise UserError(
                        f"row {row.get('id')!r} has a weight, and this loss makes its weights itself",
                        remedy="remove the weights, or set loss: weighted",
                    )
        return {**self._collate(features), _IDS: [str(row.get("id")) for row in rows]}

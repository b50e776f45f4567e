"""`UALTrainer`: transformers.Trainer whose model computes the fused, per-sample loss."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ual.errors import UserError
from ual.train.seen import BatchStatistics, spread
from ual_kernels import IGNORE_INDEX

_PARTIAL = ".partial"


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
        *args, **kwargs: as `transformers.Trainer`.

    Raises:
        UserError: several GPUs in one process (DataParallel), for which per-sample losses are not defined.
    """

    def __init__(
        self,
        *args: Any,
        average: Literal["weights", "tokens", "samples"] = "weights",
        groups: Sequence[str] = (),
        statistics: Literal["every", "logged", "never"] = "never",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"one process drives {self.args.n_gpu} GPUs (DataParallel)",
                remedy="start one process per GPU: torchrun --nproc_per_node N, or deepspeed --num_gpus N",
            )
        self.average = average
        self.seen = BatchStatistics(groups)
        self._statistics = statistics
        self._since = time.monotonic()
        self._partial: Path | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Count what the batch holds (on the device, unread), then let the model compute its loss."""
        groups = inputs.pop("groups", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.seen.is_empty:
            self._since = time.monotonic()
        live = inputs["labels"][:, 1:] != IGNORE_INDEX
        self.seen.count(live, inputs["label_smoothing"], inputs["sample_weight"])
        wanted = self._statistics == "every" or (self._statistics == "logged" and self._will_be_logged())
        loss, outputs = super().compute_loss(
            model, inputs | {"return_statistics": True} if wanted else inputs, True, num_items_in_batch
        )
        if wanted:
            self.seen.observe(live, outputs.statistics, groups)
        return (loss, outputs) if return_outputs else loss

    def _will_be_logged(self) -> bool:
        step, every = self.state.global_step + 1, max(1, round(self.state.logging_steps))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

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
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    # ---- checkpoints are whole or absent ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save aside, then rename: a kill or a full disk leaves no half checkpoint under its final name."""
        checkpoints = Path(super()._get_output_dir(trial))
        self._partial = checkpoints / _PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                for folder in self._partial.glob("checkpoint-*"):
                    if self.state.best_model_checkpoint == str(folder):  # name it as it will be called
                        self.state.best_model_checkpoint = str(checkpoints / folder.name)
                        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                    shutil.rmtree(checkpoints / folder.name, ignore_errors=True)
                    folder.rename(checkpoints / folder.name)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors wrap what the disk said
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
        self.accelerator.wait_for_everyone()


class Features(torch.utils.data.Dataset[dict[str, Any]]):
    """A list of tokenised rows, as a map-style data set."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

"""`UALTrainer`: transformers.Trainer whose model computes the fused, per-sample loss."""

import math
import shutil
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
        *args, **kwargs: as `transformers.Trainer`.

    Raises:
        UserError: several GPUs in one process (DataParallel), for which per-sample losses are not defined.
    """

    def __init__(
        self, *args: Any, average: Literal["weights", "tokens", "samples"] = "weights", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"one process drives {self.args.n_gpu} GPUs (DataParallel)",
                remedy="start one process per GPU: torchrun --nproc_per_node N, or deepspeed --num_gpus N",
            )
        self.average = average
        self._seen: dict[str, Tensor] = {}
        self._partial: Path | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Count what the batch holds (on the device, unread), then let the model compute its loss."""
        if model.training:
            live = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1)
            self._count(
                tokens=live.sum(),
                positions=torch.tensor(inputs["labels"].numel()),
                smoothing=(inputs["label_smoothing"] * live).sum(),
                weight=(inputs["sample_weight"] * live).sum(),
            )
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Sum the weights of live tokens in place of counting them, over micro-batches and devices."""
        if self.average == "tokens" or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum(
            ((batch["labels"][:, 1:] != IGNORE_INDEX).sum(1) * batch["sample_weight"]).sum()
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
        """Add what the batches since the last log held: live share, their mean smoothing and weight."""
        if "loss" in logs and self._seen:
            seen = {name: value.item() for name, value in self._seen.items()}
            tokens = max(seen["tokens"], 1)
            logs |= {
                "live_tokens": seen["tokens"],
                "live_fraction": seen["tokens"] / seen["positions"],
                "mean_smoothing": seen["smoothing"] / tokens,
                "mean_weight": seen["weight"] / tokens,
            }
            self._seen = {}
        super().log(logs, *args, **kwargs)

    def is_finished(self, checkpoint: Path) -> bool:
        """Take a checkpoint's weights and state and return True if no step is left to train after it.

        transformers, asked to resume from its own last step, trains one step too many.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        rows = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))  # type: ignore[arg-type]
        per_epoch = math.ceil(rows / self.args.gradient_accumulation_steps)
        planned = self.args.max_steps
        if planned <= 0:
            planned = math.ceil(self.args.num_train_epochs * per_epoch)
        if state.global_step < planned:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _count(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().to(self.args.device, torch.float64 if self.args.use_cpu else torch.float32)
            self._seen[name] = self._seen[name] + value if name in self._seen else value

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

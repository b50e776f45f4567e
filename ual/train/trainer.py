"""`UALTrainer`: transformers.Trainer whose model computes the fused loss, per sample."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from ual.errors import UserError
from ual.models.score import score
from ual.train import distributed
from ual.train.checkpointing import CheckpointingTrainer
from ual.train.metrics import BatchStatistics, spread
from ual.train.objective import PLAIN, Objective
from ual_kernels import IGNORE_INDEX

_IDS = "sample_ids"
_EXACT = ("label_smoothing", "sample_weight", "option_probabilities")


class UALTrainer(CheckpointingTrainer):
    """Train a model prepared by `ual.models.fuse`, on batches with `label_smoothing` and `sample_weight`.

    The model never computes logits. The loss of an accumulated batch is one mean over all its loss tokens on
    all devices, independent of the micro-batches, as in transformers.

    Args:
        average: what the sum of weighted token losses is divided by. "weights": the sum of the tokens'
            weights. "tokens": the number of loss tokens, so weights below 1 also lower the loss.
            "samples": as "weights", where the collator has divided each sample's weight by its tokens.
        groups: names of the groups that batches index by `groups`; the unsmoothed loss of each is logged.
        statistics: steps at which entropy, margin, probability and loss by group are computed, in the
            loss's own pass (docs/training.md has the cost).
        objective: what the loss computes from the model's prediction of each token.
        data_collator: as `ual.data.Collator`, called with features that have an `id`.
        *args, **kwargs: as `transformers.Trainer`.

    Raises:
        UserError: one process drives several GPUs (DataParallel), which splits batches without their samples.
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
        self._collate = data_collator
        kwargs["data_collator"] = _WithIds(data_collator, objective.token_weight is not None)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"one process drives {self.args.n_gpu} GPUs (DataParallel)",
                remedy="start one process per GPU: torchrun --nproc_per_node N, or deepspeed --num_gpus N",
            )
        self.average = average
        self.objective: Objective = objective
        self.metrics = BatchStatistics(groups)
        self._statistics = statistics
        self._since = time.monotonic()
        self._window: list[tuple[list[str], Tensor]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Add the batch to the statistics, on the device, and return the model's loss."""
        ids, groups = inputs.pop(_IDS, []), inputs.pop("groups", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise UserError(
                f"a training batch has no labels, only {sorted(inputs)}",
                remedy="UALTrainer does not support sequence and context parallelism, which replace labels "
                "by shift_labels: set sp_size and cp_size to 1",
            )
        if self.metrics.is_empty:
            self._since = time.monotonic()
        valid = inputs["labels"][:, 1:] != IGNORE_INDEX
        self.metrics.count(valid, inputs["label_smoothing"], inputs["sample_weight"])
        wanted = self._statistics == "every" or (self._statistics == "logged" and self._will_be_logged())
        inputs = self.objective.prepare(inputs, self.state.global_step / self.state.max_steps)
        loss, outputs = super().compute_loss(
            model, inputs | {"return_statistics": True} if wanted else inputs, True, num_items_in_batch
        )
        if wanted:
            self.metrics.observe(valid, outputs.statistics, groups)
        loss = self.objective.finish(loss, outputs)
        self._window.append((ids, loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def _will_be_logged(self) -> bool:
        step, every = self.state.global_step + 1, max(1, round(self.state.logging_steps))
        first, last = step == 1 and self.args.logging_first_step, step >= self.state.max_steps
        return step % every == 0 or first or last

    def suspects(self) -> list[str]:
        """Return the ids of this process's samples whose micro-batch has a non-finite loss in this step.

        If every loss is finite, return the ids of all samples of the step.
        """
        guilty = [ids for ids, loss in self._window if not torch.isfinite(loss)]
        return [name for ids in guilty or [ids for ids, _ in self._window] for name in ids]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep these columns in float32: transformers casts floating inputs to DeepSpeed's dtype."""
        exact = {name: inputs[name].to(self.args.device) for name in _EXACT if name in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a step: clear the samples of the previous one."""
        self._window = []
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the sum of the loss tokens' weights, over micro-batches and devices."""
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
        # every token is ignored or has weight 0: the loss is 0 for any divisor
        return torch.where(total == 0, 1.0, total)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Also log before a checkpoint and at the end, so that no step is missing from the history."""
        control, may_save = self.control, self.args.save_strategy == SaveStrategy.BEST
        if control.should_save or control.should_training_stop or (control.should_evaluate and may_save):
            control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean NLL of the held-out loss tokens as the loss, as `ual.evaluate` computes it.

        transformers averages the means of batches, and counts the samples twice that fill the last batch of
        several processes. Predictions and the user's metrics remain those of transformers.
        """
        samples: Any = dataloader.dataset
        output = EvalLoopOutput(None, None, {}, len(samples))  # type: ignore[arg-type]
        if not prediction_loss_only:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = self._mean_nll(samples)
        return output

    def _mean_nll(self, samples: Sequence[Any]) -> float:
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "eval"):  # schedule-free ones keep other weights for training
            optimizer.eval()
        share = distributed.rank(), distributed.world_size()
        size = self.args.eval_batch_size
        scores = score(self._module, samples, self._collate, batch_size=size, share=share)
        mine = [(-float(of_sample.log_prob.sum()), len(of_sample.log_prob)) for of_sample in scores]
        every = [pair for pairs in distributed.gather(mine) for pair in pairs]
        tokens = sum(count for _, count in every)
        if not tokens:
            raise UserError(
                "the held-out samples have no loss token, so there is no eval_loss",
                remedy="check data.eval, or raise data.max_length so that responses are not cut off",
            )
        return math.fsum(nll for nll, _ in every) / tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the statistics of the batches since the last log, over all devices, and their speed."""
        if "loss" in logs and not self.metrics.is_empty:
            seconds = time.monotonic() - self._since
            metrics = self.metrics.read(lambda totals: self.accelerator.reduce(totals, "sum"))
            logs |= metrics | {"tokens_per_second": metrics["live_tokens"] / max(seconds, 1e-9)}
            self._since = time.monotonic()
        super().log(logs, *args, **kwargs)


class _WithIds:
    """A collator whose batches carry the ids of their samples; picklable, for a data loader's workers."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], makes_weights: bool) -> None:
        self._collate = collate
        self._makes_weights = makes_weights

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        samples = [s for feature in features for s in feature.get("rows", [feature])]  # packed, or one each
        if self._makes_weights:
            for sample in samples:
                if sample["sample_weight"] != 1:
                    raise UserError(
                        f"sample {sample.get('id')!r} has a weight, but this loss computes its own weights",
                        remedy="remove the weights, or set loss: weighted",
                    )
        return {**self._collate(features), _IDS: [str(sample.get("id")) for sample in samples]}

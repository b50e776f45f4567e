"""`ual estimate`: a run's memory on each GPU, from its configuration alone."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ual.config.run import RunConfig
from ual.errors import UserError
from ual.models.memory import StepMemory, empty_model, step_memory
from ual.train.arguments import checked

# optimizer states per trained parameter, in parameter sizes; an optimizer that is not named has two, as Adam
_STATES = {"sgd": 0.0, "adafactor": 0.01, "rmsprop": 1.0, "adagrad": 1.0, "lion_32bit": 1.0}
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on each GPU. Host memory for offloading is not included."""

    weights: int
    gathered: int
    """Layers that ZeRO-3 holds unpartitioned at once: the largest and its successor."""
    gradients: int
    optimizer: int
    activations: int
    naive_head: int
    fused_head: int

    @property
    def shared(self) -> int:
        """Bytes that do not depend on the loss."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations

    @property
    def naive(self) -> int:
        return self.shared + self.naive_head

    @property
    def fused(self) -> int:
        return self.shared + self.fused_head


def estimate(
    config: RunConfig,
    *,
    gpus: int = 1,
    zero: Literal[0, 1, 2, 3] = 0,
    live: float = 1.0,
    device: Literal["cuda", "cpu"] = "cuda",
    trust_remote_code: bool = False,
) -> Estimate:
    """Estimate the largest micro-batch, whose sequences all have `data.max_length` tokens.

    Args:
        config: model, adapter, `data.max_length` (None: the smaller of 2048 and the context) and, in
            `training`, batch size, precision, optimizer and gradient checkpointing.
        gpus: processes that ZeRO shards over, >= 1.
        zero: stage. 1 shards the optimizer, 2 also gradients, 3 also weights.
        live: share of loss tokens, in (0, 1].
        device: "cpu" for training without a GPU.
        trust_remote_code: run model code that is shipped with the weights.

    Raises:
        UserError: a key of `training` is wrong, there is no such model, or the adapter does not fit it.
    """
    if not (gpus >= 1 and 0 < live <= 1):
        raise UserError(f"expected at least 1 GPU and a live share in (0, 1], got {gpus} and {live}")
    training = checked(config)
    model = empty_model(config.model, config.lora, trust_remote_code=trust_remote_code)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_LENGTH
    step = step_memory(
        model,
        batch=training.get("per_device_train_batch_size", 8),
        length=config.data.max_length or min(context, _DEFAULT_LENGTH),
        loss_fraction=live,
        checkpointing=training.get("gradient_checkpointing", False),
        # DeepSpeed casts the weights themselves; without it accelerate uses autocast over uncast weights
        autocast=None if zero else _autocast(training, device),
        quantization=config.model.quantization,
        device=device,
    )
    return sharded(step, gpus=gpus, zero=zero, states=_states(training.get("optim", "adamw_torch")))


def sharded(step: StepMemory, *, gpus: int, zero: int, states: float = 2.0) -> Estimate:
    """Return a process's share of a step's memory under ZeRO.

    Args:
        step: memory of one unsharded process.
        gpus, zero: as in `estimate`.
        states: optimizer states per trained parameter. DeepSpeed stores them, and a copy of the trained
            weights, in float32; without DeepSpeed they have the dtype of the weights.
    """
    weights = step.frozen_weights + step.trained_weights
    state_bytes = (4 * (states + 1)) * step.trained_parameters if zero else states * step.trained_weights
    return Estimate(
        weights=math.ceil(weights / (gpus if zero == 3 else 1)),
        gathered=2 * step.largest_layer if zero == 3 and gpus > 1 else 0,
        gradients=math.ceil(step.trained_weights / (gpus if zero >= 2 else 1)),
        optimizer=math.ceil(state_bytes / (gpus if zero else 1)),
        activations=step.activations,
        naive_head=step.naive_head,
        fused_head=step.fused_head,
    )


def _states(optim: str) -> float:
    if "8bit" in optim or "8_bit" in optim:
        return 0.5
    return _STATES.get(optim.removeprefix("paged_").removesuffix("_torch"), 2.0)


def _autocast(training: dict[str, Any], device: str) -> torch.dtype | None:
    if training.get("bf16", device == "cuda" and not training.get("fp16", False)):
        return torch.bfloat16
    return torch.float16 if training.get("fp16") else None

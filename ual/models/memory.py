"""Memory of a training step, counted without weights: one step runs on tensors that have shapes but no data.

A model on the meta device becomes a model of fake CPU tensors. Every storage that a step makes is counted
while it lives, so the peak belongs to the operations that training itself runs, for any architecture. Scratch
inside an operation and the allocator's waste are not counted; docs/data.md compares counts with measurements.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from ual.config.run import LoraConfig, ModelConfig
from ual.errors import UserError
from ual.models.fuse import fuse, unfuse
from ual.models.load import attach_lora, first_line, load_config, loading, stored_dtype

# (device, head is trained): MiB of logits and of a chunk's gradient within the fused loss's operator, as
# measured in docs/kernels.md
_SCRATCH = {("cpu", False): 12, ("cpu", True): 72, ("cuda", False): 512, ("cuda", True): 2304}
_QUANTIZED = {"nf4": 0.52, "int8": 1.02}  # bytes of a weight in bitsandbytes' types, with its blocks' scales


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one process, and the number of trained parameters."""

    frozen_weights: int
    trained_weights: int
    """Also the bytes of their gradients."""
    trained_parameters: int
    largest_layer: int
    """Weights of the largest module that ZeRO-3 gathers at once: decoder layer, embedding or head."""
    activations: int
    """Peak of a step without head and loss; gradients of the weights are not included."""
    naive_head: int
    """Rise of the peak with transformers' own head and loss."""
    fused_head: int
    """Rise of the peak with the fused loss."""


def empty_model(
    config: ModelConfig, lora: LoraConfig | None, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Build the model, with its adapter, on the meta device; only config.json of a hub model is fetched.

    Raises:
        UserError: there is no such configuration, or the adapter fits no module of the model.
    """
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    pretrained = load_config(config, trust_remote_code=trust_remote_code)
    dtype = stored_dtype(config, pretrained)
    with torch.device("meta"):
        with loading("model", config.path):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                pretrained, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
        return attach_lora(model, lora) if lora else model


def step_memory(
    model: PreTrainedModel | PeftModel,
    *,
    batch: int,
    length: int,
    loss_fraction: float = 1.0,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> StepMemory:
    """Count the memory of a micro-batch's forward and backward pass on fake tensors.

    Args:
        model: on the meta device, not fused, with its adapter; unusable afterwards.
        batch, length: sequences of the micro-batch, tokens of each.
        loss_fraction: share of loss tokens; only these reach the fused loss.
        checkpointing: as `gradient_checkpointing` of TrainingArguments.
        autocast: bfloat16 or float16 if the trainer computes in it over weights of another type.
        quantization: type of the frozen linear layers other than the head.
        device: whose scratch the fused loss uses.

    Raises:
        UserError: the model's operations depend on values, or its loss cannot be fused.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = _sizes(model, base, quantization)
    head = base.get_output_embeddings().weight
    loss_tokens = max(1, int(batch * length * loss_fraction))
    # a trained head: a quarter of its float32 gradient, if that is more
    most = max(_SCRATCH[device, head.requires_grad] << 20, head.numel() if head.requires_grad else 0)
    scratch = min(most, loss_tokens * len(head) * 4)
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    fuse(model, verify=False)  # before the tensors are fake: it reads numbers
    with FakeTensorMode():
        _make_fake(model)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "use_cache": False}
        labels = {"labels": ids, "max_loss_tokens": loss_tokens}
        try:
            fused = _peak(model, lambda: model(**inputs, **labels).loss, autocast, scratch)
            unfuse(model)
            activations = _peak(model, lambda: base.base_model(**inputs).last_hidden_state, autocast)
            naive = _peak(model, lambda: model(**inputs, labels=ids).loss, autocast)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"a step of {type(base).__name__} cannot be run without weights: {first_line(error)}",
                remedy="set model.dtype to bfloat16 if the model routes tokens to experts; "
                "otherwise measure a short run",
            ) from error
    head_sizes = {"naive_head": max(0, naive - activations), "fused_head": max(0, fused - activations)}
    return StepMemory(**sizes, activations=activations, **head_sizes)


def _sizes(model: nn.Module, base: Any, quantization: str | None) -> dict[str, int]:
    """Return the fields of `StepMemory` that need no step."""
    head = base.get_output_embeddings()
    linear = {m.weight for m in base.modules() if isinstance(m, nn.Linear) and m is not head}
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]

    def stored(p: Tensor) -> int:
        return int(p.numel() * _QUANTIZED[quantization]) if quantization and p in linear else p.nbytes

    return {
        "frozen_weights": sum(map(stored, frozen)),
        "trained_weights": sum(p.nbytes for p in trained),
        "trained_parameters": sum(p.numel() for p in trained),
        "largest_layer": max(sum(p.nbytes for p in m.parameters()) for m in _gathered_at_once(base)),
    }


def _gathered_at_once(base: nn.Module) -> Iterator[nn.Module]:
    """Yield decoder layers, which are in lists, and the largest modules beside them: embedding and head."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
        elif isinstance(module, nn.Embedding | nn.Linear):
            yield module


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors; tied parameters stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                if p.requires_grad:  # a gradient exists before the step, so no step's peak includes it
                    made[p].grad = torch.zeros(p.shape, dtype=p.dtype)
            module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _peak(
    model: nn.Module, forward: Callable[[], Tensor], autocast: torch.dtype | None, scratch: int = 0
) -> int:
    """Return the largest number of bytes in storages that a step makes."""
    counter = _Storages(model, scratch)
    with counter:
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            out = forward()
        torch.autograd.backward(out, torch.ones_like(out))
    return counter.peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, until each is freed."""

    def __init__(self, model: nn.Module, scratch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._scratch = scratch
        # Operations return views of weights and gradients. References keep their ids from being used again.
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        known = [t.untyped_storage() for t in (*tensors, *model.buffers())]
        self._known = {id(storage): storage for storage in known}
        self._counted: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        if func.name().startswith("ual_kernels::"):
            self.peak = max(self.peak, self._live + self._scratch)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._counted:
            return

        def freed(_: Any) -> None:
            self._live -= size
            del self._counted[key]

        self._counted[key] = weakref.ref(storage, freed)
        self._live += size
        self.peak = max(self.peak, self._live)

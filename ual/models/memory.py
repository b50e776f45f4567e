"""What a training step needs of memory, found without weights: one step is run on tensors that hold nothing.

A model on the meta device becomes one of fake CPU tensors, whose operations know shapes only. Every storage
that a step makes is counted while it lives, so the peak is that of the very operations that training runs,
whatever the architecture: nothing here knows what a layer is made of. What it cannot see is scratch inside
an operation and what an allocator wastes. (On two CPU models measured peaks were 0.99 of it: docs/data.md.)
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
from ual.models.fuse import fuse
from ual.models.load import attach_lora, cannot_load, load_config

# what the fused loss needs within its operator (docs/kernels.md): tiles of logits, and a chunk's gradient
_SCRATCH = {
    ("cpu", False): 12 << 20,
    ("cpu", True): 72 << 20,
    ("cuda", False): 512 << 20,
    ("cuda", True): 2304 << 20,
}
# bytes of a weight in bitsandbytes' types, with the scales of its blocks
_QUANTISED = {"nf4": 0.52, "int8": 1.02}


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one process. `activations` is the peak of a step without head and loss, gradients apart."""

    frozen_weights: int
    trained_weights: int
    trained_parameters: int
    gradients: int
    largest_layer: int
    """Weights of the largest module that ZeRO-3 gathers at once, a decoder layer or the head."""
    activations: int
    naive_head: int
    """What the peak rises by with transformers' own head and loss."""
    fused_head: int
    """What it rises by with the fused loss."""


def empty_model(
    config: ModelConfig, lora: LoraConfig | None, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Build the model, with its adapter, on the meta device: of a hub model only config.json is fetched.

    Raises:
        UserError: there is no such configuration, or the adapter fits nothing in it.
    """
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    of_model = load_config(config, trust_remote_code=trust_remote_code)
    try:
        dtype = getattr(torch, config.dtype) if config.dtype != "auto" else of_model.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                of_model, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", config.path, error) from error
    if lora is None:
        return model  # type: ignore[no-any-return]
    with torch.device("meta"):
        return attach_lora(model, lora)


def step_memory(
    model: PreTrainedModel | PeftModel,
    *,
    batch: int,
    length: int,
    live: float = 1.0,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> StepMemory:
    """Run steps of the model on fake tensors, and count.

    Args:
        model: on the meta device, not fused, with its adapter; of no use afterwards.
        batch, length: sequences of a micro-batch, tokens of each.
        live: share of the tokens that are trained; the fused loss sees no others.
        checkpointing: gradient checkpointing, as `gradient_checkpointing` of TrainingArguments.
        autocast: bfloat16 or float16 where the trainer computes in it over other weights.
        quantization: the frozen linear layers but the head are held in it.
        device: for the fused loss's scratch.

    Raises:
        UserError: the architecture decides by values what it computes, or the loss cannot be fused.
    """
    base = _base(model)
    head = base.get_output_embeddings()
    rows = max(1, int(batch * length * live))
    most = _SCRATCH[device, head.weight.requires_grad]
    if head.weight.requires_grad:  # a quarter of its float32 gradient
        most = max(most, head.weight.numel())
    scratch = min(most, rows * head.weight.shape[0] * 4)
    frozen: dict[Tensor, int] = {p: p.nbytes for p in model.parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    if quantization:
        for module in base.modules():
            if isinstance(module, nn.Linear) and module is not head and module.weight in frozen:
                frozen[module.weight] = int(module.weight.numel() * _QUANTISED[quantization])
    sizes = {
        "frozen_weights": sum(frozen.values()),
        "trained_weights": sum(p.nbytes for p in trained),
        "trained_parameters": sum(p.numel() for p in trained),
        "gradients": sum(p.nbytes for p in trained),
        "largest_layer": max(map(_size, _gathered_at_once(base))),
    }
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})

    with FakeTensorMode():
        _fake(model)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "use_cache": False}

        def body() -> Tensor:
            hidden: Tensor = base.base_model(**inputs).last_hidden_state
            return hidden

        def loss(**options: Any) -> Tensor:
            computed: Tensor = model(**inputs, labels=ids, **options).loss
            return computed

        try:
            activations = _peak(model, body, autocast)
            naive = _peak(model, loss, autocast)
            fuse(model, verify=False)
            fused = _peak(model, lambda: loss(max_loss_tokens=rows), autocast, scratch)
        except (RuntimeError, NotImplementedError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"a step of {type(base).__name__} cannot be run without weights: {first}",
                remedy="experts that are chosen by the data need model.dtype bfloat16; "
                "else measure a short run",
            ) from error
    return StepMemory(
        **sizes,
        activations=activations,
        naive_head=max(0, naive - activations),
        fused_head=max(0, fused - activations),
    )


def _peak(
    model: nn.Module, forward: Callable[[], Tensor], autocast: torch.dtype | None, scratch: int = 0
) -> int:
    """Bytes of the storages of one step, at their most."""
    counter = _Storages(model, scratch)
    with counter:
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            out = forward()
        torch.autograd.backward(out, torch.ones_like(out))
    return counter.peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, from the moment they do until they are freed."""

    def __init__(self, model: nn.Module, scratch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._scratch = scratch
        # weights and gradients, of which operations return views; held, so that no id of theirs comes again
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


def _fake(model: nn.Module) -> None:
    """Put fake CPU tensors in the place of those on the meta device, tied ones in one place."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                if p.requires_grad:  # as in accumulation, so that no step's peak holds them
                    made[p].grad = torch.zeros(p.shape, dtype=p.dtype)
            if p is not None:
                module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _gathered_at_once(base: nn.Module) -> Iterator[nn.Module]:
    """Decoder layers, which come in lists, and the largest modules beside them: embedding and head."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
        elif isinstance(module, nn.Embedding | nn.Linear):
            yield module


def _size(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _base(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model

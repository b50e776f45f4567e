"""Compute the loss within the lm_head's own call, where hooks have gathered its weight and adapter.

1. `capturing(head)`: within it, the model's own `forward` calls the head, which returns a placeholder for the
   logits and keeps its input. No hook runs yet.
2. `call(head, hidden, loss)`: the head computes the loss of this input in place of logits. The hooks of
   DeepSpeed ZeRO-3, FSDP and accelerate run as they do for logits.

Nothing is patched in either step, and the state of step 1 belongs to the calling thread.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from ual.errors import UserError
from ual.models.attach import Attached, attach, detach, foreign_forward, plain_class
from ual_kernels import TokenStatistics

Lora: TypeAlias = tuple[Tensor, Tensor, float]

_REMEDY = "use plain LoRA, modules_to_save, or no adapter on the lm_head"
_REMEDY_FOR_TOKENS = (
    "remove trainable_token_indices, or untie the embeddings: PEFT adapts a tied lm_head as well"
)
_TENSOR_PARALLEL = ("transformers.distributed.tensor_parallel", "torch.distributed.tensor._api")
_FRAMEWORKS = ("deepspeed.", "torch.distributed.")  # their forward hooks look for tensors in any output


class HeadLoss(NamedTuple):
    """What a head returns in place of logits."""

    loss: Tensor
    statistics: TokenStatistics | None


class Captured:
    """The input of a head, [..., D], once its model has called it.

    Args:
        head: whose calls are intercepted.
        reply: makes what the head returns in place of logits, [..., 1] or [..., V]; None computes the logits.
    """

    def __init__(self, head: nn.Module, reply: Callable[[Tensor], Tensor] | None) -> None:
        self.head, self.reply = head, reply
        self.inputs: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        """The hidden states.

        Raises:
            UserError: the model has not called its head exactly once.
        """
        if len(self.inputs) != 1:
            raise _unsupported(
                f"was called {len(self.inputs)} times during the model's forward, which must call it once",
                "remove hooks that call it or the model; otherwise, please report the architecture",
            )
        return self.inputs[0]


class _ThreadState(threading.local):
    captured: Captured | None = None
    given: tuple[nn.Module, Tensor] | None = None


_STATE = _ThreadState()


def placeholder(hidden: Tensor) -> Tensor:
    """Return zeros [..., 1]: logits are scaled and capped after the head, and this costs next to nothing."""
    return hidden.new_zeros(*hidden.shape[:-1], 1)


@contextmanager
def capturing(head: nn.Module, reply: Callable[[Tensor], Tensor] | None = placeholder) -> Iterator[Captured]:
    """Intercept the calls of this head, in this thread."""
    outer, captured = _STATE.captured, Captured(head, reply)
    _STATE.captured = captured
    try:
        yield captured
    finally:
        _STATE.captured = outer


@contextmanager
def given(head: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Give the head these hidden states in place of the model's, in this thread."""
    _STATE.given = head, hidden
    try:
        yield
    finally:
        _STATE.given = None


def call(
    head: nn.Module,
    hidden: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor | None, Lora | None], HeadLoss],
) -> HeadLoss:
    """Return `loss(hidden, weight, bias, lora)`, computed within the head's `__call__`.

    Args:
        head: a linear layer, plain LoRA around one, or PEFT's wrapper for `modules_to_save`.
        hidden: [..., D] hidden states.
        loss: receives the hidden states on the head's device, weight [V, D], bias [V] or None, and the active
            adapter (A [r, D], B [V, r], scale) or None. If the head is tensor-parallel, weight and bias are
            DTensors that are sharded over classes.

    Raises:
        UserError: the fused loss does not support this head.
    """
    prepare(head)

    def without_lora(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
        return loss(hidden, weight, bias, None)

    if isinstance(head, _LoraLinear):
        result = head(hidden, fused_loss=loss)
    elif isinstance(head, _SavedModules):
        result = head(hidden, fused_loss=without_lora)
    else:
        result = _call_linear(head, hidden, [], without_lora)
    assert isinstance(result, HeadLoss)
    return result


def prepare(head: nn.Module) -> None:
    """Give the head and the modules within it the classes that `call` needs, once each.

    Weights need not be in memory.

    Raises:
        UserError: the fused loss does not support this head, its adapter, or a hook on it.
    """
    for module, mixin in _parts(head):
        _check_instance(module, alone=module is head)
        if not isinstance(module, mixin):
            _check_class(module, mixin)
            attach(module, mixin)


def check(head: nn.Module) -> None:
    """Raise if the head cannot be fused. Weights need not be in memory.

    Raises:
        UserError: as `prepare`; also an adapter other than plain LoRA, or a trainable one with dropout.
    """
    for module, mixin in _parts(head):
        _check_instance(module, alone=module is head)
        _check_class(module, mixin)
    if isinstance(head, LoraLinear):
        trained = any(p.requires_grad for p in head.lora_A.parameters())
        _check_lora(head, _active(head), training=trained)


def release(head: nn.Module) -> None:
    """Undo `prepare`."""
    for module in head.modules():
        if isinstance(module, _Linear | _LoraLinear | _SavedModules):
            detach(module)


# ---- heads that compute a loss on request ----


class _Head(Attached):
    """A module whose call can be intercepted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        captured, given = _STATE.captured, _STATE.given
        if given is not None and given[0] is self:
            args = (given[1], *args[1:])
        if captured is not None and captured.head is self and "fused_loss" not in kwargs:
            captured.inputs.append(args[0])
            if captured.reply is not None:
                return captured.reply(args[0])
        if "fused_loss" in kwargs and is_tensor_parallel(self):
            # what is around its forward would distribute the input and gather the output
            return type(self).forward(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class _Linear(_Head):
    """A linear layer that passes its input, weight and bias to a function on request."""

    def forward(self, input: Tensor, *args: Any, fused_loss: Any = None, **kwargs: Any) -> Any:
        if fused_loss is None:
            return super().forward(input, *args, **kwargs)
        weight: Any = self.weight
        if _is_packed(weight) and not _is_vocab_parallel(self):
            raise _unsupported(
                f"has a weight of type {type(weight).__name__} ({weight.dtype})",
                "keep the lm_head unquantized; fully_shard it only if it is not tensor-parallel",
            )
        return fused_loss(input, weight, self.bias)


def _is_packed(weight: Tensor) -> bool:
    """Return whether a weight stores other numbers than it shows: quantized, or a shard of a DTensor."""
    kind: Any = type(weight)
    plain = kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__module__.startswith(
        "torch._subclasses"
    )
    return not (plain and weight.is_floating_point())


class _LoraLinear(_Head):
    """Plain LoRA that passes on the base weight and the active adapters' factors, unmerged.

    PEFT's own `forward` would pass `fused_loss` to the base layer and leave the adapter out.
    """

    def forward(self, x: Tensor, *args: Any, fused_loss: Any = None, **kwargs: Any) -> Any:
        if fused_loss is None:
            return super().forward(x, *args, **kwargs)
        _check_adapter_names(kwargs)
        layer: Any = self
        active = _active(layer)
        _check_lora(layer, active, training=layer.training)
        scaling = [layer.scaling[name] for name in active]
        factors = [layer.lora_A[name] for name in active] + [layer.lora_B[name] for name in active]

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> HeadLoss:
            result: HeadLoss = fused_loss(hidden, weight, bias, _joined(factors, scaling))
            return result

        return _call_lora(factors, [], layer.get_base_layer(), x, compute)


class _SavedModules(_Head):
    """PEFT's wrapper for `modules_to_save`; it passes `fused_loss` on to the module that is in use."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_loss") is not None:
            _check_adapter_names(kwargs)
        return super().forward(*args, **kwargs)


def _call_lora(
    factors: Sequence[nn.Module],
    weights: Sequence[Tensor],
    base: nn.Module,
    hidden: Tensor,
    compute: Callable[..., HeadLoss],
) -> HeadLoss:
    """Call the factors one within the other and the base innermost: each call gathers its module's weight."""
    if not factors:
        return _call_linear(base, hidden, weights, compute)

    def within(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
        return _call_lora(factors[1:], [*weights, weight], base, hidden, compute)

    result: HeadLoss = factors[0](hidden, fused_loss=within)
    return result


def _call_linear(
    base: nn.Module, hidden: Tensor, factors: Sequence[Tensor], compute: Callable[..., HeadLoss]
) -> HeadLoss:
    """Return `compute(hidden, weight, bias, *factors)`, computed within the base's call."""
    partitioned = any(hasattr(p, "ds_id") for p in base.parameters(recurse=False))
    trained = any(p.requires_grad for p in base.parameters(recurse=False))
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *factors))
    if trained or not (partitioned and differentiated):
        result: HeadLoss = base(hidden, fused_loss=lambda h, w, b: compute(h, w, b, *factors))
        return result
    # ZeRO-3 gathers a module again in backward if its output requires a gradient, but a frozen head is not
    # needed there. So the gradients are computed now, and the head's output has no history.
    loss, statistics, *gradients = base(
        hidden, fused_loss=lambda h, w, b: _with_gradients(lambda x, *f: compute(x, w, b, *f), [h, *factors])
    )
    return HeadLoss(_PrecomputedGradients.apply(loss, gradients, hidden, *factors), statistics)  # type: ignore[no-untyped-call]


def _with_gradients(compute: Callable[..., HeadLoss], inputs: Sequence[Tensor]) -> list[Any]:
    """Return [loss, statistics, the loss's gradient for each input or None], all without history."""
    detached = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    loss, statistics = compute(*detached)
    known = iter(torch.autograd.grad(loss, [t for t in detached if t.requires_grad]))
    return [loss.detach(), statistics, *(next(known) if t.requires_grad else None for t in detached)]


class _PrecomputedGradients(torch.autograd.Function):
    """A loss whose gradients are known; backward scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)


def _joined(factors: Sequence[Tensor], scaling: Sequence[float]) -> Lora | None:
    """Return one adapter (A, B, scale) that equals the sum of the active ones."""
    count = len(scaling)
    if count == 0:
        return None
    a, b = factors[:count], factors[count:]
    if count == 1:
        return a[0], b[0], scaling[0]
    scaled = [factor * scale for factor, scale in zip(b, scaling, strict=True)]
    return torch.cat(list(a)), torch.cat(scaled, dim=1), 1.0


# ---- which heads are supported ----


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return whether tensor parallelism, of transformers or torch, has split this module over ranks."""
    around = [foreign_forward(module), *module._forward_hooks.values()]
    return any(getattr(function, "__module__", None) in _TENSOR_PARALLEL for function in around)


def _is_vocab_parallel(module: nn.Module) -> bool:
    """Return whether each rank has this layer's weight for some of the classes, in the order of ranks."""
    weight = module.weight
    return is_tensor_parallel(module) and isinstance(weight, DTensor) and weight.placements == (Shard(0),)


def _parts(head: Any) -> Iterator[tuple[nn.Module, type[Attached]]]:
    """Yield the modules of a head with their mixins."""
    if isinstance(head, ModulesToSaveWrapper):
        for module in (head.original_module, *head.modules_to_save.values()):
            yield module, _Linear
        yield head, _SavedModules
    elif isinstance(head, _LoraLinear) or _is_plain_lora(head):
        for module in (head.get_base_layer(), *head.lora_A.values(), *head.lora_B.values()):
            yield module, _Linear
        yield head, _LoraLinear
    else:
        yield head, _Linear


def _is_plain_lora(head: nn.Module) -> bool:
    return isinstance(head, LoraLinear) and plain_class(head).forward is LoraLinear.forward


def _check_class(module: nn.Module, mixin: type[Attached]) -> None:
    """Refuse a module in the place of a linear layer that computes anything else, whatever it is called."""
    if mixin is not _Linear:
        return
    if isinstance(module, FullyShardedDataParallel):
        raise _unsupported(
            "is wrapped in FullyShardedDataParallel of its own",
            "use fully_shard, or an auto-wrap policy that wraps decoder layers only",
        )
    if not isinstance(module, nn.Linear):
        name = _described(module)
        raise _unsupported(f"is a {name}", _REMEDY_FOR_TOKENS if "TrainableTokens" in name else _REMEDY)
    if plain_class(module).forward is not nn.Linear.forward:
        raise _unsupported(f"is a {_described(module)}, which has a forward of its own", _REMEDY)


def _described(module: nn.Module) -> str:
    kind = plain_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _unsupported(problem: str, remedy: str) -> UserError:
    return UserError(f"the lm_head {problem}; the fused loss does not support it", remedy=remedy)


def _check_instance(module: nn.Module, *, alone: bool) -> None:
    """Refuse what somebody has set on this module: a forward, or hooks that expect logits."""
    if is_tensor_parallel(module):
        if not (alone and _is_vocab_parallel(module)):
            raise _unsupported(
                "is tensor-parallel, and has an adapter, or FSDP's shards, or is not split over classes",
                "keep adapters off the lm_head, give it a column-wise style in the plan, and call "
                "fuse(model) before fully_shard(model), which must leave the lm_head to the root",
            )
    elif (own := foreign_forward(module)) is not None:
        raise _unsupported(
            f"has a forward that {getattr(own, '__module__', type(own).__name__)} has set on the module",
            "remove what replaced its forward",
        )
    for hook in module._forward_hooks.values():
        function = getattr(hook, "func", hook)
        origin = str(getattr(function, "__module__", type(function).__module__))
        if not origin.startswith(_FRAMEWORKS):
            name = getattr(function, "__qualname__", type(function).__name__)
            raise _unsupported(
                f"has the forward hook {name} of {origin}, which would receive the loss instead of logits",
                "remove the hook, use a forward pre-hook, or call unfuse(model)",
            )


def _check_adapter_names(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise _unsupported(
            "has another adapter for each sample (adapter_names=)",
            "call the model once per adapter, or keep the adapters off the lm_head",
        )


def _active(head: Any) -> list[str]:
    names = [] if head.disable_adapters or head.merged else head.active_adapters
    return [name for name in names if name in head.lora_A]


def _check_lora(head: Any, active: Sequence[str], *, training: bool) -> None:
    for adapter in active:
        variant = head.lora_variant.get(adapter)
        if variant is not None or head.lora_bias.get(adapter):
            kind = (
                "LoRA with a bias"
                if variant is None
                else type(variant).__name__.removesuffix("LinearVariant")
            )
            raise _unsupported(f"has an adapter other than plain LoRA ({kind})", _REMEDY)
        dropout = head.lora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and dropout.p and training:
            raise _unsupported(
                f"has LoRA dropout {dropout.p}",
                "set the adapter's dropout to 0 (lora.dropout), or remove lm_head from target_modules",
            )

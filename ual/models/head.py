"""Compute the loss within the lm_head's own call, where hooks have gathered its weight and adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ual.errors import UserError

_SUPPORTED = "use plain LoRA, modules_to_save, or no adapter on the lm_head"


def call_head(head: nn.Module, hidden: Tensor, loss: Callable[..., Any]) -> Any:
    """Return `loss(hidden, weight, ...)`, a pair (loss, statistics), computed within the head's `__call__`.

    Args:
        head: a linear layer, plain LoRA around one, or PEFT's wrapper for `modules_to_save`.
        hidden: [..., D] hidden states.
        loss: receives `hidden`, `weight` [V, D], `linear_bias` and, for LoRA, `linear_lora`.

    Raises:
        UserError: the fused loss does not support this head.
    """
    if isinstance(head, ModulesToSaveWrapper):
        adapter = head.active_adapters[0]
        trained = not head.disable_adapters and adapter in head.modules_to_save
        return call_head(head.modules_to_save[adapter] if trained else head.original_module, hidden, loss)
    if isinstance(head, LoraLayer):
        return _call_lora_head(head, hidden, loss)
    if not isinstance(head, nn.Linear):
        raise _unsupported(head)
    return _call_nested([], head, hidden, lambda hidden: loss(hidden, head.weight, linear_bias=head.bias), [])


def check_head(head: nn.Module) -> None:
    """Raise if the head cannot be fused in training. Its weights need not be in memory.

    Raises:
        UserError: the head is not a linear layer, or has an adapter other than plain LoRA without dropout.
    """
    if isinstance(head, LoraLayer):
        _check_lora(head, _active(head), training=True)
    elif not isinstance(head, nn.Linear | ModulesToSaveWrapper):
        raise _unsupported(head)


def _unsupported(head: nn.Module) -> UserError:
    return UserError(
        f"the lm_head is a {type(head).__name__}, which the fused loss does not support", remedy=_SUPPORTED
    )


def _call_lora_head(head: Any, hidden: Tensor, loss: Callable[..., Any]) -> Any:
    """Pass the base weight and the active adapters' factors, unmerged as in PEFT's own forward."""
    active = _active(head)
    _check_lora(head, active, training=head.training)
    base = head.get_base_layer()
    down, up = [head.lora_A[name] for name in active], [head.lora_B[name] for name in active]
    scaling = [head.scaling[name] for name in active]

    def compute(hidden: Tensor, *factors: Tensor) -> Any:
        a, b = factors[: len(active)], factors[len(active) :]
        lora = None
        if len(active) == 1:
            lora = a[0], b[0], scaling[0]
        elif active:
            scaled = [factor * scale for factor, scale in zip(b, scaling, strict=True)]
            lora = torch.cat(a), torch.cat(scaled, dim=1), 1.0
        return loss(hidden, base.weight, linear_bias=base.bias, linear_lora=lora)

    return _call_nested([head, *down, *up], base, hidden, compute, [*down, *up])


def _active(head: Any) -> list[str]:
    return [] if head.disable_adapters or head.merged else list(head.active_adapters)


def _check_lora(head: Any, active: Sequence[str], *, training: bool) -> None:
    for adapter in active:
        dropout = head.lora_dropout[adapter]
        if not hasattr(head, "get_delta_weight") or head.use_dora.get(adapter) or head.lora_bias.get(adapter):
            raise UserError(
                "the lm_head has an adapter other than plain LoRA, which the fused loss does not support",
                remedy=_SUPPORTED,
            )
        if isinstance(dropout, nn.Dropout) and dropout.p and training:
            raise UserError(
                f"LoRA dropout {dropout.p} on the lm_head cannot be fused",
                remedy="set lora.dropout to 0, or remove lm_head from target_modules",
            )


def _call_nested(
    outer: Sequence[nn.Module],
    base: nn.Module,
    hidden: Tensor,
    compute: Callable[..., Any],
    factors: Sequence[nn.Module],
) -> Any:
    """Call the modules one within the other, and `compute(hidden, *weights of factors)` within `base`.

    Each call runs the module's hooks, which gather its weight before and release it after.
    """
    if outer:
        with _forward(outer[0], lambda hidden: _call_nested(outer[1:], base, hidden, compute, factors)):
            return outer[0](hidden)
    weights: list[Any] = [module.weight for module in factors]
    partitioned = any(hasattr(p, "ds_id") for p in base.parameters(recurse=False))
    trained = any(p.requires_grad for p in base.parameters(recurse=False))
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *weights))
    if trained or not (partitioned and differentiated):
        with _forward(base, lambda hidden: compute(hidden, *weights)):
            return base(hidden)
    # ZeRO-3 gathers a module again in backward if its output requires a gradient, but a frozen head is not
    # needed there. So the gradients are computed now, and the head's output has no history.
    with _forward(base, lambda hidden: _with_gradients(compute, [hidden, *weights])):
        loss, statistics, *gradients = base(hidden)
    return _Known.apply(loss, gradients, hidden, *weights), statistics  # type: ignore[no-untyped-call]


def _with_gradients(compute: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Any]:
    """Return [loss, statistics, the loss's gradient for each input or None], all without history."""
    detached = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    loss, statistics = compute(*detached)
    known = iter(torch.autograd.grad(loss, [t for t in detached if t.requires_grad]))
    return [loss.detach(), statistics, *(next(known) if t.requires_grad else None for t in detached)]


class _Known(torch.autograd.Function):
    """A loss whose gradients are known; backward scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)


@contextmanager
def _forward(module: nn.Module, replacement: Callable[[Tensor], Any]) -> Iterator[None]:
    """Replace the module's `forward` in this context."""
    own = vars(module).get("forward")
    module.forward = replacement
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

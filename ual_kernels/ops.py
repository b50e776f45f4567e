"""The operators: schemas, fake implementations, autograd. Triton is imported when an operator needs it.

There are four operators in the namespace `ual_kernels`; `_operands` defines their arguments and results.

cross_entropy, cross_entropy_backward   logits are saved; backward reads them again
cross_entropy_inplace                   the gradient overwrites the logits
linear_cross_entropy                    logits are not materialized; gradients are computed in forward

The loss of the linear operator is `token_scale * (loss for a weight of 1)`. The scale of a token contains its
sample weight and the reduction's divisor, so gradients computed in forward are final if the upstream gradient
is 1, the usual case.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ual_kernels._matrices import scaled
from ual_kernels._operands import (
    LinearInputs,
    LinearOutputs,
    LinearSpec,
    LogitsInputs,
    LogitsOutputs,
    LogitsSpec,
    schema,
    tensors,
)
from ual_kernels._tokens import TokenFns
from ual_kernels._types import UnsupportedError
from ual_kernels._vocab_parallel import Shards

_LOGITS, _LINEAR = len(LogitsInputs._fields), len(LinearInputs._fields)  # numbers of tensor arguments


def _body(backend: str, operator: str) -> Any:
    """Import and return the module that computes an operator."""
    try:
        return importlib.import_module(f"ual_kernels._{backend}.{operator}")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            'backend="triton" needs the package triton, which is not installed: pip install triton, or use '
            'backend="torch"'
        ) from error


@contextmanager
def _as_called(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's device current, because Triton launches on the current device; disable autocast.

    Autocast is applied before an operator is called. Inside, it would round the accumulator's values.
    """
    device = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    with torch.autocast(tensor.device.type, enabled=False), device:
        yield


class _Once(torch.autograd.Function):
    """Identity whose backward raises. Without it, double backward would treat the gradients as constants."""

    @staticmethod
    def forward(ctx: Any, dummy: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            'the fused losses are differentiable once; use backend="reference" for second derivatives'
        )


def _once(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # backward without create_graph
        return gradients
    dummy = torch.zeros((), requires_grad=True)
    given = iter(_Once.apply(dummy, *(g for g in gradients if g is not None)))  # type: ignore[no-untyped-call]
    return tuple(None if g is None else next(given) for g in gradients)


# ---- cross entropy of given logits ----


def cross_entropy(inputs: LogitsInputs, spec: LogitsSpec, shards: Shards) -> LogitsOutputs:
    """Loss for a sample weight of 1, differentiable by logits and smoothing."""
    if shards.alone:
        return LogitsOutputs(*cross_entropy_op(*inputs, *spec))
    return LogitsOutputs(*_CrossEntropySharded.apply(*inputs, *spec, shards))  # type: ignore[no-untyped-call]


def cross_entropy_inplace(
    inputs: LogitsInputs, token_scale: Tensor, spec: LogitsSpec, shards: Shards
) -> tuple[Tensor, Tensor]:
    """Loss times `token_scale`, and statistics; the gradient overwrites the logits."""
    loss, statistics = _CrossEntropyInplace.apply(  # type: ignore[no-untyped-call]
        inputs.logits, inputs.smoothing, token_scale, inputs.target, inputs.class_weight, spec, shards
    )
    return loss, statistics


@custom_op(
    "ual_kernels::cross_entropy",
    mutates_args=(),
    schema=schema([LogitsInputs, LogitsSpec], tensors(LogitsOutputs)),
)
def cross_entropy_op(*values: Any) -> tuple[Tensor, ...]:
    inputs, spec = LogitsInputs(*values[:_LOGITS]), LogitsSpec(*values[_LOGITS:])
    with _as_called(inputs.logits):
        return tuple(_body(spec.backend, "cross_entropy").forward(inputs, spec))


@cross_entropy_op.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LogitsOutputs.empty(LogitsInputs(*values[:_LOGITS]), LogitsSpec(*values[_LOGITS:])))


@custom_op(
    "ual_kernels::cross_entropy_backward",
    mutates_args=(),
    schema=schema(["dloss", "state", LogitsInputs, LogitsSpec], "Tensor"),
)
def cross_entropy_backward_op(dloss: Tensor, state: Tensor, *values: Any) -> Tensor:
    """Return dlogits [N, V], contiguous, for dloss [N] of any stride."""
    inputs, spec = LogitsInputs(*values[:_LOGITS]), LogitsSpec(*values[_LOGITS:])
    return _logits_gradient(dloss, state, inputs, spec)


def _logits_gradient(
    dloss: Tensor, state: Tensor, inputs: LogitsInputs, spec: LogitsSpec, *shards: Shards
) -> Tensor:
    with _as_called(inputs.logits):
        dlogits: Tensor = _body(spec.backend, "cross_entropy").backward(dloss, state, inputs, spec, *shards)
        return dlogits


@cross_entropy_backward_op.register_fake
def _(dloss: Tensor, state: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, statistics = output
    ctx.mark_non_differentiable(state, statistics)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.shards = LogitsSpec(*inputs[_LOGITS:]), None
    ctx.save_for_backward(state, *inputs[:_LOGITS])


def _backward_logits(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wants = LogitsInputs(*ctx.needs_input_grad[:_LOGITS])
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    state, *inputs = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if wants.logits and ctx.shards is None:
        gradients[0] = cross_entropy_backward_op(dloss, state, *inputs, *ctx.spec)
    elif wants.logits:
        with torch.no_grad():  # as in an operator
            gradients[0] = _logits_gradient(dloss, state, LogitsInputs(*inputs), ctx.spec, ctx.shards)
    if wants.smoothing:
        gradients[2] = dloss * state[3]
    return _once(*gradients)


cross_entropy_op.register_autograd(_backward_logits, setup_context=_save_logits)


class _CrossEntropySharded(torch.autograd.Function):
    """`cross_entropy` with vocab-parallel shards as the last argument; a schema cannot contain them."""

    @staticmethod
    def forward(*values: Any) -> tuple[Tensor, ...]:
        inputs, spec = LogitsInputs(*values[:_LOGITS]), LogitsSpec(*values[_LOGITS:-1])
        with _as_called(inputs.logits):
            return tuple(_body(spec.backend, "cross_entropy").forward(inputs, spec, shards=values[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_logits(ctx, inputs[:-1], output)
        ctx.shards = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return _backward_logits(ctx, *upstream)


@custom_op(
    "ual_kernels::cross_entropy_inplace",
    mutates_args=("logits",),
    schema=schema([LogitsInputs, "token_scale", LogitsSpec], tensors(LogitsOutputs), mutated="logits"),
)
def cross_entropy_inplace_op(*values: Any) -> tuple[Tensor, ...]:
    """`cross_entropy` that overwrites the logits with the gradient times `token_scale`."""
    inputs, token_scale = LogitsInputs(*values[:_LOGITS]), values[_LOGITS]
    spec = LogitsSpec(*values[_LOGITS + 1 :])
    with _as_called(inputs.logits):
        return tuple(_body(spec.backend, "cross_entropy").forward(inputs, spec, inplace_scale=token_scale))


@cross_entropy_inplace_op.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LogitsOutputs.empty(LogitsInputs(*values[:_LOGITS]), LogitsSpec(*values[_LOGITS + 1 :])))


class _CrossEntropyInplace(torch.autograd.Function):
    """Scaled loss [N] and statistics; forward overwrites the buffer of `logits` with the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        smoothing: Tensor,
        token_scale: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LogitsSpec,
        shards: Shards,
    ) -> tuple[Tensor, Tensor]:
        # it shares the version counter of the logits, so autograd raises if an operation has saved them
        buffer = logits.detach()
        inputs = LogitsInputs(buffer, target, smoothing, class_weight)
        if shards.alone:
            loss, state, statistics = cross_entropy_inplace_op(*inputs, token_scale, *spec)
        else:
            with _as_called(buffer):
                loss, state, statistics = _body(spec.backend, "cross_entropy").forward(
                    inputs, spec, inplace_scale=token_scale, shards=shards
                )
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.backend = buffer, spec.backend
        ctx.save_for_backward(loss, state, token_scale)
        return loss * token_scale, statistics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(ctx.needs_input_grad) - 3)
        if dloss is None:
            return None, None, None, *others
        if ctx.buffer is None:
            raise RuntimeError(
                "backward ran a second time through cross_entropy with inplace_backward=True, which supports "
                "one backward; set inplace_backward=False"
            )
        loss, state, token_scale = ctx.saved_tensors
        with _as_called(dloss):
            dlogits = _body(ctx.backend, "cross_entropy").scale_tokens(ctx.buffer, dloss)
        ctx.buffer = None
        return _once(dlogits, dloss * token_scale * state[3], dloss * loss, *others)


# ---- cross entropy of hidden states and head ----


def linear_cross_entropy(
    inputs: LinearInputs, spec: LinearSpec, token_fns: TokenFns | None, shards: Shards
) -> LinearOutputs:
    """Loss, gradients and statistics in one pass over chunks of tokens."""
    if token_fns is None and shards.alone:
        return LinearOutputs(*linear_cross_entropy_op(*inputs, *spec))
    # a schema cannot contain functions of the statistics or a process group
    return LinearOutputs(
        *_LinearCrossEntropyDirect.apply(*inputs, *spec, token_fns, shards)  # type: ignore[no-untyped-call]
    )


def _compute_linear(inputs: LinearInputs, spec: LinearSpec, *direct: Any) -> LinearOutputs:
    with _as_called(inputs.input):
        outputs: LinearOutputs = _body(spec.backend, "linear_cross_entropy").linear_cross_entropy(
            inputs, spec, *direct
        )
        return outputs


@custom_op(
    "ual_kernels::linear_cross_entropy",
    mutates_args=(),
    schema=schema([LinearInputs, LinearSpec], tensors(LinearOutputs)),
)
def linear_cross_entropy_op(*values: Any) -> tuple[Tensor, ...]:
    return tuple(_compute_linear(LinearInputs(*values[:_LINEAR]), LinearSpec(*values[_LINEAR:])))


@linear_cross_entropy_op.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LinearOutputs.empty(LinearInputs(*values[:_LINEAR]), LinearSpec(*values[_LINEAR:])))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, outputs = LinearInputs(*inputs[:_LINEAR]), LinearOutputs(*output)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.direct = LinearSpec(*inputs[_LINEAR:]), None
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in given[:5]]
    # a head's gradient is a sum over tokens and needs the upstream gradient of each token
    ctx.again = ctx.spec.per_token and any(ctx.needs_input_grad[1:5])
    extra = given if ctx.again else ()
    ctx.save_for_backward(outputs.state, given.token_scale, *outputs[3:], *extra)


def _backward_linear(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    state, token_scale, *saved = ctx.saved_tensors
    gradients, upstream = saved[:5], dloss
    wants = LinearInputs(*ctx.needs_input_grad[:_LINEAR])
    if ctx.again:
        inputs = LinearInputs(*saved[5:])._replace(token_scale=dloss * token_scale)
        spec = ctx.spec._replace(
            statistics=False,
            input_grad=wants.input,
            head_grad=bool(wants.linear_weight),
            bias_grad=bool(wants.linear_bias),
            lora_grad=bool(wants.lora_a or wants.lora_b),
            per_token=False,
        )
        if ctx.direct is None:
            gradients = list(linear_cross_entropy_op(*inputs, *spec)[3:])
        else:
            with torch.no_grad():  # as in an operator
                gradients = list(_compute_linear(inputs, spec, *ctx.direct)[3:])
        upstream = torch.ones_like(dloss)
    dinput = None
    if wants.input:  # in one pass, without a float32 [N, D]
        dinput = torch.empty_like(gradients[0], dtype=ctx.dtypes[0])
        torch.mul(gradients[0], upstream[:, None], out=dinput)
    # gradients that are sums over tokens exist only if all tokens have the same upstream value
    scalar = upstream[:1].sum()
    summed = [
        scaled(gradient, scalar, dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients[1:], ctx.dtypes[1:], wants[1:5], strict=True)
    ]
    dsmoothing = dloss * token_scale * state[1] if wants.smoothing else None
    dscale = dloss * state[0] if wants.token_scale else None
    unwanted = (None,) * (len(ctx.needs_input_grad) - 8)
    return _once(dinput, *summed, None, dsmoothing, dscale, *unwanted)


linear_cross_entropy_op.register_autograd(_backward_linear, setup_context=_save_linear)


class _LinearCrossEntropyDirect(torch.autograd.Function):
    """`linear_cross_entropy` without an operator; the last two arguments are `token_fns` and `shards`."""

    @staticmethod
    def forward(*values: Any) -> tuple[Tensor, ...]:
        *operands, token_fns, shards = values
        inputs, spec = LinearInputs(*operands[:_LINEAR]), LinearSpec(*operands[_LINEAR:])
        return tuple(_compute_linear(inputs, spec, token_fns, shards))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_linear(ctx, inputs[:-2], output)
        ctx.direct = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return _backward_linear(ctx, *upstream)

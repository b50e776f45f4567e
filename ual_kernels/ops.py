"""Operator contracts: schema, fake, autograd. Torch only; Triton is imported when an operator asks for it.

Four operators in the namespace `ual_kernels`. Rows are always flat: N tokens, V classes, D features.
`loss` is `row_scale * (unit loss)`; a row's scale holds its sample weight and the reduction's divisor, so
that gradients made in forward are already final, and backward of the common case multiplies by one.

cross_entropy, cross_entropy_backward   logits are given and saved; backward reads them again
cross_entropy_inplace                   logits are given and become their own gradient
linear_cross_entropy                    logits never exist; gradients are made in forward

`softcap` 0.0 stands for none. Labels out of range and NaN in the per-row numbers poison their own row.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ual_kernels import chunked
from ual_kernels._types import UnsupportedError
from ual_kernels.chunked import stored_dtype

_STATISTICS = 7


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _body(backend: str, operator: str) -> Any:
    """The module that computes an operator; Triton's are imported here and nowhere sooner."""
    if backend != "triton":
        return chunked
    try:
        return importlib.import_module(f"ual_kernels._triton.{operator}")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            'the Triton kernels need the package triton: pip install triton, or backend="torch"'
        ) from error


def _as_given(tensor: Tensor) -> torch.autocast:
    """Autocast did its work before an operator was called; inside, it would round what must stay exact."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Once(torch.autograd.Function):
    """Gradients as they are; going back through them is refused aloud, where autograd would see constants."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError('the fused losses are differentiable once; backend="reference" is, twice')


def _once(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # as it is in every backward but one with create_graph
        return gradients
    anchor = torch.zeros((), requires_grad=True)
    given = iter(_Once.apply(anchor, *(g for g in gradients if g is not None)))  # type: ignore[no-untyped-call]
    return tuple(None if g is None else next(given) for g in gradients)


# ---- logits in ----


@custom_op("ual_kernels::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor,  # [N, V], rows of stride 1
    target: Tensor,  # [N] int32 or int64
    smoothing: Tensor,  # [N] ACC
    class_weight: Tensor | None,  # [V] ACC
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit loss [N]; state [4, N]: maximum, log-sum, coefficient of p, dloss/ds; statistics [7, N or 0]."""
    with _as_given(logits):
        return _body(backend, "cross_entropy").forward(  # type: ignore[no-any-return]
            logits, target, smoothing, class_weight, ignore_index, softcap, logit_scale, z_loss, statistics
        )


@cross_entropy.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, rows = _accumulator(logits), logits.shape[0]
    return (
        logits.new_empty(rows, dtype=acc),
        logits.new_empty((4, rows), dtype=acc),
        logits.new_empty((_STATISTICS, rows if statistics else 0), dtype=acc),
    )


@custom_op("ual_kernels::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    dloss: Tensor,  # [N] ACC, any stride
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    state: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """dlogits [N, V], contiguous."""
    with _as_given(logits):
        return _body(backend, "cross_entropy").backward(  # type: ignore[no-any-return]
            dloss, logits, target, smoothing, class_weight, state, ignore_index, softcap, logit_scale
        )


@cross_entropy_backward.register_fake
def _(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    state: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, smoothing, class_weight, *options, _z_loss, _statistics, ctx.backend = inputs
    ctx.options = options
    _, state, statistics = output
    ctx.mark_non_differentiable(state, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, smoothing, class_weight, state)


def _backward_logits(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    logits, target, smoothing, class_weight, state = ctx.saved_tensors
    wants_logits, _, wants_smoothing, *_ = ctx.needs_input_grad
    dlogits = (
        cross_entropy_backward(
            dloss, logits, target, smoothing, class_weight, state, *ctx.options, ctx.backend
        )
        if wants_logits
        else None
    )
    return _once(dlogits, None, dloss * state[3] if wants_smoothing else None, *(None,) * 7)


cross_entropy.register_autograd(_backward_logits, setup_context=_save_logits)


@custom_op("ual_kernels::cross_entropy_inplace", mutates_args=("logits",))
def cross_entropy_inplace(
    logits: Tensor,  # [N, V], becomes row_scale * dloss/dlogits
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,  # [N] ACC
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cross_entropy`, and the gradient where the logits were."""
    with _as_given(logits):
        return _body(backend, "cross_entropy").forward(  # type: ignore[no-any-return]
            logits, target, smoothing, class_weight, ignore_index, softcap, logit_scale, z_loss, statistics,
            row_scale=row_scale,
        )  # fmt: skip


@cross_entropy_inplace.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, rows = _accumulator(logits), logits.shape[0]
    return (
        logits.new_empty(rows, dtype=acc),
        logits.new_empty((4, rows), dtype=acc),
        logits.new_empty((_STATISTICS, rows if statistics else 0), dtype=acc),
    )


class CrossEntropyInplace(torch.autograd.Function):
    """Scaled loss [N] and statistics; the buffer of `logits` is the gradient from forward on."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, smoothing: Tensor, row_scale: Tensor, target: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        # shares the logits' version counter: whoever saved them gets autograd's error, not our gradient
        buffer = logits.detach()
        loss, state, statistics = cross_entropy_inplace(buffer, target, smoothing, row_scale, *options)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.backend = buffer, options[-1]
        ctx.save_for_backward(loss, state, row_scale)
        return loss * row_scale, statistics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        options = (None,) * (len(ctx.needs_input_grad) - 3)
        if dloss is None:
            return None, None, None, *options
        if ctx.buffer is None:
            raise RuntimeError(
                "backward ran a second time through cross_entropy(inplace_backward=True): the first gave the "
                "logits' buffer away as their gradient; use retain_graph without inplace_backward"
            )
        loss, state, row_scale = ctx.saved_tensors
        dlogits, ctx.buffer = _body(ctx.backend, "cross_entropy").scale_rows(ctx.buffer, dloss), None
        return _once(dlogits, dloss * row_scale * state[3], dloss * loss, *options)


# ---- hidden states and head in ----


@custom_op("ual_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [V, D]
    linear_bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    smoothing: Tensor,  # [N] ACC
    row_scale: Tensor,  # [N] ACC
    class_weight: Tensor | None,  # [V] ACC
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    per_row: bool,
    chunk_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics in one pass over chunks of rows.

    Returns:
        loss: [N] ACC, already times `row_scale`.
        state: [2, N] ACC, the unit loss and d(unit loss)/ds.
        statistics: [7, N] or [7, 0] ACC.
        dinput: [N, D], times `row_scale`; [0, D] unless `input_grad`.
        dlinear_weight, dlinear_bias: [V, D] and [V] ACC, summed over rows; empty unless `head_grad`.

    `per_row` says that upstream gradients may differ between rows: `dinput` is then kept in ACC, and
    `head_grad` must be False (backward calls this operator again with the upstream in `row_scale`).
    """
    with _as_given(input):
        return _body(backend, "linear_cross_entropy").linear_cross_entropy(  # type: ignore[no-any-return]
            input,
            linear_weight,
            linear_bias,
            target,
            smoothing,
            row_scale,
            class_weight,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            statistics=statistics,
            input_grad=input_grad,
            head_grad=head_grad,
            per_row=per_row,
            chunk_tokens=chunk_tokens,
        )


@linear_cross_entropy.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    per_row: bool,
    chunk_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc, (rows, features), vocab = _accumulator(input), input.shape, linear_weight.shape[0]
    return (
        input.new_empty(rows, dtype=acc),
        input.new_empty((2, rows), dtype=acc),
        input.new_empty((_STATISTICS, rows if statistics else 0), dtype=acc),
        input.new_empty((rows if input_grad else 0, features), dtype=stored_dtype(input.dtype, per_row)),
        input.new_empty((vocab if head_grad else 0, features), dtype=acc),
        input.new_empty(vocab if head_grad and linear_bias is not None else 0, dtype=acc),
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, linear_weight, linear_bias, target, smoothing, row_scale, class_weight, *options = inputs
    _, state, statistics, dinput, dlinear_weight, dlinear_bias = output
    ctx.mark_non_differentiable(state, statistics, dinput, dlinear_weight, dlinear_bias)
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.dtypes = input.dtype, linear_weight.dtype, None if linear_bias is None else linear_bias.dtype
    *_, per_row, _chunk_tokens, _backend = options
    ctx.again = per_row and any(ctx.needs_input_grad[1:3])
    extra = (input, linear_weight, linear_bias, target, smoothing, class_weight) if ctx.again else ()
    ctx.save_for_backward(state, row_scale, dinput, dlinear_weight, dlinear_bias, *extra)


def _backward_linear(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 17
    state, row_scale, dinput, dhead, dbias, *extra = ctx.saved_tensors
    needs_input, needs_head, needs_bias, _, needs_smoothing, needs_scale, *_ = ctx.needs_input_grad
    input_dtype, head_dtype, bias_dtype = ctx.dtypes
    upstream = dloss
    if ctx.again:
        input, linear_weight, linear_bias, target, smoothing, class_weight = extra
        *options, _statistics, _input_grad, _head_grad, _per_row, chunk_tokens, backend = ctx.options
        _, _, _, dinput, dhead, dbias = linear_cross_entropy(
            input,
            linear_weight,
            linear_bias,
            target,
            smoothing,
            dloss * row_scale,
            class_weight,
            *options,
            False,
            needs_input,
            True,
            False,
            chunk_tokens,
            backend,
        )
        upstream = torch.ones_like(dloss)
    # head gradients exist only where all rows share one upstream value
    scalar = upstream[:1].sum()
    return _once(
        (dinput * upstream[:, None]).to(input_dtype) if needs_input else None,
        (dhead * scalar).to(head_dtype) if needs_head else None,
        (dbias * scalar).to(bias_dtype) if needs_bias else None,
        None,
        dloss * row_scale * state[1] if needs_smoothing else None,
        dloss * state[0] if needs_scale else None,
        *(None,) * 11,
    )


linear_cross_entropy.register_autograd(_backward_linear, setup_context=_save_linear)

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

from ual_kernels._rows import LOGITS_STATISTICS, STATISTICS, scaled, stored_dtype
from ual_kernels._types import UnsupportedError


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _body(backend: str, operator: str) -> Any:
    """The module that computes an operator; Triton's are imported here and nowhere sooner."""
    try:
        return importlib.import_module(f"ual_kernels._{backend}.{operator}")
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
        logits.new_empty((LOGITS_STATISTICS, rows if statistics else 0), dtype=acc),
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
        logits.new_empty((LOGITS_STATISTICS, rows if statistics else 0), dtype=acc),
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
    lora_a: Tensor | None,  # [r, D]
    lora_b: Tensor | None,  # [V, r]
    target: Tensor,  # [N]
    smoothing: Tensor,  # [N] ACC
    row_scale: Tensor,  # [N] ACC
    class_weight: Tensor | None,  # [V] ACC
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lora_scale: float,
    z_loss: float,
    gradient_filter: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    lora_grad: bool,
    per_row: bool,
    live_rows: int,
    chunk_tokens: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics in one pass over chunks of rows.

    Returns:
        loss: [N] ACC, already times `row_scale`.
        state: [2, N] ACC, the unit loss and d(unit loss)/ds.
        statistics: [8, N] or [8, 0] ACC.
        dinput: [N, D], times `row_scale`; [0, D] unless `input_grad`.
        dlinear_weight, dlinear_bias: [V, D] and [V] ACC, summed over rows; empty unless `head_grad`.
        dlora_a, dlora_b: [r, D] and [V, r] ACC, likewise; empty unless `lora_grad`.

    `per_row` says that upstream gradients may differ between rows: `dinput` is then kept in ACC, and
    `head_grad` and `lora_grad` must be False (backward calls this operator again with the upstream in
    `row_scale`). `live_rows` is `_rows.COUNT`, or how many rows take part: then nothing waits for the device.
    """
    return _linear(  # type: ignore[no-any-return]
        (input, linear_weight, linear_bias, lora_a, lora_b, target, smoothing, row_scale, class_weight),
        (
            ignore_index, softcap, logit_scale, lora_scale, z_loss, gradient_filter, statistics, input_grad,
            head_grad, lora_grad, per_row, live_rows, chunk_tokens, precision, backend,
        ),
    )  # fmt: skip


_LINEAR_OPTIONS = (
    "ignore_index", "softcap", "logit_scale", "lora_scale", "z_loss", "gradient_filter", "statistics",
    "input_grad", "head_grad", "lora_grad", "per_row", "live_rows", "chunk_tokens", "precision", "backend",
)  # fmt: skip


def _linear(tensors: tuple[Any, ...], options: tuple[Any, ...], **direct: Any) -> Any:
    named = dict(zip(_LINEAR_OPTIONS, options, strict=True))
    body = _body(named.pop("backend"), "linear_cross_entropy")
    with _as_given(tensors[0]):
        return body.linear_cross_entropy(*tensors, **named, **direct)


@linear_cross_entropy.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    named = dict(zip(_LINEAR_OPTIONS, options, strict=True))
    acc, (rows, features), vocab = _accumulator(input), input.shape, linear_weight.shape[0]
    head_grad, lora_grad = named["head_grad"], named["lora_grad"]
    rank = 0 if lora_a is None else lora_a.shape[0]
    stored = stored_dtype(input.dtype, named["per_row"])
    return (
        input.new_empty(rows, dtype=acc),
        input.new_empty((2, rows), dtype=acc),
        input.new_empty((STATISTICS, rows if named["statistics"] else 0), dtype=acc),
        input.new_empty((rows if named["input_grad"] else 0, features), dtype=stored),
        input.new_empty((vocab if head_grad else 0, features), dtype=acc),
        input.new_empty(vocab if head_grad and linear_bias is not None else 0, dtype=acc),
        input.new_empty((rank if lora_grad else 0, features), dtype=acc),
        input.new_empty((vocab if lora_grad else 0, rank), dtype=acc),
    )


_TENSORS = 9  # arguments of linear_cross_entropy that are tensors, first of all


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:_TENSORS], inputs[_TENSORS:]
    _, state, statistics, *gradients = output
    ctx.mark_non_differentiable(state, statistics, *gradients)
    ctx.set_materialize_grads(False)
    ctx.options = dict(zip(_LINEAR_OPTIONS, options, strict=True))
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:5]]
    ctx.direct = {}
    # a head's gradient is a sum over rows: it waits until each row's upstream gradient is known
    ctx.again = ctx.options["per_row"] and any(ctx.needs_input_grad[1:5])
    extra = tensors if ctx.again else ()
    ctx.save_for_backward(state, tensors[7], *gradients, *extra)


def _backward_linear(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    unwanted = (None,) * len(_LINEAR_OPTIONS)
    if dloss is None:
        return *(None,) * _TENSORS, *unwanted
    state, row_scale, *saved = ctx.saved_tensors
    gradients, tensors = saved[:5], saved[5:]
    needs = ctx.needs_input_grad
    upstream = dloss
    if ctx.again:
        options = ctx.options | {
            "statistics": False,
            "input_grad": needs[0],
            "head_grad": needs[1] or needs[2],
            "lora_grad": needs[3] or needs[4],
            "per_row": False,
        }
        tensors[7] = dloss * row_scale
        values = tuple(options.values())
        if ctx.direct:
            with torch.no_grad():  # as an operator would have it
                outputs = _linear(tuple(tensors), values, **ctx.direct)
        else:
            outputs = linear_cross_entropy(*tensors, *values)
        gradients = outputs[3:]
        upstream = torch.ones_like(dloss)
    # gradients that are sums over rows exist only where all rows share one upstream value
    scalar = upstream[:1].sum()
    by_row = (gradients[0] * upstream[:, None]).to(ctx.dtypes[0]) if needs[0] else None
    summed = [
        scaled(gradient, scalar, dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients[1:], ctx.dtypes[1:], needs[1:5], strict=True)
    ]
    return _once(
        by_row,
        *summed,
        None,
        dloss * row_scale * state[1] if needs[6] else None,
        dloss * state[0] if needs[7] else None,
        None,
        *unwanted,
    )


linear_cross_entropy.register_autograd(_backward_linear, setup_context=_save_linear)


class LinearCrossEntropyDirect(torch.autograd.Function):
    """The same with arguments that no schema can hold: a rule on the statistics, a process group."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *values, direct = inputs
        return _linear(tuple(values[:_TENSORS]), tuple(values[_TENSORS:]), **direct)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, direct = inputs
        _save_linear(ctx, tuple(values), output)
        ctx.direct = direct

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return *_backward_linear(ctx, *upstream), None

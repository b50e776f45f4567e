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
from collections.abc import Callable, Iterable, Iterator
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
    without_autocast,
)
from ual_kernels._tokens import TokenFns
from ual_kernels._types import UnsupportedError
from ual_kernels._vocab_parallel import Shards

_LOGITS, _LINEAR = len(LogitsInputs._fields), len(LinearInputs._fields)  # numbers of tensor arguments
_GRADIENTS = LinearOutputs._fields.index("dinput")  # the first of the five gradients


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
    with without_autocast(tensor), device:
        yield


# ---- autograd ----

# The operators know autograd for torch.compile. Elsewhere a Function calls the operator, because functorch's
# transforms do not support operators with an autograd formula, and forward mode would be silently zero.


def _differentiable_once() -> UnsupportedError:
    return UnsupportedError(
        "the fused losses are differentiable once, in reverse mode, and have neither second derivatives nor "
        'forward mode; use backend="reference" for them'
    )


def _hidden_by_vmap(loss: str) -> UnsupportedError:
    return UnsupportedError(
        f"torch.vmap inside of torch.func.grad hides which gradients {loss} must compute; apply "
        'torch.func.grad inside of torch.vmap, loop over the samples or use backend="reference"'
    )


class _Function(torch.autograd.Function):
    """A Function of tensors and constants, for which torch.vmap is a loop and forward mode an error."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _differentiable_once()

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *values: Any) -> Any:
        def of(sample: int) -> tuple[Tensor | None, ...]:
            chosen = (
                value if dim is None else value.select(dim, sample)
                for value, dim in zip(values, in_dims, strict=True)
            )
            return cls.apply(*chosen)  # type: ignore[no-any-return, no-untyped-call]

        results = zip(*map(of, range(info.batch_size)), strict=True)
        return tuple(None if of_all[0] is None else torch.stack(of_all) for of_all in results), 0


class _Gradients(_Function):
    """The gradients as a Function of all tensors that they depend on; it has no derivatives."""

    @staticmethod
    def forward(compute: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> Any:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise _differentiable_once()


def _link(inputs: Iterable[Any]) -> Tensor | None:
    """Return a tensor without elements that depends on all inputs which require a gradient, None without.

    The context of a loss that does not save its inputs saves this tensor. So the graph of the gradients
    reaches every input, and second derivatives meet `_Gradients.backward`. It costs no memory, and no kernel
    runs. It is not an argument of the loss, because a second edge to an input breaks compiled autograd.
    """
    with torch.enable_grad():
        found = [
            value[:0].reshape(-1) for value in inputs if isinstance(value, Tensor) and value.requires_grad
        ]
        return torch.cat(found) if found else None


# ---- cross entropy of given logits ----


def cross_entropy(inputs: LogitsInputs, spec: LogitsSpec, shards: Shards) -> LogitsOutputs:
    """Loss for a sample weight of 1, differentiable by logits and smoothing."""
    if torch.compiler.is_compiling():
        return LogitsOutputs(*cross_entropy_op(*inputs, *spec))
    return LogitsOutputs(*_CrossEntropy.apply(*inputs, *spec, shards))  # type: ignore[no-untyped-call]


def cross_entropy_inplace(
    inputs: LogitsInputs, token_scale: Tensor, spec: LogitsSpec, shards: Shards
) -> tuple[Tensor, Tensor]:
    """Loss times `token_scale`, and statistics; the gradient overwrites the logits."""
    # before forward overwrites the logits, and in a tuple, where autograd sees no argument
    linked = (_link((*inputs, token_scale)),)
    loss, statistics, *_ = _CrossEntropyInplace.apply(  # type: ignore[no-untyped-call]
        *inputs, token_scale, linked, *spec, shards
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
    outputs = LogitsOutputs(*output)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.shards = LogitsSpec(*inputs[_LOGITS:]), None
    ctx.save_for_backward(outputs.state, outputs.dprobabilities, *inputs[:_LOGITS])


def _backward_logits(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    unwanted = (None,) * len(ctx.needs_input_grad)
    if dloss is None:
        return unwanted
    wants, spec, shards = LogitsInputs(*ctx.needs_input_grad[:_LOGITS]), ctx.spec, ctx.shards
    if wants.probabilities and not spec.probability_grad:
        raise _hidden_by_vmap("cross_entropy")

    def gradients(
        dloss: Tensor, state: Tensor, dprobabilities: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        dlogits = None
        if wants.logits and shards is None:
            dlogits = cross_entropy_backward_op(dloss, state, *inputs, *spec)
        elif wants.logits:
            dlogits = _logits_gradient(dloss, state, LogitsInputs(*inputs), spec, shards)
        dsmoothing = dloss * state[3] if wants.smoothing else None
        return dlogits, dsmoothing, dloss[:, None] * dprobabilities if wants.probabilities else None

    dlogits, dsmoothing, dp = _Gradients.apply(gradients, dloss, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
    return dlogits, None, dsmoothing, None, None, dp, *unwanted[_LOGITS:]


cross_entropy_op.register_autograd(_backward_logits, setup_context=_save_logits)


class _CrossEntropy(_Function):
    """`cross_entropy` with vocab-parallel shards as the last argument; a schema cannot contain them."""

    @staticmethod
    def forward(*values: Any) -> tuple[Tensor, ...]:
        *operands, shards = values
        if shards.alone:
            return cross_entropy_op(*operands)  # type: ignore[no-any-return]
        inputs, spec = LogitsInputs(*operands[:_LOGITS]), LogitsSpec(*operands[_LOGITS:])
        with _as_called(inputs.logits):
            return tuple(_body(spec.backend, "cross_entropy").forward(inputs, spec, shards=shards))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_logits(ctx, inputs[:-1], output)
        ctx.shards = None if inputs[-1].alone else inputs[-1]

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


class _Inplace(_Function):
    """A Function that overwrites a buffer, which the samples of torch.vmap would share."""

    @classmethod
    def vmap(cls, *_: Any) -> Any:
        raise UnsupportedError(
            "inplace_backward is not supported under torch.vmap and jacrev; set inplace_backward=False"
        )


class _InplaceGradients(_Inplace, _Gradients):
    """Gradients of which one is the overwritten buffer."""


class _CrossEntropyInplace(_Inplace):
    """Scaled loss [N] and statistics; forward overwrites the buffer of `logits` with the gradient."""

    @staticmethod
    def forward(*values: Any) -> tuple[Tensor, ...]:
        inputs, (token_scale, _, *scalars, shards) = LogitsInputs(*values[:_LOGITS]), values[_LOGITS:]
        spec = LogitsSpec(*scalars)
        # it shares the version counter of the logits, so autograd raises if an operation has saved them
        inputs = inputs._replace(logits=inputs.logits.detach())
        if shards.alone:
            outputs = LogitsOutputs(*cross_entropy_inplace_op(*inputs, token_scale, *spec))
        else:
            with _as_called(inputs.logits):
                outputs = _body(spec.backend, "cross_entropy").forward(
                    inputs, spec, inplace_scale=token_scale, shards=shards
                )
        return (
            outputs.loss * token_scale,
            outputs.statistics,
            outputs.loss,
            outputs.state,
            outputs.dprobabilities,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        token_scale, linked, *scalars, _ = inputs[_LOGITS:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.backend = inputs[0].detach(), LogitsSpec(*scalars).backend
        ctx.save_for_backward(*output[2:], token_scale, *linked)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        unwanted = (None,) * len(ctx.needs_input_grad)
        if dloss is None:
            return unwanted
        if ctx.buffer is None:
            raise RuntimeError(
                "backward ran a second time through cross_entropy with inplace_backward=True, which supports "
                "one backward; set inplace_backward=False"
            )
        backend, wants_probabilities = (
            ctx.backend,
            LogitsInputs(*ctx.needs_input_grad[:_LOGITS]).probabilities,
        )

        # detached: the result of a Function that is one of its arguments would be a view
        def gradients(
            buffer: Tensor,
            dloss: Tensor,
            loss: Tensor,
            state: Tensor,
            dprobabilities: Tensor,
            token_scale: Tensor,
            _: Tensor | None,
        ) -> tuple[Tensor | None, ...]:
            with _as_called(dloss):
                dlogits = _body(backend, "cross_entropy").scale_tokens(buffer, dloss).detach()
            scaled = dloss * token_scale
            dp = scaled[:, None] * dprobabilities if wants_probabilities else None
            return dlogits, scaled * state[3], dp, dloss * loss

        dlogits, dsmoothing, dp, dscale = _InplaceGradients.apply(  # type: ignore[no-untyped-call]
            gradients, ctx.buffer, dloss, *ctx.saved_tensors
        )
        ctx.buffer = None
        return dlogits, None, dsmoothing, None, None, dp, dscale, *unwanted[_LOGITS + 1 :]


# ---- cross entropy of hidden states and head ----


def linear_cross_entropy(
    inputs: LinearInputs, spec: LinearSpec, token_fns: TokenFns | None, shards: Shards
) -> LinearOutputs:
    """Loss, gradients and statistics in one pass over chunks of tokens."""
    if torch.compiler.is_compiling():
        return LinearOutputs(*linear_cross_entropy_op(*inputs, *spec))
    return LinearOutputs(
        *_LinearCrossEntropy.apply(*inputs, *spec, token_fns, shards)  # type: ignore[no-untyped-call]
    )


def _compute_linear(
    inputs: LinearInputs, spec: LinearSpec, token_fns: TokenFns | None = None, shards: Shards | None = None
) -> LinearOutputs:
    """Call the operator, or its body with what a schema cannot contain; meta tensors need only shapes."""
    if inputs.input.is_meta or (token_fns is None and (shards is None or shards.alone)):
        return LinearOutputs(*linear_cross_entropy_op(*inputs, *spec))
    return _linear_body(inputs, spec, token_fns, shards)


def _linear_body(inputs: LinearInputs, spec: LinearSpec, *direct: Any) -> LinearOutputs:
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
    return tuple(_linear_body(LinearInputs(*values[:_LINEAR]), LinearSpec(*values[_LINEAR:])))


@linear_cross_entropy_op.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LinearOutputs.empty(LinearInputs(*values[:_LINEAR]), LinearSpec(*values[_LINEAR:])))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, outputs = LinearInputs(*inputs[:_LINEAR]), LinearOutputs(*output)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.direct = LinearSpec(*inputs[_LINEAR:]), ()
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in given[:5]]
    # a head's gradient is a sum over tokens and needs the upstream gradient of each token
    ctx.again = ctx.spec.per_token and any(ctx.needs_input_grad[1:5])
    extra = given if ctx.again else ()
    ctx.save_for_backward(
        outputs.state, outputs.dprobabilities, given.token_scale, _link(given), *outputs[_GRADIENTS:], *extra
    )


def _backward_linear(
    ctx: Any, dloss: Tensor | None, *_: None, overwrite: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients. `overwrite` scales the saved ones in place where their dtype allows it."""
    unwanted = (None,) * len(ctx.needs_input_grad)
    if dloss is None:
        return unwanted
    wants, spec = LinearInputs(*ctx.needs_input_grad[:_LINEAR]), ctx.spec
    dtypes, direct, again = ctx.dtypes, ctx.direct, ctx.again
    computed = spec.input_grad, spec.head_grad, spec.bias_grad, spec.lora_grad, spec.lora_grad
    hidden = not again and any(w and not done for w, done in zip(wants[:5], computed, strict=True))
    if hidden or (wants.probabilities and not spec.probability_grad):
        raise _hidden_by_vmap("linear_cross_entropy")

    def gradients(
        dloss: Tensor,
        state: Tensor,
        dprobabilities: Tensor,
        token_scale: Tensor,
        _: Tensor | None,
        *saved: Tensor,
    ) -> Any:
        computed, upstream = list(saved[:5]), dloss
        if again:
            inputs = LinearInputs(*saved[5:])._replace(token_scale=dloss * token_scale)
            computed, upstream = _computed_again(inputs, spec, wants, direct), torch.ones_like(dloss)
        # gradients that are sums over tokens exist only if all tokens have the same upstream value
        factors = [upstream, *[upstream[:1].sum()[None]] * 4]
        wanted_gradients = [
            _scaled(gradient, factor, dtype, spec.backend, overwrite=overwrite) if wanted else None
            for gradient, factor, dtype, wanted in zip(computed, factors, dtypes, wants[:5], strict=True)
        ]
        scale = dloss * token_scale
        dsmoothing = scale * state[1] if wants.smoothing else None
        dscale = dloss * state[0] if wants.token_scale else None
        dp = scale[:, None] * dprobabilities if wants.probabilities else None
        return *wanted_gradients, None, dsmoothing, dscale, None, None, dp

    found = _Gradients.apply(gradients, dloss, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
    return *found, *unwanted[_LINEAR:]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str, *, overwrite: bool) -> Tensor:
    """Return a gradient times a factor [1] or, for [N, D], [N] in `dtype`, without a float32 copy of it."""
    overwrite = overwrite and dtype == gradient.dtype and gradient.is_contiguous()
    if backend == "triton" and gradient.ndim == 2:
        if not overwrite:
            return scale_matrix_op(gradient, factor, dtype)  # type: ignore[no-any-return]
        scale_matrix_inplace_op(gradient, factor)
        return gradient.detach()
    return scaled(gradient, factor, dtype, out=gradient if overwrite else None).detach()


# private functions of PyTorch; without them, saved gradients are never overwritten
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
_is_batch: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False
)


def _reads_once(upstream: Tensor | None) -> bool:
    """Whether the running backward is the last to read what was saved, and reads it once."""
    if upstream is None or torch.compiler.is_compiling() or _keeps_graph() or _is_batch(upstream):
        return False
    if upstream.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # the captured backward may be replayed several times
    return torch._C._functorch.peek_interpreter_stack() is None


@custom_op(
    "ual_kernels::scale_matrix",
    mutates_args=(),
    schema="(Tensor matrix, Tensor factor, ScalarType dtype) -> Tensor",
)
def scale_matrix_op(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrix [M, D] times factor [M] or [1] in `dtype`, in one pass; PyTorch's takes twice as long."""
    out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    with _as_called(matrix):
        _body("triton", "linear_cross_entropy").scale_matrix(matrix.contiguous(), factor, out)
    return out


@scale_matrix_op.register_fake
def _(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


@custom_op(
    "ual_kernels::scale_matrix_inplace",
    mutates_args=("matrix",),
    schema="(Tensor(a!) matrix, Tensor factor) -> ()",
)
def scale_matrix_inplace_op(matrix: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous matrix [M, D] by factor [M] or [1], in one pass."""
    with _as_called(matrix):
        _body("triton", "linear_cross_entropy").scale_matrix(matrix, factor, matrix)


@scale_matrix_inplace_op.register_fake
def _(matrix: Tensor, factor: Tensor) -> None:
    return None


def _computed_again(
    inputs: LinearInputs, spec: LinearSpec, wants: LinearInputs, direct: tuple[Any, ...]
) -> list[Tensor]:
    """Return the five gradients, computed for a token scale that contains the upstream gradient."""
    spec = spec._replace(
        statistics=False,
        input_grad=bool(wants.input),
        head_grad=bool(wants.linear_weight),
        bias_grad=bool(wants.linear_bias),
        lora_grad=bool(wants.lora_a or wants.lora_b),
        probability_grad=False,
        per_token=False,
    )
    return list(_compute_linear(inputs, spec, *direct)[_GRADIENTS:])


linear_cross_entropy_op.register_autograd(_backward_linear, setup_context=_save_linear)


class _LinearCrossEntropy(_Function):
    """`linear_cross_entropy`; the last two arguments, `token_fns` and `shards`, cannot be in a schema."""

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
        return _backward_linear(ctx, *upstream, overwrite=_reads_once(upstream[0]))

"""The public losses: they check arguments, choose a backend and reduce."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch import distributed as dist

from ual_kernels import _arguments, ops, reference
from ual_kernels._arguments import LossArguments, Operands
from ual_kernels._operands import (
    ALL_TOKENS,
    LinearInputs,
    LinearSpec,
    LogitsInputs,
    LogitsSpec,
    without_autocast,
)
from ual_kernels._types import IGNORE_INDEX, Backend, Reduction, UnsupportedError
from ual_kernels._vocab_parallel import ProcessGroupShards, Shards, raised_on_every_rank
from ual_kernels.options import CrossEntropyOptions, LinearCrossEntropyOptions
from ual_kernels.statistics import LOGITS_STATISTICS, TokenFn, TokenStatistics
from ual_kernels.targets import SparseTarget


def cross_entropy(
    input: Tensor,
    target: Tensor | SparseTarget,
    *,
    label_smoothing: float | Tensor | TokenFn = 0.0,
    sample_weight: Tensor | TokenFn | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    options: CrossEntropyOptions | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy of given logits with a separate label smoothing and weight per sample or token.

    With a float `label_smoothing` it equals `torch.nn.functional.cross_entropy` for class indices, except
    that the classes are always the *last* dimension and that the loss is at least float32. Per token, with
    q = (1 - s) onehot(target) + s / V:  loss = -sum_v q_v log softmax(z)_v. Gradients flow to `input`,
    `label_smoothing`, `sample_weight` and a target's probabilities. Second derivatives and forward mode
    raise, except with backend="reference".

    A target outside [0, V), a smoothing out of range or a negative weight *in a tensor* makes the loss of its
    token NaN. Other tokens are unaffected. An exception would need a device synchronization.

    Args:
        input: [..., V] logits; bfloat16, float16, float32 or float64.
        target: [...] int32 or int64 in [0, V), or `ignore_index`; or a `SparseTarget` of K classes per token,
            q = (1 - s) sum_k p_k onehot(i_k) + s / V; or [..., V] probabilities, q = (1 - s) target + s / V.
            As in PyTorch, probabilities need not have a sum of 1, and no token is ignored.
        label_smoothing: a float in [0, 1], or a floating-point tensor with leading dimensions of `input`,
            without its last one, which is broadcast ([B]: per sample, [B, T]: per token), or a function of
            the `TokenStatistics` (see `ual_kernels.losses`), for which the logits are read once more. Values
            up to V / (V - 1), where the target has probability zero, are accepted. torch.compile compiles
            again for each value of a float; pass a schedule as a tensor without dimensions.
        sample_weight: factor of each token's loss: a tensor >= 0 with such dimensions, a function of the
            `TokenStatistics`, or None for 1.
        weight: [V] class weights, as in PyTorch; not differentiable. If they are 0 for every target, "mean"
            is 0 with gradient 0, as for a batch without loss tokens. PyTorch divides by 0 and returns NaN.
        ignore_index: tokens with this target have no loss and no gradient and are not counted in divisors.
            For a `SparseTarget` the first of the K classes decides.
        reduction: "none" ([...]), "sum" or "mean". "mean" divides by the sum over non-ignored tokens of
            `sample_weight` times `weight[target]`, for a `SparseTarget` sum_k p_k `weight`[i_k]. For [..., V]
            probabilities the second factor is 1, as in PyTorch. In this sum a function as `sample_weight`
            counts as 1.
        num_items: > 0, replaces the divisor of "mean", like `num_items_in_batch` of transformers.
        softcap: > 0; logits become softcap * tanh(logits / softcap), after `logit_scale` (Gemma).
        logit_scale: factor of the logits, applied first (Cohere; 1 / logits_scaling of Granite).
        z_loss: >= 0; adds z_loss * lse(z)^2 to each token's loss (PaLM).
        options: speed and memory, see `CrossEntropyOptions`.
        backend: "auto" is "triton" for CUDA tensors and "torch" for others. A backend that is named and
            cannot run raises; it is never replaced.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [...] for "none". If every token is
        ignored, it is 0 with a connected graph.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        UnsupportedError: the backend or an option is not supported here, e.g. `inplace_backward` or
            `process_group` under torch.compile; or a second derivative is computed.

    Source: uncertainty-aware learning, arXiv 2406.04854. PyTorch's convention puts s / V on every class;
    `losses.others` converts from Megatron-LM's convention.

    >>> import torch
    >>> logits, target = torch.zeros(2, 3, 4), torch.tensor([[1, 2, -100], [0, 3, 3]])
    >>> per_sample = torch.tensor([0.0, 0.2])
    >>> round(cross_entropy(logits, target, label_smoothing=per_sample).item(), 4)  # log 4
    1.3863
    """
    arguments = LossArguments(
        label_smoothing, sample_weight, weight, ignore_index, reduction, num_items, softcap, logit_scale,
        z_loss,
    )  # fmt: skip
    return _of_logits(input, target, arguments, options, backend, statistics=False)[0]


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor | SparseTarget,
    *,
    label_smoothing: float | Tensor | TokenFn = 0.0,
    sample_weight: Tensor | TokenFn | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    options: CrossEntropyOptions | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, TokenStatistics]:
    """`cross_entropy` and the `TokenStatistics` of the same pass, detached, one value per token.

    Arguments and errors are those of `cross_entropy`.

    >>> import torch
    >>> loss, statistics = cross_entropy_with_statistics(torch.zeros(3, 4), torch.tensor([1, 2, -100]))
    >>> statistics.entropy  # log 4 for each token that is not ignored
    tensor([1.3863, 1.3863,    nan])
    """
    arguments = LossArguments(
        label_smoothing, sample_weight, weight, ignore_index, reduction, num_items, softcap, logit_scale,
        z_loss,
    )  # fmt: skip
    loss, packed = _of_logits(input, target, arguments, options, backend, statistics=True)
    return loss, TokenStatistics.unpack(packed, input.shape[:-1])


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    linear_bias: Tensor | None = None,
    linear_lora: tuple[Tensor, Tensor, float] | None = None,
    label_smoothing: float | Tensor | TokenFn = 0.0,
    sample_weight: Tensor | TokenFn | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without materializing the logits.

    Ignored tokens are dropped before the first GEMM. Gradients are computed in forward, chunk by chunk. No
    gradient is computed for a head with `requires_grad=False`. Logits have the accumulator's dtype. It is a
    drop-in replacement of `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13) with smoothing per sample
    or token. For a padded vocabulary, pass `linear_weight[:vocab_size]`.

    Args:
        input: [..., D] hidden states; bfloat16, float16, float32 or float64.
        linear_weight: [V, D] lm_head, same dtype as `input` (under autocast both are cast).
        target: [...] class indices or a `SparseTarget`, as in `cross_entropy`. A value that makes a token's
            loss NaN makes the complete gradient of a trained head NaN, because it is a sum over tokens.
        linear_bias: [V] or None.
        linear_lora: (A [r, D], B [V, r], scale) of a LoRA adapter of the head, in any floating-point dtype.
            The logits are E C^T + scale (E A^T) B^T, never merged; A and B get gradients.
        label_smoothing, sample_weight: as in `cross_entropy`. A function is called on the device, once per
            chunk of tokens after its pass over the vocabulary, and must treat tokens independently.
        weight, ignore_index, reduction, num_items, softcap, logit_scale, z_loss: as in `cross_entropy`.
        options: speed and memory, see `LinearCrossEntropyOptions`.
        backend: "auto" is "triton" on Hopper GPUs for bfloat16, for float32 without a softcap and an adapter,
            and for float16 with a frozen head, without a softcap and an adapter. With a trained bias,
            `gradient_filter` or `process_group`, and elsewhere, it is "torch". "triton" does not support
            float64, `gradient_filter` and `process_group`. A backend that is named and cannot run raises; it
            is never replaced.

    Returns:
        As `cross_entropy`. Gradients flow to `input`, `linear_weight`, `linear_bias`, A and B, to the
        probabilities of a `SparseTarget`, and to `label_smoothing` and `sample_weight` if they are tensors.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        UnsupportedError: the backend or an option is not supported here, e.g. a function as `label_smoothing`
            or `sample_weight`, or a `process_group`, under torch.compile; or a second derivative is computed.

    >>> import torch
    >>> hidden, head = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> target = torch.tensor([[1, 2, -100], [0, 3, 3]])
    >>> round(linear_cross_entropy(hidden, head, target, label_smoothing=torch.tensor([0.0, 0.2])).item(), 4)
    1.3863
    """
    arguments = LossArguments(
        label_smoothing, sample_weight, weight, ignore_index, reduction, num_items, softcap, logit_scale,
        z_loss,
    )  # fmt: skip
    head = linear_weight, linear_bias, linear_lora
    return _of_linear(input, *head, target, arguments, options, backend, statistics=False)[0]


def linear_cross_entropy_with_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    linear_bias: Tensor | None = None,
    linear_lora: tuple[Tensor, Tensor, float] | None = None,
    label_smoothing: float | Tensor | TokenFn = 0.0,
    sample_weight: Tensor | TokenFn | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, TokenStatistics]:
    """`linear_cross_entropy` and the `TokenStatistics` of the same pass, detached, one value per token.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    arguments = LossArguments(
        label_smoothing, sample_weight, weight, ignore_index, reduction, num_items, softcap, logit_scale,
        z_loss,
    )  # fmt: skip
    head = linear_weight, linear_bias, linear_lora
    loss, packed = _of_linear(input, *head, target, arguments, options, backend, statistics=True)
    return loss, TokenStatistics.unpack(packed, input.shape[:-1])


def _of_logits(
    input: Tensor,
    target: Tensor | SparseTarget,
    arguments: LossArguments,
    options: CrossEntropyOptions | None,
    backend: Backend,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and packed statistics, [8, N] if requested, else [8, 0]."""
    options = _arguments.check_options(options, CrossEntropyOptions)
    grouped = options.process_group is not None
    backend = _arguments.choose_backend(backend, input, fused="torch" if grouped else "triton")
    if grouped and backend != "torch":
        raise UnsupportedError(f'process_group needs backend="torch", got {backend!r}')
    if grouped and torch.compiler.is_compiling():
        raise UnsupportedError(
            "process_group is not supported under torch.compile; call cross_entropy outside torch.compile"
        )
    with _same_errors(options.process_group, input):
        _arguments.check_logits(input)
        if options.inplace_backward:
            _arguments.check_inplace(input, backend)
        logits, shape = input.reshape(-1, input.shape[-1]), input.shape[:-1]
        _arguments.check(logits, shape, target, arguments, logits.shape[1], dense=True)
    shards = Shards(logits.shape[1])
    if options.process_group is not None:
        shared = _arguments.shared(arguments, options, input, target, statistics=statistics)
        shards = ProcessGroupShards(logits.shape[1], options.process_group, input.device, shared)
    operands = _arguments.prepare(logits, shape, target, arguments, shards, statistics=statistics)
    if backend == "reference":
        return _by_definition(logits, operands, arguments, shape, statistics=statistics)
    if logits.stride(-1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    spec = LogitsSpec(
        operands.ignore_index,
        arguments.softcap or 0.0,
        arguments.logit_scale,
        arguments.z_loss,
        statistics,
        _trained(operands.probabilities),
        backend,
    )

    def inputs() -> LogitsInputs:
        return LogitsInputs(
            logits, operands.target, operands.smoothing, operands.class_weight, operands.classes,
            operands.probabilities,
        )  # fmt: skip

    if operands.token_fns is not None:
        with torch.no_grad():
            only = spec._replace(statistics=True, probability_grad=False)
            packed = ops.cross_entropy(inputs(), only, shards).statistics
        operands = operands.resolve(packed)
    if options.inplace_backward and torch.is_grad_enabled() and input.requires_grad:
        loss, packed = ops.cross_entropy_inplace(inputs(), operands.token_scale, spec, shards)
    else:
        outputs = ops.cross_entropy(inputs(), spec, shards)
        loss, packed = outputs.loss * operands.token_scale, outputs.statistics
    return _reduce(loss, arguments, shape), packed


def _of_linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    linear_lora: tuple[Tensor, Tensor, float] | None,
    target: Tensor | SparseTarget,
    arguments: LossArguments,
    options: LinearCrossEntropyOptions | None,
    backend: Backend,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and packed statistics, [9, N] ([8, N] for the reference) if requested."""
    options = _arguments.check_options(options, LinearCrossEntropyOptions)
    measured = _measured_on_gpu(input, linear_weight, linear_bias, linear_lora, arguments, options)
    fused: Backend = "triton" if measured else "torch"
    backend = _arguments.choose_backend(backend, input, fused=fused)
    _check_supported(input, arguments, options, backend)
    with _same_errors(options.process_group, input):
        input, linear_weight, linear_bias = _arguments.linear(input, linear_weight, linear_bias)
        lora = _arguments.lora(linear_lora, input, linear_weight)
        shape = input.shape[:-1]
        hidden = input.reshape(shape.numel(), input.shape[-1])
        _arguments.check(hidden, shape, target, arguments, linear_weight.shape[0], dense=False)
    shards = Shards(len(linear_weight))
    if options.process_group is not None:
        shared = _arguments.shared(arguments, options, input, target, statistics=statistics) | {
            "the number of features": str(input.shape[-1]),
            "linear_lora's rank": "none" if lora.a is None else str(len(lora.a)),
            "requires_grad of input, linear_weight, linear_bias, A and B": str(
                [_trained(tensor) for tensor in (input, linear_weight, linear_bias, lora.a, lora.b)]
            ),
        }
        shards = ProcessGroupShards(
            len(linear_weight),
            options.process_group,
            input.device,
            shared,
            reduce_input_grad=options.reduce_input_grad,
        )
    operands = _arguments.prepare(hidden, shape, target, arguments, shards, statistics=statistics)
    if backend == "reference":
        acc = operands.smoothing.dtype
        ignored = (operands.target == operands.ignore_index)[:, None]
        with without_autocast(input):
            hidden = hidden.to(acc).masked_fill(ignored, 0.0)
            logits = hidden @ linear_weight.to(acc).T
            if lora.a is not None and lora.b is not None:
                logits = logits + hidden @ lora.a.to(acc).T @ lora.b.to(acc).T * lora.scale
        if linear_bias is not None:
            logits = logits + linear_bias.to(acc)
        return _by_definition(logits, operands, arguments, shape, statistics=statistics)

    inputs = LinearInputs(
        hidden,
        linear_weight,
        linear_bias,
        lora.a,
        lora.b,
        operands.target,
        operands.smoothing,
        operands.token_scale,
        operands.class_weight,
        operands.classes,
        operands.probabilities,
    )
    per_token = arguments.reduction == "none"
    head_grad, bias_grad, lora_grad = _trained(linear_weight), _trained(linear_bias), _trained(lora.a, lora.b)
    spec = LinearSpec(
        operands.ignore_index,
        arguments.softcap or 0.0,
        arguments.logit_scale,
        lora.scale,
        arguments.z_loss,
        float(options.gradient_filter),
        statistics,
        input_grad=_trained(input) and not (per_token and (head_grad or bias_grad or lora_grad)),
        head_grad=head_grad and not per_token,
        bias_grad=bias_grad and not per_token,
        lora_grad=lora_grad and not per_token,
        probability_grad=_trained(operands.probabilities),
        per_token=per_token,
        max_loss_tokens=_most_tokens(options, len(hidden)),
        chunk_tokens=options.chunk_tokens or 0,
        precision=options.precision,
        backend=backend,
    )
    outputs = ops.linear_cross_entropy(inputs, spec, operands.token_fns, shards)
    return _reduce(outputs.loss, arguments, shape), outputs.statistics


def _same_errors(group: dist.ProcessGroup | None, input: Tensor) -> AbstractContextManager[None]:
    if group is None:
        return nullcontext()
    if input.is_meta:
        raise UnsupportedError("process_group does not support meta tensors; call without process_group")
    return raised_on_every_rank(group, input.device)


def _measured_on_gpu(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    linear_lora: tuple[Tensor, Tensor, float] | None,
    arguments: LossArguments,
    options: LinearCrossEntropyOptions,
) -> bool:
    """Whether Triton was measured for this call, and was faster than PyTorch (docs/kernels.md)."""
    unsupported = options.gradient_filter or options.process_group is not None
    if not input.is_cuda or torch.version.hip or unsupported or _trained(linear_bias):
        return False
    dtype = _arguments.autocast_dtype(input) or input.dtype
    if dtype == torch.float32:
        measured = linear_lora is None and not arguments.softcap
    elif dtype == torch.float16:
        # the factors of a head's or an adapter's gradient are float32, which is slow
        measured = linear_lora is None and not arguments.softcap and not _trained(linear_weight)
    else:
        measured = dtype == torch.bfloat16
    return measured and torch.cuda.get_device_properties(input.device).major == 9


def _check_supported(
    input: Tensor, arguments: LossArguments, options: LinearCrossEntropyOptions, backend: Backend
) -> None:
    """Raise if the backend does not support an argument or option."""
    grouped, filtered = options.process_group is not None, bool(options.gradient_filter)
    by_statistics = callable(arguments.label_smoothing) or callable(arguments.sample_weight)
    if (grouped or by_statistics) and backend != "reference" and torch.compiler.is_compiling():
        raise UnsupportedError(
            "functions of the statistics and process_group are not supported under torch.compile; call "
            "linear_cross_entropy outside torch.compile, or pass tensors computed from the statistics of "
            "linear_cross_entropy_with_statistics"
        )
    if grouped and (backend != "torch" or filtered):
        raise UnsupportedError(
            f'process_group needs backend="torch" and gradient_filter=0.0, got backend={backend!r} and '
            f"gradient_filter={options.gradient_filter}"
        )
    if backend == "reference" and (filtered or options.precision == "fast"):
        raise UnsupportedError(
            'backend="reference" does not support gradient_filter and precision="fast"; use backend="torch"'
        )
    if backend == "triton" and input.dtype == torch.float64:
        raise UnsupportedError(
            'backend="triton" of linear_cross_entropy does not support float64; use backend="torch"'
        )
    if backend == "triton" and filtered:
        raise UnsupportedError('backend="triton" does not support gradient_filter; use backend="torch"')


def _most_tokens(options: LinearCrossEntropyOptions, tokens: int) -> int:
    if not options.compact:
        return tokens
    return ALL_TOKENS if options.max_loss_tokens is None else options.max_loss_tokens


def _trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _by_definition(
    logits: Tensor, operands: Operands, arguments: LossArguments, shape: torch.Size, *, statistics: bool
) -> tuple[Tensor, Tensor]:
    """Return loss and packed statistics of backend="reference"."""
    logits = logits.to(operands.smoothing.dtype)
    packed = logits.new_empty((LOGITS_STATISTICS, 0))
    if statistics or operands.token_fns is not None:
        packed = reference.statistics(
            logits.detach(),
            operands.target,
            classes=operands.classes,
            probabilities=operands.probabilities,
            ignore_index=operands.ignore_index,
            softcap=arguments.softcap,
            logit_scale=arguments.logit_scale,
        )
    if operands.token_fns is not None:
        operands = operands.resolve(packed)
    loss = reference.cross_entropy(
        logits,
        operands.target,
        operands.smoothing,
        classes=operands.classes,
        probabilities=operands.probabilities,
        weight=operands.class_weight,
        ignore_index=operands.ignore_index,
        softcap=arguments.softcap,
        logit_scale=arguments.logit_scale,
        z_loss=arguments.z_loss,
    )
    return _reduce(loss * operands.token_scale, arguments, shape), packed


def _reduce(loss: Tensor, arguments: LossArguments, shape: torch.Size) -> Tensor:
    return loss.reshape(shape) if arguments.reduction == "none" else loss.sum()

"""Check the arguments of the public losses and convert them to the operators' arguments."""

import math
import os
from dataclasses import fields
from typing import NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ual_kernels._operands import accumulator
from ual_kernels._tokens import TokenFns, nan_outside, smoothing_limit
from ual_kernels._types import IGNORE_INDEX, Backend, Reduction, UnsupportedError
from ual_kernels._vocab_parallel import Shards
from ual_kernels.options import CrossEntropyOptions, LinearCrossEntropyOptions
from ual_kernels.statistics import TokenFn
from ual_kernels.targets import SparseTarget

Options = TypeVar("Options", CrossEntropyOptions, LinearCrossEntropyOptions)

# the largest distance of a sum of probabilities from 1
_SUM_TOLERANCE = 1e-3

# Triton reads this variable once, when it decorates a kernel at import.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class LossArguments(NamedTuple):
    """The keywords that both losses share, unchecked."""

    label_smoothing: float | Tensor | TokenFn
    sample_weight: Tensor | TokenFn | None
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    num_items: int | Tensor | None
    softcap: float | None
    logit_scale: float
    z_loss: float


class Operands(NamedTuple):
    """The checked arguments: one value for each of N tokens, contiguous, in the accumulator's dtype."""

    target: Tensor  # [N], the class with the largest probability
    ignore_index: int
    classes: Tensor | None  # [N, K], `target` first; None for a class index and for a dense target
    probabilities: Tensor | None  # [N, K], or [N, V] for a dense target; None for a class index
    smoothing: Tensor  # [N]
    token_scale: Tensor  # [N]: sample weight over the reduction's divisor, 0 for ignored tokens
    class_weight: Tensor | None  # [V]
    token_fns: TokenFns | None

    def resolve(self, statistics: Tensor) -> "Operands":
        """Replace the functions of the statistics [8, N] by the values that they return."""
        assert self.token_fns is not None
        selected = self.target != self.ignore_index
        smoothing, weight = self.token_fns(statistics)
        return self._replace(
            smoothing=self.smoothing if smoothing is None else smoothing.where(selected, 0.0),
            token_scale=self.token_scale
            if weight is None
            else self.token_scale * weight.where(selected, 0.0),
            token_fns=None,
        )


def check(
    tokens: Tensor,
    shape: torch.Size,
    target: Tensor | SparseTarget,
    arguments: LossArguments,
    classes: int,
    *,
    dense: bool,
) -> None:
    """Check the shared keywords as far as one rank can: all but the largest smoothing.

    Args:
        tokens: [N, ...] logits or hidden states, for their dtype and device.
        shape: the leading dimensions of the input.
        target: class indices, sparse or dense.
        arguments: the shared keywords.
        classes: the number of classes that `arguments.weight` covers.
        dense: whether a dense target is supported.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if isinstance(target, SparseTarget):
        _check_sparse(target, shape, tokens)
    elif not isinstance(target, Tensor):
        raise ValueError(f"target must be a tensor or a SparseTarget, got {type(target).__name__}")
    elif target.is_floating_point():
        _check_dense(target, (*shape, classes), tokens, supported=dense)
        if arguments.ignore_index >= 0:
            raise ValueError(
                "ignore_index must be negative for a target of probabilities, which ignores no token, got "
                f"{arguments.ignore_index}; give tokens to ignore the sample_weight 0"
            )
    else:
        _check_target(target, shape, tokens)
    _check_numbers(arguments)
    _check_class_weight(arguments.weight, classes, tokens)
    smoothing, weight = arguments.label_smoothing, arguments.sample_weight
    if not (isinstance(smoothing, Tensor | float | int) or callable(smoothing)):
        raise ValueError(
            f"label_smoothing must be a number, a tensor or a function of the statistics, got {smoothing!r}"
        )
    if not (weight is None or isinstance(weight, Tensor) or callable(weight)):
        raise ValueError(
            f"sample_weight must be a tensor, a function of the statistics or None, got {weight!r}; for one "
            "weight for all tokens pass torch.tensor(weight)"
        )
    for name, value in (("label_smoothing", smoothing), ("sample_weight", weight)):
        if isinstance(value, Tensor):
            _check_per_token(name, value, shape, tokens)


def shared(
    arguments: LossArguments,
    options: CrossEntropyOptions | LinearCrossEntropyOptions,
    input: Tensor,
    target: Tensor | SparseTarget,
    *,
    statistics: bool,
) -> dict[str, str]:
    """Describe what must be the same on all ranks of a process group, by name.

    It decides which collectives run. The values of tensors are not compared.
    """
    kind = "class indices"
    if isinstance(target, SparseTarget):
        kind = f"{target.indices.shape[-1]} classes, requires_grad={target.probabilities.requires_grad}"
    elif target.is_floating_point():
        kind = f"dense, requires_grad={target.requires_grad}"

    def describe(value: object) -> str:
        if isinstance(value, Tensor):
            return f"a tensor with requires_grad={value.requires_grad}"
        return "a function" if callable(value) else repr(value)

    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    del chosen["process_group"]
    return {
        "the kind of target": kind,
        "the shape of target": str(list(input.shape[:-1])),
        "the dtype of input": str(input.dtype),
        "the request for statistics": str(statistics),
        **{name: describe(value) for name, value in (arguments._asdict() | chosen).items()},
    }


def prepare(
    tokens: Tensor,
    shape: torch.Size,
    target: Tensor | SparseTarget,
    arguments: LossArguments,
    shards: Shards,
    *,
    statistics: bool,
) -> Operands:
    """Broadcast the shared keywords, which `check` accepted, to one value per token.

    Args:
        tokens: [N, ...] logits or hidden states, for their dtype and device.
        shape: the leading dimensions of the input.
        target: class indices, sparse or dense.
        arguments: the shared keywords.
        shards: the number of classes, and the classes that `arguments.weight` covers.
        statistics: whether statistics are requested. Zero-weight tokens are then computed too.

    Raises:
        ValueError: a float `label_smoothing` is out of range.
    """
    acc = accumulator(tokens)
    class_weight = None if arguments.weight is None else arguments.weight.to(acc).contiguous()
    smoothing, weight = arguments.label_smoothing, arguments.sample_weight
    limit = smoothing_limit(shards.vocab, acc)
    token_fns = None
    if callable(smoothing) or callable(weight):
        token_fns = TokenFns(
            smoothing if callable(smoothing) else None, weight if callable(weight) else None, limit
        )
    if callable(smoothing):
        smoothing = 0.0
    if not isinstance(smoothing, Tensor):
        if not 0 <= smoothing <= limit:
            raise ValueError(
                f"label_smoothing must be in [0, 1], or up to V / (V - 1) = {limit:.6g} by losses.others, "
                f"got {smoothing}"
            )
        smoothing = tokens.new_full((), smoothing, dtype=acc)
    smoothing = nan_outside(_per_token(smoothing, shape, acc), limit)

    ours = _canonical(target, arguments.ignore_index, shards, acc)
    labels, ignore_index = ours.labels, ours.ignore_index
    scale = None
    if isinstance(weight, Tensor):
        scale = _per_token(weight, shape, acc)
        scale = torch.where(scale >= 0, scale, torch.nan)
        if not (scale.requires_grad or statistics):
            # a zero-weight token has no loss and no gradient: it is dropped before the GEMM
            labels = torch.where(scale == 0, ignore_index, labels)
    selected = labels != ignore_index
    token_scale = torch.where(selected, torch.ones_like(smoothing) if scale is None else scale, 0.0)
    if arguments.reduction == "mean":
        divisor = _divisor(arguments.num_items, token_scale, ours, class_weight, shards)
        # masked again: num_items may be a tensor of 0 if every token is ignored
        token_scale = torch.where(selected, token_scale / divisor, 0.0)
    return Operands(
        labels,
        ignore_index,
        ours.classes,
        ours.probabilities,
        smoothing,
        token_scale,
        class_weight,
        token_fns,
    )


class _Targets(NamedTuple):
    """Targets in the form of the operators; see `Operands`."""

    labels: Tensor  # [N]
    ignore_index: int
    classes: Tensor | None
    probabilities: Tensor | None


def _canonical(
    target: Tensor | SparseTarget, ignore_index: int, shards: Shards, acc: torch.dtype
) -> _Targets:
    """Return the target in the form of the operators.

    Labels that are out of range make the loss of their tokens NaN. The label of a token whose
    probabilities are invalid is therefore -1.
    """
    if not isinstance(target, SparseTarget):
        if target.is_floating_point():
            return _dense(target, shards, acc)
        # reshape does not copy a strided vector
        return _Targets(target.reshape(-1).contiguous(), ignore_index, None, None)
    count = target.indices.shape[-1]
    classes = target.indices.reshape(-1, count).long()
    p = target.probabilities.reshape(-1, count).to(acc)
    ignored = classes[:, 0] == ignore_index
    valid = ((classes >= 0) & (classes < shards.vocab)).all(1) & (p >= 0).all(1)
    valid &= (p.sum(1) - 1).abs() <= _SUM_TOLERANCE
    # an invalid token counts in the divisor like a class index out of range: as the nearest class
    alone = torch.zeros_like(p)
    alone[:, 0] = 1.0
    usable = (valid & ~ignored)[:, None]
    nearest = torch.where(alone != 0, classes.clamp(0, shards.vocab - 1), 0)
    classes, p = torch.where(usable, classes, nearest), torch.where(usable, p, alone)
    if count > 1:
        classes, p = _largest_first(*_merged(classes, p))
    # a class of an ignored or invalid token cannot be mistaken for these labels
    labels = torch.where(ignored, IGNORE_INDEX, torch.where(valid, classes[:, 0], -1))
    return _Targets(labels, IGNORE_INDEX, classes.contiguous(), p.contiguous())


def _dense(target: Tensor, shards: Shards, acc: torch.dtype) -> _Targets:
    q = target.reshape(-1, target.shape[-1]).to(acc).contiguous()
    largest, column = q.detach().max(1)
    return _Targets(shards.top(largest, largest, column).label, IGNORE_INDEX, None, q)


def _merged(classes: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Add the probabilities of repeated classes [N, K] up; entries that become free are class 0 and 0."""
    tokens, count = classes.shape
    classes, order = classes.sort(stable=True, dim=1)
    slot = torch.zeros_like(classes)
    slot[:, 1:] = (classes[:, 1:] != classes[:, :-1]).cumsum(1)
    place = (slot + torch.arange(tokens, device=slot.device)[:, None] * count).reshape(-1)
    # accumulating index_put_ is deterministic on every device
    summed = p.new_zeros(tokens * count).index_put((place,), p.gather(1, order).reshape(-1), accumulate=True)
    return torch.zeros_like(classes).scatter(1, slot, classes), summed.view(tokens, count)


def _largest_first(classes: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the class of the largest probability and the first one."""
    top, place = p.argmax(1, keepdim=True), torch.arange(p.shape[1], device=p.device)
    order = torch.where(place == 0, top, torch.where(place == top, 0, place))
    return classes.gather(1, order), p.gather(1, order)


def _check_sparse(target: SparseTarget, shape: torch.Size, tokens: Tensor) -> None:
    indices, probabilities = target
    for name, value in (("indices", indices), ("probabilities", probabilities)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"target.{name} must be a torch.Tensor, got {type(value).__name__}; convert it by "
                "torch.as_tensor"
            )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target.indices must be int32 or int64, got {indices.dtype}")
    if indices.ndim == 0 or indices.shape[:-1] != shape or indices.shape[-1] == 0:
        raise ValueError(
            f"target.indices must be {[*shape, 'K']} to match input, with K >= 1, got {list(indices.shape)}"
        )
    if probabilities.shape != indices.shape:
        raise ValueError(
            f"target.probabilities must be {list(indices.shape)} like target.indices, got "
            f"{list(probabilities.shape)}"
        )
    check_floating("target.probabilities", probabilities)
    check_device("target.indices", indices, tokens)
    check_device("target.probabilities", probabilities, tokens)


def _check_dense(target: Tensor, shape: tuple[int, ...], tokens: Tensor, *, supported: bool) -> None:
    if not supported:
        raise ValueError(
            "target must be class indices or a SparseTarget, because probabilities of all classes are as "
            f"large as the logits, got {target.dtype}; use SparseTarget or cross_entropy of the logits"
        )
    if target.shape != shape:
        raise ValueError(
            f"target must be int32 or int64 class indices {list(shape[:-1])} or probabilities {list(shape)} "
            f"shaped like input, got {target.dtype} {list(target.shape)}"
        )
    check_floating("target", target)
    check_device("target", target, tokens)


def _check_target(target: Tensor, shape: torch.Size, tokens: Tensor) -> None:
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target must be int32 or int64 class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {list(shape)} to match input, got {list(target.shape)}")
    check_device("target", target, tokens)


def _check_numbers(arguments: LossArguments) -> None:
    reduction, softcap = arguments.reduction, arguments.softcap
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if arguments.num_items is not None and reduction != "mean":
        raise ValueError(
            f'num_items is the divisor of reduction="mean", got reduction={reduction!r}; remove one of them'
        )
    if isinstance(arguments.num_items, Tensor):
        if arguments.num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {list(arguments.num_items.shape)}")
    elif arguments.num_items is not None and not arguments.num_items > 0:
        raise ValueError(f"num_items must be positive, got {arguments.num_items}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if not -math.inf < arguments.logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {arguments.logit_scale}")
    if not 0 <= arguments.z_loss < math.inf:
        raise ValueError(f"z_loss must be a number >= 0, got {arguments.z_loss}")


def _check_class_weight(weight: Tensor | None, size: int, tokens: Tensor) -> None:
    if weight is None:
        return
    if weight.shape != (size,):
        raise ValueError(f"weight must be [{size}], one value per class, got {list(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight is not differentiable; pass weight.detach()")
    check_device("weight", weight, tokens)


def _check_per_token(name: str, value: Tensor, shape: torch.Size, tokens: Tensor) -> None:
    if value.shape != shape[: value.ndim]:
        leading = [list(shape[:k]) for k in range(len(shape) + 1)]
        raise ValueError(
            f"{name} must have leading dimensions of input without its last one, one of {leading}, "
            f"got {list(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    check_device(name, value, tokens)


def _per_token(value: Tensor, shape: torch.Size, acc: torch.dtype) -> Tensor:
    """Broadcast one value per leading index of a shape: [N] in the accumulator's dtype."""
    missing = (1,) * (len(shape) - value.ndim)
    return value.to(acc).reshape(value.shape + missing).expand(shape).reshape(-1)


def _divisor(
    num_items: int | Tensor | None,
    token_scale: Tensor,
    targets: _Targets,
    class_weight: Tensor | None,
    shards: Shards,
) -> Tensor | float:
    if isinstance(num_items, Tensor):
        return num_items.reshape(()).to(token_scale)
    if num_items is not None:
        return float(num_items)
    dense = targets.classes is None and targets.probabilities is not None
    plain = targets.probabilities is None and class_weight is None  # every token counts 1
    if not (dense or plain):  # PyTorch divides the loss of dense targets by the number of tokens
        # a label out of range is clamped to the nearest class; the token's own loss is NaN anyway
        classes = targets.labels.clamp(0, shards.vocab - 1)[:, None]
        share = (
            torch.ones_like(token_scale)[:, None] if targets.probabilities is None else targets.probabilities
        )
        if class_weight is not None:
            column, held = shards.place(classes if targets.classes is None else targets.classes)
            share = share * shards.sum(torch.where(held, class_weight[column.long()], 0.0))
        token_scale = token_scale * share.sum(1)
    total = token_scale.nansum()  # negative weights are NaN here and must not affect other tokens
    return torch.where(total == 0, torch.inf, total)  # loss and gradient are then 0


class Lora(NamedTuple):
    """A checked LoRA adapter of the head, unmerged."""

    a: Tensor | None  # [r, D]
    b: Tensor | None  # [V, r]
    scale: float


def lora(linear_lora: tuple[Tensor, Tensor, float] | None, input: Tensor, linear_weight: Tensor) -> Lora:
    """Return the checked (A, B, scale)."""
    if linear_lora is None:
        return Lora(None, None, 1.0)
    if not (isinstance(linear_lora, tuple) and len(linear_lora) == 3):
        raise ValueError(f"linear_lora must be (A, B, scale) or None, got {type(linear_lora).__name__}")
    a, b, scale = linear_lora
    vocab, features = linear_weight.shape
    rank = a.shape[0] if a.ndim == 2 else "r"
    for name, matrix, shape in (("A", a, (rank, features)), ("B", b, (vocab, rank))):
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"linear_lora's {name} must be [{shape[0]}, {shape[1]}], got {list(matrix.shape)}"
            )
        check_floating(f"linear_lora's {name}", matrix)
        check_device(f"linear_lora's {name}", matrix, input)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"linear_lora's scale must be finite, got {scale}")
    return Lora(a, b, float(scale))


class Linear(NamedTuple):
    """Checked hidden states and head, cast if autocast is enabled."""

    input: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts the operands of a linear layer, None without autocast."""
    kind = input.device.type
    if input.is_meta or input.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the checked hidden states and head.

    Under autocast they are cast as in `torch.nn.functional.linear`; gradients have the original dtypes.
    """
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"linear_weight must be [V, D] with V >= 1, got {list(weight.shape)}")
    if input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be [..., {weight.shape[1]}] to match linear_weight, got {list(input.shape)}"
        )
    check_device("linear_weight", weight, input)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_floating("input", input)
    if weight.dtype != input.dtype:
        raise ValueError(
            f"linear_weight must be {input.dtype} like input, got {weight.dtype}; cast one of them or use "
            "torch.autocast"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_bias must be [{weight.shape[0]}], got {list(bias.shape)}")
        check_floating("linear_bias", bias)
        check_device("linear_bias", bias, input)
    return Linear(input, weight, bias)


def check_options(options: Options | None, kind: type[Options]) -> Options:
    """Return the options or the defaults; raise if they are not of this kind."""
    if options is not None and not isinstance(options, kind):
        raise ValueError(f"options must be {kind.__name__} or None, got {type(options).__name__}")
    return options or kind()


def check_logits(input: Tensor) -> None:
    """Raise unless input is [..., V] with V >= 1."""
    if input.ndim < 1 or input.shape[-1] == 0:
        raise ValueError(f"input must be [..., V] with V >= 1, got {list(input.shape)}")
    check_floating("input", input)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless the dtype is one of the four supported dtypes."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_inplace(input: Tensor, backend: Backend) -> None:
    """Raise if the logits cannot be overwritten."""
    if backend == "reference":
        raise UnsupportedError('backend="reference" does not support inplace_backward; use backend="torch"')
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "inplace_backward is not supported under torch.compile; set inplace_backward=False"
        )
    owner = input if input._base is None else input._base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError("inplace_backward would overwrite a leaf that requires grad; pass a computed tensor")
    if input.dtype == torch.float16:
        raise ValueError(
            "inplace_backward does not support float16: gradients divided by the number of tokens underflow "
            "before the loss scale is applied; use bfloat16 or float32"
        )
    if not input.is_contiguous():
        raise ValueError(
            f"inplace_backward needs contiguous input, got strides {input.stride()}; call input.contiguous()"
        )


def choose_backend(backend: Backend, input: Tensor, *, fused: Backend) -> Backend:
    """Resolve "auto" (`fused` on CUDA, "torch" elsewhere); raise if a named backend cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "auto":
        return fused if input.is_cuda else "torch"
    if backend == "triton" and not (input.is_cuda or _INTERPRETING):
        raise UnsupportedError(
            f'backend="triton" needs CUDA tensors, got one on {input.device}; use backend="auto" or "torch"'
        )
    return backend

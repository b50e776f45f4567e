"""The public functions: check the arguments, choose a backend, reduce."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch import distributed as dist

from ual_kernels import ops, reference
from ual_kernels._rows import COUNT, Rule
from ual_kernels._types import (
    IGNORE_INDEX,
    Backend,
    Precision,
    Reduction,
    SmoothingOver,
    UnsupportedError,
)
from ual_kernels.parallel import Shards
from ual_kernels.statistics import TokenStatistics

TokenRule: TypeAlias = Callable[[TokenStatistics], Tensor]
"""A number for each token from its own statistics: fields [M] of some tokens in, [M] out.

Where ignored tokens are among them (`cross_entropy`, compact=False), what is returned for those is not used.
"""

# Triton reads this when it decorates a kernel, so once, at import; so do we.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    label_smoothing: float | Tensor | TokenRule = ...,
    sample_weight: Tensor | TokenRule | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items: int | Tensor | None = ...,
    smoothing_over: SmoothingOver = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    z_loss: float = ...,
    return_statistics: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor, target: Tensor, *, return_statistics: Literal[True], **options: Any
) -> tuple[Tensor, TokenStatistics]: ...


def cross_entropy(  # type: ignore[misc]
    input: Tensor,
    target: Tensor,
    *,
    label_smoothing: float | Tensor | TokenRule = 0.0,
    sample_weight: Tensor | TokenRule | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    smoothing_over: SmoothingOver = "all",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_statistics: bool = False,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Cross entropy of given logits in which every sample, or token, has its own label smoothing and weight.

    With float `label_smoothing` it is `torch.nn.functional.cross_entropy` for class indices, except that the
    classes are always the *last* dimension and that the loss is at least float32. Per row, with
    q = (1 - s) onehot(target) + s / V:  loss = -sum_v q_v log softmax(z)_v
    (uncertainty-aware learning, arXiv 2406.04854; the convention s / V on every class is PyTorch's).
    Gradients flow to `input`, `label_smoothing` and `sample_weight`.

    Args:
        input: [..., V] logits; bfloat16, float16, float32 or float64.
        target: [...] int32 or int64 in [0, V), or `ignore_index`.
        label_smoothing: a float in [0, 1], or a tensor shaped like any leading part of `target` ([B] is one
            value per sample, [B, T] one per token), spread over the rest; or a function of the token's own
            `TokenStatistics` (see `ual_kernels.losses`), for which the logits are read once more.
        sample_weight: a tensor >= 0, shaped likewise, or such a function; multiplies each row's loss. None
            is 1.
        weight: [V] class weights, as in PyTorch; not differentiable.
        ignore_index: rows with this target have no loss, no gradient and no share in any divisor.
        reduction: "none" ([...]), "sum", or "mean": divided by the sum over live rows of `sample_weight`
            (times `weight[target]`, as PyTorch does). A weight that is a function does not count there: the
            losses that are defined so divide by the number of tokens.
        num_items: replaces that divisor under "mean", as transformers passes `num_items_in_batch`; > 0.
        smoothing_over: "all" puts s / V on every class; "others" puts s / (V - 1) on all but the target
            (Megatron, fairseq).
        softcap: logits become softcap * tanh(logits / softcap), after `logit_scale`; > 0 (Gemma).
        logit_scale: multiplies the logits first (Cohere; 1 / logits_scaling of Granite).
        z_loss: adds z_loss * lse(z)^2 to each row (PaLM), >= 0.
        return_statistics: also return `TokenStatistics`, detached, from the same pass.
        inplace_backward: compute the gradient in forward and *overwrite `input`* with it: least memory and
            traffic. `input` must be contiguous, not float16 (its range is too small for gradients that wait),
            neither a leaf nor a view of one, and cannot be used afterwards (autograd refuses where another
            operation had saved it). Without a gradient to compute nothing is overwritten. Not under
            torch.compile.
        backend: "auto" takes Triton for CUDA tensors and PyTorch elsewhere; "triton", "torch" or "reference"
            given outright is used or refused, never exchanged.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [...] under "none"; 0 with a connected
        graph when every row is ignored. With `return_statistics`, (loss, TokenStatistics).

    Raises:
        ValueError: shapes, dtypes, devices, names or floats that do not fit the above.
        UnsupportedError: a backend asked for by name cannot run here.

    A target outside [0, V), a smoothing outside [0, 1] or a negative weight *in a tensor* makes its own row
    NaN and leaves the rest right: finding it here would stall the device.

    >>> import torch
    >>> logits, target = torch.zeros(2, 3, 4), torch.tensor([[1, 2, -100], [0, 3, 3]])
    >>> per_sample = torch.tensor([0.0, 0.2])
    >>> round(cross_entropy(logits, target, label_smoothing=per_sample).item(), 4)  # log 4
    1.3863
    """
    _check_classes("input", input)
    rows = input.reshape(-1, input.shape[-1])
    plan = _plan(
        rows, input.shape[:-1], rows.shape[1], target, label_smoothing, sample_weight, weight,
        ignore_index, reduction, num_items, smoothing_over, softcap, logit_scale, z_loss, return_statistics,
    )  # fmt: skip
    backend = _choose(backend, input, fused="triton")
    if inplace_backward:
        _check_inplace(input, backend)
    if backend == "reference":
        return _reference(rows, plan)
    if rows.stride(-1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    flags = plan.weight, ignore_index, softcap or 0.0, logit_scale, z_loss
    if plan.rule is not None:
        with torch.no_grad():
            facts = ops.cross_entropy(rows, plan.target, plan.smoothing, *flags, True, backend)[2]
        plan = plan.ruled(facts)
    options = (*flags, return_statistics, backend)
    if inplace_backward and torch.is_grad_enabled() and input.requires_grad:
        loss, stats = ops.CrossEntropyInplace.apply(  # type: ignore[no-untyped-call]
            rows, plan.smoothing, plan.row_scale, plan.target, *options
        )
    else:
        unit, _, stats = ops.cross_entropy(rows, plan.target, plan.smoothing, *options)
        loss = unit * plan.row_scale
    return plan.finish(loss, stats)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    label_smoothing: float | Tensor | TokenRule = ...,
    sample_weight: Tensor | TokenRule | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items: int | Tensor | None = ...,
    smoothing_over: SmoothingOver = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    z_loss: float = ...,
    return_statistics: Literal[False] = ...,
    linear_lora: tuple[Tensor, Tensor, float] | None = ...,
    vocab_size: int | None = ...,
    live_rows: int | None = ...,
    compact: bool = ...,
    chunk_tokens: int | None = ...,
    precision: Precision = ...,
    gradient_filter: float | Literal["off"] = ...,
    process_group: dist.ProcessGroup | None = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_statistics: Literal[True], **options: Any
) -> tuple[Tensor, TokenStatistics]: ...


def linear_cross_entropy(  # type: ignore[misc]
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    label_smoothing: float | Tensor | TokenRule = 0.0,
    sample_weight: Tensor | TokenRule | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    smoothing_over: SmoothingOver = "all",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_statistics: bool = False,
    linear_lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    live_rows: int | None = None,
    compact: bool = True,
    chunk_tokens: int | None = None,
    precision: Precision = "high",
    gradient_filter: float | Literal["off"] = "off",
    process_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without ever holding all the logits.

    Ignored rows leave before the first GEMM; gradients are made in forward, chunk by chunk; a head that does
    not require a gradient never gets one computed; logits stay in the accumulator's dtype. Drop-in for
    `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13) with per-sample or per-token smoothing.

    Args:
        input: [..., D] hidden states; bfloat16, float16, float32 or float64.
        linear_weight: [V, D], the lm_head, of the same dtype (under autocast both are cast).
        target: [...] as in `cross_entropy`. What makes a row NaN there makes all of a trainable head's
            gradient NaN here, for that is a sum over rows.
        linear_bias: [V] or None.
        linear_lora: (A [r, D], B [V, r], scale) of a LoRA adapter on the head, in any floating dtype: the
            logits are E C^T + scale (E A^T) B^T, never merged, with gradients for A and B.
        vocab_size: the head's first rows that are real; the rest, padding, is left out. None is all.
        live_rows: how many rows take part, if the caller knows (a collator does): at least as many as have a
            target. Nothing then waits for the device; too small a number makes the loss NaN.
        compact: False leaves ignored rows in, at full cost: for CUDA graphs, where no row may be counted.
        chunk_tokens: rows of logits held at a time; None takes what fits a small budget (512 MiB under
            backend="triton").
        precision: "high" never rounds logits to 16 bits. "fast" does, like most implementations: the
            gradient's error grows from its rounding floor, 2e-3, to 1e-2 (docs/kernels.md).
        gradient_filter: skip the gradient of parts of the vocabulary that together hold less than this
            probability in every row, and leave their mass to their mean: 1e-4, say. "off" is exact.
        process_group: the ranks of this group each hold some consecutive rows of the head, in their order
            (`linear_weight`, `linear_bias`, `weight` and B are this rank's), and the same `input` and
            `target`. The loss and the gradients are those of the whole head.
        label_smoothing, sample_weight: as in `cross_entropy`. A function is called on the device, once for
            each chunk of live rows after its pass over the vocabulary, and must treat each row by itself.
        weight, ignore_index, reduction, num_items, smoothing_over, softcap, logit_scale, z_loss,
            return_statistics, backend: as in `cross_entropy`, but "auto" is "torch" everywhere, and "triton"
            refuses float64, `gradient_filter` and `process_group`.

    Returns:
        As `cross_entropy`. Gradients flow to `input`, `linear_weight`, `linear_bias`, A, B, and to
        `label_smoothing` and `sample_weight` that are tensors.

    Raises:
        ValueError: shapes, dtypes, devices, names or floats that do not fit.
        UnsupportedError: what is asked for by name cannot run here; a function as `label_smoothing` or
            `sample_weight`, or a `process_group`, under torch.compile.

    >>> import torch
    >>> hidden, head = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> target = torch.tensor([[1, 2, -100], [0, 3, 3]])
    >>> round(linear_cross_entropy(hidden, head, target, label_smoothing=torch.tensor([0.0, 0.2])).item(), 4)
    1.3863
    """
    if linear_weight.ndim != 2 or linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight must be [V, D] with V >= 1, got {list(linear_weight.shape)}")
    if input.ndim < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input must be [..., {linear_weight.shape[1]}] to match linear_weight, got {list(input.shape)}"
        )
    _check_device("linear_weight", linear_weight, input)
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    _check_floating("input", input)
    if linear_weight.dtype != input.dtype:
        raise ValueError(
            f"linear_weight must be {input.dtype} like input, got {linear_weight.dtype}; cast one of "
            "them, or run under torch.autocast"
        )
    lora_a, lora_b, lora_scale = _check_lora(linear_lora, input, linear_weight)
    if linear_bias is not None:
        if linear_bias.shape != linear_weight.shape[:1]:
            raise ValueError(f"linear_bias must be [{linear_weight.shape[0]}], got {list(linear_bias.shape)}")
        _check_device("linear_bias", linear_bias, input)
    if vocab_size is not None:
        if not 1 <= vocab_size <= linear_weight.shape[0]:
            raise ValueError(f"vocab_size must be in [1, {linear_weight.shape[0]}], got {vocab_size}")
        linear_weight = linear_weight[:vocab_size]
        linear_bias = None if linear_bias is None else linear_bias[:vocab_size]
        lora_b = None if lora_b is None else lora_b[:vocab_size]
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    threshold = 0.0 if gradient_filter == "off" else gradient_filter
    if isinstance(threshold, str) or not 0 <= threshold < 1:
        raise ValueError(f'gradient_filter must be "off" or in [0, 1), got {gradient_filter!r}')
    rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])
    if live_rows is not None and (live_rows < 0 or not compact):
        raise ValueError(f"live_rows must be a number >= 0 of a compact loss, got {live_rows}")
    taking_part = len(rows) if not compact else COUNT if live_rows is None else live_rows

    # "auto" stays with PyTorch until the Triton path has been measured on a GPU
    backend = _choose(backend, input, fused="torch")
    size = linear_weight.shape[0]
    direct = process_group is not None or callable(label_smoothing) or callable(sample_weight)
    if direct and backend != "reference" and torch.compiler.is_compiling():
        raise UnsupportedError(
            "neither a function of the statistics nor a process_group can be compiled; call "
            "linear_cross_entropy outside torch.compile, or pass tensors made from return_statistics"
        )
    shards = None
    if process_group is not None:
        if backend != "torch" or threshold:
            raise UnsupportedError('process_group needs backend="torch", without gradient_filter')
        shards = Shards(size, process_group, input.device)
    plan = _plan(
        rows, input.shape[:-1], size, target, label_smoothing, sample_weight, weight,
        ignore_index, reduction, num_items, smoothing_over, softcap, logit_scale, z_loss, return_statistics,
        shards=shards,
    )  # fmt: skip
    if backend == "reference":
        if threshold or precision == "fast":
            raise UnsupportedError('backend="reference" is exact: no gradient_filter, no precision="fast"')
        acc = plan.smoothing.dtype
        dead = (plan.target == ignore_index)[:, None]
        with torch.autocast(input.device.type, enabled=False):
            hidden = rows.to(acc).masked_fill(dead, 0.0)
            logits = hidden @ linear_weight.to(acc).T
            if lora_a is not None and lora_b is not None:
                logits = logits + hidden @ lora_a.to(acc).T @ lora_b.to(acc).T * lora_scale
        return _reference(logits if linear_bias is None else logits + linear_bias.to(acc), plan)
    if backend == "triton" and input.dtype == torch.float64:
        raise UnsupportedError('backend="triton" of linear_cross_entropy has no float64; use "torch"')
    if backend == "triton" and threshold:
        raise UnsupportedError('backend="triton" has no gradient_filter; use "torch"')
    grad = torch.is_grad_enabled()

    def learnt(*tensors: Tensor | None) -> bool:
        return grad and any(t is not None and t.requires_grad for t in tensors)

    head_grad, lora_grad = learnt(linear_weight, linear_bias), learnt(lora_a, lora_b)
    per_row = reduction == "none"
    summed = head_grad or lora_grad
    arguments = (
        rows,
        linear_weight,
        linear_bias,
        lora_a,
        lora_b,
        plan.target,
        plan.smoothing,
        plan.row_scale,
        plan.weight,
        ignore_index,
        softcap or 0.0,
        logit_scale,
        lora_scale,
        z_loss,
        float(threshold),
        return_statistics,
        learnt(input) and not (per_row and summed),
        head_grad and not per_row,
        lora_grad and not per_row,
        per_row,
        taking_part,
        chunk_tokens or 0,
        precision,
        backend,
    )
    if direct:
        loss, _, stats, *_ = ops.LinearCrossEntropyDirect.apply(  # type: ignore[no-untyped-call]
            *arguments, {"rule": plan.rule, "whole": shards}
        )
    else:
        loss, _, stats, *_ = ops.linear_cross_entropy(*arguments)
    return plan.finish(loss, stats)


@dataclass(frozen=True)
class _Plan:
    """The arguments that both losses share: checked, flat, contiguous, and in the accumulator's dtype."""

    target: Tensor  # [N]
    smoothing: Tensor  # [N]
    row_scale: Tensor  # [N]
    weight: Tensor | None  # [V]
    shape: tuple[int, ...]
    reduction: Reduction
    options: dict[str, Any]
    return_statistics: bool
    rule: Rule | None

    def ruled(self, facts: Tensor) -> "_Plan":
        """With the numbers that the rule makes of the statistics [7, N] in its place."""
        assert self.rule is not None
        live = self.target != self.options["ignore_index"]
        smoothing, weight = self.rule(facts)
        return replace(
            self,
            smoothing=self.smoothing if smoothing is None else smoothing.where(live, 0.0),
            row_scale=self.row_scale if weight is None else self.row_scale * weight.where(live, 0.0),
            rule=None,
        )

    def finish(self, loss: Tensor, stats: Tensor) -> Tensor | tuple[Tensor, TokenStatistics]:
        loss = loss.reshape(self.shape) if self.reduction == "none" else loss.sum()
        return (loss, TokenStatistics.unpack(stats, self.shape)) if self.return_statistics else loss


def _plan(
    rows: Tensor,
    shape: tuple[int, ...],
    vocab: int,
    target: Tensor,
    label_smoothing: float | Tensor | TokenRule,
    sample_weight: Tensor | TokenRule | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    num_items: int | Tensor | None,
    smoothing_over: SmoothingOver,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    return_statistics: bool,
    *,
    shards: Shards | None = None,
) -> _Plan:
    acc = torch.promote_types(rows.dtype, torch.float32)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if smoothing_over not in get_args(SmoothingOver):
        raise ValueError(f"smoothing_over must be one of {get_args(SmoothingOver)}, got {smoothing_over!r}")
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target must be int32 or int64 class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {list(shape)} to match input, got {list(target.shape)}")
    _check_device("target", target, rows)
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if not (-math.inf < logit_scale < math.inf):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if not (0 <= z_loss < math.inf):
        raise ValueError(f"z_loss must be a number >= 0, got {z_loss}")
    if weight is not None:
        if weight.shape != (vocab,):
            raise ValueError(f"weight must be [{vocab}], one number per class, got {list(weight.shape)}")
        if weight.requires_grad:
            raise ValueError("weight is not differentiable; pass weight.detach()")
        _check_device("weight", weight, rows)
        weight = weight.to(acc).contiguous()

    whole_vocab = vocab if shards is None else shards.vocab
    # (1 - s) on the target and s / (V - 1) elsewhere is s' / V on every class for s' = s V / (V - 1)
    stretch = 1.0
    if smoothing_over == "others":
        stretch = whole_vocab / (whole_vocab - 1) if whole_vocab > 1 else 0.0
    rules: list[Callable[[TokenStatistics], Tensor] | None] = [None, None]
    if callable(label_smoothing):
        rules[0], label_smoothing = label_smoothing, 0.0
    if callable(sample_weight):
        rules[1], sample_weight = sample_weight, None
    if not isinstance(label_smoothing, Tensor):
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        label_smoothing = rows.new_full((), label_smoothing, dtype=acc)
    smoothing = _per_row("label_smoothing", label_smoothing, target, acc)
    smoothing = _smoothing(smoothing, stretch)
    labels = target.reshape(-1).contiguous()  # a strided vector survives reshape
    scale = None
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor):
            raise ValueError(f"sample_weight must be a tensor or None, got {sample_weight!r}")
        scale = _per_row("sample_weight", sample_weight, target, acc)
        scale = torch.where(scale >= 0, scale, torch.nan)
        if not (scale.requires_grad or return_statistics):
            # a row of weight 0 has no loss and no gradient: spare it the GEMM
            labels = torch.where(scale == 0, ignore_index, labels)
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items is the divisor of reduction="mean", got reduction={reduction!r}')
    live = labels != ignore_index
    row_scale = torch.where(live, torch.ones_like(smoothing) if scale is None else scale, 0.0)
    if reduction == "mean":
        # masked once more: with every row ignored, num_items may be a tensor of 0
        divisor = _divisor(num_items, row_scale, labels, weight, shards)
        row_scale = torch.where(live, row_scale / divisor, 0.0)
    return _Plan(
        target=labels,
        smoothing=smoothing,
        row_scale=row_scale,
        weight=weight,
        shape=tuple(shape),
        reduction=reduction,
        return_statistics=return_statistics,
        rule=_rule(rules[0], rules[1], stretch) if any(rules) else None,
        options={
            "weight": weight,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "z_loss": z_loss,
        },
    )


def _smoothing(s: Tensor, stretch: float) -> Tensor:
    s = torch.where((s >= 0) & (s <= 1), s, torch.nan)
    return s if stretch == 1.0 else s * stretch


def _numbers(name: str, function: TokenRule | None, facts: Tensor) -> Tensor | None:
    if function is None:
        return None
    value = function(TokenStatistics.unpack(facts.clone(), facts.shape[1:]))
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == facts.shape[1:]):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name}(statistics) must return a floating-point tensor [{facts.shape[1]}], one number per "
            f"token like the fields of its argument, got {got}"
        )
    return value.detach().to(facts.dtype)


def _rule(smoothing: TokenRule | None, weight: TokenRule | None, stretch: float) -> Rule:
    """What the caller's functions make of statistics [7, M], checked."""

    def rule(facts: Tensor) -> tuple[Tensor | None, Tensor | None]:
        s, w = _numbers("label_smoothing", smoothing, facts), _numbers("sample_weight", weight, facts)
        return (
            None if s is None else _smoothing(s, stretch),
            None if w is None else torch.where(w >= 0, w, torch.nan),
        )

    return rule


def _divisor(
    num_items: int | Tensor | None,
    row_scale: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    shards: Shards | None,
) -> Tensor | float:
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must hold one number, got shape {list(num_items.shape)}")
        return num_items.reshape(()).to(row_scale)
    if num_items is not None:
        if not num_items > 0:
            raise ValueError(f"num_items must be positive, got {num_items}")
        return float(num_items)
    if weight is not None:
        start, size = 0 if shards is None else shards.start, len(weight)
        of_target = weight[(labels - start).clamp(0, size - 1).long()]
        if shards is not None:
            mine = (labels >= start) & (labels < start + size)
            of_target = shards.sum(torch.where(mine, of_target, 0.0))
        row_scale = row_scale * of_target
    total = row_scale.nansum()  # a negative weight, NaN by now, must not reach the other rows
    return torch.where(total == 0, 1.0, total)


def _per_row(name: str, value: Tensor, target: Tensor, acc: torch.dtype) -> Tensor:
    """Spread a number per leading index of `target` over the rest of it: [N] in the accumulator's dtype."""
    if value.shape != target.shape[: value.ndim]:
        leading = [list(target.shape[:k]) for k in range(target.ndim + 1)]
        raise ValueError(
            f"{name} must be shaped like a leading part of target, one of {leading}, got {list(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    _check_device(name, value, target)
    missing = (1,) * (target.ndim - value.ndim)
    return value.to(acc).reshape(value.shape + missing).expand(target.shape).reshape(-1)


def _reference(logits: Tensor, plan: _Plan) -> Tensor | tuple[Tensor, TokenStatistics]:
    logits = logits.to(plan.smoothing.dtype)
    facts = {k: v for k, v in plan.options.items() if k not in ("weight", "z_loss")}
    if plan.rule is not None:
        plan = plan.ruled(reference.statistics(logits.detach(), plan.target, **facts))
    loss = reference.cross_entropy(logits, plan.target, plan.smoothing, **plan.options) * plan.row_scale
    if not plan.return_statistics:
        return plan.finish(loss, loss)
    return plan.finish(loss, reference.statistics(logits.detach(), plan.target, **facts))


def _choose(backend: Backend, input: Tensor, *, fused: Backend) -> Backend:
    """Resolve "auto" (`fused` on CUDA, PyTorch elsewhere); keep or refuse a name."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "auto":
        return fused if input.is_cuda else "torch"
    if backend == "triton" and not (input.is_cuda or _INTERPRETING):
        raise UnsupportedError(f'backend="triton" needs CUDA tensors, got one on {input.device}')
    return backend


def _autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as `torch.nn.functional.linear` would be cast: by value, with gradients in the given dtypes."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input, linear_weight, linear_bias
    dtype = torch.get_autocast_dtype(kind)
    return (
        input.to(dtype),
        linear_weight.to(dtype),
        None if linear_bias is None else linear_bias.to(dtype),
    )


def _check_lora(
    linear_lora: tuple[Tensor, Tensor, float] | None, input: Tensor, linear_weight: Tensor
) -> tuple[Tensor | None, Tensor | None, float]:
    if linear_lora is None:
        return None, None, 1.0
    lora_a, lora_b, scale = linear_lora
    vocab, features = linear_weight.shape
    rank = lora_a.shape[0] if lora_a.ndim == 2 else "r"
    for name, matrix, shape in (("A", lora_a, (rank, features)), ("B", lora_b, (vocab, rank))):
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"linear_lora's {name} must be [{shape[0]}, {shape[1]}], got {list(matrix.shape)}"
            )
        _check_floating(f"linear_lora's {name}", matrix)
        _check_device(f"linear_lora's {name}", matrix, input)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"linear_lora's scale must be finite, got {scale}")
    return lora_a, lora_b, float(scale)


def _check_classes(name: str, input: Tensor) -> None:
    if input.ndim < 1 or input.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {list(input.shape)}")
    _check_floating(name, input)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def _check_inplace(input: Tensor, backend: Backend) -> None:
    if backend == "reference":
        raise UnsupportedError('backend="reference" has no inplace_backward')
    if torch.compiler.is_compiling():
        raise UnsupportedError("inplace_backward does not run under torch.compile")
    owner = input if input._base is None else input._base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError("inplace_backward would overwrite a leaf that requires grad; pass a computed tensor")
    if input.dtype == torch.float16:
        raise ValueError(
            "inplace_backward cannot keep float16 gradients: divided by the number of tokens they underflow "
            "before a loss scaler's factor arrives; use bfloat16 or float32"
        )
    if not input.is_contiguous():
        raise ValueError(f"inplace_backward needs contiguous input, got strides {input.stride()}")

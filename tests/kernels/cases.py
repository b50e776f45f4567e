"""The definition of the loss, test inputs, and the accuracy that a backend must reach.

There are two accuracy criteria. Neither contains a tuned number.

1. As accurate as eager. The error against float64, on the same rounded inputs, is at most twice the error of
   `definition` in the accumulator's dtype plus four roundings of the largest value in the returned dtype. (A
   gradient by a per-token argument is a product of four: upstream, weight, divisor, derivative.)
2. At the floor. Rounding to nearest changes a number in [2^e, 2^(e+1)) by a uniformly distributed error of at
   most eps 2^e / 2, whose root mean square is eps 2^e / sqrt(12). The relative error of a rounded tensor in
   the Frobenius norm is therefore at most eps / sqrt(12). For bfloat16 this bound is 2.26e-3, and 1.66e-3 is
   typical for normally distributed values. The *total* error of a 16-bit result must not exceed the bound, so
   all other errors must fit into the difference. A bound of twice the error of bfloat16 logits would allow
   2e-2. In a vector few values may dominate the norm. There each value must be within one unit in the last
   place.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import ual_kernels
from ual_kernels import CrossEntropyOptions, LinearCrossEntropyOptions, SparseTarget, losses

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]


def definition(
    input: Tensor,
    target: Tensor | SparseTarget,
    *,
    label_smoothing: float | Tensor = 0.0,
    sample_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    smoothing_over: str = "all",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """H(q, softmax(z)) with explicit q, for valid arguments. It shares no code with the package."""
    shape = input.shape[:-1]

    def per_token(value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, device=input.device).to(dtype)
        return value.reshape(value.shape + (1,) * (len(shape) - value.ndim)).expand(shape)

    selected = loss_tokens(target, ignore_index)
    z = input.to(dtype)[selected] * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    vocab = z.shape[-1]
    s = per_token(label_smoothing)[selected][:, None]
    w = per_token(1.0 if sample_weight is None else sample_weight)[selected]
    c = z.new_ones(vocab) if weight is None else weight.to(dtype)
    hit = distribution(target, selected, vocab, dtype)
    spread = torch.full_like(hit, 1 / vocab) if smoothing_over == "all" else (1 - hit) / max(vocab - 1, 1)
    q = (1 - s) * hit + s * spread
    loss = w * (-(c * q * torch.log_softmax(z, -1)).sum(-1) + z_loss * torch.logsumexp(z, -1) ** 2)
    if reduction == "none":
        return z.new_zeros(shape).masked_scatter(selected, loss)
    if reduction == "sum" or not selected.any():
        return loss.sum()
    if num_items is not None:
        return loss.sum() / torch.as_tensor(num_items).to(dtype)
    # as in PyTorch, probabilities of all classes are not part of the divisor
    return loss.sum() / (w if is_dense(target) else w * (hit * c).sum(-1)).sum()


def is_dense(target: Tensor | SparseTarget) -> bool:
    """Whether a target has a probability for every class."""
    return isinstance(target, Tensor) and target.is_floating_point()


def loss_tokens(target: Tensor | SparseTarget, ignore_index: int = -100) -> Tensor:
    """Return which tokens are not ignored."""
    if isinstance(target, SparseTarget):
        return target.indices[..., 0] != ignore_index
    return (
        target.new_ones(target.shape[:-1], dtype=torch.bool) if is_dense(target) else target != ignore_index
    )


def distribution(
    target: Tensor | SparseTarget, selected: Tensor, vocab: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the target of the selected tokens without smoothing, [M, V]."""
    if isinstance(target, SparseTarget):
        p = target.probabilities[selected].to(dtype)
        return p.new_zeros(len(p), vocab).scatter_add(1, target.indices[selected].long(), p)
    if is_dense(target):
        return target[selected].to(dtype)
    return torch.nn.functional.one_hot(target[selected].long(), vocab).to(dtype)


# ---- the losses with the fields of options as keywords ----


LOGITS_FIELDS = tuple(field.name for field in fields(CrossEntropyOptions))
LINEAR_FIELDS = tuple(field.name for field in fields(LinearCrossEntropyOptions))


def cross_entropy(
    input: Tensor, target: Tensor | SparseTarget, *, return_statistics: bool = False, **keywords: Any
) -> Any:
    """`ual_kernels.cross_entropy` with the fields of its options as keywords.

    `return_statistics` calls `cross_entropy_with_statistics`. `smoothing_over` converts by `losses.others`.
    """
    nested = _nested(keywords, LOGITS_FIELDS, CrossEntropyOptions, input.shape[-1])
    if return_statistics:
        return ual_kernels.cross_entropy_with_statistics(input, target, **nested)
    return ual_kernels.cross_entropy(input, target, **nested)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    return_statistics: bool = False,
    vocab_size: int | None = None,
    classes: int | None = None,
    **keywords: Any,
) -> Any:
    """`ual_kernels.linear_cross_entropy` with the fields of its options as keywords.

    `vocab_size` slices a padded head. `classes` is the number of classes of all shards.
    """
    if vocab_size is not None:
        linear_weight = linear_weight[:vocab_size]
        if (bias := keywords.get("linear_bias")) is not None:
            keywords["linear_bias"] = bias[:vocab_size]
        if (lora := keywords.get("linear_lora")) is not None:
            keywords["linear_lora"] = lora[0], lora[1][:vocab_size], lora[2]
    nested = _nested(keywords, LINEAR_FIELDS, LinearCrossEntropyOptions, classes or linear_weight.shape[0])
    if return_statistics:
        return ual_kernels.linear_cross_entropy_with_statistics(input, linear_weight, target, **nested)
    return ual_kernels.linear_cross_entropy(input, linear_weight, target, **nested)


def _nested(
    keywords: dict[str, Any], names: tuple[str, ...], options: Callable[..., Any], vocab: int
) -> dict[str, Any]:
    nested = {name: value for name, value in keywords.items() if name not in names}
    if nested.pop("smoothing_over", "all") == "others":
        nested["label_smoothing"] = losses.others(nested.get("label_smoothing", 0.0), vocab)
    chosen = {name: value for name, value in keywords.items() if name in names}
    return nested | ({"options": options(**chosen)} if chosen else {})


# One flag at a time, then all compatible flags. `options` sets `weight`, which depends on V.
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "items": {"num_items": 7},
    "items-tensor": {"num_items": torch.tensor(7.0)},
    "others": {"smoothing_over": "others"},
    "softcap": {"softcap": 3.0},
    "scaled": {"logit_scale": 0.25},
    "z-loss": {"z_loss": 1e-2},
    "classes": {"weight": None},
    "all": {"reduction": "none", "smoothing_over": "others", "softcap": 4.0, "logit_scale": 1.5,
            "z_loss": 1e-3, "weight": None},
}  # fmt: skip


def options(name: str, vocab: int, device: torch.device) -> dict[str, Any]:
    """Return the keywords of OPTIONS by name."""
    chosen = dict(OPTIONS[name])
    if "weight" in chosen:
        chosen["weight"] = torch.linspace(0.0, 2.0, vocab, device=device)
    return chosen


def logits_case(
    tokens: int, vocab: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves (input, label_smoothing, sample_weight) and targets; the second token is ignored."""
    acc = torch.promote_types(dtype, torch.float32)
    target = torch.randint(vocab, (tokens,), device=device)
    target[1:2] = -100
    leaves = {
        "input": (torch.randn(tokens, vocab, device=device, dtype=torch.float64) * scale).to(dtype),
        "label_smoothing": torch.rand(tokens, device=device, dtype=acc),
        "sample_weight": torch.rand(tokens, device=device, dtype=acc) + 0.5,
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, target


def linear_case(
    tokens: int, vocab: int, features: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves with hidden states and a head whose logits have a standard deviation of about 3."""
    leaves, target = logits_case(tokens, vocab, dtype, device)
    wide = {"device": device, "dtype": torch.float64}
    leaves["input"] = torch.randn(tokens, features, **wide).to(dtype)
    leaves["linear_weight"] = (torch.randn(vocab, features, **wide) * 3 / math.sqrt(features)).to(dtype)
    leaves["linear_bias"] = torch.randn(vocab, **wide).to(dtype)
    return {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}, target


def linear_definition(
    input: Tensor,
    target: Tensor | SparseTarget,
    *,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **rest: Any,
) -> Tensor:
    """`definition` of the logits of hidden states and head."""
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = torch.nn.functional.linear(input.to(dtype), linear_weight.to(dtype), bias)
    return definition(logits, target, dtype=dtype, **rest)


def several(target: Tensor, count: int, vocab: int, dtype: torch.dtype) -> SparseTarget:
    """Return `count` classes per token, the target first, so that the same tokens are ignored.

    Every fifth token has a class several times, every fifth padding, every fifth padding beside class 0, and
    every fifth a first class of probability 0. Probabilities have a sum of 1 in float64.
    """
    place = torch.arange(count, device=target.device)
    kind = (torch.arange(target.numel(), device=target.device).reshape(target.shape) % 5)[..., None]
    indices = torch.randint(vocab, (*target.shape, count), device=target.device)
    indices[..., :1] = target[..., None]
    logits = torch.randn(indices.shape, device=target.device, dtype=torch.float64) * 2
    if count > 1:
        again = (place % 3 == 1) & (kind == 1)
        indices = torch.where(again, target[..., None].clamp(min=0), indices)
        padding = (place > (count - 1) // 2) & ((kind == 2) | (kind == 3))
        indices = indices.masked_fill(padding, 0).masked_fill((place == 1) & (kind == 3) & ~padding, 0)
        logits = logits.masked_fill(padding | ((place == 0) & (kind == 4)), -torch.inf)
    return SparseTarget(indices, torch.softmax(logits, -1).to(dtype))


def with_probabilities(
    leaves: dict[str, Tensor], target: Tensor, count: int, vocab: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Add a leaf `probabilities` [..., K], in the accumulator's dtype, and return its classes."""
    made = several(target, count, vocab, leaves["label_smoothing"].dtype)
    return leaves | {"probabilities": made.probabilities.requires_grad_()}, made.indices


def of_several(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Call a loss with the target that a leaf `probabilities` and its classes are."""

    def called(*, target: Tensor, probabilities: Tensor, **rest: Any) -> Any:
        return loss(target=SparseTarget(target, probabilities), **rest)

    return called


ADAPTER_SCALE = 0.75


def frozen(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with a head that is not trained."""
    head = ("linear_weight", "linear_bias")
    return {name: leaf.detach().requires_grad_(name not in head) for name, leaf in leaves.items()}


def with_adapter(
    leaves: dict[str, Tensor], rank: int = 3, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Add a LoRA adapter A [r, D], B [V, r] of the head, whose logits are as large as the head's."""
    head = leaves["linear_weight"]
    wide = {"device": head.device, "dtype": torch.float64}
    a = torch.randn(rank, head.shape[1], **wide) / math.sqrt(head.shape[1])
    made = {"lora_a": a, "lora_b": torch.randn(head.shape[0], rank, **wide)}
    return leaves | {name: leaf.to(dtype or head.dtype).requires_grad_() for name, leaf in made.items()}


def frozen_with_adapter(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with a frozen head and an adapter, the usual case of LoRA."""
    return with_adapter(frozen(leaves))


def adapted(
    loss: Callable[..., Any], lora_a: Tensor | None = None, lora_b: Tensor | None = None, **rest: Any
) -> Any:
    """Call a linear loss of the package with leaves that may include an adapter."""
    adapter = None if lora_a is None or lora_b is None else (lora_a, lora_b, ADAPTER_SCALE)
    return loss(**rest, linear_lora=adapter)


def merged_definition(
    linear_weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **rest: Any,
) -> Tensor:
    """`linear_definition` of the head merged with the adapter."""
    if lora_a is not None and lora_b is not None:
        linear_weight = linear_weight.to(dtype) + ADAPTER_SCALE * lora_b.to(dtype) @ lora_a.to(dtype)
    return linear_definition(linear_weight=linear_weight, dtype=dtype, **rest)


def measure(
    loss: Callable[..., Tensor], leaves: dict[str, Tensor], target: Tensor, **chosen: Any
) -> dict[str, Tensor]:
    """Return the loss and the gradients of all leaves that require one, for an upstream gradient != 1."""
    leaves = {name: leaf.detach().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    value = loss(target=target, **leaves, **chosen)
    upstream = torch.linspace(0.5, 2.0, value.numel(), device=value.device).reshape(value.shape).to(value)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(value, [leaves[name] for name in wanted], upstream)
    return {"loss": value.detach(), **dict(zip(wanted, gradients, strict=True))}


def as_float64(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the leaves to float64."""
    return {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}


def assert_as_accurate_as_eager(
    actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], terms: int = 0
) -> None:
    """Criterion 1. In float64, eager is the exact result, and 64 roundings are allowed.

    A sum over the classes of a target has `terms` roundings, whose root mean square is that of sqrt(terms).
    """
    for name, truth in exact.items():
        ours, theirs = actual[name], eager[name]
        assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} instead of {theirs.dtype}"
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        rounding = torch.finfo(ours.dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
        budget = (
            2 * _worst(theirs, truth)
            + (64 if ours.dtype == torch.float64 else 4 + math.sqrt(terms)) * rounding
        )
        error = _worst(ours, truth)
        assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e}"


def assert_at_the_floor(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Criterion 2 for 16-bit results; for float32 results, 64 roundings are allowed."""
    for name, truth in exact.items():
        ours, eps = actual[name], torch.finfo(actual[name].dtype).eps
        errors = (ours.double() - truth).abs()
        if ours.dtype in HALVES and ours.ndim == 1:
            unit = eps * truth.abs().clamp(min=torch.finfo(ours.dtype).smallest_normal)
            cancelled = 64 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (errors <= unit + cancelled).all(), f"{name}: error above one unit in the last place"
            continue
        budget = eps / math.sqrt(12) if ours.dtype in HALVES else 64 * eps
        error = (errors.norm() / truth.norm()).item()
        assert error <= budget, f"{name}: relative error {error:.3e} exceeds the floor {budget:.3e}"


def _worst(a: Tensor, truth: Tensor) -> float:
    return (a.double() - truth).abs().max().item() if truth.numel() else 0.0


def names(dtypes: list[torch.dtype]) -> list[Any]:
    """Return dtypes as parameters with readable names."""
    return [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in dtypes]

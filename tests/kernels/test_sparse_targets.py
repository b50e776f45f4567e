"""Targets of several classes, `SparseTarget`, against a dense [N, V] definition in float64.

The probabilities are a leaf beside the others, so every comparison includes their gradient.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ual_kernels
from tests.kernels.cases import (
    DTYPES,
    HALVES,
    OPTIONS,
    adapted,
    as_float64,
    assert_as_accurate_as_eager,
    assert_at_the_floor,
    cross_entropy,
    definition,
    distribution,
    frozen,
    frozen_with_adapter,
    linear_case,
    linear_cross_entropy,
    logits_case,
    loss_tokens,
    measure,
    merged_definition,
    names,
    of_several,
    options,
    several,
    with_adapter,
    with_probabilities,
)
from ual_kernels import SparseTarget, TokenStatistics
from ual_kernels._torch import linear_cross_entropy as tiled

Leaves = dict[str, Tensor]
Head = Callable[[Leaves], Leaves]

COUNTS = [1, 2, 3, 20, 64]
BACKENDS = ["torch", "triton", "reference"]
HEADS: dict[str, Head] = {
    "frozen": frozen,
    "trainable": dict,
    "lora": frozen_with_adapter,
    "trainable-lora": with_adapter,
}
backends = pytest.mark.parametrize("backend", BACKENDS)
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
counts = pytest.mark.parametrize("count", COUNTS)


def of_logits(**arguments: Any) -> Any:
    return of_several(cross_entropy)(**arguments)


def of_hidden(**arguments: Any) -> Any:
    return of_several(lambda **rest: adapted(linear_cross_entropy, **rest))(**arguments)


def dense(**arguments: Any) -> Tensor:
    return of_several(definition)(**arguments)  # type: ignore[no-any-return]


def dense_of_hidden(**arguments: Any) -> Tensor:
    return of_several(merged_definition)(**arguments)  # type: ignore[no-any-return]


def sparse_logits(
    tokens: int, vocab: int, count: int, dtype: torch.dtype, device: torch.device, scale: float = 2.0
) -> tuple[Leaves, Tensor]:
    leaves, target = logits_case(tokens, vocab, dtype, device, scale)
    return with_probabilities(leaves, target, count, vocab)


def sparse_hidden(
    tokens: int, vocab: int, features: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[Leaves, Tensor]:
    leaves, target = linear_case(tokens, vocab, features, dtype, device)
    return with_probabilities(leaves, target, count, vocab)


def judge(leaves: Leaves, target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    """Loss and all gradients are as accurate as eager PyTorch with a dense target."""
    linear = "linear_weight" in leaves
    ours, exact = (of_hidden, dense_of_hidden) if linear else (of_logits, dense)
    assert_as_accurate_as_eager(
        actual=measure(ours, leaves, target, **flags, **how),
        eager=measure(exact, leaves, target, **flags, dtype=leaves["label_smoothing"].dtype),
        exact=measure(exact, as_float64(leaves), target, **flags),
        terms=target.shape[-1],
    )


def judge_floor(leaves: Leaves, target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    assert_at_the_floor(
        actual=measure(of_hidden, leaves, target, **flags, **how),
        exact=measure(dense_of_hidden, as_float64(leaves), target, **flags),
    )


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- values and gradients of given logits ----


# the reference defines the loss in float64
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in ("torch", "triton") for dtype in DTYPES]
    + [("reference", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag(flags: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    leaves, target = sparse_logits(6, 101, 5, dtype, device)
    judge(leaves, target, options(flags, 101, device), backend=backend)


@counts
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float64),
     ("triton", torch.bfloat16), ("reference", torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_any_number_of_classes(
    flags: str, backend: str, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    """Of 37 classes: 64 entries repeat some, and every kind of `several` occurs."""
    leaves, target = sparse_logits(7, 37, count, dtype, device)
    judge(leaves, target, options(flags, 37, device), backend=backend)


@backends
def test_a_thousand_classes(backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(5, 2_003, 1_024, torch.float64, device)
    judge(leaves, target, options("classes", 2_003, device), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", names([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("vocab", [2, 257, 4_096, 4_097])
def test_any_width(vocab: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(5, vocab, 3, dtype, device)
    judge(leaves, target, {"reduction": "none", "z_loss": 1e-2}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scale", [1e-4, 50.0])
def test_tiny_and_huge_logits(scale: float, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(7, 4_097, 4, torch.float32, device, scale)
    judge(leaves, target, {"reduction": "none"}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", names([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
def test_the_gradient_in_place(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(7, 101, 4, dtype, device)

    def ours(input: Tensor, **rest: Any) -> Tensor:
        logits = input * 1.0
        place = logits.data_ptr()
        value = of_logits(input=logits, inplace_backward=True, backend=backend, **rest)
        assert logits.data_ptr() == place
        assert not torch.equal(logits.detach(), input.detach()), "the logits are not overwritten"
        return value  # type: ignore[no-any-return]

    chosen = options(flags, 101, device)
    assert_as_accurate_as_eager(
        actual=measure(ours, leaves, target, **chosen),
        eager=measure(dense, leaves, target, **chosen, dtype=leaves["label_smoothing"].dtype),
        exact=measure(dense, as_float64(leaves), target, **chosen),
        terms=4,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_several_chunks_of_tokens(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ual_kernels._torch.cross_entropy._CHUNK_ELEMENTS", {device.type: 3 * 17})
    leaves, target = sparse_logits(11, 17, 4, torch.float32, device)
    judge(leaves, target, options("all", 17, device), backend=backend)


# ---- values and gradients of hidden states and a head ----


@every_head
@pytest.mark.parametrize("dtype", names([torch.float64, torch.float32]))
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag_of_the_linear_loss(
    flags: str, dtype: torch.dtype, head: Head, device: torch.device
) -> None:
    leaves, target = sparse_hidden(24, 101, 32, 5, dtype, device)
    judge(head(leaves), target, options(flags, 101, device), backend="torch", chunk_tokens=7)


@every_head
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_the_reference_of_the_linear_loss(flags: str, head: Head, device: torch.device) -> None:
    leaves, target = sparse_hidden(7, 31, 8, 4, torch.float64, device)
    judge(head(leaves), target, options(flags, 31, device), backend="reference")


@every_head
@counts
@pytest.mark.parametrize("flags", ["mean", "none", "all"])
def test_any_number_of_classes_of_the_linear_loss(
    flags: str, count: int, head: Head, device: torch.device
) -> None:
    leaves, target = sparse_hidden(9, 37, 8, count, torch.float64, device)
    judge(head(leaves), target, options(flags, 37, device))


@pytest.mark.parametrize("head", [frozen, with_adapter], ids=["frozen", "trainable-lora"])
def test_a_thousand_classes_of_the_linear_loss(head: Head, device: torch.device) -> None:
    leaves, target = sparse_hidden(5, 2_003, 8, 1_024, torch.float64, device)
    judge(head(leaves), target, options("classes", 2_003, device))


@every_head
@pytest.mark.parametrize(("tokens", "width"), [(5, 3), (24, 100)])
@pytest.mark.parametrize("flags", OPTIONS)
def test_many_tiles(
    flags: str, tokens: int, width: int, head: Head, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of one token are in different tiles, and at both ends of tiles."""
    monkeypatch.setattr(tiled, "tile_shape", lambda *_: tiled.TileShape(tokens, width))
    leaves, target = sparse_hidden(24, 101, 8, 6, torch.float64, device)
    edges = torch.tensor([0, 2, 3, 99, 100, 98], device=device)
    target[5:10] = edges[torch.arange(5, device=device)[:, None] + torch.arange(6, device=device) - 5]
    judge(head(leaves), target, options(flags, 101, device))


@pytest.mark.parametrize("head", [frozen, dict, with_adapter], ids=["frozen", "trainable", "trainable-lora"])
@pytest.mark.parametrize("dtype", names(HALVES))
@pytest.mark.parametrize("flags", OPTIONS)
def test_sixteen_bits_are_rounded_once(
    flags: str, dtype: torch.dtype, head: Head, device: torch.device
) -> None:
    leaves, target = sparse_hidden(64, 1_000, 64, 5, dtype, device)
    judge_floor(head(leaves), target, options(flags, 1_000, device))


@pytest.fixture(params=["tma", "pointer", "cublas", "exact"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from ual_kernels._triton import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "VARIANT", request.param)
    return str(request.param)


def without_trained_bias(leaves: Leaves) -> Leaves:
    """Return the leaves with a trained head and a frozen bias; a trained bias needs the exact variant."""
    return {name: leaf.detach().requires_grad_(name != "linear_bias") for name, leaf in leaves.items()}


def triton_case(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Leaves, Tensor]:
    """Return 19 tokens with a smoothing of at most 0.2.

    For a trained head, the Triton backend rounds probabilities to 16 bits in addition to the gradient. More
    smoothing makes the columns of the targets, which are added in float32, a smaller part of the gradient.
    """
    leaves, target = sparse_hidden(19, 131, 48, count, dtype, device)
    return leaves | {"label_smoothing": (leaves["label_smoothing"].detach() / 5).requires_grad_()}, target


def with_larger_adapter(leaves: Leaves) -> Leaves:
    """Return the leaves with an adapter of rank 16; in a smaller one, a few values dominate the norm."""
    return with_adapter(leaves, rank=16)


@pytest.mark.parametrize("head", [frozen, without_trained_bias], ids=["frozen", "trainable"])
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.slow(spare=8)
def test_every_variant_of_triton(flags: str, head: Head, variant: str, device: torch.device) -> None:
    leaves, target = triton_case(5, torch.bfloat16, device)
    judge_floor(head(leaves), target, options(flags, 131, device), backend="triton", chunk_tokens=17)


@counts
@pytest.mark.parametrize("head", [frozen, with_larger_adapter], ids=["frozen", "trainable-lora"])
@pytest.mark.slow(spare=5)
def test_any_number_of_classes_in_triton(count: int, head: Head, device: torch.device) -> None:
    leaves, target = triton_case(count, torch.bfloat16, device)
    judge_floor(head(leaves), target, options("all", 131, device), backend="triton")


@pytest.mark.parametrize("head", [frozen, with_larger_adapter], ids=["frozen", "trainable-lora"])
@pytest.mark.parametrize("dtype", names([torch.float32, torch.float16]))
@pytest.mark.parametrize("flags", ["mean", "softcap", "all"])
def test_other_dtypes_in_triton(flags: str, dtype: torch.dtype, head: Head, device: torch.device) -> None:
    leaves, target = triton_case(5, dtype, device)
    leaves, chosen = head(leaves), options(flags, 131, device)
    (judge_floor if dtype in HALVES else judge)(leaves, target, chosen, backend="triton")


# ---- one class is a class index ----


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(
            b[name], a[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def one_class(target: Tensor, trained: bool, dtype: torch.dtype) -> SparseTarget:
    ones = torch.ones(*target.shape, 1, dtype=dtype, device=target.device)
    return SparseTarget(target[..., None], ones.requires_grad_(trained))


def compare_with_an_index(
    loss: Callable[..., Any], leaves: Leaves, target: Tensor, trained: bool, **flags: Any
) -> None:
    one = one_class(target, trained, torch.float32)
    plain, ours = (measure(loss, leaves, given, **flags) for given in (target, one))
    assert_same_bits(plain, ours)
    flags.pop("inplace_backward", None)
    plain, ours = (
        loss(**leaves, target=given, **flags, return_statistics=True)[1]._asdict() for given in (target, one)
    )
    assert_same_bits(plain, ours)


@backends
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", names(DTYPES))
@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
@pytest.mark.slow(spare=8)
def test_one_class_has_the_bits_of_an_index(
    flags: str, dtype: torch.dtype, trained: bool, backend: str, device: torch.device
) -> None:
    """Loss, all gradients and statistics, with an ignored token and an invalid class."""
    leaves, target = logits_case(7, 101, dtype, device, scale=3.0)
    target[4] = 101
    compare_with_an_index(cross_entropy, leaves, target, trained, **options(flags, 101, device),
                          backend=backend)  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_one_class_has_the_bits_of_an_index_in_place(
    flags: str, trained: bool, backend: str, device: torch.device
) -> None:
    leaves, target = logits_case(7, 101, torch.float32, device)

    def loss(input: Tensor, **rest: Any) -> Any:
        return cross_entropy(input=input * 1.0, **rest)

    compare_with_an_index(loss, leaves, target, trained, **options(flags, 101, device),
                          inplace_backward=True, backend=backend)  # fmt: skip


@every_head
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", dtype) for dtype in DTYPES]
    + [("triton", dtype) for dtype in DTYPES[1:]]
    + [("reference", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("flags", ["mean", "all"])
@pytest.mark.slow(spare=8)
def test_one_class_has_the_bits_of_an_index_in_the_linear_loss(
    flags: str, backend: str, dtype: torch.dtype, trained: bool, head: Head, device: torch.device
) -> None:
    leaves, target = linear_case(9, 131, 16, dtype, device)
    if head in (frozen, frozen_with_adapter):
        target[4] = 131  # makes a trained head's gradient NaN

    def loss(**arguments: Any) -> Any:
        return adapted(linear_cross_entropy, **arguments)

    compare_with_an_index(loss, head(leaves), target, trained, **options(flags, 131, device),
                          backend=backend)  # fmt: skip


@pytest.mark.parametrize("how", [{"max_loss_tokens": 8}, {"compact": False}, {"chunk_tokens": 2}], ids=str)
def test_one_class_has_the_bits_of_an_index_with_options(how: dict[str, Any], device: torch.device) -> None:
    leaves, target = linear_case(9, 131, 16, torch.bfloat16, device)
    compare_with_an_index(linear_cross_entropy, leaves, target, True, **how)


# ---- properties ----


@st.composite
def splits(draw: st.DrawFn) -> tuple[Tensor, Tensor, SparseTarget, Tensor]:
    """Return logits, target, the target's probability split over copies among entries of 0, and smoothing."""
    tokens, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    count = draw(st.sampled_from(COUNTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    wide = {"generator": generator, "dtype": torch.float64}
    target = torch.randint(vocab, (tokens,), generator=generator)
    copies = torch.rand(tokens, count, generator=generator) < 0.5
    copies[:, draw(st.integers(0, count - 1))] = True
    p = torch.rand(tokens, count, **wide) * copies
    others = torch.randint(vocab, (tokens, count), generator=generator)
    sparse = SparseTarget(torch.where(copies, target[:, None], others), p / p.sum(1, keepdim=True))
    return torch.randn(tokens, vocab, **wide) * 3, target, sparse, torch.rand(tokens, **wide)


@pytest.mark.kills("ual_kernels/_arguments.py", ", accumulate=True)", ")")
@backends
@settings(max_examples=20)
@given(splits(), st.sampled_from(["none", "sum", "mean"]))
def test_a_split_over_copies_of_a_class_is_the_class(
    backend: str, problem: tuple[Tensor, Tensor, SparseTarget, Tensor], reduction: str
) -> None:
    logits, target, sparse, smoothing = problem
    leaves = {"input": logits.requires_grad_(), "label_smoothing": smoothing.requires_grad_()}
    flags = {"reduction": reduction, "weight": torch.linspace(0.5, 2, logits.shape[1]), "backend": backend}
    assert_close(
        measure(cross_entropy, leaves, sparse, **flags), measure(cross_entropy, leaves, target, **flags)
    )


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Leaves, Tensor]:
    """Return logits, smoothing, weights and any distribution, with copies, zeros and padding."""
    tokens, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    count = draw(st.sampled_from(COUNTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    wide = {"generator": generator, "dtype": torch.float64}
    indices = torch.randint(vocab, (tokens, count), generator=generator)
    p = torch.rand(tokens, count, **wide) * (torch.rand(tokens, count, generator=generator) < 0.6)
    padded = torch.arange(count) >= count - draw(st.integers(0, count - 1))
    p, indices = p.masked_fill(padded, 0.0), indices.masked_fill(padded, 0)
    p[:, 0] += 1e-3
    leaves = {
        "input": torch.randn(tokens, vocab, **wide) * draw(st.sampled_from([1e-3, 1.0, 30.0])),
        "label_smoothing": torch.rand(tokens, **wide),
        "sample_weight": torch.rand(tokens, **wide) + 0.1,
        "probabilities": p / p.sum(1, keepdim=True),
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, indices


@backends
@settings(max_examples=20)
@given(distributions(), st.sampled_from(["none", "sum", "mean"]), st.booleans(), st.booleans())
def test_any_distribution(
    backend: str, problem: tuple[Leaves, Tensor], reduction: str, weighted: bool, capped: bool
) -> None:
    leaves, indices = problem
    vocab = leaves["input"].shape[1]
    flags = {
        "reduction": reduction,
        "weight": torch.linspace(0.0, 2.0, vocab, dtype=torch.float64) + 0.1 if weighted else None,
        "softcap": 5.0 if capped else None,
        "z_loss": 1e-3,
    }
    # entries of probability 0 are compared as well: their gradient is that of the formula
    assert_close(
        measure(of_logits, leaves, indices, **flags, backend=backend),
        measure(dense, leaves, indices, **flags),
        tolerance=1e-10,
    )


@backends
@settings(max_examples=20)
@given(distributions(), st.randoms(use_true_random=False))
def test_the_order_of_entries_changes_only_roundings(
    backend: str, problem: tuple[Leaves, Tensor], random: Any
) -> None:
    leaves, indices = problem
    order = list(range(indices.shape[1]))
    random.shuffle(order)
    shuffled = leaves | {"probabilities": leaves["probabilities"][:, order]}
    first, second = (
        measure(of_logits, *case, reduction="none", backend=backend)
        for case in ((leaves, indices), (shuffled, indices[:, order]))
    )
    first["probabilities"] = first["probabilities"][:, order]
    assert_close(first, second)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=20)
@given(distributions(), st.integers(1, 6), st.integers(1, 5))
def test_the_linear_loss_is_the_loss_of_the_product(
    backend: str, problem: tuple[Leaves, Tensor], features: int, chunk_tokens: int
) -> None:
    leaves, indices = problem
    tokens, vocab = leaves["input"].shape
    wide = {"generator": torch.Generator().manual_seed(tokens * vocab), "dtype": torch.float64}
    leaves = leaves | {
        "input": torch.randn(tokens, features, **wide).requires_grad_(),
        "linear_weight": torch.randn(vocab, features, **wide).requires_grad_(),
    }
    ours = measure(of_hidden, leaves, indices, chunk_tokens=chunk_tokens, backend=backend)
    assert_close(ours, measure(dense_of_hidden, leaves, indices), tolerance=1e-9)


# ---- ignored tokens ----


@pytest.mark.kills(
    "ual_kernels/_arguments.py",
    "ignored = classes[:, 0] == ignore_index",
    "ignored = (classes == ignore_index).any(1)",
)
@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
@backends
def test_the_first_class_decides_what_is_ignored(
    ignore_index: int, backend: str, device: torch.device
) -> None:
    """`ignore_index` may be a class of other tokens, or the class of their padding."""
    leaves, target = sparse_logits(8, 17, 4, torch.float64, device)
    target = torch.where(target == ignore_index, 7, target)
    target[1, 0] = target[6, 0] = ignore_index
    with torch.no_grad():
        target[2], leaves["probabilities"][2] = torch.tensor([3, 0, 5, 5]), torch.tensor([0.5, 0.25, 0.25, 0])
        target[3], leaves["probabilities"][3] = torch.tensor([4, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])
        target[4], leaves["probabilities"][4] = torch.tensor([9, 5, 0, 0]), torch.tensor([0.0, 1, 0, 0])
    for reduction in ("none", "mean"):
        flags = {"reduction": reduction, "ignore_index": ignore_index}
        judge(leaves, target, flags, backend=backend)
        measured = measure(of_logits, leaves, target, **flags, backend=backend)
        for name in leaves:
            assert not measured[name][[1, 6]].any(), name
    hidden, _ = sparse_hidden(8, 17, 8, 4, torch.float64, device)
    hidden |= {"probabilities": leaves["probabilities"]}
    if backend != "triton":
        judge(hidden, target, {"ignore_index": ignore_index}, backend=backend)


def spoiled(leaves: Leaves, target: Tensor) -> None:
    """Replace all that an ignored token 1 must not use."""
    target[1, 1:] = 10**9
    with torch.no_grad():
        for name in ("input", "label_smoothing", "sample_weight", "probabilities"):
            leaves[name][1] = torch.nan


@backends
def test_entries_of_an_ignored_token_are_not_used(backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(6, 17, 4, torch.float32, device)
    clean = measure(of_logits, leaves, target, backend=backend)
    spoiled(leaves, target)
    dirty = measure(of_logits, leaves, target, backend=backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in leaves:
        assert not dirty[name][1].any(), name


@pytest.mark.parametrize(
    "how", [{}, {"max_loss_tokens": 5}, {"max_loss_tokens": 6}, {"compact": False}], ids=str
)
@backends
def test_entries_of_an_ignored_token_are_not_used_in_the_linear_loss(
    backend: str, how: dict[str, Any], device: torch.device
) -> None:
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    leaves, target = sparse_hidden(6, 131, 16, 4, dtype, device)
    clean = measure(of_hidden, leaves, target, **how, backend=backend)
    spoiled(leaves, target)
    dirty = measure(of_hidden, leaves, target, **how, backend=backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@backends
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_ignored_is_zero(reduction: str, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(3, 17, 4, torch.float32, device)
    target[:, 0] = -100
    for name, value in measure(of_logits, leaves, target, reduction=reduction, backend=backend).items():
        assert not value.any(), name
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    leaves, _ = sparse_hidden(3, 17, 16, 4, dtype, device)
    for name, value in measure(of_hidden, leaves, target, reduction=reduction, backend=backend).items():
        assert not value.any(), name


@backends
@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_empty_batch(reduction: str, loss: Callable[..., Any], backend: str, device: torch.device) -> None:
    width = 5 if loss is cross_entropy else 4
    input = torch.zeros(0, width, device=device, requires_grad=True)
    head = [] if loss is cross_entropy else [torch.zeros(5, 4, device=device)]
    p = torch.zeros(0, 3, device=device, requires_grad=True)
    target = SparseTarget(torch.zeros(0, 3, dtype=torch.long, device=device), p)
    value, found = loss(input, *head, target, reduction=reduction, return_statistics=True, backend=backend)
    assert value.sum().item() == 0
    assert found.predicted.shape == (0,)
    value.sum().backward()
    assert input.grad.shape == (0, width)
    assert p.grad is None or p.grad.shape == (0, 3)


@backends
def test_zero_weight_tokens_have_no_gradient(backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(5, 17, 3, torch.float64, device)
    leaves["sample_weight"] = torch.tensor([1.0, 1, 0, 2, 0], device=device, dtype=torch.float64)
    judge(leaves, target, {}, backend=backend)
    leaves, _ = sparse_hidden(5, 17, 16, 3, torch.float64, device)
    leaves["sample_weight"] = torch.tensor([1.0, 1, 0, 2, 0], device=device, dtype=torch.float64)
    if backend != "triton":
        judge(leaves, target, {}, backend=backend)


# ---- invalid tokens ----

# a place, a class or None, and a probability or None
INVALID: dict[str, tuple[int, int | None, float | None]] = {
    "class-v-first": (0, 131, None),
    "class-v-last": (3, 131, None),
    "class-minus-one-first": (0, -1, None),
    "class-minus-one-last": (3, -1, None),
    "ignored-last": (3, -100, None),
    "huge-class": (2, 2**31 - 1, None),
    "negative": (2, None, -0.25),
    "nan": (1, None, torch.nan),
    "infinite": (1, None, torch.inf),
    "sum-above": (3, None, 0.252),
    "sum-below": (3, None, 0.248),
}  # fmt: skip
invalid = pytest.mark.parametrize("which", INVALID)


def make_invalid(which: str, leaves: Leaves, target: Tensor) -> None:
    place, label, probability = INVALID[which]
    if label is not None:
        target[2, place] = label
    if probability is not None:
        with torch.no_grad():
            if which == "negative":  # the sum stays 1
                leaves["probabilities"][2, 3] += leaves["probabilities"][2, place] - probability
            leaves["probabilities"][2, place] = probability


def valid_case(leaves: Leaves, target: Tensor) -> None:
    with torch.no_grad():
        leaves["probabilities"][2] = 0.25
        target[2] = torch.tensor([5, 3, 0, 7], device=target.device)


def assert_one_is_nan(clean: dict[str, Tensor], dirty: dict[str, Tensor], exact: bool) -> None:
    others = [i for i in range(len(clean["input"])) if i != 2]
    assert dirty["loss"].isnan().tolist() == [i == 2 for i in range(len(clean["input"]))]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        tolerance = 0.0 if exact else 1e-12
        torch.testing.assert_close(
            dirty[name][others], clean[name][others], rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.kills("ual_kernels/_arguments.py", "valid &= (p.sum(1) - 1).abs() <= _SUM_TOLERANCE", "pass")
@pytest.mark.kills("ual_kernels/_arguments.py", " & (p >= 0).all(1)", "")
@backends
@invalid
def test_an_invalid_entry_makes_one_token_nan(which: str, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(6, 131, 4, torch.float32, device)
    valid_case(leaves, target)
    clean = measure(of_logits, leaves, target, reduction="none", backend=backend)
    make_invalid(which, leaves, target)
    dirty = measure(of_logits, leaves, target, reduction="none", backend=backend)
    assert_one_is_nan(clean, dirty, exact=True)
    mean = measure(of_logits, leaves, target, backend=backend)
    assert mean["loss"].isnan()
    assert mean["input"][[0, 1, 3, 4, 5]].isfinite().all()
    found = of_logits(**leaves, target=target, return_statistics=True, backend=backend)[1]
    assert found.log_prob.isnan().tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@invalid
def test_an_invalid_entry_makes_one_token_nan_in_place(
    which: str, backend: str, device: torch.device
) -> None:
    leaves, target = sparse_logits(6, 131, 4, torch.float32, device)
    valid_case(leaves, target)
    make_invalid(which, leaves, target)
    with torch.no_grad():
        leaves["probabilities"].requires_grad_(False)
    logits = leaves["input"] * 1.0
    loss = cross_entropy(
        logits, SparseTarget(target, leaves["probabilities"]), reduction="sum", inplace_backward=True,
        backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaves["input"])
    assert gradient.isnan().all(-1).tolist() == [False, False, True, False, False, False]
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


@backends
@pytest.mark.parametrize("softcap", [None, 5.0])
@invalid
@pytest.mark.slow(spare=6)
def test_an_invalid_entry_makes_one_token_nan_in_the_linear_loss(
    which: str, softcap: float | None, backend: str, device: torch.device
) -> None:
    dtype = torch.bfloat16 if backend == "triton" else torch.float64
    leaves, target = sparse_hidden(6, 131, 16, 4, dtype, device)
    valid_case(leaves, target)
    flags = {"reduction": "none", "softcap": softcap, "backend": backend}
    clean = measure(of_hidden, frozen(leaves), target, **flags)
    make_invalid(which, leaves, target)
    dirty = measure(of_hidden, frozen(leaves), target, **flags)
    assert_one_is_nan(clean, dirty, exact=backend == "triton")
    assert measure(of_hidden, leaves, target, **flags)["linear_weight"].isnan().any()


@pytest.mark.kills(
    "ual_kernels/_arguments.py",
    "token_scale = token_scale * share.sum(1)",
    "token_scale = token_scale * share.amax(1)",
)
@pytest.mark.kills("ual_kernels/_arguments.py", "_SUM_TOLERANCE = 1e-3", "_SUM_TOLERANCE = 1e-4")
@backends
@pytest.mark.parametrize("total", [0.9995, 1.0005])
@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
def test_a_sum_that_is_off_by_a_rounding_is_computed_as_written(
    flags: str, total: float, backend: str, device: torch.device
) -> None:
    """Nothing is renormalized, and the divisor of "mean" contains the sum."""
    leaves, target = sparse_logits(6, 101, 4, torch.float64, device)
    with torch.no_grad():
        leaves["probabilities"] *= total
    judge(leaves, target, options(flags, 101, device), backend=backend)
    leaves, target = sparse_hidden(6, 31, 8, 4, torch.float64, device)
    with torch.no_grad():
        leaves["probabilities"] *= total
    if backend != "triton":
        judge(leaves, target, options(flags, 31, device), backend=backend)


@backends
@pytest.mark.parametrize("total", [0.9995, 1.0005])
def test_one_class_of_almost_probability_one(total: float, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(6, 101, 1, torch.float64, device)
    with torch.no_grad():
        leaves["probabilities"] *= total
    judge(leaves, target, options("all", 101, device), backend=backend)


def test_normalized_divides_by_the_sum(device: torch.device) -> None:
    p = torch.tensor([[2.0, 6.0], [0.0, 0.0]], device=device, dtype=torch.bfloat16, requires_grad=True)
    target = SparseTarget(torch.zeros(2, 2, dtype=torch.long, device=device), p)
    made = target.normalized()
    assert made.indices is target.indices
    assert made.probabilities.dtype == torch.float32
    assert made.probabilities.tolist() == [[0.25, 0.75], [0.0, 0.0]]
    (gradient,) = torch.autograd.grad(made.probabilities[0, 0], p)
    assert gradient.float().isfinite().all()
    assert cross_entropy(torch.zeros(2, 3, device=device), made, reduction="none").isnan().tolist() == [
        False,
        True,
    ]


@pytest.mark.kills("ual_kernels/reference.py", "torch.where(impossible, 0.0, values)", "values")
@pytest.mark.kills(
    "ual_kernels/_tokens.py",
    "torch.where(weights[:, 1:] == 0, 0.0, weights[:, 1:] * below)",
    "(weights[:, 1:] * below)",
)
@backends
def test_masked_classes(backend: str, device: torch.device) -> None:
    """A class of probability 0 may have a logit of -inf, as padding has if class 0 is masked."""
    leaves, target = sparse_logits(5, 40, 4, torch.float64, device)
    target.copy_(torch.randint(3, 40, target.shape, device=device))
    with torch.no_grad():
        p = leaves["probabilities"].clone()
        p[:, 2:] = 0
        p[:, :2] = torch.tensor([0.75, 0.25])
        leaves["probabilities"].copy_(p)
        target[:, 2:] = 0
        leaves["label_smoothing"].zero_()
        leaves["input"][:, :3] = -torch.inf
    for leaf in ("label_smoothing", "probabilities"):
        leaves[leaf] = leaves[leaf].detach()  # these gradients are infinite
    few = leaves | {"input": leaves["input"].detach()[:, 3:].requires_grad_()}
    few["probabilities"] = leaves["probabilities"][:, :2]
    for reduction in ("none", "mean"):
        expected = measure(dense, few, target[:, :2] - 3, reduction=reduction)
        actual = measure(of_logits, leaves, target, reduction=reduction, backend=backend)
        assert not actual["input"][:, :3].any()
        actual["input"] = actual["input"][:, 3:]
        assert_close(actual, expected)
    found = of_logits(**leaves, target=target, return_statistics=True, backend=backend)[1]
    assert found.log_prob.isfinite().all()
    target[2, 1] = 1  # a masked class of positive probability
    loss = of_logits(**leaves, target=target, reduction="none", backend=backend)
    assert loss.isposinf().tolist() == [i == 2 for i in range(5)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_masked_classes_of_the_linear_loss(backend: str, device: torch.device) -> None:
    leaves, target = sparse_hidden(5, 40, 8, 4, torch.float64, device)
    with torch.no_grad():
        target.copy_(torch.randint(3, 40, target.shape, device=device))
        target[:, 2:] = 0
        leaves["probabilities"].copy_(torch.tensor([0.75, 0.25, 0, 0]))
        leaves["label_smoothing"].zero_()
        leaves["linear_bias"][:3] = -torch.inf
    leaves = frozen(leaves)
    for leaf in ("label_smoothing", "probabilities"):
        leaves[leaf] = leaves[leaf].detach()
    few = leaves | {name: leaves[name].detach()[3:] for name in ("linear_weight", "linear_bias")}
    few["probabilities"] = leaves["probabilities"][:, :2]
    expected = measure(dense_of_hidden, few, target[:, :2] - 3)
    assert_close(measure(of_hidden, leaves, target, backend=backend), expected)


# ---- shapes and dtypes ----


@backends
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
def test_values_per_leading_index_are_broadcast(
    shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    vocab = 9
    wide: dict[str, Any] = {"device": device, "dtype": torch.float64, "requires_grad": True}
    made = several(torch.randint(vocab, shape, device=device), 3, vocab, torch.float64)
    for known in range(len(shape) + 1):
        leaves = {
            "input": torch.randn(*shape, vocab, **wide),
            "label_smoothing": torch.rand(shape[:known], **wide),
            "sample_weight": torch.rand(shape[:known], **wide),
            "probabilities": made.probabilities.detach().requires_grad_(),
        }
        for reduction in ("mean", "none"):
            ours = measure(of_logits, leaves, made.indices, reduction=reduction, backend=backend)
            exact = measure(dense, leaves, made.indices, reduction=reduction)
            assert ours["loss"].shape == (shape if reduction == "none" else ())
            assert_close(ours, exact)
        found = of_logits(**leaves, target=made.indices, return_statistics=True, backend=backend)[1]
        assert all(field.shape == shape for field in found)


@backends
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
def test_int32_classes(loss: Callable[..., Any], backend: str, device: torch.device) -> None:
    make = sparse_logits if loss is of_logits else lambda n, v, k, *rest: sparse_hidden(n, v, 16, k, *rest)
    leaves, target = make(6, 33, 3, torch.float32, device)
    long, short = (measure(loss, leaves, given, backend=backend) for given in (target, target.int()))
    for name in long:
        assert torch.equal(long[name], short[name]), name


@backends
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
@pytest.mark.parametrize("dtype", names(DTYPES))
def test_probabilities_of_any_dtype(
    dtype: torch.dtype, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    """Dyadic probabilities are exact in every dtype; the gradient has the dtype of its leaf."""
    if loss is of_logits:
        leaves, target = sparse_logits(6, 33, 3, torch.float32, device)
    else:
        leaves, target = sparse_hidden(6, 33, 16, 3, torch.float32, device)
    p = torch.tensor([0.5, 0.375, 0.125], device=device).expand(6, 3)
    results = [
        measure(loss, leaves | {"probabilities": p.to(made).requires_grad_()}, target, backend=backend)
        for made in (torch.float32, dtype)
    ]
    assert results[1]["probabilities"].dtype == dtype
    results[0]["probabilities"] = results[0]["probabilities"].to(dtype)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@backends
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
def test_any_strides(loss: Callable[..., Any], backend: str, device: torch.device) -> None:
    """Classes and probabilities are views into larger tensors whose other elements are invalid."""

    def inside(packed: Tensor) -> Tensor:
        nowhere = torch.nan if packed.is_floating_point() else 10**9
        view = packed.new_full((*packed.shape[:-1], 2 * packed.shape[-1]), nowhere)[..., ::2]
        view.copy_(packed)
        return view

    if loss is of_logits:
        leaves, target = sparse_logits(6, 33, 3, torch.float32, device)
    else:
        leaves, target = sparse_hidden(6, 33, 16, 3, torch.float32, device)
    packed = measure(loss, leaves, target, backend=backend)
    leaves["probabilities"] = inside(leaves["probabilities"].detach()).requires_grad_()
    strided = measure(loss, leaves, inside(target), backend=backend)
    transposed = measure(
        loss, leaves | {"probabilities": leaves["probabilities"].detach().T.contiguous().T.requires_grad_()},
        target.T.contiguous().T, backend=backend,
    )  # fmt: skip
    for name in packed:
        assert torch.equal(packed[name], strided[name]), name
        assert torch.equal(packed[name], transposed[name]), name


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "((nll + nan_mask) + (z_y - z))",
    "(nll + nan_mask)",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "- ((1.0 - s) * p * c + s / V * c)",
    "- ((1.0 - s) * c + s / V * c)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "of_target = of_target * inputs.probabilities[chunk]", "pass"
)
@pytest.mark.kills("ual_kernels/_tokens.py", "nll[:, None] + (z_y - z))", "nll[:, None])")
@backends
@pytest.mark.parametrize("wanted", ["input", "label_smoothing", "sample_weight", "probabilities"])
def test_one_gradient_alone(wanted: str, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(5, 19, 4, torch.float64, device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    for reduction in ("none", "mean"):
        judge(leaves, target, {"reduction": reduction}, backend=backend)


@pytest.mark.kills("ual_kernels/_torch/linear_cross_entropy.py", "_zero_at(x, where, listed)", "pass")
@pytest.mark.parametrize(
    "wanted",
    ["input", "linear_weight", "linear_bias", "label_smoothing", "sample_weight", "probabilities"],
)
@pytest.mark.parametrize("flags", ["mean", "none", "softcap"])
def test_one_gradient_alone_of_the_linear_loss(flags: str, wanted: str, device: torch.device) -> None:
    leaves, target = sparse_hidden(9, 19, 8, 4, torch.float64, device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    judge(leaves, target, options(flags, 19, device))


# ---- options of the linear loss ----


@every_head
@pytest.mark.parametrize("flags", ["mean", "none", "all"])
@pytest.mark.parametrize(
    "how",
    [
        {"max_loss_tokens": 13},
        {"max_loss_tokens": 15},
        {"max_loss_tokens": 20},
        {"compact": False},
        {"compact": False, "chunk_tokens": 3},
        {"chunk_tokens": 1},
    ],
    ids=str,
)
def test_options_change_no_value(how: dict[str, Any], flags: str, head: Head, device: torch.device) -> None:
    leaves, target = sparse_hidden(20, 31, 8, 4, torch.float64, device)
    target[[0, 4, 5, 11, 18, 19], 0] = -100
    judge(head(leaves), target, options(flags, 31, device), **how)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upper_bound_that_is_too_small_gives_nan(reduction: str, device: torch.device) -> None:
    leaves, target = sparse_hidden(9, 31, 8, 3, torch.float64, device)
    measured = measure(of_hidden, frozen(leaves), target, reduction=reduction, max_loss_tokens=5)
    selected = target[:, 0] != -100
    assert measured["loss"].isnan().any()
    for name in ("input", "probabilities"):
        assert measured[name][selected].isnan().all(), name


@pytest.mark.parametrize("dtype", names(HALVES))
def test_fast_rounds_logits_and_nothing_else(dtype: torch.dtype, device: torch.device) -> None:
    """A logit changes by at most d = u max|z|, so the loss by at most 2 d of its weight."""
    leaves, target = sparse_hidden(64, 1_000, 64, 5, dtype, device)
    leaves = frozen(leaves)
    flags = {"reduction": "none"}
    exact = measure(dense_of_hidden, as_float64(leaves), target, **flags)
    fast = measure(of_hidden, leaves, target, **flags, precision="fast")
    wide = as_float64(leaves)
    z = torch.nn.functional.linear(wide["input"], wide["linear_weight"], wide["linear_bias"]).detach()
    u = torch.finfo(dtype).eps / 2
    bound = 4 * u * z.abs().amax(1) * wide["sample_weight"].detach()
    slack = 64 * torch.finfo(torch.float32).eps * exact["loss"].abs()
    assert ((fast["loss"].double() - exact["loss"]).abs() <= bound + slack).all()
    error = (fast["input"].double() - exact["input"]).norm() / exact["input"].norm()
    assert torch.finfo(dtype).eps / 12**0.5 < error < 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_gradient_filter_keeps_the_targets_of_skipped_tiles(
    reduction: str, head: Head, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of eight tiles hold 2e-3 of the probability. Their mass is spread, and their targets are exact.

    Spreading mass m of token i over a tile changes the gradient of its hidden state by at most
    m a_i max |C_v - mean C|. The loss and the gradients of arguments per token do not change.
    """
    monkeypatch.setattr(tiled, "tile_shape", lambda *_: tiled.TileShape(5, 8))
    leaves, target = sparse_hidden(12, 64, 8, 6, torch.float64, device)
    with torch.no_grad():
        leaves["linear_weight"].mul_(0.3)
        leaves["linear_bias"].zero_()
        leaves["linear_bias"][8:16], leaves["linear_bias"][40:48] = 9.0, 7.0
    leaves = head(leaves)
    flags = {"reduction": reduction}
    exact = measure(dense_of_hidden, leaves, target, **flags)
    filtered = measure(of_hidden, leaves, target, **flags, gradient_filter=1e-2)
    found = of_hidden(**leaves, target=target, **flags, gradient_filter=1e-2, return_statistics=True)[1]
    dropped = found.dropped_mass
    assert (dropped[target[:, 0] != -100] > 0).any()
    for name in ("loss", "label_smoothing", "sample_weight", "probabilities"):
        torch.testing.assert_close(filtered[name], exact[name], rtol=1e-11, atol=1e-12)
    scale = leaves["sample_weight"].detach()
    if reduction == "mean":
        scale = scale / (scale * (target[:, 0] != -100)).sum()
    rows = leaves["linear_weight"].detach()
    # the largest upstream gradient of `measure` is 2
    bound = 2 * dropped * scale * 2 * rows.norm(dim=1).max()
    error = (filtered["input"] - exact["input"]).norm(dim=1)
    assert (error <= bound.nan_to_num() + 1e-12).all()
    assert error.max() > 1e-9


# ---- functions of the statistics ----


def smoothing_fn(statistics: TokenStatistics) -> Tensor:
    return 0.6 * statistics.entropy / (1 + statistics.entropy) + 0.1 * statistics.top1_prob


def weight_fn(statistics: TokenStatistics) -> Tensor:
    return (
        statistics.log_prob.exp()
        + 0.2 * statistics.margin.tanh()
        + 0.1 * statistics.correct
        + 0.01 * (statistics.predicted % 3)
    )


TOKEN_FNS = {
    "smoothing": {"label_smoothing": smoothing_fn},
    "weight": {"sample_weight": weight_fn},
    "both": {"label_smoothing": smoothing_fn, "sample_weight": weight_fn},
}


def by_tensors(token_fn: str, final: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute the functions' values from statistics by definition. In the divisor a function counts as 1."""

    def loss(**arguments: Any) -> Tensor:
        target, selected = arguments["target"], loss_tokens(arguments["target"])
        z = final(**arguments)
        found = exact_statistics(
            z.detach(), target, {k: arguments.get(k) for k in ("softcap", "logit_scale")}
        )
        for name, function in TOKEN_FNS[token_fn].items():
            arguments[name] = function(found).where(selected, 0.0)
        if "sample_weight" in TOKEN_FNS[token_fn] and arguments.get("reduction", "mean") == "mean":
            hit = distribution(target, selected, z.shape[-1])
            weight = arguments.get("weight")
            counted = (hit if weight is None else hit * weight.double()).sum()
            arguments.setdefault("num_items", counted)
        of_product = "linear_weight" in arguments
        return (merged_definition if of_product else definition)(**arguments)

    return loss


def logits_of(
    input: Tensor,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if linear_weight is None:
        return input
    z = input @ linear_weight.T
    if lora_a is not None and lora_b is not None:
        z = z + 0.75 * input @ lora_a.T @ lora_b.T
    return z if linear_bias is None else z + linear_bias


@pytest.mark.parametrize("token_fn", TOKEN_FNS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
def test_a_function_of_the_statistics(
    loss: Callable[..., Any], flags: str, backend: str, token_fn: str, device: torch.device
) -> None:
    if loss is of_logits:
        leaves, target = sparse_logits(9, 31, 4, torch.float64, device)
    else:
        leaves, target = sparse_hidden(9, 31, 8, 4, torch.float64, device)
        leaves = with_adapter(leaves)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in TOKEN_FNS[token_fn]}
    chosen = options(flags, 31, device)
    expected = measure(of_several(by_tensors(token_fn, logits_of)), leaves, target, **chosen)
    actual = measure(loss, leaves, target, **chosen, **TOKEN_FNS[token_fn], backend=backend)
    assert_close(actual, expected, tolerance=1e-10)


@pytest.mark.parametrize("token_fn", TOKEN_FNS)
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
def test_a_function_of_the_statistics_in_triton(
    loss: Callable[..., Any], token_fn: str, device: torch.device
) -> None:
    """The error of the function itself is included: its argument is statistics in float32."""
    if loss is of_logits:
        leaves, target = sparse_logits(9, 131, 4, torch.float32, device)
    else:
        leaves, target = sparse_hidden(9, 131, 24, 4, torch.float32, device)
        leaves = frozen(leaves)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in TOKEN_FNS[token_fn]}
    exact = measure(of_several(by_tensors(token_fn, logits_of)), as_float64(leaves), target)
    actual = measure(loss, leaves, target, **TOKEN_FNS[token_fn], backend="triton")
    for name in exact:
        off = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        assert off <= 64 * torch.finfo(torch.float32).eps, name


# ---- statistics ----


def exact_statistics(
    logits: Tensor, target: Tensor | SparseTarget, flags: dict[str, Any] | None = None
) -> TokenStatistics:
    """The statistics by definition, in the dtype of the logits; ties are broken by the smallest class."""
    flags = flags or {}
    z = logits * (flags.get("logit_scale") or 1.0)
    if (cap := flags.get("softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    selected, vocab = loss_tokens(target), z.shape[-1]
    q = z.new_zeros(*selected.shape, vocab)
    q[selected] = distribution(target, selected, vocab, z.dtype).detach()
    log_p = torch.log_softmax(z, -1)
    largest = z.amax(-1, keepdim=True)
    top = q.argmax(-1)
    correct = z.gather(-1, top[..., None]).squeeze(-1) >= largest.squeeze(-1)
    two = z.topk(2, -1).values if vocab > 1 else torch.cat([largest, largest - torch.inf], -1)
    nothing = torch.where(selected, 0.0, torch.nan)
    return TokenStatistics(
        lse=torch.logsumexp(z, -1) + nothing,
        log_prob=torch.where(q == 0, 0.0, q * log_p).sum(-1) + nothing,
        entropy=torch.special.entr(log_p.exp()).sum(-1) + nothing,
        top1_prob=log_p.amax(-1).exp() + nothing,
        margin=two[..., 0] - two[..., 1] + nothing,
        mean_logit=z.mean(-1) + nothing,
        correct=correct & selected,
        predicted=torch.where(correct, top, z.argmax(-1)).masked_fill(~selected, -1),
        dropped_mass=nothing.to(z.dtype),
    )


def compare_statistics(found: TokenStatistics, exact: TokenStatistics, eps: float) -> None:
    for name, ours, truth in zip(found._fields, found, exact, strict=True):
        assert not ours.requires_grad
        assert ours.shape == truth.shape
        if truth.is_floating_point():
            torch.testing.assert_close(
                ours.double(), truth.double(), rtol=64 * eps, atol=64 * eps, equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip
        else:
            assert ours.dtype == truth.dtype, name
            assert torch.equal(ours, truth), name


@pytest.mark.kills(
    "ual_kernels/_arguments.py",
    "top, place = p.argmax(1, keepdim=True),",
    "top, place = p.argmin(1, keepdim=True),",
)
@pytest.mark.kills("ual_kernels/_tokens.py", "+ self._excess(self.probability))", "+ self.excess)")
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "plain_excess = tl.sum(p * below, axis=0)",
    "plain_excess = excess",
)
@backends
@counts
@pytest.mark.parametrize("dtype", names(DTYPES))
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_statistics(flags: str, dtype: torch.dtype, count: int, backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(11, 1_500, count, dtype, device, scale=3.0)
    # for some tokens the likeliest class has the largest logit, and for one token it is a sum of copies
    best = leaves["input"].argmax(-1)
    target[2], target[7, -1] = best[2], best[7]
    if count > 2:
        target[8] = torch.arange(10, 10 + count, device=device)
        target[8, 1] = target[8, 2] = best[8]
        with torch.no_grad():
            p = torch.full((count,), 0.0, device=device)
            p[:3] = torch.tensor([0.4, 0.3, 0.3])
            leaves["probabilities"][8] = p
    chosen = options(flags, 1_500, device)
    found = of_logits(**leaves, target=target, **chosen, return_statistics=True, backend=backend)[1]
    sparse = SparseTarget(target, leaves["probabilities"])
    exact = exact_statistics(leaves["input"].detach().double(), sparse, chosen)
    if count > 2:
        assert exact.correct[8]
    compare_statistics(found, exact, torch.finfo(found.lse.dtype).eps)


@counts
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.bfloat16),
     ("reference", torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_statistics_of_the_linear_loss(
    flags: str, backend: str, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    leaves, target = sparse_hidden(11, 131, 16, count, dtype, device)
    chosen = options(flags, 131, device)
    logits = logits_of(**as_float64(leaves)).detach()
    target[5] = logits[5].argmax()
    exact = exact_statistics(logits, SparseTarget(target, leaves["probabilities"]), chosen)
    for how in ({}, {"chunk_tokens": 3}) if backend == "torch" else ({},):
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                found = of_hidden(
                    **leaves, target=target, **chosen, **how, return_statistics=True, backend=backend
                )[1]
            # sums are relative to the reference point; differences reach 40
            compare_statistics(found, exact, 40 * torch.finfo(found.lse.dtype).eps)


@backends
@pytest.mark.parametrize("twin", [7, 4_098])
def test_a_tie_of_logits_is_the_targets_class(twin: int, backend: str, device: torch.device) -> None:
    """In one block or in two. If the target has none of the largest logits, either class is predicted."""
    logits = torch.randn(1, 4_100, device=device)
    logits[0, [3, twin]] = 9.0
    for label in (3, twin, 11):
        p = torch.tensor([[0.3, 0.7]], device=device)
        for target in (
            torch.tensor([label], device=device),
            SparseTarget(torch.tensor([[12, label]], device=device), p),
        ):
            found = cross_entropy(logits, target, return_statistics=True, backend=backend)[1]
            assert found.margin.item() == 0
            assert found.correct.item() == (label != 11)
            assert found.predicted.item() in ([3, twin] if label == 11 else [label])


@backends
def test_a_tie_of_probabilities_is_the_smallest_class(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0]], device=device).repeat(2, 1)
    target = SparseTarget(
        torch.tensor([[3, 1], [2, 0]], device=device), torch.full((2, 2), 0.5, device=device)
    )
    found = cross_entropy(logits, target, return_statistics=True, backend=backend)[1]
    assert found.predicted[0].item() == 1
    assert found.correct.tolist() == [True, False]
    assert found.predicted[1].item() in (1, 3)


@backends
def test_statistics_of_one_class(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[2.0], [3.0], [4.0]], device=device)
    indices = torch.tensor([[0, 0], [-100, 0], [0, 0]], device=device)
    target = SparseTarget(indices, torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]], device=device))
    _, found = cross_entropy(logits, target, return_statistics=True, backend=backend)
    assert [field[0].item() for field in found] == [2.0, 0.0, 0.0, 1.0, torch.inf, 2.0, True, 0, 0.0]
    assert found.predicted.tolist() == [0, -1, 0]


@backends
def test_statistics_do_not_change_the_loss(backend: str, device: torch.device) -> None:
    leaves, target = sparse_logits(6, 101, 4, torch.float32, device)
    plain = of_logits(**leaves, target=target, backend=backend)
    assert torch.equal(plain, of_logits(**leaves, target=target, return_statistics=True, backend=backend)[0])


# ---- errors ----


def sparse(indices: Any = None, probabilities: Any = None) -> SparseTarget:
    return SparseTarget(
        torch.zeros(4, 2, dtype=torch.long) if indices is None else indices,
        torch.full((4, 2), 0.5) if probabilities is None else probabilities,
    )


@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (sparse(probabilities=torch.ones(4, 3)), r"probabilities must be \[4, 2\].*got \[4, 3\]"),
        (sparse(probabilities=torch.ones(4)), r"probabilities must be \[4, 2\].*got \[4\]"),
        (
            sparse(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0)),
            r"indices must be \[4, 'K'\].*K >= 1, got \[4, 0\]",
        ),
        (sparse(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)), r"indices must be .*got \[3, 2\]"),
        (sparse(torch.zeros(4, dtype=torch.long), torch.zeros(4)), r"indices must be .*got \[4\]"),
        (sparse(torch.zeros((), dtype=torch.long), torch.zeros(())), r"indices must be .*got \[\]"),
        (sparse(torch.zeros(4, 2)), "indices must be int32 or int64, got torch.float32"),
        (sparse(torch.zeros(4, 2, dtype=torch.uint8)), "indices must be int32 or int64, got torch.uint8"),
        (
            sparse(probabilities=torch.zeros(4, 2, dtype=torch.long)),
            "probabilities must be bfloat16, float16, float32 or float64, got torch.int64",
        ),
        (
            sparse(torch.zeros(4, 2, dtype=torch.long, device="meta")),
            "indices must be on cpu, got meta",
        ),
        (sparse(probabilities=torch.zeros(4, 2, device="meta")), "probabilities must be on cpu, got meta"),
    ],
)
def test_errors_name_the_field(loss: Callable[..., Any], target: SparseTarget, message: str) -> None:
    given = [torch.zeros(4, 5)] + [torch.zeros(6, 5)] * (loss is linear_cross_entropy)
    with pytest.raises(ValueError, match=message):
        loss(*given, target)


def test_a_dense_target_of_the_linear_loss_names_sparse_target() -> None:
    with pytest.raises(ValueError, match="SparseTarget"):
        ual_kernels.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, 5))

"""Probabilities of all classes as the target of given logits, against PyTorch and a definition in float64."""

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
    OPTIONS,
    as_float64,
    assert_as_accurate_as_eager,
    cross_entropy,
    definition,
    logits_case,
    measure,
    names,
    options,
)
from tests.kernels.test_sparse_targets import compare_statistics, exact_statistics
from ual_kernels import SparseTarget, TokenStatistics

Leaves = dict[str, Tensor]

fused = pytest.mark.parametrize("backend", ["torch", "triton"])
backends = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])


def of_dense(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Call a loss with the leaf `probabilities` as its target."""
    return lambda *, target, probabilities, **rest: loss(target=probabilities, **rest)


ours, exact_loss = of_dense(cross_entropy), of_dense(definition)


def dense_case(
    tokens: int, vocab: int, dtype: torch.dtype, device: torch.device, scale: float = 2.0
) -> tuple[Leaves, Tensor]:
    """Probabilities with zeros; the second token is uniform and the third has one class."""
    leaves, target = logits_case(tokens, vocab, dtype, device, scale)
    raw = torch.randn(tokens, vocab, device=device, dtype=torch.float64) * 2
    raw = raw.masked_fill(torch.rand_like(raw) < 0.3, -torch.inf)
    raw[:, 0] = 0.0
    raw[1:2] = 0.0
    raw[2:3, 1:] = -torch.inf
    p = raw.softmax(-1).to(leaves["label_smoothing"].dtype)
    return leaves | {"probabilities": p.requires_grad_()}, target


def judge(leaves: Leaves, target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    assert_as_accurate_as_eager(
        actual=measure(ours, leaves, target, **flags, **how),
        eager=measure(exact_loss, leaves, target, **flags, dtype=leaves["label_smoothing"].dtype),
        exact=measure(exact_loss, as_float64(leaves), target, **flags),
        terms=leaves["input"].shape[-1],
    )


# ---- PyTorch's own loss ----


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    tokens, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    wide = {
        "generator": torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1))),
        "dtype": torch.float64,
    }
    logits = torch.randn(tokens, vocab, **wide) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    q = torch.rand(tokens, vocab, **wide) * (torch.rand(tokens, vocab, **wide) < 0.7) + 1e-3
    # as in PyTorch, a sum need not be 1
    q = q / q.sum(1, keepdim=True) if draw(st.booleans()) else q * 3
    return logits.requires_grad_(), q.requires_grad_()


@pytest.mark.kills("ual_kernels/_arguments.py", "if not (dense or plain):  #", "if not plain:  #")
@backends
@settings(max_examples=30)
@given(problems(), st.floats(0, 1), st.sampled_from(["none", "sum", "mean"]), st.booleans())
def test_equals_pytorch(
    backend: str, problem: tuple[Tensor, Tensor], uniform: float, reduction: str, weighted: bool
) -> None:
    """Loss and gradients of logits and probabilities, with class weights and smoothing."""
    logits, q = problem
    flags: dict[str, Any] = {
        "weight": torch.linspace(0.0, 2.0, logits.shape[1], dtype=torch.float64) if weighted else None,
        "label_smoothing": uniform,
        "reduction": reduction,
    }
    theirs = torch.nn.functional.cross_entropy(logits, q, **flags)
    mine = cross_entropy(logits, q, **flags, backend=backend)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.linspace(0.5, 2.0, mine.numel(), dtype=torch.float64).reshape(mine.shape)
    for a, b in zip(
        *(torch.autograd.grad(loss, (logits, q), upstream) for loss in (mine, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@backends
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_pytorch_for_sequences(reduction: str, backend: str, device: torch.device) -> None:
    """PyTorch has the classes in the second dimension, and ours in the last."""
    logits = torch.randn(2, 3, 7, device=device, dtype=torch.float64)
    q = torch.rand_like(logits).softmax(-1)
    flags: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.2}
    theirs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), q.transpose(1, 2), **flags)
    torch.testing.assert_close(cross_entropy(logits, q, **flags, backend=backend), theirs)


# ---- the definition ----


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "spread += (1.0 - s) * tl.load(probability_ptr",
    "spread += tl.load(probability_ptr",
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in ("torch", "triton") for dtype in DTYPES]
    + [("reference", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag(flags: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    leaves, target = dense_case(6, 101, dtype, device)
    judge(leaves, target, options(flags, 101, device), backend=backend)


@fused
@pytest.mark.parametrize("dtype", names([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("vocab", [1, 2, 257, 4_096, 4_097])
def test_any_width(vocab: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(4, vocab, dtype, device)
    if vocab == 1:  # p - q cancels to a rounding of 1
        leaves = as_float64(leaves)
        actual = measure(ours, leaves, target, reduction="none", z_loss=1e-2, backend=backend)
        exact = measure(exact_loss, leaves, target, reduction="none", z_loss=1e-2)
        for name in exact:
            torch.testing.assert_close(actual[name], exact[name], rtol=0, atol=1e-14)
        return
    judge(leaves, target, {"reduction": "none", "z_loss": 1e-2}, backend=backend)


@fused
@pytest.mark.parametrize("dtype", names([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
def test_the_gradient_in_place(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(6, 101, dtype, device)

    def loss(input: Tensor, **rest: Any) -> Tensor:
        logits = input * 1.0
        value = ours(input=logits, inplace_backward=True, backend=backend, **rest)
        assert not torch.equal(logits.detach(), input.detach()), "the logits are not overwritten"
        return value  # type: ignore[no-any-return]

    chosen = options(flags, 101, device)
    assert_as_accurate_as_eager(
        actual=measure(loss, leaves, target, **chosen),
        eager=measure(exact_loss, leaves, target, **chosen, dtype=leaves["label_smoothing"].dtype),
        exact=measure(exact_loss, as_float64(leaves), target, **chosen),
        terms=101,
    )


@fused
def test_several_chunks_of_tokens(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ual_kernels._torch.cross_entropy._CHUNK_ELEMENTS", {device.type: 3 * 17})
    leaves, target = dense_case(11, 17, torch.float32, device)
    judge(leaves, target, options("all", 17, device), backend=backend)


@backends
@pytest.mark.parametrize("wanted", ["input", "label_smoothing", "sample_weight", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_gradient_alone(reduction: str, wanted: str, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(5, 19, torch.float64, device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    judge(leaves, target, {"reduction": reduction}, backend=backend)


@backends
def test_equals_the_sparse_target_of_all_classes(backend: str, device: torch.device) -> None:
    """If the sums are 1, also with the mean, without class weights."""
    leaves, _ = dense_case(6, 19, torch.float64, device)
    q = leaves.pop("probabilities").detach()
    for reduction in ("none", "sum", "mean"):
        both = [
            measure(cross_entropy, leaves, target, reduction=reduction, backend=backend)
            for target in (q, SparseTarget(torch.arange(19, device=device).repeat(6, 1), q))
        ]
        for name in both[0]:
            torch.testing.assert_close(both[1][name], both[0][name], rtol=1e-11, atol=1e-12)


@backends
def test_no_token_is_ignored(backend: str, device: torch.device) -> None:
    leaves, target = dense_case(5, 19, torch.float64, device)
    ignored = measure(ours, leaves, target, ignore_index=-1, backend=backend)
    plain = measure(ours, leaves, target, backend=backend)
    for name in plain:
        assert torch.equal(ignored[name], plain[name]), name
    assert plain["input"].any(-1).all()


@backends
@pytest.mark.parametrize("loss", ["smoothing", "weight"])
def test_invalid_values_make_one_token_nan(loss: str, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(4, 17, torch.float32, device)
    clean = measure(ours, leaves, target, reduction="none", backend=backend)
    with torch.no_grad():
        if loss == "smoothing":
            leaves["label_smoothing"][2] = 1.5
        else:
            leaves["sample_weight"][2] = -1.0
    dirty = measure(ours, leaves, target, reduction="none", backend=backend)
    assert dirty["loss"].isnan().tolist() == [False, False, True, False]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        assert torch.equal(dirty[name][[0, 1, 3]], clean[name][[0, 1, 3]]), name


@backends
def test_nan_probabilities_make_one_token_nan(backend: str, device: torch.device) -> None:
    leaves, target = dense_case(4, 17, torch.float32, device)
    clean = measure(ours, leaves, target, reduction="none", backend=backend)
    with torch.no_grad():
        leaves["probabilities"][2, 5] = torch.nan
    dirty = measure(ours, leaves, target, reduction="none", backend=backend)
    assert dirty["loss"].isnan().tolist() == [False, False, True, False]
    for name in clean:
        assert torch.equal(dirty[name][[0, 1, 3]], clean[name][[0, 1, 3]]), name


@backends
def test_masked_classes(backend: str, device: torch.device) -> None:
    """A class of probability 0 may have a logit of -inf, here a complete block of them."""
    logits = torch.randn(3, 4_100, device=device, dtype=torch.float64)
    q = torch.rand(3, 4_100, device=device, dtype=torch.float64)
    logits[:, :4_096], q[:, :4_096] = -torch.inf, 0.0
    q /= q.sum(1, keepdim=True)
    short = logits[:, 4_096:].clone().requires_grad_()
    logits.requires_grad_()
    mine = cross_entropy(logits, q, backend=backend)
    few = torch.nn.functional.cross_entropy(short, q[:, 4_096:])
    torch.testing.assert_close(mine, few)
    (gradient,), (expected,) = (torch.autograd.grad(a, b) for a, b in ((mine, logits), (few, short)))
    assert not gradient[:, :4_096].any()
    torch.testing.assert_close(gradient[:, 4_096:], expected)


# ---- shapes and dtypes ----


@backends
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_values_per_leading_index_are_broadcast(
    shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    wide: dict[str, Any] = {"device": device, "dtype": torch.float64, "requires_grad": True}
    q = torch.rand(*shape, 9, device=device, dtype=torch.float64).softmax(-1).requires_grad_()
    for known in range(len(shape) + 1):
        leaves = {
            "input": torch.randn(*shape, 9, **wide),
            "label_smoothing": torch.rand(shape[:known], **wide),
            "sample_weight": torch.rand(shape[:known], **wide),
            "probabilities": q,
        }
        for reduction in ("mean", "none"):
            mine = measure(ours, leaves, q, reduction=reduction, backend=backend)
            exact = measure(exact_loss, leaves, q, reduction=reduction)
            assert mine["loss"].shape == (shape if reduction == "none" else ())
            for name in exact:
                torch.testing.assert_close(mine[name], exact[name], rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("dtype", names(DTYPES))
def test_probabilities_of_any_dtype(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Dyadic probabilities are exact in every dtype; the gradient has the dtype of its leaf."""
    leaves, target = dense_case(6, 4, torch.float32, device)
    q = torch.tensor([0.5, 0.25, 0.125, 0.125], device=device).repeat(6, 1)
    first, second = (
        measure(ours, leaves | {"probabilities": q.to(made).requires_grad_()}, target, backend=backend)
        for made in (torch.float32, dtype)
    )
    assert second["probabilities"].dtype == dtype
    first["probabilities"] = first["probabilities"].to(dtype)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@backends
def test_any_strides(backend: str, device: torch.device) -> None:
    leaves, target = dense_case(6, 33, torch.float32, device)
    packed = measure(ours, leaves, target, backend=backend)
    spread = torch.full((6, 66), torch.nan, device=device)[:, ::2]
    spread.copy_(leaves["probabilities"].detach())
    strided = measure(ours, leaves | {"probabilities": spread.requires_grad_()}, target, backend=backend)
    for name in packed:
        assert torch.equal(packed[name], strided[name]), name


@backends
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_empty_batch(reduction: str, backend: str, device: torch.device) -> None:
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    q = torch.zeros(0, 5, device=device, requires_grad=True)
    loss = cross_entropy(logits, q, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert logits.grad.shape == (0, 5)


# ---- autograd, compilers ----


@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("torch", "mean"),
        ("torch", "none"),
        ("torch", "classes"),
        ("torch", "all"),
        pytest.param("triton", "all", marks=pytest.mark.slow),
    ],
)
def test_gradcheck(flags: str, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(3, 4, torch.float64, device)
    chosen = options(flags, 4, device)
    assert torch.autograd.gradcheck(
        lambda *values: ours(
            **dict(zip(leaves, values, strict=True)), target=target, **chosen, backend=backend
        ),
        tuple(leaves.values()),
    )


@fused
@pytest.mark.parametrize("flags", ["items-tensor", "all"])
@pytest.mark.slow
def test_compiles_without_a_graph_break(flags: str, backend: str, device: torch.device) -> None:
    torch.compiler.reset()

    def loss(**arguments: Any) -> Any:
        return ours(**arguments, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    chosen = options(flags, 29, device)
    for tokens in (3, 6):
        leaves, target = dense_case(tokens, 29, torch.float32, device)
        plain, traced = (measure(f, leaves, target, **chosen) for f in (loss, compiled))
        for name in plain:
            assert torch.equal(plain[name], traced[name]), name


@fused
@pytest.mark.parametrize("by", ["input", "probabilities"])
def test_a_second_derivative_is_refused(by: str, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(4, 17, torch.float32, device)
    value = ours(**leaves, target=target, backend=backend)
    (gradient,) = torch.autograd.grad(value, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_transforms_match_pytorch(device: torch.device) -> None:
    leaves, _ = dense_case(4, 9, torch.float64, device)
    logits, q = leaves["input"].detach(), leaves["probabilities"].detach()
    for loss in (
        lambda f: torch.func.grad(f, (0, 1))(logits, q),
        lambda f: torch.vmap(f)(torch.stack([logits, 2 * logits]), torch.stack([q, q.flip(1)])),
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)))(torch.stack([logits] * 2), torch.stack([q] * 2)),
    ):
        torch.testing.assert_close(
            loss(lambda z, p: cross_entropy(z, p, label_smoothing=0.1)),
            loss(lambda z, p: torch.nn.functional.cross_entropy(z, p, label_smoothing=0.1)),
        )


# ---- statistics ----


@backends
@pytest.mark.parametrize("dtype", names(DTYPES))
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_statistics(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = dense_case(7, 1_500, dtype, device, scale=3.0)
    with torch.no_grad():
        leaves["probabilities"][3] = 0.0
        leaves["probabilities"][3, leaves["input"][3].argmax()] = 1.0
    chosen = options(flags, 1_500, device)
    found = ours(**leaves, target=target, **chosen, return_statistics=True, backend=backend)[1]
    exact = exact_statistics(leaves["input"].detach().double(), leaves["probabilities"].detach(), chosen)
    assert exact.correct[3]
    compare_statistics(found, exact, 4 * torch.finfo(found.lse.dtype).eps)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_functions_of_the_statistics(backend: str, device: torch.device) -> None:
    def smoothing(statistics: TokenStatistics) -> Tensor:
        return statistics.entropy / (1 + statistics.entropy)

    leaves, target = dense_case(6, 31, torch.float64, device)
    del leaves["label_smoothing"]
    exact = exact_statistics(leaves["input"].detach(), leaves["probabilities"].detach())
    expected = measure(exact_loss, leaves, target, label_smoothing=smoothing(exact))
    actual = measure(ours, leaves, target, label_smoothing=smoothing, backend=backend)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-11)


# ---- errors ----


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(4), r"target must .*\[4\].*\[4, 5\].*got torch.float32 \[4\]"),
        (torch.zeros(4, 6), r"target must .*\[4, 5\].*got torch.float32 \[4, 6\]"),
        (torch.zeros(3, 5), r"target must .*\[4, 5\].*got torch.float32 \[3, 5\]"),
        (torch.zeros(4, 5, 1), r"target must .*got torch.float32 \[4, 5, 1\]"),
        (torch.zeros(4, 5, device="meta"), "target must be on cpu, got meta"),
        (torch.zeros(4, 5, dtype=torch.float8_e5m2), "target must be bfloat16, float16, float32 or float64"),
        (torch.zeros(4, 5, dtype=torch.long), r"target must have shape \[4\]"),
        (torch.zeros(4, 5, dtype=torch.bool), "target must be int32 or int64"),
    ],
)
def test_errors_name_the_target(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ual_kernels.cross_entropy(torch.zeros(4, 5), target)


@pytest.mark.parametrize("target", [torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, 3)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_linear_loss_names_sparse_target(target: Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match=r"target must be class indices or a SparseTarget.*use SparseTarget"):
        ual_kernels.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), target, backend=backend)

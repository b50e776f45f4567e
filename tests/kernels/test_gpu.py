"""Tests that need a GPU: synchronization, determinism, 64-bit offsets, CUDA graphs, far tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.launches import watching
from tests.kernels.cases import (
    cross_entropy,
    definition,
    linear_case,
    linear_cross_entropy,
    linear_definition,
)
from ual_kernels._triton import linear_cross_entropy as kernels

pytestmark = pytest.mark.gpu

variants = pytest.mark.parametrize("variant", ["tma", "pointer", "cublas", "exact"], indirect=True)


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "VARIANT", request.param)
    return str(request.param)


@pytest.fixture
def as_in_training() -> None:
    """Disable the NaN-filled memory and the deterministic operations of the other tests."""
    torch.use_deterministic_algorithms(False)


def case(
    tokens: int, vocab: int, features: int, device: torch.device, *, trainable: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves of `linear_case` in bfloat16 without a bias; the second token is ignored."""
    leaves, target = linear_case(tokens, vocab, features, torch.bfloat16, device)
    del leaves["linear_bias"]
    wanted = {"input", "linear_weight"} if trainable else {"input"}
    return {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}, target


def step(leaves: dict[str, Tensor], target: Tensor, **flags: Any) -> list[Tensor]:
    loss = linear_cross_entropy(**leaves, target=target, backend="triton", **flags)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [leaf for leaf in leaves.values() if leaf.requires_grad]),
    ]


# ---- synchronization ----


@contextmanager
def synchronizing_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("as_in_training")
@variants
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "flags", [{"max_loss_tokens": 299}, {"max_loss_tokens": 300}, {"compact": False}], ids=str
)
def test_the_linear_loss_does_not_synchronize(
    flags: dict[str, Any], trainable: bool, variant: str, device: torch.device
) -> None:
    leaves, target = case(300, 1_000, 64, device, trainable=trainable)
    step(leaves, target, **flags)  # compiles
    with synchronizing_raises():
        step(leaves, target, **flags)


def test_a_synchronization_is_detected(device: torch.device) -> None:
    """Without `max_loss_tokens` the number of loss tokens is read from the device."""
    leaves, target = case(300, 1_000, 64, device)
    step(leaves, target)
    with synchronizing_raises(), pytest.raises(RuntimeError, match="synchroniz"):
        step(leaves, target)


@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_of_logits_does_not_synchronize(inplace: bool, device: torch.device) -> None:
    leaf = torch.randn(300, 1_000, device=device, dtype=torch.bfloat16, requires_grad=True)
    target, smoothing = torch.randint(1_000, (300,), device=device), torch.rand(300, device=device)
    for context in (nullcontext(), synchronizing_raises()):
        with context:
            loss = cross_entropy(leaf * 1, target, label_smoothing=smoothing, inplace_backward=inplace)
            loss.backward()


# ---- determinism ----


@variants
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.usefixtures("as_in_training")
def test_a_hundred_runs_give_the_same_bits(trainable: bool, variant: str, device: torch.device) -> None:
    leaves, target = case(1_000, 5_003, 256, device, trainable=trainable)
    target[::3] = 7  # many tokens add to one row of the head
    first = step(leaves, target)
    for _ in range(99):
        for one, other in zip(first, step(leaves, target), strict=True):
            assert torch.equal(one, other)


# ---- beyond 2^31 ----


BIG = 16_500, 131_072  # tokens and classes; their product exceeds int32 by 15 million


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of a GPU's memory, {free / 2**30:.0f} are free")


@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("inplace", [False, True])
def test_more_logits_than_an_int32_counts(inplace: bool, device: torch.device) -> None:
    needs_memory(24)
    tokens, vocab = BIG
    leaf = torch.zeros(tokens, 1, device=device, requires_grad=True)
    logits = torch.empty(tokens, vocab, device=device, dtype=torch.bfloat16).normal_(std=3)
    last = logits[-8:].clone().double().requires_grad_()
    target, smoothing = torch.randint(vocab, (tokens,), device=device), torch.rand(tokens, device=device)
    loss = cross_entropy(
        (logits + leaf.bfloat16()).requires_grad_(), target, label_smoothing=smoothing, reduction="none",
        inplace_backward=inplace,
    )  # fmt: skip
    exact = definition(last, target[-8:], label_smoothing=smoothing[-8:], reduction="none")
    torch.testing.assert_close(loss[-8:].double(), exact, rtol=1e-5, atol=1e-5)
    # the gradient of a token sums to 0 up to rounding; it is NaN or large if an offset overflowed
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.abs().max() < 0.1


@pytest.mark.usefixtures("as_in_training")
@variants
def test_a_chunk_of_more_logits_than_an_int32_counts(variant: str, device: torch.device) -> None:
    needs_memory(32)
    tokens, vocab = BIG
    leaves, target = case(tokens, vocab, 64, device)
    loss = linear_cross_entropy(
        **leaves, target=target, reduction="none", chunk_tokens=tokens, backend="triton"
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaves["input"])
    tail = {
        name: leaf.detach() if name == "linear_weight" else leaf.detach()[-8:]
        for name, leaf in leaves.items()
    }
    tail = {name: leaf.double().requires_grad_(name == "input") for name, leaf in tail.items()}
    exact = linear_definition(**tail, target=target[-8:], reduction="none")
    (truth,) = torch.autograd.grad(exact.sum(), tail["input"])
    torch.testing.assert_close(loss[-8:].double(), exact, rtol=1e-5, atol=1e-5)
    assert (gradient[-8:].double() - truth).norm() <= 5e-3 * truth.norm()


# ---- graphs ----


@pytest.mark.usefixtures("as_in_training")
@variants
def test_a_cuda_graph_replays_on_new_inputs(variant: str, device: torch.device) -> None:
    """Forward and backward are captured once; each replay ignores other tokens."""
    leaves, target = case(300, 1_000, 64, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(leaves, target, compact=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, target, compact=False)
    for round in range(3):
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.copy_(torch.rand_like(leaf) if leaf.ndim == 1 else torch.randn_like(leaf))
            target.copy_(torch.randint(1_000, (300,), device=device))
            target[round * 50 : 100] = -100
        graph.replay()
        for replayed, eager in zip(captured, step(leaves, target, compact=False), strict=True):
            torch.testing.assert_close(replayed, eager)


@pytest.mark.usefixtures("as_in_training")
@variants
def test_a_captured_backward_gives_the_same_gradient_in_every_replay(
    variant: str, device: torch.device
) -> None:
    """Backward alone in a graph, as `make_graphed_callables` captures it; outside, it would overwrite."""
    leaves, target = case(300, 1_000, 64, device)
    upstream = torch.full((), 0.25, device=device)
    for _ in range(3):
        step(leaves, target, compact=False)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        loss = linear_cross_entropy(**leaves, target=target, backend="triton", compact=False)
    with torch.cuda.graph(backward, pool=forward.pool()):
        (gradient,) = torch.autograd.grad(loss, leaves["input"], upstream)
    forward.replay()
    backward.replay()
    first = gradient.clone()
    backward.replay()
    assert torch.equal(gradient, first)


# ---- far tokens ----


@contextmanager
def counting_far_tokens() -> Iterator[list[int]]:
    """Record the number of far tokens of each launch of `_far_tokens_kernel`."""
    found: list[int] = []

    def look(arguments: dict[str, Any]) -> Any:
        total = arguments["table_ptr"][kernels._TOTAL.value]
        found.append(int((~(total < kernels._LARGEST_TOTAL.value)).sum()))
        return nullcontext()

    with ExitStack() as stack:
        stack.enter_context(watching(kernels, "_far_tokens_kernel", look))
        yield found


@pytest.mark.parametrize("variant", ["auto"], indirect=True)
def test_no_ordinary_token_is_far(variant: str, device: torch.device) -> None:
    """Logits with a standard deviation of 3; targets are drawn from them or at random."""
    leaves, target = case(500, 5_003, 64, device)
    with counting_far_tokens() as found:
        step(leaves, target)
        logits = leaves["input"].detach().float() @ leaves["linear_weight"].detach().float().T
        step(leaves, torch.distributions.Categorical(logits=logits).sample())
    assert found
    assert not any(found)


@pytest.mark.parametrize("variant", ["auto"], indirect=True)
def test_a_far_token_is_recomputed(variant: str, device: torch.device) -> None:
    """A target about 200 nats below the maximum."""
    leaves, target = case(500, 5_003, 64, device)
    with torch.no_grad():
        leaves["input"][4] = leaves["linear_weight"][9] * 200
        target[4] = leaves["linear_weight"].float().mv(leaves["linear_weight"][9].float()).argmin()
    with counting_far_tokens() as found:
        step(leaves, target)
    assert found == [1]

"""What only a GPU can show: nothing waits for it, its bits repeat, its offsets are wide, graphs replay."""

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
    """Without what the other tests ask of PyTorch: poison and its own deterministic operations."""
    torch.use_deterministic_algorithms(False)


def case(
    rows: int, vocab: int, features: int, device: torch.device, *, trainable: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves of `linear_case` in bfloat16 without a bias; the second row ignored."""
    leaves, target = linear_case(rows, vocab, features, torch.bfloat16, device)
    del leaves["linear_bias"]
    wanted = {"input", "linear_weight"} if trainable else {"input"}
    return {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}, target


def step(leaves: dict[str, Tensor], target: Tensor, **flags: Any) -> list[Tensor]:
    loss = linear_cross_entropy(**leaves, target=target, backend="triton", **flags)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [leaf for leaf in leaves.values() if leaf.requires_grad]),
    ]


# ---- nothing waits ----


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
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
def test_the_linear_loss_does_not_wait(
    flags: dict[str, Any], trainable: bool, variant: str, device: torch.device
) -> None:
    leaves, target = case(300, 1_000, 64, device, trainable=trainable)
    step(leaves, target, **flags)  # compiles
    with waiting_is_an_error():
        step(leaves, target, **flags)


def test_waiting_would_be_seen(device: torch.device) -> None:
    """The control: without `max_loss_tokens` the rows are counted."""
    leaves, target = case(300, 1_000, 64, device)
    step(leaves, target)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        step(leaves, target)


@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_of_logits_does_not_wait(inplace: bool, device: torch.device) -> None:
    leaf = torch.randn(300, 1_000, device=device, dtype=torch.bfloat16, requires_grad=True)
    target, smoothing = torch.randint(1_000, (300,), device=device), torch.rand(300, device=device)
    for context in (nullcontext(), waiting_is_an_error()):
        with context:
            loss = cross_entropy(leaf * 1, target, label_smoothing=smoothing, inplace_backward=inplace)
            loss.backward()


# ---- the same bits ----


@variants
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.usefixtures("as_in_training")
def test_a_hundred_runs_give_the_same_bits(trainable: bool, variant: str, device: torch.device) -> None:
    leaves, target = case(1_000, 5_003, 256, device, trainable=trainable)
    target[::3] = 7  # many rows add to one row of the head
    first = step(leaves, target)
    for _ in range(99):
        for one, other in zip(first, step(leaves, target), strict=True):
            assert torch.equal(one, other)


# ---- beyond 2^31 ----


BIG = 16_500, 131_072  # rows, columns: 15 million more than int32 can count


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of a GPU's memory, {free / 2**30:.0f} are free")


@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("inplace", [False, True])
def test_more_logits_than_an_int32_counts(inplace: bool, device: torch.device) -> None:
    needs_memory(24)
    rows, vocab = BIG
    leaf = torch.zeros(rows, 1, device=device, requires_grad=True)
    logits = torch.empty(rows, vocab, device=device, dtype=torch.bfloat16).normal_(std=3)
    last = logits[-8:].clone().double().requires_grad_()
    target, smoothing = torch.randint(vocab, (rows,), device=device), torch.rand(rows, device=device)
    loss = cross_entropy(
        (logits + leaf.bfloat16()).requires_grad_(), target, label_smoothing=smoothing, reduction="none",
        inplace_backward=inplace,
    )  # fmt: skip
    exact = definition(last, target[-8:], label_smoothing=smoothing[-8:], reduction="none")
    torch.testing.assert_close(loss[-8:].double(), exact, rtol=1e-5, atol=1e-5)
    # the sum over a row of its gradient: 0 but for rounding, and NaN or large where an offset wrapped
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.abs().max() < 0.1


@pytest.mark.usefixtures("as_in_training")
@variants
def test_a_chunk_of_more_numbers_than_an_int32_counts(variant: str, device: torch.device) -> None:
    needs_memory(32)
    rows, vocab = BIG
    leaves, target = case(rows, vocab, 64, device)
    loss = linear_cross_entropy(
        **leaves, target=target, reduction="none", chunk_tokens=rows, backend="triton"
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
def test_a_cuda_graph_replays_on_new_numbers(variant: str, device: torch.device) -> None:
    """Forward and backward, captured once; ignored rows may be others at every replay."""
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


# ---- tokens that the constant reference point does not serve ----


@contextmanager
def counting_far_tokens() -> Iterator[list[int]]:
    """How many tokens of each launch of `_far_tokens_kernel` it has to compute."""
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
    """Logits of a standard deviation of 3, and targets drawn from them or at random."""
    leaves, target = case(500, 5_003, 64, device)
    with counting_far_tokens() as found:
        step(leaves, target)
        logits = leaves["input"].detach().float() @ leaves["linear_weight"].detach().float().T
        step(leaves, torch.distributions.Categorical(logits=logits).sample())
    assert found
    assert not any(found)


@pytest.mark.parametrize("variant", ["auto"], indirect=True)
def test_a_far_token_is_computed_again(variant: str, device: torch.device) -> None:
    """The control: a target some 200 nats below the maximum."""
    leaves, target = case(500, 5_003, 64, device)
    with torch.no_grad():
        leaves["input"][4] = leaves["linear_weight"][9] * 200
        target[4] = leaves["linear_weight"].float().mv(leaves["linear_weight"][9].float()).argmin()
    with counting_far_tokens() as found:
        step(leaves, target)
    assert found == [1]

"""Schemas, fake implementations and autograd of the operators; torch.compile and checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import (
    cross_entropy,
    linear_case,
    linear_cross_entropy,
    logits_case,
    measure,
    options,
)
from ual_kernels import ops
from ual_kernels._operands import (
    ALL_TOKENS,
    LinearInputs,
    LinearSpec,
    LogitsInputs,
    LogitsOutputs,
    LogitsSpec,
)

LOSSES = [
    pytest.param(cross_entropy, "torch", id="logits-torch"),
    pytest.param(cross_entropy, "triton", id="logits-triton"),
    pytest.param(linear_cross_entropy, "torch", id="linear-torch"),
]
losses = pytest.mark.parametrize(("loss", "backend"), LOSSES)
every_loss = pytest.mark.parametrize(
    ("loss", "backend"), [*LOSSES, pytest.param(linear_cross_entropy, "triton", id="linear-triton")]
)


def case(
    loss: Callable[..., Any],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    vocab: int = 29,
) -> tuple[dict[str, Tensor], Tensor]:
    if loss is linear_cross_entropy:
        return linear_case(tokens, vocab, 8, dtype, device)
    return logits_case(tokens, vocab, dtype, device)


# ---- opcheck ----

# opcheck compares outputs for equality, so no output may be NaN: no token is ignored


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.slow(spare=8)
def test_opcheck_logits(
    backend: str, statistics: bool, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    leaves, target = logits_case(tokens, 13, dtype, device)
    logits, smoothing, scale = leaves.values()
    weight = torch.rand(13, device=device, dtype=scale.dtype)
    flags = (-100, 5.0, 1.5, 1e-3)
    target = target.clamp(min=0)
    inputs, spec = (
        LogitsInputs(logits, target, smoothing, weight),
        LogitsSpec(*flags, statistics, False, backend),
    )
    torch.library.opcheck(ops.cross_entropy_op, (*inputs, *spec))
    inputs = inputs._replace(logits=logits.detach(), smoothing=smoothing.detach())
    state = LogitsOutputs(*ops.cross_entropy_op(*inputs, *spec)).state
    torch.library.opcheck(ops.cross_entropy_backward_op, (scale.detach(), state, *inputs, *spec))
    inputs = inputs._replace(logits=logits.detach().clone(), class_weight=None)
    torch.library.opcheck(ops.cross_entropy_inplace_op, (*inputs, scale.detach(), *spec))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.slow(spare=8)
def test_opcheck_linear(
    biased: bool, per_token: bool, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    leaves, target = linear_case(tokens, 13, 4, dtype, device)
    inputs = LinearInputs(
        leaves["input"],
        leaves["linear_weight"],
        leaves["linear_bias"] if biased else None,
        *((torch.randn(2, 4, device=device), torch.randn(13, 2, device=device)) if biased else (None, None)),
        target.clamp(min=0),
        leaves["label_smoothing"],
        leaves["sample_weight"],
        None,
    )
    gradients = (not per_token, not per_token, *(biased and not per_token,) * 2, False, per_token)
    spec = LinearSpec(-100, 0.0, 1.0, 0.5, 1e-3, 0.0, True, *gradients, ALL_TOKENS, 2, "high", "torch")
    torch.library.opcheck(ops.linear_cross_entropy_op, (*inputs, *spec))


@pytest.mark.kills(
    "ual_kernels/ops.py",
    "scale_matrix(matrix.contiguous(), factor, out)",
    "scale_matrix(matrix, factor, out)",
)
@pytest.mark.kills("ual_kernels/_triton/linear_cross_entropy.py", "(row * factor).to(", "row.to(")
@pytest.mark.parametrize("factors", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_scale_matrix(dtype: torch.dtype, factors: int, device: torch.device) -> None:
    """The product is computed in float32 and rounded to the dtype, as in PyTorch."""
    matrix, factor = torch.randn(7, 5, device=device).T, torch.randn(factors, device=device)
    torch.library.opcheck(ops.scale_matrix_op, (matrix, factor, dtype))
    expected = (matrix.double() * factor.double()[:, None]).to(torch.float32).to(dtype)
    assert torch.equal(ops.scale_matrix_op(matrix, factor, dtype), expected)
    inplace = expected.float().contiguous()
    torch.library.opcheck(ops.scale_matrix_inplace_op, (inplace, factor))
    goal = (inplace.double() * factor.double()[:, None]).to(torch.float32)
    ops.scale_matrix_inplace_op(inplace, factor)
    assert torch.equal(inplace, goal)
    rounded = matrix.to(torch.bfloat16)
    expected = (rounded.float() * factor[:, None]).to(dtype)
    assert torch.equal(ops.scale_matrix_op(rounded, factor, dtype), expected)


# ---- gradcheck ----


@losses
@pytest.mark.parametrize("flags", ["mean", "none", "all"])
def test_gradcheck(flags: str, loss: Callable[..., Tensor], backend: str, device: torch.device) -> None:
    leaves, target = case(loss, 3, device, torch.float64, vocab=7)
    chosen = options(flags, 7, device)
    assert torch.autograd.gradcheck(
        lambda *values: loss(
            **dict(zip(leaves, values, strict=True)), target=target, **chosen, backend=backend
        ),
        tuple(leaves.values()),
    )


# ---- torch.compile and activation checkpointing ----


@every_loss
@pytest.mark.parametrize("flags", ["items-tensor", "all"])
@pytest.mark.slow
def test_compiles_without_a_graph_break(
    flags: str, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    chosen = options(flags, 29, device)
    for tokens in (3, 6):
        leaves, target = case(loss, tokens, device)
        plain, traced = (measure(f, leaves, target, **chosen, backend=backend) for f in (loss, compiled))
        for name in plain:
            assert torch.equal(plain[name], traced[name]), name
        with_statistics = {"return_statistics": True, "backend": backend}
        first, second = (f(**leaves, target=target, **chosen, **with_statistics)[1] for f in (loss, compiled))
        for field, a, b in zip(first._fields, first, second, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), field


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "how", [{"compact": False}, {"max_loss_tokens": 5}, {"vocab_size": 23}, {"precision": "fast"}]
)
@pytest.mark.slow(spare=4)
def test_options_of_the_head_compile(how: dict[str, Any], backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    lora = torch.randn(2, 8, device=device), torch.randn(29, 2, device=device)

    def loss(lora_a: Tensor, lora_b: Tensor, **rest: Any) -> Tensor:
        return linear_cross_entropy(linear_lora=(lora_a, lora_b, 0.5), **rest, **how, backend=backend)

    leaves, target = linear_case(5, 29, 8, torch.bfloat16, device)
    target.clamp_(max=22)
    leaves |= {"lora_a": lora[0].requires_grad_(), "lora_b": lora[1].requires_grad_()}
    plain, traced = (
        measure(f, leaves, target) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    )
    for name in plain:
        assert torch.equal(plain[name], traced[name]), name


@pytest.mark.kills(
    "ual_kernels/_arguments.py",
    "    missing = (1,) * (len(shape) - value.ndim)",
    "    value = value if value.ndim else value.new_tensor(value.item())\n"
    "    missing = (1,) * (len(shape) - value.ndim)",
)
@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["label_smoothing", "sample_weight"])
def test_a_schedule_in_a_scalar_tensor_compiles_once(
    name: str, learned: bool, loss: Callable[..., Tensor], device: torch.device
) -> None:
    """A float is a constant of the compiled graph, and each of its values compiles another graph."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    leaves, target = case(loss, 5, device)
    given = {key: leaf for key, leaf in leaves.items() if key not in ("label_smoothing", "sample_weight")}

    def step(scheduled: Tensor) -> Tensor:
        return loss(**given, target=target, reduction="sum", **{name: scheduled})

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (0.0, 0.1, 0.2, 0.3):
        scheduled = torch.tensor(value, device=device, requires_grad=learned)
        wanted = [*given.values(), *([scheduled] if learned else [])]
        results = [f(scheduled) for f in (step, compiled)]
        plain, traced = (torch.autograd.grad(result, wanted) for result in results)
        assert torch.equal(*results)
        assert all(map(torch.equal, plain, traced))
    assert counter.frame_count == 1


def test_in_place_is_refused_under_a_compiler(device: torch.device) -> None:
    def step(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits * 1.0, target, inplace_backward=True)

    leaves, target = logits_case(3, 29, torch.float32, device)
    with pytest.raises(Exception, match=r"is not supported under torch\.compile"):
        torch.compile(step, fullgraph=True, backend="eager")(leaves["input"], target)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fake_tensors_agree_with_real_ones(
    reduction: str, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    def everything(leaves: dict[str, Tensor], target: Tensor) -> list[Tensor]:
        value, statistics = loss(
            **leaves, target=target, reduction=reduction, return_statistics=True, backend=backend
        )
        return [value, *statistics, *torch.autograd.grad(value.sum(), list(leaves.values()))]

    real_leaves, real_target = case(loss, 5, device, torch.bfloat16)
    real = everything(real_leaves, real_target)
    with FakeTensorMode() as mode:
        leaves = {name: mode.from_tensor(leaf) for name, leaf in real_leaves.items()}
        fake = everything(leaves, mode.from_tensor(real_target))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("flags", ["mean", "none"])
def test_under_activation_checkpointing(
    flags: str, reentrant: bool, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    leaves, target = case(loss, 5, device)
    names, chosen = list(leaves), options(flags, 29, device)

    def run(*values: Tensor) -> Tensor:
        scaled = [value * 1.0 for value in values]  # an activation to recompute
        return loss(**dict(zip(names, scaled, strict=True)), target=target, **chosen, backend=backend)

    plain = torch.autograd.grad(run(*leaves.values()).sum(), list(leaves.values()))
    checkpoint(run, *leaves.values(), use_reentrant=reentrant).sum().backward()
    for name, gradient in zip(names, plain, strict=True):
        assert torch.equal(leaves[name].grad, gradient), name


# ---- devices ----


@pytest.mark.kills("ual_kernels/ops.py", "without_autocast(tensor), device:", "without_autocast(tensor):")
@every_loss
def test_bodies_run_on_the_device_of_their_tensors(
    loss: Callable[..., Any], backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward make the tensors' device current; Triton launches on the current device."""
    entered: list[Tensor] = []
    guard = torch.cuda.device_of

    class Recorded(guard):  # type: ignore[misc, valid-type]
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            self.tensor = tensor

        def __enter__(self) -> None:
            entered.append(self.tensor)
            super().__enter__()

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    leaves, target = case(loss, 5, device, torch.bfloat16)
    value = loss(**leaves, target=target, reduction="none", backend=backend)
    assert len(entered) == 1
    torch.autograd.grad(value.sum(), list(leaves.values()))
    # Triton's linear loss scales each gradient that is a matrix in an operator of its own
    matrices = [name for name in ("input", "linear_weight", "lora_a", "lora_b") if name in leaves]
    assert len(entered) == 2 + (len(matrices) if "linear_weight" in leaves and backend == "triton" else 0)
    if loss is cross_entropy:
        entered.clear()
        scaled = loss(leaves["input"] * 1.0, target, inplace_backward=True, backend=backend)
        (scaled * 3.0).backward()
        assert len(entered) == 2

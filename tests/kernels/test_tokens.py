"""The per-token terms in PyTorch and Triton against the reference and its derivatives in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ual_kernels import (
    CrossEntropyOptions,
    LinearCrossEntropyOptions,
    UnsupportedError,
    cross_entropy,
    linear_cross_entropy,
    reference,
)
from ual_kernels._tokens import token_statistics, token_terms
from ual_kernels._triton import math

N, V = 12, 9


@triton.jit
def _terms_kernel(inputs_ptr, out_ptr, M, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.arange(0, BLOCK)
    mask = token < M
    inputs_ptr += token
    nll = tl.load(inputs_ptr, mask=mask)
    lse = tl.load(inputs_ptr + M, mask=mask)
    term = tl.load(inputs_ptr + 2 * M, mask=mask)
    s = tl.load(inputs_ptr + 3 * M, mask=mask)
    weight = tl.load(inputs_ptr + 4 * M, mask=mask)
    excess = tl.load(inputs_ptr + 5 * M, mask=mask)
    c_mean = tl.load(inputs_ptr + 6 * M, mask=mask)
    loss, k, uniform, ds = math.token_terms(nll, lse, term, s, weight, excess, c_mean, Z_LOSS)
    out_ptr += token
    tl.store(out_ptr, loss, mask=mask)
    tl.store(out_ptr + M, k, mask=mask)
    tl.store(out_ptr + 2 * M, uniform, mask=mask)
    tl.store(out_ptr + 3 * M, ds, mask=mask)


@triton.jit
def _statistics_kernel(inputs_ptr, out_ptr, M, BLOCK: tl.constexpr):
    token = tl.arange(0, BLOCK)
    mask = token < M
    inputs_ptr += token
    reference = tl.load(inputs_ptr + M, mask=mask)
    largest = tl.load(inputs_ptr + 5 * M, mask=mask)
    second = tl.load(inputs_ptr + 6 * M, mask=mask)
    math.store_statistics(
        out_ptr + token, M, mask, mask,
        reference, tl.load(inputs_ptr + 2 * M, mask=mask), tl.load(inputs_ptr + 3 * M, mask=mask),
        tl.load(inputs_ptr + 4 * M, mask=mask), largest - reference, second - reference,
        tl.load(inputs_ptr + 7 * M, mask=mask), tl.load(inputs_ptr, mask=mask) >= largest,
        tl.load(inputs_ptr + 8 * M, mask=mask), tl.load(inputs_ptr + 9 * M, mask=mask),
    )  # fmt: skip


@triton.jit
def _tanh_kernel(input_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, math.tanh(tl.load(input_ptr + place)))


def triton_terms(*inputs: Tensor, z_loss: float) -> tuple[Tensor, ...]:
    packed = torch.stack(inputs)
    out = packed.new_full((4, N), torch.nan)
    _terms_kernel[(1,)](packed, out, N, Z_LOSS=z_loss, BLOCK=16)
    return tuple(out)


def triton_statistics(*inputs: Tensor) -> Tensor:
    packed = torch.stack(inputs)
    out = packed.new_full((8, N), torch.nan)
    _statistics_kernel[(1,)](packed, out, N, BLOCK=16)
    return out


def torch_terms(*inputs: Tensor, z_loss: float) -> tuple[Tensor, ...]:
    return token_terms(*inputs, z_loss=z_loss)


@pytest.fixture
def problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, targets, smoothing from 0 to its limit, and class weights."""
    logits = torch.randn(N, V, dtype=torch.float64, device=device) * 3
    target = torch.randint(V, (N,), device=device)
    smoothing = torch.linspace(0.0, V / (V - 1), N, dtype=torch.float64, device=device)
    return logits, target, smoothing, torch.linspace(0.5, 3.0, V, dtype=torch.float64, device=device)


@pytest.mark.kills("ual_kernels/_tokens.py", "uniform + 2 * z_loss * lse\n", "uniform\n")
@pytest.mark.kills(
    "ual_kernels/_tokens.py", "(c_mean - weight) * nll - excess - smoothing_term)", "-smoothing_term)"
)
@pytest.mark.kills("ual_kernels/_triton/math.py", "uniform += 2.0 * Z_LOSS * lse", "pass")
@pytest.mark.kills(
    "ual_kernels/_triton/math.py", "k = (1.0 - s) * weight + s * c_mean", "k = (1.0 - s) * weight + s"
)
@pytest.mark.kills("ual_kernels/_tokens.py", "(1 - s) * excess", "excess")
@pytest.mark.kills("ual_kernels/_triton/math.py", "(1.0 - s) * excess", "excess")
@pytest.mark.kills("ual_kernels/_triton/math.py", "nll - excess - smoothing_term", "nll - smoothing_term")
@pytest.mark.parametrize("several", [False, True], ids=["index", "several"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("terms", [torch_terms, triton_terms])
def test_the_terms_are_the_reference_and_its_derivatives(
    terms: Callable[..., tuple[Tensor, ...]], z_loss: float, several: bool, problem: tuple[Tensor, ...]
) -> None:
    z, y, s, c = problem
    z, s = z.requires_grad_(), s.requires_grad_()
    classes = torch.stack([y, (y + 2) % V, (y + 5) % V], 1) if several else y[:, None]
    share = z.new_tensor([0.5, 0.3, 0.2] if several else [1.0]).expand(N, -1)
    loss = reference.cross_entropy(z, y, s, weight=c, z_loss=z_loss, classes=classes, probabilities=share)
    dz, ds = torch.autograd.grad(loss.sum(), [z, s])

    z, s, column = z.detach(), s.detach(), y[:, None]
    z_y, lse, p = z.gather(1, column).squeeze(1), torch.logsumexp(z, 1), torch.softmax(z, 1)
    c_mean = c.mean().expand(N)
    term = (c * z).mean(1) - c_mean * z_y
    w = share * c[classes]
    excess = (w * (z_y[:, None] - z.gather(1, classes))).sum(1)
    ours, k, uniform, ours_ds = terms(lse - z_y, lse, term, s, w.sum(1), excess, c_mean, z_loss=z_loss)
    close = {"rtol": 0.0, "atol": 64 * torch.finfo(torch.float64).eps * z.abs().max().item()}
    torch.testing.assert_close(ours, loss.detach(), **close)
    torch.testing.assert_close(ours_ds, ds, **close)
    everywhere = k[:, None] * p - s[:, None] * c / V
    at_label = uniform + (1 - s) * w[:, 1:].sum(1) - k * (1 - p.gather(1, column).squeeze(1)) - s * c[y] / V
    everywhere = everywhere.scatter_add(1, classes[:, 1:], -(1 - s)[:, None] * w[:, 1:])
    torch.testing.assert_close(everywhere.scatter(1, column, at_label[:, None]), dz, **close)


@pytest.mark.kills("ual_kernels/_tokens.py", "log_total - moment / total", "log_total + moment / total")
@pytest.mark.kills(
    "ual_kernels/_triton/math.py", "log_total - moment / total, nan", "log_total + moment / total, nan"
)
@pytest.mark.kills("ual_kernels/_triton/math.py", "tl.exp(largest) / total", "1.0 / total")
@pytest.mark.parametrize("statistics", [token_statistics, triton_statistics])
def test_the_statistics_are_the_references(
    statistics: Callable[..., Tensor], problem: tuple[Tensor, ...]
) -> None:
    z, y, _, _ = problem
    z_y = z.gather(1, y[:, None]).squeeze(1)
    point = z_y + 1.5  # any reference point near the largest logit
    x = torch.exp(z - point[:, None])
    two = z.topk(2).values
    found = statistics(
        z_y, point, x.sum(1), z_y - torch.logsumexp(z, 1), (x * (z - point[:, None])).sum(1),
        two[:, 0], two[:, 1], z.mean(1), y.to(z.dtype), z.argmax(1).to(z.dtype),
    )  # fmt: skip
    torch.testing.assert_close(found, reference.statistics(z, y), rtol=1e-12, atol=1e-12)


@pytest.mark.kills("ual_kernels/_triton/math.py", "size < 0.75", "size < 0.1")
@pytest.mark.kills("ual_kernels/_triton/math.py", "p * z - 3.44947246999821692e-5", "p * z")
@pytest.mark.kills("ual_kernels/_triton/math.py", "tl.where(x < 0.0, -large, large)", "large")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_accurate_near_zero_and_far_from_it(dtype: torch.dtype, device: torch.device) -> None:
    """exp and the quotient may each be off by 2 eps on a GPU, of which at most half reaches the result."""
    sizes = torch.logspace(-12, 1.5, 2_000, dtype=torch.float64)
    special = torch.tensor([0.0, 0.75, 1e30, torch.inf], dtype=torch.float64)
    x = torch.cat([sizes, special, -sizes, -special, torch.linspace(-1, 1, 88)]).to(device, dtype)
    out = torch.full_like(x, torch.nan)
    _tanh_kernel[(1,)](x, out, BLOCK=4_096)
    exact = torch.tanh(x.double())
    error = ((out.double() - exact) / exact).abs()[exact != 0].max()
    assert error <= 4 * torch.finfo(dtype).eps
    assert not out[exact == 0].any()
    _tanh_kernel[(1,)](x * torch.nan, out, BLOCK=4_096)
    assert out.isnan().all()


@pytest.mark.kills("ual_kernels/_triton/math.py", "size < 0.75", "size < 0.0")
@pytest.mark.parametrize("softcap", [30.0, 50.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_gradient_of_capped_logits_is_as_accurate_as_eagers(
    backend: str, softcap: float, device: torch.device
) -> None:
    """Each component relative to itself: p is off by softcap times the error of tanh."""
    logits = torch.randn(16, 1_000, device=device)
    target = logits.argmin(-1)

    def gradient(loss: Callable[..., Tensor], logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(logits), logits)[0].double()

    def eager(logits: Tensor) -> Tensor:
        capped = softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(capped, target, reduction="sum")

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, target, softcap=softcap, reduction="sum", backend=backend)

    exact = gradient(eager, logits.double())
    mine, theirs = (((gradient(f, logits) - exact) / exact).abs().max().item() for f in (ours, eager))
    assert mine <= 2 * theirs + 4 * torch.finfo(torch.float32).eps


# ---- smoothing beyond 1: Megatron's convention ----


@pytest.mark.parametrize("vocab", [2, 3, 1_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_smoothing_up_to_its_limit_is_accepted(
    backend: str, dtype: torch.dtype, vocab: int, device: torch.device
) -> None:
    """At V / (V - 1) the target has probability zero: the loss is the mean of the other classes' losses."""
    logits = torch.randn(2, vocab, dtype=dtype, device=device)
    target = torch.tensor([0, vocab - 1], device=device)
    limit = vocab / (vocab - 1)
    log_p = torch.log_softmax(logits.double(), 1)
    own = log_p.gather(1, target[:, None]).squeeze(1)
    expected = ((own - log_p.sum(1)) / (vocab - 1)).mean()
    for smoothing in (limit, torch.tensor(limit, dtype=dtype, device=device)):
        loss = cross_entropy(logits, target, label_smoothing=smoothing, backend=backend)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.kills(
    "ual_kernels/_tokens.py", "return vocab / (vocab - 1) * (1 + 4", "return vocab / (vocab - 1) * (2 + 4"
)
@pytest.mark.parametrize("vocab", [1, 2, 3, 1_000])
def test_smoothing_beyond_its_limit_is_refused(vocab: int, device: torch.device) -> None:
    logits, target = torch.zeros(2, vocab, device=device), torch.zeros(2, dtype=torch.long, device=device)
    beyond = 1.001 * (vocab / (vocab - 1) if vocab > 1 else 1.0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
        cross_entropy(logits, target, label_smoothing=beyond)
    loss = cross_entropy(
        logits, target, label_smoothing=torch.tensor([0.5, beyond], device=device), reduction="none"
    )
    assert loss.isnan().tolist() == [False, True]


def test_a_padded_vocabulary_is_a_slice_of_the_head(device: torch.device) -> None:
    """The slice is a view, so nothing is copied, and the gradient of the padding is exactly 0."""
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    head = torch.randn(19, 8, device=device, requires_grad=True)
    target = torch.tensor([0, 16, 3, -100], device=device)
    linear_cross_entropy(hidden, head[:17], target, label_smoothing=0.1).backward()
    assert head.grad is not None
    assert (head.grad[17:] == 0).all()
    assert head.grad[:17].any(1).all()


@pytest.mark.kills("ual_kernels/functional.py", " or torch.version.hip or unsupported", " or unsupported")
@pytest.mark.kills("ual_kernels/functional.py", " and not _trained(linear_weight)", "")
@pytest.mark.kills("ual_kernels/functional.py", "unsupported or _trained(linear_bias)", "unsupported")
@pytest.mark.kills("ual_kernels/functional.py", ".major == 9", ".major >= 8")
@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ({}, "triton"),
        ({"major": 8}, "torch"),
        ({"hip": "7.0"}, "torch"),
        ({"device": "cpu"}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"dtype": torch.float16}, "triton"),
        ({"dtype": torch.float16, "trained_head": True}, "torch"),
        ({"dtype": torch.float16, "adapter": True}, "torch"),
        ({"dtype": torch.float16, "softcap": 30.0}, "torch"),
        ({"dtype": torch.float32}, "triton"),
        ({"dtype": torch.float32, "trained_head": True}, "triton"),
        ({"dtype": torch.float32, "adapter": True}, "torch"),
        ({"dtype": torch.float32, "softcap": 30.0}, "torch"),
        ({"dtype": torch.float32, "autocast": torch.bfloat16, "softcap": 30.0}, "triton"),
        ({"autocast": torch.float16, "trained_head": True}, "torch"),
        ({"softcap": 30.0}, "triton"),
        ({"trained_head": True, "adapter": True}, "triton"),
        ({"trained_bias": True}, "torch"),
        ({"options": {"precision": "fast"}}, "triton"),
        ({"options": {"gradient_filter": 1e-4}}, "torch"),
        ({"options": {"chunk_tokens": 16}}, "triton"),
    ],
    ids=str,
)
def test_auto_is_triton_where_it_was_measured(
    changed: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors of a GPU: the backend is chosen before any kernel runs."""
    found: list[str] = []

    def choose(backend: str, input: Tensor, *, fused: str) -> None:
        found.append(fused if input.is_cuda else "torch")
        raise UnsupportedError("chosen")

    monkeypatch.setattr("ual_kernels._arguments.choose_backend", choose)
    monkeypatch.setattr(torch.version, "hip", changed.get("hip"))
    properties = SimpleNamespace(major=changed.get("major", 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    if "autocast" in changed:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: changed["autocast"])
    kind = {"device": changed.get("device", "cuda"), "dtype": changed.get("dtype", torch.bfloat16)}
    with FakeTensorMode():
        hidden = torch.empty(3, 8, **kind)
        head = torch.empty(5, 8, requires_grad="trained_head" in changed, **kind)
        adapter = (
            (torch.empty(2, 8, **kind), torch.empty(5, 2, **kind), 0.5) if "adapter" in changed else None
        )
        target = torch.empty(3, device=kind["device"], dtype=torch.long)
        bias = torch.empty(5, requires_grad=True, **kind) if "trained_bias" in changed else None
        chosen_options = LinearCrossEntropyOptions(**changed.get("options", {}))
        with pytest.raises(UnsupportedError, match="chosen"):
            linear_cross_entropy(
                hidden, head, target, linear_bias=bias, linear_lora=adapter, softcap=changed.get("softcap"),
                options=chosen_options,
            )  # fmt: skip
    assert found == [chosen]


def test_an_error_of_a_backend_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._arguments._INTERPRETING", False)
    with pytest.raises(UnsupportedError, match='use backend="auto" or "torch"'):
        cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend="triton")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": LinearCrossEntropyOptions()}, "options must be CrossEntropyOptions or None, got Linear"),
        ({"label_smoothing": None}, "label_smoothing must be a number, a tensor or a function"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be a number, a tensor or a function"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": CrossEntropyOptions()}, "options must be LinearCrossEntropyOptions or None, got Cross"),
        (
            {"linear_lora": (torch.zeros(1, 3), torch.zeros(2, 1))},
            r"linear_lora must be \(A, B, scale\) or None",
        ),
        ({"linear_bias": torch.zeros(2, dtype=torch.long)}, "linear_bias must be bfloat16, float16"),
    ],
)
def test_arguments_of_the_linear_loss_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(
            torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(1, dtype=torch.long), **arguments
        )

"""cross_entropy against its definition: values, gradients, shapes, edge cases, errors."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ual_kernels
from tests.kernels.cases import (
    DTYPES,
    OPTIONS,
    as_float64,
    assert_as_accurate_as_eager,
    cross_entropy,
    definition,
    linear_case,
    linear_cross_entropy,
    logits_case,
    measure,
    names,
    options,
)
from ual_kernels import TokenStatistics, UnsupportedError, ops
from ual_kernels._operands import LogitsInputs, LogitsSpec
from ual_kernels._vocab_parallel import Shards

FUSED = ["torch", "triton"]
BACKENDS = [*FUSED, "reference"]
fused = pytest.mark.parametrize("backend", FUSED)
backends = pytest.mark.parametrize("backend", BACKENDS)


def judge(leaves: dict[str, Tensor], target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    acc = leaves["label_smoothing"].dtype
    assert_as_accurate_as_eager(
        actual=measure(cross_entropy, leaves, target, **flags, **how),
        eager=measure(definition, leaves, target, **flags, dtype=acc),
        exact=measure(definition, as_float64(leaves), target, **flags),
    )


# ---- values and gradients ----


@pytest.mark.kills("ual_kernels/_triton/math.py", "k += 2.0 * Z_LOSS * lse", "k += Z_LOSS * lse")
@pytest.mark.kills(
    "ual_kernels/_triton/math.py",
    "uniform, (c_mean - weight) * nll - excess - smoothing_term",
    "uniform, -smoothing_term",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py", "((1.0 - s) * p * c + s / V * c)", "(p * c + s / V * c)"
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py", "((1.0 - s) * p * c + s / V * c)", "((1.0 - s) * p * c)"
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "                dx *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)",
    "                dx *= 1.0 - z / SOFTCAP",
)
@pytest.mark.kills(
    "ual_kernels/_triton/math.py", "z = SOFTCAP * tanh(z / SOFTCAP)", "z = SOFTCAP * tanh(x / SOFTCAP)"
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "logits[chunk].to(acc, copy=True)", "logits[chunk].to(acc)"
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py",
    "p -= (scale * s / shards.vocab)[:, None]",
    "p -= (scale * s)[:, None]",
)
@pytest.mark.kills(
    "ual_kernels/_tokens.py", "k, uniform = k + 2 * z_loss * lse,", "k, uniform = k + z_loss * lse,"
)
@pytest.mark.kills("ual_kernels/losses.py", "torch.float32)) * ratio", "torch.float32))")
@fused
@pytest.mark.parametrize("dtype", names(DTYPES))
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(6, 101, dtype, device, scale=2.0)
    judge(leaves, target, options(flags, 101, device), backend=backend)


@pytest.mark.kills(
    "ual_kernels/reference.py",
    "uniform = -weighted.mean(dim=-1)",
    "uniform = -log_p.mean(dim=-1)",
)
@pytest.mark.kills(
    "ual_kernels/reference.py",
    "z_loss * torch.logsumexp(z, dim=-1).square()",
    "z_loss * torch.logsumexp(z, dim=-1)",
)
@pytest.mark.kills(
    "ual_kernels/reference.py", "softcap * torch.tanh(z / softcap)", "softcap * torch.tanh(input / softcap)"
)
@pytest.mark.parametrize("flags", OPTIONS)
def test_the_reference_equals_the_definition(flags: str, device: torch.device) -> None:
    leaves, target = logits_case(6, 101, torch.float64, device, scale=2.0)
    judge(leaves, target, options(flags, 101, device), backend="reference")


# two classes; odd and below a block; a complete block, and a block plus one, in float32 and in bfloat16
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "            term += tl.sum(tl.where(inside, z - z_y, 0.0)",
    "            term += tl.sum(z - z_y",
)
@fused
@pytest.mark.parametrize("dtype", names([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("vocab", [2, 257, 2_048, 2_049, 4_096, 4_097])
def test_every_width(vocab: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(3, vocab, dtype, device)
    judge(leaves, target, {"reduction": "none", "z_loss": 1e-2}, backend=backend)


@fused
def test_one_class(backend: str, device: torch.device) -> None:
    """Only the z-loss has a gradient; p - q cancels to a rounding of 1."""
    leaves, target = logits_case(3, 1, torch.float64, device)
    ours, exact = (
        measure(loss, leaves, target, reduction="none", z_loss=1e-2, **how)
        for loss, how in ((cross_entropy, {"backend": backend}), (definition, {}))
    )
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=0, atol=1e-15)


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py", "rescale = tl.exp(high - base)", "rescale = tl.exp(base - base)"
)
@fused
def test_the_maximum_may_come_late_or_early(backend: str, device: torch.device) -> None:
    """In the first block, the last or both: the running sums are rescaled when the maximum changes."""
    leaves, target = logits_case(4, 4_100, torch.float32, device)
    with torch.no_grad():
        peaks = torch.tensor([8.0, 8.0, 7.0, 8.0], device=device)
        leaves["input"][[0, 2, 3, 3], [4_099, 0, 5, 4_098]] = peaks
    judge(leaves, target, {"reduction": "none"}, backend=backend)


@fused
@pytest.mark.parametrize("scale", [1e-4, 50.0])
def test_tiny_and_huge_logits(scale: float, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(8, 4_097, torch.float32, device, scale)
    judge(leaves, target, {"reduction": "none"}, backend=backend)


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "p = tl.exp2((z - k) * _LOG2E - log_sum * _LOG2E)",
    "p = tl.exp2((z - (k + log_sum)) * _LOG2E)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py",
    "smoothing_term = weighted - c_mean * (z_y - largest)",
    "smoothing_term = (largest + weighted) - c_mean * z_y",
)
@fused
def test_logits_far_from_zero(backend: str, device: torch.device) -> None:
    """Near 300 float32 has steps of 3e-5, the relative error of a probability from a stored log-sum-exp."""
    leaves, target = logits_case(6, 5, torch.float32, device)
    with torch.no_grad():
        leaves["input"] += 300
    judge(leaves, target, {"reduction": "none"}, backend=backend)


@fused
def test_several_chunks(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._torch.cross_entropy._CHUNK_ELEMENTS", {device.type: 3 * 17})
    leaves, target = logits_case(11, 17, torch.float32, device)
    judge(leaves, target, options("all", 17, device), backend=backend)
    stats = cross_entropy(leaves["input"], target, return_statistics=True, backend=backend)[1]
    expected = cross_entropy(leaves["input"], target, return_statistics=True, backend="reference")[1]
    torch.testing.assert_close(stats, expected, equal_nan=True)


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "tl.load(token_scale_ptr + token) * LOGIT_SCALE, selected",
    "tl.load(token_scale_ptr + token), selected",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "stop = tl.where(scale == 1.0, 0, V)",
    "stop = tl.where(scale == 1.0, 0, 0)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "buffer.is_cpu and bool((scale == 1).all())", "buffer.is_cpu"
)
@pytest.mark.kills(
    "ual_kernels/ops.py", "return dlogits, scaled * state[3], dp", "return dlogits, dloss * state[3], dp"
)
@fused
@pytest.mark.parametrize("dtype", names([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("flags", OPTIONS)
def test_the_gradient_in_place(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(6, 101, dtype, device, scale=2.0)

    def loss(input: Tensor, **rest: Any) -> Tensor:
        logits = input * 1.0
        before = logits.data_ptr(), logits.detach().clone()
        value = cross_entropy(logits, inplace_backward=True, backend=backend, **rest)
        assert logits.data_ptr() == before[0]
        assert not torch.equal(logits.detach(), before[1]), "the logits are not overwritten"
        return value

    chosen = options(flags, 101, device)
    assert_as_accurate_as_eager(
        actual=measure(loss, leaves, target, **chosen),
        eager=measure(definition, leaves, target, **chosen, dtype=leaves["label_smoothing"].dtype),
        exact=measure(definition, as_float64(leaves), target, **chosen),
    )


@pytest.mark.kills(
    "ual_kernels/_triton/math.py",
    "tl.maximum(tl.minimum(high, other_high), tl.maximum(second, other_second))",
    "tl.maximum(second, other_second)",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "moment = rescale * (moment + moved)",
    "moment = rescale * moment",
)
@backends
@pytest.mark.parametrize("dtype", names(DTYPES))
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_statistics(flags: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(7, 4_100, dtype, device, scale=3.0)
    target[2] = leaves["input"][2].argmax()
    with torch.no_grad():  # the largest in the last block and the second in the first, and the reverse
        peaks = torch.tensor([14.0, 15.0, 14.0, 15.0], device=device, dtype=dtype)
        leaves["input"][[3, 3, 4, 4], [5, 4_099, 4_099, 5]] = peaks
    chosen = options(flags, 4_100, device)
    loss, stats = cross_entropy(leaves["input"], target, **chosen, return_statistics=True, backend=backend)
    assert isinstance(stats, TokenStatistics)
    # with statistics, Triton sums 16-bit logits in another order: an error of log2(V) eps in the sum
    reordered = backend == "triton" and dtype.itemsize == 2
    torch.testing.assert_close(
        loss,
        cross_entropy(leaves["input"], target, **chosen, backend=backend),
        rtol=0,
        atol=2 * 13 * 2**-24 if reordered else 0,
    )
    z = leaves["input"].detach().double() * chosen.get("logit_scale", 1.0)
    if "softcap" in chosen:
        z = chosen["softcap"] * torch.tanh(z / chosen["softcap"])
    p = torch.softmax(z, -1)
    z_y = z.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    first, second = z.topk(2).values.unbind(-1)
    exact = TokenStatistics(
        lse=torch.logsumexp(z, -1),
        log_prob=z_y - torch.logsumexp(z, -1),
        entropy=-(p * p.log()).sum(-1),
        top1_prob=p.amax(-1),
        margin=first - second,
        mean_logit=z.mean(-1),
        correct=z_y == first,
        predicted=z.argmax(-1),
        dropped_mass=torch.zeros_like(z_y),
    )
    selected = target != -100
    acc = torch.promote_types(dtype, torch.float32)
    for name, ours, truth in zip(stats._fields, stats, exact, strict=True):
        assert not ours.requires_grad
        assert ours.shape == target.shape
        if name == "correct":
            assert torch.equal(ours, truth & selected)
            continue
        if name == "predicted":  # 16-bit logits have equal largest ones
            assert (ours[~selected] == -1).all()
            of_predicted = z[selected].gather(-1, ours[selected][:, None])[:, 0]
            assert torch.equal(of_predicted, first[selected])
            continue
        assert ours.dtype == acc
        assert ours[~selected].isnan().all()
        eps = torch.finfo(acc).eps
        torch.testing.assert_close(
            ours[selected].double(),
            truth[selected],
            rtol=32 * eps,
            atol=32 * eps,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.kills(
    "ual_kernels/_triton/math.py",
    "tl.where(tl.sum(is_largest.to(tl.int32), axis=0) > 1, high, second)",
    "second",
)
@backends
@pytest.mark.parametrize("twin", [7, 4_098])
def test_statistics_of_a_tie(twin: int, backend: str, device: torch.device) -> None:
    """Two equal largest logits, in one block or in two."""
    logits = torch.randn(1, 4_100, device=device)
    logits[0, [3, twin]] = 9.0
    for label in (3, twin):
        target = torch.tensor([label], device=device)
        stats = cross_entropy(logits, target, return_statistics=True, backend=backend)[1]
        assert stats.margin.item() == 0
        assert stats.correct.item()
        assert stats.predicted.item() == label


@backends
def test_statistics_of_one_class(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[2.0], [3.0]], device=device)
    target = torch.tensor([0, -100], device=device)
    _, stats = cross_entropy(logits, target, return_statistics=True, backend=backend)
    assert [field[0].item() for field in stats] == [2.0, 0.0, 0.0, 1.0, math.inf, 2.0, True, 0, 0.0]


# ---- shapes and dtypes of arguments ----


@pytest.mark.kills(
    "ual_kernels/_arguments.py", "reshape(value.shape + missing)", "reshape(missing + value.shape)"
)
@backends
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
def test_values_per_leading_index_are_broadcast(
    shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    vocab = 9
    wide: dict[str, Any] = {"device": device, "dtype": torch.float64, "requires_grad": True}
    target = torch.randint(vocab, shape, device=device)
    for known in range(len(shape) + 1):
        leaves = {
            "input": torch.randn(*shape, vocab, **wide),
            "label_smoothing": torch.rand(shape[:known], **wide),
            "sample_weight": torch.rand(shape[:known], **wide),
        }
        for reduction in ("mean", "none"):
            ours = measure(cross_entropy, leaves, target, reduction=reduction, backend=backend)
            exact = measure(definition, leaves, target, reduction=reduction)
            assert ours["loss"].shape == (shape if reduction == "none" else ())
            for name in exact:
                torch.testing.assert_close(ours[name], exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.kills("ual_kernels/_arguments.py", "share = share * shards.sum(", "shards.sum(")
@backends
@pytest.mark.parametrize("uniform", [0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pytorch_for_one_smoothing(
    weighted: bool, uniform: float, backend: str, device: torch.device
) -> None:
    leaves, target = logits_case(9, 37, torch.float64, device)
    weight = torch.rand(37, device=device, dtype=torch.float64) if weighted else None
    for reduction in ("none", "sum", "mean"):
        flags: dict[str, Any] = {"label_smoothing": uniform, "weight": weight, "reduction": reduction}
        ours = cross_entropy(leaves["input"], target, **flags, backend=backend)
        theirs = torch.nn.functional.cross_entropy(leaves["input"], target, **flags)
        torch.testing.assert_close(ours, theirs)


@backends
def test_int32_labels(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(6, 33, torch.float32, device)
    long, short = (
        measure(cross_entropy, leaves, labels, backend=backend) for labels in (target, target.int())
    )
    for name in long:
        assert torch.equal(long[name], short[name]), name


@pytest.mark.kills("ual_kernels/_arguments.py", "target.reshape(-1).contiguous()", "target.reshape(-1)")
@pytest.mark.kills("ual_kernels/_arguments.py", "weight.to(acc).contiguous()", "weight.to(acc)")
@backends
def test_any_strides(backend: str, device: torch.device) -> None:
    """Every argument is a view into a larger tensor whose other elements are invalid."""

    def inside(packed: Tensor) -> Tensor:
        nowhere = torch.nan if packed.is_floating_point() else 10**9
        wide = torch.full(
            (*packed.shape[:-1], 2 * packed.shape[-1]), nowhere, device=device, dtype=packed.dtype
        )
        view = wide[..., ::2]
        view.copy_(packed)
        return view

    leaves, target = logits_case(6, 33, torch.float32, device)
    weight = torch.rand(33, device=device)
    packed = measure(cross_entropy, leaves, target, weight=weight, backend=backend)
    strided = measure(
        cross_entropy,
        {name: inside(leaf.detach()).requires_grad_() for name, leaf in leaves.items()},
        inside(target),
        weight=inside(weight),
        backend=backend,
    )
    for name in packed:
        torch.testing.assert_close(strided[name], packed[name], rtol=0, atol=0)


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py", "dlogits_ptr + token * V", "dlogits_ptr + token * stride_n"
)
@fused
def test_a_strided_view_is_read_and_written_within_its_bounds(backend: str, device: torch.device) -> None:
    """The logits are a view into a NaN-filled buffer, so accesses outside of the view are visible."""
    buffer = torch.full((4, 64), torch.nan, device=device)
    view = buffer[:, 5:42]
    view.copy_(torch.randn_like(view))
    packed = view.clone().requires_grad_()
    target = torch.tensor([0, 36, 7, 8], device=device)
    (strided,), (plain,) = (
        torch.autograd.grad(cross_entropy(x, target, label_smoothing=0.3, backend=backend), x)
        for x in (view.requires_grad_(), packed)
    )
    assert torch.equal(strided, plain)
    assert buffer[:, :5].isnan().all()
    assert buffer[:, 42:].isnan().all()


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "    logits_ptr += token * stride_n\n    column, live, p, c, z_y, z",
    "    logits_ptr += (token * stride_n).to(tl.int32)\n    column, live, p, c, z_y, z",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "    logits_ptr += token * stride_n\n    column, live, p, c, _, z",
    "    logits_ptr += (token * stride_n).to(tl.int32)\n    column, live, p, c, _, z",
)
@fused
def test_offsets_past_two_to_the_31(backend: str, device: torch.device, tmp_path: Path) -> None:
    """Three tokens with a stride for which the third has an offset above 2^31."""
    stride, vocab = 2**30 + 8, 33
    packed = torch.randn(3, vocab).bfloat16()
    # a sparse file: the 4 GiB between the tokens are not stored
    far = torch.from_file(str(tmp_path / "far"), shared=True, size=2 * stride + vocab, dtype=packed.dtype)
    view = far.as_strided((3, vocab), (stride, 1)).copy_(packed).to(device)
    (spread,), (plain,) = (
        torch.autograd.grad(cross_entropy(x, torch.tensor([1, 2, 32], device=device), backend=backend), x)
        for x in (view.requires_grad_(), packed.to(device).requires_grad_())
    )
    assert torch.equal(spread, plain)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits(device: torch.device) -> None:
    tokens, vocab = 16_500, 131_072
    logits = torch.randn(1, vocab, device=device, dtype=torch.bfloat16).repeat(tokens, 1).requires_grad_()
    target = torch.arange(tokens, device=device)
    last = logits.detach()[-1:].clone().requires_grad_()
    (many,) = torch.autograd.grad(cross_entropy(logits, target, reduction="sum"), logits)
    (one,) = torch.autograd.grad(cross_entropy(last, target[-1:], reduction="sum"), last)
    assert torch.equal(many[-1:], one)


@fused
def test_logits_that_share_memory(backend: str, device: torch.device) -> None:
    one = torch.randn(1, 21, device=device)
    target = torch.tensor([1, 2, 20], device=device)
    shared, own = (one.expand(3, -1), one.expand(3, -1).contiguous())
    losses = [cross_entropy(x, target, reduction="none", backend=backend) for x in (shared, own)]
    assert torch.equal(*losses)


@backends
def test_an_upstream_of_stride_zero(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(5, 19, torch.float32, device)
    losses = cross_entropy(**leaves, target=target, reduction="none", backend=backend)
    broadcast, dense = (
        torch.autograd.grad(losses, list(leaves.values()), upstream, retain_graph=True)
        for upstream in (torch.ones((), device=device).expand(5), torch.ones(5, device=device))
    )
    for a, b in zip(broadcast, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py", "dloss_ptr + token * stride_g", "dloss_ptr + token"
)
@fused
def test_the_operator_takes_any_upstream(backend: str, device: torch.device) -> None:
    """The operator itself, because the public function makes the upstream gradient dense."""
    leaves, target = logits_case(5, 19, torch.float32, device)
    flags = -100, 0.0, 1.0, 0.0
    inputs = LogitsInputs(leaves["input"], target, leaves["label_smoothing"], None)
    loss = ops.cross_entropy(inputs, LogitsSpec(*flags, False, False, backend), Shards(19)).loss
    upstream = torch.full((2 * 5,), torch.nan, device=device)
    upstream[::2] = torch.rand(5, device=device)
    for strided in (upstream[::2], torch.ones((), device=device).expand(5)):
        ours, dense = (
            torch.autograd.grad(loss, leaves["input"], given, retain_graph=True)[0]
            for given in (strided, strided.contiguous())
        )
        assert torch.equal(ours, dense)


@backends
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    """Class weights need a matrix product, which autocast would round."""
    leaves, target = logits_case(6, 65, torch.float32, device, scale=5.0)
    flags = options("classes", 65, device)
    plain = measure(cross_entropy, leaves, target, **flags, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        cast = measure(cross_entropy, leaves, target, **flags, backend=backend)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@fused
@pytest.mark.parametrize("wanted", ["input", "label_smoothing", "sample_weight"])
def test_one_gradient_alone(wanted: str, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(5, 19, torch.float64, device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    judge(leaves, target, {"reduction": "none"}, backend=backend)


# ---- edge cases ----


@backends
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_empty_batch(reduction: str, backend: str, device: torch.device) -> None:
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    loss, stats = cross_entropy(logits, target, reduction=reduction, return_statistics=True, backend=backend)
    assert loss.sum().item() == 0
    assert stats.lse.shape == (0,)
    loss.sum().backward()
    assert logits.grad.shape == (0, 5)


@backends
@pytest.mark.parametrize("num_items", [None, 3, torch.tensor(0.0)])
def test_all_ignored_is_zero_with_a_connected_graph(
    num_items: int | Tensor | None, backend: str, device: torch.device
) -> None:
    leaves, target = logits_case(3, 17, torch.float32, device)
    measured = measure(cross_entropy, leaves, target.fill_(-100), num_items=num_items, backend=backend)
    for name, value in measured.items():
        assert not value.any(), name


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "tl.store(loss_ptr + token, tl.where(selected, loss + nan_mask, 0.0))",
    "tl.store(loss_ptr + token, loss + nan_mask)",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "tl.store(out_ptr + start + lane, zero, mask=start + lane < V)",
    "pass",
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "return p.masked_fill_(~label.selected[:, None], 0.0)", "return p"
)
@pytest.mark.kills("ual_kernels/reference.py", "input.where(selected[:, None], 0.0)", "input")
@backends
@pytest.mark.parametrize("nothing", [torch.nan, torch.inf, -torch.inf])
def test_inputs_of_an_ignored_token_are_not_used(nothing: float, backend: str, device: torch.device) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    clean = measure(cross_entropy, leaves, target, backend=backend)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf[1] = nothing
    dirty = measure(cross_entropy, leaves, target, backend=backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    assert not dirty["input"][1].any()


@fused
def test_inputs_of_an_ignored_token_are_not_used_in_place(backend: str, device: torch.device) -> None:
    leaf = torch.randn(3, 17, device=device, requires_grad=True)
    logits = leaf * torch.tensor([[1.0], [torch.nan], [1.0]], device=device)
    target = torch.tensor([1, -100, 3], device=device)
    loss = cross_entropy(logits, target, label_smoothing=0.1, inplace_backward=True, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert not logits[1].any()


@backends
def test_another_ignore_index(backend: str, device: torch.device) -> None:
    """An ignore_index that is a class, as padding often is."""
    leaves, target = logits_case(6, 17, torch.float64, device)
    target[:3] = 0
    target[3:] = torch.tensor([5, 7, 16])
    judge(leaves, target, {"ignore_index": 0, "weight": torch.rand(17, device=device)}, backend=backend)


@pytest.mark.kills(
    "ual_kernels/_arguments.py", "labels = torch.where(scale == 0, ignore_index, labels)", "pass"
)
@backends
def test_a_zero_weight_token_is_dropped(backend: str, device: torch.device) -> None:
    """Also if its inputs are NaN."""
    leaves, target = logits_case(4, 17, torch.float32, device)
    leaves["sample_weight"] = torch.tensor([1.0, 1.0, 0.0, 2.0], device=device)
    with torch.no_grad():
        leaves["input"][2] = torch.nan
    measured = measure(cross_entropy, leaves, target, backend=backend)
    selected = [0, 1, 3]
    alone = measure(
        cross_entropy,
        {name: leaf.detach()[selected].requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()},
        target[selected],
        backend=backend,
    )
    assert not measured["input"][2].any()
    assert torch.equal(measured["loss"], alone["loss"])
    assert torch.equal(measured["input"][selected], alone["input"])


@pytest.mark.kills("ual_kernels/_arguments.py", "torch.where(total == 0, torch.inf, total)", "total")
@pytest.mark.kills(
    "ual_kernels/_arguments.py", "torch.where(total == 0, torch.inf, total)", "total + (total == 0)"
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_targets_whose_class_weights_are_zero(
    backend: str, loss: Callable[..., Tensor], smoothing: float, device: torch.device
) -> None:
    """PyTorch divides by 0 and returns NaN, or infinity with smoothing."""
    leaves, _ = (
        linear_case(4, 17, 8, torch.float64, device)
        if loss is linear_cross_entropy
        else logits_case(4, 17, torch.float64, device)
    )
    del leaves["label_smoothing"], leaves["sample_weight"]
    target, weight = torch.tensor([0, 1, -100, 0], device=device), torch.ones(17, device=device)
    weight[:2] = 0.0
    chosen = {"weight": weight, "label_smoothing": smoothing, "backend": backend}
    for name, value in measure(loss, leaves, target, **chosen).items():
        assert torch.equal(value, torch.zeros_like(value)), name
    dense = torch.nn.functional.cross_entropy(
        torch.zeros(4, 17, device=device), target, weight, label_smoothing=smoothing
    )
    assert not dense.isfinite()


@backends
def test_all_weights_zero_is_zero(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    leaves["sample_weight"] = torch.zeros(4, device=device)
    measured = measure(cross_entropy, leaves, target, backend=backend)
    assert measured["loss"].item() == 0
    assert not measured["input"].any()
    # trained weights have a gradient, so their tokens cannot be dropped
    leaves["sample_weight"].requires_grad_()
    measured = measure(cross_entropy, leaves, target, backend=backend)
    assert measured["loss"].item() == 0
    assert not measured["input"].any()


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    'base = tl.where(new_high == float("-inf"), 0.0, new_high)',
    "base = new_high",
)
@pytest.mark.kills(
    "ual_kernels/_triton/math.py",
    "+ (1.0 - s) * excess - tl.where(s == 0.0, 0.0, s * smoothing_term)",
    "+ (1.0 - s) * excess - s * smoothing_term",
)
@pytest.mark.kills(
    "ual_kernels/_tokens.py", "torch.where(s == 0, 0.0, s * smoothing_term)", "s * smoothing_term"
)
@pytest.mark.kills(
    "ual_kernels/reference.py",
    "torch.where((label_smoothing == 0) & uniform.isinf(), 0.0, uniform)",
    "uniform",
)
@backends
def test_masked_classes_without_smoothing(backend: str, device: torch.device) -> None:
    """Constrained decoding masks classes by logits of -inf; here the complete first block is masked."""
    vocab = 4_100
    logits = torch.randn(4, vocab, device=device)
    target = torch.randint(4_097, vocab, (4,), device=device)
    short = logits[:, 4_096:].clone().requires_grad_()
    logits[:, :4_096] = -torch.inf
    logits.requires_grad_()
    stats = cross_entropy(logits, target, return_statistics=True, backend=backend)[1]
    few = cross_entropy(short, target - 4_096, return_statistics=True, backend="reference")[1]
    for name in ("lse", "log_prob", "entropy", "top1_prob", "margin", "correct"):
        torch.testing.assert_close(getattr(stats, name), getattr(few, name))
    loss = cross_entropy(logits, target, reduction="none", backend=backend)
    torch.testing.assert_close(loss, cross_entropy(short, target - 4_096, reduction="none"))
    dlogits, dshort = (
        torch.autograd.grad(cross_entropy(x, y, backend=backend), x)[0]
        for x, y in ((logits, target), (short, target - 4_096))
    )
    torch.testing.assert_close(dlogits[:, 4_096:], dshort)
    assert not dlogits[:, :4_096].any()
    # with smoothing, a masked class has a positive target probability and an infinite loss
    smoothed = cross_entropy(logits, target, label_smoothing=0.1, reduction="none", backend=backend)
    assert (smoothed == torch.inf).all()


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "    coefficient += nan_mask\n",
    "",
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "(target < V)\n    logits_ptr += token * stride_n\n    column, live, p, c, z_y, z = ",
    "(target <= V)\n    logits_ptr += token * stride_n\n    column, live, p, c, z_y, z = ",
)
@pytest.mark.kills(
    "ual_kernels/_tokens.py",
    "(smoothing >= 0) & (smoothing <= limit)",
    "smoothing <= limit",
)
@pytest.mark.kills("ual_kernels/_arguments.py", "torch.where(scale >= 0, scale, torch.nan)", "scale")
@pytest.mark.kills("ual_kernels/_arguments.py", "total = token_scale.nansum()", "total = token_scale.sum()")
@pytest.mark.kills(
    "ual_kernels/reference.py",
    "torch.where(selected & ~valid, torch.nan, 1.0)",
    "torch.where(selected & ~valid, 1.0, 1.0)",
)
@backends
@pytest.mark.parametrize(
    ("label", "smoothing", "weight"),
    [(17, 0.5, 1.0), (-1, 0.5, 1.0), (2, 1.5, 1.0), (2, -0.1, 1.0), (2, torch.nan, 1.0), (2, 0.5, -1.0),
     (2, 0.5, torch.nan)],
)  # fmt: skip
def test_out_of_range_makes_one_token_nan(
    label: int, smoothing: float, weight: float, backend: str, device: torch.device
) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    clean = measure(cross_entropy, leaves, target, reduction="none", backend=backend)
    target[2] = label
    with torch.no_grad():
        leaves["label_smoothing"][2], leaves["sample_weight"][2] = smoothing, weight
    dirty = measure(cross_entropy, leaves, target, reduction="none", backend=backend)
    others = [0, 1, 3]
    assert dirty["loss"].isnan().tolist() == [False, False, True, False]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        assert torch.equal(dirty[name][others], clean[name][others]), name
    stats = cross_entropy(**leaves, target=target, return_statistics=True, backend=backend)[1]
    assert stats.lse.isnan().tolist() == [False, True, not 0 <= label < 17, False]
    # with "mean", an invalid weight in the divisor does not affect gradients of other tokens
    mean = measure(cross_entropy, leaves, target, backend=backend)
    assert mean["loss"].isnan()
    assert mean["input"][others].isfinite().all()


@fused
def test_out_of_range_makes_one_token_nan_in_place(backend: str, device: torch.device) -> None:
    leaf = torch.randn(3, 17, device=device, requires_grad=True)
    target = torch.tensor([1, 17, 3], device=device)
    cross_entropy(leaf * 1.0, target, reduction="sum", inplace_backward=True, backend=backend).backward()
    assert leaf.grad.isnan().all(-1).tolist() == [False, True, False]


@backends
def test_nan_logits_make_one_token_nan(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    with torch.no_grad():
        leaves["input"][2, 3] = torch.nan
    measured = measure(cross_entropy, leaves, target, reduction="none", backend=backend)
    assert measured["loss"].isnan().tolist() == [False, False, True, False]
    assert measured["input"].isnan().any(-1).tolist() == [False, False, True, False]


# ---- autograd ----


@backends
def test_backward_again_on_a_retained_graph(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    loss = cross_entropy(**leaves, target=target, backend=backend)
    first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.kills(
    "ual_kernels/ops.py",
    "def backward(ctx: Any, *_: Tensor | None) -> Any:\n        raise _differentiable_once()",
    "def backward(ctx: Any, *_: Tensor | None) -> Any:\n        return (None,) * len(ctx.needs_input_grad)",
)
@fused
@pytest.mark.parametrize(
    ("by", "inplace"),
    [
        ("input", False),
        ("label_smoothing", False),
        ("input", True),
        ("label_smoothing", True),
        ("sample_weight", True),
    ],
)
def test_a_second_derivative_is_refused(by: str, inplace: bool, backend: str, device: torch.device) -> None:
    """Otherwise autograd would treat the gradient in a gradient penalty as a constant."""
    leaves, target = logits_case(4, 17, torch.float32, device)
    loss = cross_entropy(
        leaves["input"] * 1.0,
        target,
        label_smoothing=leaves["label_smoothing"],
        sample_weight=leaves["sample_weight"],
        inplace_backward=inplace,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_the_reference_has_second_derivatives(device: torch.device) -> None:
    leaves, target = logits_case(3, 5, torch.float64, device)
    assert torch.autograd.gradgradcheck(
        lambda x, s, w: cross_entropy(x, target, label_smoothing=s, sample_weight=w, backend="reference"),
        tuple(leaves.values()),
    )


@backends
def test_no_grad_builds_no_graph_and_overwrites_nothing(backend: str, device: torch.device) -> None:
    leaves, target = logits_case(4, 17, torch.float32, device)
    logits = leaves["input"] * 1.0
    before = logits.detach().clone()
    with torch.no_grad():
        loss = cross_entropy(logits, target, inplace_backward=backend != "reference", backend=backend)
    assert not loss.requires_grad
    assert torch.equal(logits, before)


@pytest.mark.kills("ual_kernels/ops.py", "        ctx.buffer = None\n", "")
@fused
def test_in_place_backward_runs_once(backend: str, device: torch.device) -> None:
    logits = torch.randn(4, 17, device=device, requires_grad=True) * 1.0
    target = torch.randint(17, (4,), device=device)
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


@fused
def test_in_place_backward_raises_if_the_logits_were_saved(backend: str, device: torch.device) -> None:
    leaf = torch.randn(4, 17, device=device, requires_grad=True)
    target = torch.randint(17, (4,), device=device)
    logits = torch.exp(leaf)  # exp saves its result
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1.0
    norm = logits.square().sum()
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend) + norm
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@fused
def test_in_place_backward_overwrites_only_its_view(backend: str, device: torch.device) -> None:
    leaf = torch.randn(3, 2, 17, device=device, requires_grad=True)
    target = torch.randint(17, (1, 2), device=device)
    logits = leaf * 1.0
    rest = logits[1:].detach().clone()
    cross_entropy(logits[:1], target, inplace_backward=True, backend=backend).backward()
    assert torch.equal(logits[1:], rest)
    assert not leaf.grad[1:].any()
    assert leaf.grad[0].any()


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(())}, r"input must be \[..., V\]"),
        ({"input": torch.zeros(4, 0)}, r"input must be \[..., V\] with V >= 1"),
        ({"input": torch.zeros(4, 5, dtype=torch.long)}, "input must be bfloat16, float16"),
        (
            {"target": torch.zeros(4)},
            r"target must be int32 or int64 class indices \[4\] or probabilities \[4, 5\]",
        ),
        ({"target": torch.zeros(4, dtype=torch.uint8)}, "target must be int32 or int64"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \[4\]"),
        ({"target": torch.zeros(4, dtype=torch.long, device="meta")}, "target must be on cpu, got meta"),
        (
            {"label_smoothing": 1.5},
            r"label_smoothing must be in \[0, 1\], or up to V / \(V - 1\) = 1\.25 by losses\.others, got 1.5",
        ),
        ({"label_smoothing": math.nan}, "label_smoothing must be in"),
        ({"label_smoothing": torch.zeros(3)}, r"label_smoothing must have leading dimensions of input"),
        ({"label_smoothing": torch.zeros(4, 1)}, r"one of \[\[\], \[4\]\], got \[4, 1\]"),
        ({"label_smoothing": torch.zeros(4, dtype=torch.long)}, "label_smoothing must be a floating-point"),
        (
            {"sample_weight": 2.0},
            "sample_weight must be a tensor, a function of the statistics or None, got 2.0",
        ),
        ({"sample_weight": torch.zeros(5)}, "sample_weight must have leading dimensions"),
        ({"weight": torch.ones(4)}, r"weight must be \[5\], one value per class"),
        ({"weight": torch.ones(5, requires_grad=True)}, "weight is not differentiable"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"num_items": 0}, "num_items must be positive, got 0"),
        ({"num_items": torch.ones(2)}, "num_items must have one element"),
        ({"num_items": 3, "reduction": "sum"}, 'num_items is the divisor of reduction="mean"'),
        ({"softcap": 0.0}, "softcap must be a positive number or None"),
        ({"softcap": math.inf}, "softcap must be a positive number or None"),
        ({"logit_scale": math.inf}, "logit_scale must be finite"),
        ({"z_loss": -1.0}, "z_loss must be a number >= 0"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        ual_kernels.cross_entropy(**(arguments | change))


@pytest.mark.kills(
    "ual_kernels/_arguments.py", "owner = input if input._base is None else input._base", "owner = input"
)
def test_in_place_errors() -> None:
    target = torch.zeros(4, dtype=torch.long)
    leaf = torch.zeros(4, 5, requires_grad=True)
    for input, message in [
        (leaf, "would overwrite a leaf"),
        (torch.zeros(20, requires_grad=True).view(4, 5), "would overwrite a leaf"),
        ((leaf * 1.0).T.contiguous().T, "needs contiguous input"),
        (leaf.half(), "does not support float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            cross_entropy(input, target, inplace_backward=True)
    with pytest.raises(UnsupportedError, match="does not support inplace_backward"):
        cross_entropy(leaf * 1.0, target, inplace_backward=True, backend="reference")


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._arguments._INTERPRETING", False)
    arguments = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match='backend="triton" needs CUDA tensors'):
        cross_entropy(*arguments, backend="triton")
    assert cross_entropy(*arguments).item() == pytest.approx(math.log(5))

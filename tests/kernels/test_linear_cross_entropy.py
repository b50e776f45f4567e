"""linear_cross_entropy against its definition; its matrix products and allocations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import (
    HALVES,
    OPTIONS,
    as_float64,
    assert_as_accurate_as_eager,
    assert_at_the_floor,
    cross_entropy,
    frozen,
    linear_case,
    linear_cross_entropy,
    linear_definition,
    measure,
    names,
    options,
)

BACKENDS = ["torch", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)
HEAD = ("linear_weight", "linear_bias")


def judge(leaves: dict[str, Tensor], target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    assert_as_accurate_as_eager(
        actual=measure(linear_cross_entropy, leaves, target, **flags, **how),
        eager=measure(linear_definition, leaves, target, **flags, dtype=leaves["label_smoothing"].dtype),
        exact=measure(linear_definition, as_float64(leaves), target, **flags),
    )


# ---- values and gradients ----


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "torch.stack(means).sum(0) * spec.logit_scale",
    "torch.stack(means).sum(0)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "_zero_at(x, where[:, :1], here[:, :1])",
    "pass",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "            x.mul_(slope)\n", "            pass\n"
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "(of_target - s[:, None] * target.class_weight / vocab) * slope",
    "of_target * slope",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "dleft.addcmul_(factors.of_mean[:, None], t.mean, value=-1)",
    "pass",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "out.addr_(over, t.smoothed, alpha=-1.0 / vocab)", "pass"
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "    a = a * spec.logit_scale\n", "    pass\n"
)
@pytest.mark.kills("ual_kernels/_matrices.py", "out.index_add_(0, label, values)", "out[label] += values")
@pytest.mark.kills("ual_kernels/ops.py", "token_scale=dloss * token_scale", "token_scale=token_scale")
@pytest.mark.kills("ual_kernels/ops.py", "direct), torch.ones_like(dloss)", "direct), dloss")
@pytest.mark.kills("ual_kernels/ops.py", "upstream[:1].sum()[None]", "upstream.sum()[None]")
@pytest.mark.kills("ual_kernels/ops.py", "scale * state[1]", "dloss * state[1]")
@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", names([torch.float64, torch.float32]))
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag(
    flags: str, dtype: torch.dtype, head: Callable[..., dict[str, Tensor]], device: torch.device
) -> None:
    leaves, target = linear_case(24, 101, 32, dtype, device)
    judge(head(leaves), target, options(flags, 101, device), backend="torch", chunk_tokens=7)


@pytest.mark.parametrize("flags", OPTIONS)
def test_the_reference_equals_the_definition(flags: str, device: torch.device) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    judge(leaves, target, options(flags, 31, device), backend="reference")


@pytest.mark.kills(
    "ual_kernels/_torch/gemm.py",
    "                torch.mm(left, right.T, out=out)",
    "                torch.mm(left, right.T, out=out)\n                out.copy_(out.bfloat16())",
)
@pytest.mark.kills(
    "ual_kernels/_operands.py",
    "dtype if dtype == torch.bfloat16 and not per_token",
    "dtype if dtype == torch.bfloat16",
)
@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", names(HALVES))
@pytest.mark.parametrize("flags", OPTIONS)
def test_sixteen_bits_are_rounded_once(
    flags: str, dtype: torch.dtype, head: Callable[..., dict[str, Tensor]], device: torch.device
) -> None:
    """The loss and the gradients of hidden states and head are at the floor of their dtype."""
    leaves, target = linear_case(64, 1_000, 64, dtype, device)
    leaves, chosen = head(leaves), options(flags, 1_000, device)
    assert_at_the_floor(
        actual=measure(linear_cross_entropy, leaves, target, **chosen),
        exact=measure(linear_definition, as_float64(leaves), target, **chosen),
    )


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_the_error_of_each_token_is_bounded(softcap: float | None, device: torch.device) -> None:
    """With a confident prediction p - 1 cancels, so a rounded probability of the target would be visible."""
    leaves, target = linear_case(64, 1_000, 64, torch.bfloat16, device)
    leaves = frozen(leaves)
    with torch.no_grad():
        # a hidden state close to the target's row of the head makes the target likely
        pull = torch.linspace(0.0, 1.0, 64, device=device)[:, None]
        leaves["input"] += pull * leaves["linear_weight"][target.clamp(min=0)]
        leaves["label_smoothing"].zero_()
    flags = {"reduction": "none", "softcap": softcap}
    actual = measure(linear_cross_entropy, leaves, target, **flags)["input"].double()
    exact = measure(linear_definition, as_float64(leaves), target, **flags)["input"]
    selected = target != -100
    errors = ((actual - exact).norm(dim=-1) / exact.norm(dim=-1))[selected]
    # with 64 values per token the measured rounding error varies by a tenth; 1.5 times the bound is safe
    assert errors.max() <= 1.5 * torch.finfo(torch.bfloat16).eps / math.sqrt(12)


@pytest.mark.kills(
    "ual_kernels/_operands.py", "dtype if dtype == torch.bfloat16 and not per_token", "dtype if not per_token"
)
def test_float16_gradients_are_kept_in_float32(device: torch.device) -> None:
    """A millionth of a gradient is 0 in float16; the loss scale is applied later, in backward."""
    leaves, target = linear_case(64, 1_000, 64, torch.float16, device)

    def scaled(**arguments: Any) -> Tensor:
        loss = linear_cross_entropy if arguments["input"].dtype == torch.float16 else linear_definition
        return 2.0**16 * loss(**arguments, num_items=1_000_000)

    assert_at_the_floor(
        actual=measure(scaled, leaves, target), exact=measure(scaled, as_float64(leaves), target)
    )


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "            if first:\n", "            if last:\n"
)
@pytest.mark.kills("ual_kernels/_torch/linear_cross_entropy.py", "last=part.stop == count", "last=True")
@pytest.mark.parametrize("chunk_tokens", [1, 5, 24, 1_000, None])
def test_any_chunk(chunk_tokens: int | None, device: torch.device) -> None:
    leaves, target = linear_case(24, 33, 8, torch.float64, device)
    judge(leaves, target, options("all", 33, device), chunk_tokens=chunk_tokens)
    judge(leaves, target, options("mean", 33, device), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("vocab", [1, 2, 257])
def test_any_width(vocab: int, device: torch.device) -> None:
    leaves, target = linear_case(5, vocab, 8, torch.float64, device)
    ours, exact = (
        measure(loss, leaves, target, reduction="none") for loss in (linear_cross_entropy, linear_definition)
    )
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.kills(
    "ual_kernels/_matrices.py", "class_weight[part] @ block", "class_weight[: len(block)] @ block"
)
@pytest.mark.parametrize("flags", ["sum", "classes"])
def test_the_column_mean_of_a_head_of_many_blocks(flags: str, device: torch.device) -> None:
    """A block has 2^19 numbers, here 16 rows of the head."""
    leaves, target = linear_case(3, 70, 1 << 15, torch.float32, device)
    leaves, chosen = frozen(leaves), {**options(flags, 70, device), "reduction": "sum"}
    judge(leaves, target, chosen, backend="torch")


@pytest.mark.parametrize(
    "wanted", ["input", "linear_weight", "linear_bias", "label_smoothing", "sample_weight"]
)
@pytest.mark.parametrize("flags", ["mean", "none"])
def test_one_gradient_alone(flags: str, wanted: str, device: torch.device) -> None:
    leaves, target = linear_case(9, 19, 8, torch.float64, device)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    judge(leaves, target, options(flags, 19, device))


@backends
def test_without_a_bias(backend: str, device: torch.device) -> None:
    leaves, target = linear_case(9, 19, 8, torch.float64, device)
    del leaves["linear_bias"]
    judge(leaves, target, options("classes", 19, device), backend=backend)


@backends
@pytest.mark.parametrize("flags", OPTIONS)
def test_equals_cross_entropy_of_the_product(flags: str, backend: str, device: torch.device) -> None:
    leaves, target = linear_case(2 * 3, 19, 8, torch.float64, device)
    leaves = {
        name: leaf.detach().reshape(2, 3, *leaf.shape[1:]).requires_grad_() if name not in HEAD else leaf
        for name, leaf in leaves.items()
    }
    target, chosen = target.reshape(2, 3), options(flags, 19, device)

    def of_the_product(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, **rest: Any) -> Tensor:
        return cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), **rest)

    ours = measure(linear_cross_entropy, leaves, target, **chosen, backend=backend)
    theirs = measure(of_the_product, leaves, target, **chosen, backend="torch")
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12)


@backends
@pytest.mark.parametrize("flags", ["mean", "classes", "all"])
def test_statistics(flags: str, backend: str, device: torch.device) -> None:
    leaves, target = linear_case(9, 19, 8, torch.float64, device)
    target[3] = 19
    chosen = {**options(flags, 19, device), "return_statistics": True}
    logits = torch.nn.functional.linear(leaves["input"], leaves["linear_weight"], leaves["linear_bias"])
    theirs = cross_entropy(logits, target, **chosen, backend="reference")[1]
    for chunk_tokens in (2, None):
        loss, ours = linear_cross_entropy(
            **leaves, target=target, **chosen, chunk_tokens=chunk_tokens, backend=backend
        )
        assert loss.requires_grad
        assert not any(field.requires_grad for field in ours)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_equals_pytorch_for_one_smoothing(device: torch.device) -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("needs PyTorch 2.13, the first with linear_cross_entropy")
    leaves, target = linear_case(9, 37, 8, torch.float64, device)
    arguments = leaves["input"], leaves["linear_weight"], target
    weight = torch.rand(37, device=device, dtype=torch.float64)
    for reduction in ("none", "sum", "mean"):
        flags: dict[str, Any] = {"label_smoothing": 0.1, "weight": weight, "reduction": reduction}
        flags["linear_bias"] = leaves["linear_bias"]
        ours = linear_cross_entropy(*arguments, **flags)
        theirs = torch.nn.functional.linear_cross_entropy(*arguments, **flags)
        torch.testing.assert_close(ours, theirs)


# ---- matrix products and allocations ----


def work(step: Callable[[], Any]) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Return the shapes of the matrix products in a step, and its largest allocation in bytes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        step()
    names = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}
    factors = [event.input_shapes[names[event.name]] for event in seen.events() if event.name in names]
    products = [(left, right) for left, right in factors if min(*left, *right) > 1]
    largest = max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in seen.events())
    return products, largest


@pytest.mark.kills(
    "ual_kernels/functional.py",
    "head_grad=head_grad and not per_token",
    "head_grad=torch.is_grad_enabled() and not per_token",
)
def test_a_frozen_head_gets_no_gradient(device: torch.device) -> None:
    """There are two products and no third, and no allocation is as large as the head."""
    tokens, vocab, features = 12, 50, 64
    leaves, target = linear_case(tokens, vocab, features, torch.float32, device)
    leaves = frozen(leaves)
    products, largest = work(lambda: linear_cross_entropy(**leaves, target=target).backward())
    count = tokens - 1
    assert products == [([count, features], [features, vocab]), ([count, vocab], [vocab, features])]
    assert largest < vocab * features * 4
    assert leaves["linear_weight"].grad is None
    assert leaves["input"].grad is not None


def test_a_trainable_head_costs_one_product_more(device: torch.device) -> None:
    leaves, target = linear_case(12, 50, 64, torch.float32, device)
    products, _ = work(lambda: linear_cross_entropy(**leaves, target=target).backward())
    assert products == [([11, 64], [64, 50]), ([11, 50], [50, 64]), ([50, 11], [11, 64])]


def test_evaluation_computes_no_gradient(device: torch.device) -> None:
    leaves, target = linear_case(12, 50, 64, torch.float32, device)
    with torch.no_grad():
        products, _ = work(lambda: linear_cross_entropy(**leaves, target=target))
    assert products == [([11, 64], [64, 50])]


@pytest.mark.kills(
    "ual_kernels/_tokens.py",
    "return LossTokens(selected.nonzero().squeeze(1), None, None)",
    "return LossTokens(torch.arange(len(target)), selected, None)",
)
@pytest.mark.parametrize("why", ["ignored", "weight 0"])
def test_ignored_inputs_are_dropped_before_the_first_product(why: str, device: torch.device) -> None:
    leaves, target = linear_case(12, 50, 64, torch.float32, device)
    leaves = frozen(leaves)
    if why == "ignored":
        target[3:] = -100
    else:
        leaves["sample_weight"] = torch.zeros(12, device=device)
        leaves["sample_weight"][:3] = 1.0
    products, _ = work(lambda: linear_cross_entropy(**leaves, target=target).backward())
    assert products == [([2, 64], [64, 50]), ([2, 50], [50, 64])]


@pytest.mark.kills("ual_kernels/functional.py", "options.chunk_tokens or 0,", "0,")
def test_a_chunk_bounds_the_logits(device: torch.device) -> None:
    """All logits are 1 MiB; the logits of a chunk of 8 tokens are 16 KiB."""
    leaves, target = linear_case(512, 512, 4, torch.float32, device)
    leaves = frozen(leaves)
    products, largest = work(lambda: linear_cross_entropy(**leaves, target=target, chunk_tokens=8).backward())
    assert max(left[0] for left, _ in products) == 8
    assert largest <= 8 * 512 * 4


@pytest.mark.kills(
    "ual_kernels/_torch/gemm.py",
    "yield slice(tokens * i // pieces, tokens * (i + 1) // pieces)",
    "yield slice(i * most, min(tokens, (i + 1) * most))",
)
def test_chunks_are_even(device: torch.device) -> None:
    leaves, target = linear_case(11, 50, 8, torch.float32, device)
    leaves = frozen(leaves)
    products, _ = work(lambda: linear_cross_entropy(**leaves, target=target, chunk_tokens=4).backward())
    assert [left[0] for left, _ in products[::2]] == [3, 3, 4]


# ---- arguments ----


@pytest.mark.kills("ual_kernels/ops.py", "    with _as_called(inputs.input):\n", "    if True:\n")
@backends
def test_autocast_casts_the_operands_and_nothing_inside(backend: str, device: torch.device) -> None:
    """Autocast casts the operands, but does not round the products inside to 16 bits."""
    leaves, target = linear_case(64, 1_000, 64, torch.float32, device)
    chosen = options("classes", 1_000, device)
    rounded = {
        name: leaf.detach().bfloat16().requires_grad_() if leaf.ndim == 2 or name == "linear_bias" else leaf
        for name, leaf in leaves.items()
    }
    by_hand = measure(linear_cross_entropy, rounded, target, **chosen, backend=backend)

    def under_autocast(**arguments: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return linear_cross_entropy(**arguments, backend=backend)

    cast = measure(under_autocast, leaves, target, **chosen)
    for name in cast:
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], by_hand[name].float()), name


def test_autocast_during_a_backward_that_recomputes(device: torch.device) -> None:
    leaves, target = linear_case(12, 50, 8, torch.float32, device)
    loss = linear_cross_entropy(**leaves, target=target, reduction="none").sum()
    plain = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        cast = torch.autograd.grad(loss, list(leaves.values()))
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    leaves, target = linear_case(12, 50, 8, torch.float64, device)
    with torch.autocast(device.type, torch.bfloat16):
        judge(leaves, target, {})


@pytest.mark.kills("ual_kernels/_torch/gemm.py", "        settings.fp32_precision = before", "        pass")
@pytest.mark.parametrize("setting", ["none", "ieee", "bf16"])
def test_the_precision_setting_is_restored(
    setting: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn.matmul, "fp32_precision", setting)
    leaves, target = linear_case(12, 50, 8, torch.bfloat16, device)
    linear_cross_entropy(**leaves, target=target)
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


@pytest.mark.parametrize("labels", [torch.int32, torch.int64])
def test_any_strides(labels: torch.dtype, device: torch.device) -> None:
    def inside(packed: Tensor) -> Tensor:
        nowhere = torch.nan if packed.is_floating_point() else 10**9
        view = packed.new_full((*packed.shape[:-1], 2 * packed.shape[-1]), nowhere)[..., ::2]
        view.copy_(packed)
        return view

    leaves, target = linear_case(9, 33, 8, torch.float64, device)
    packed = measure(linear_cross_entropy, leaves, target)
    strided = measure(
        linear_cross_entropy,
        {name: inside(leaf.detach()).requires_grad_() for name, leaf in leaves.items()},
        inside(target.to(labels)),
    )
    for name in packed:
        torch.testing.assert_close(strided[name], packed[name], rtol=1e-12, atol=1e-12)


def test_a_tied_head_gets_both_gradients(device: torch.device) -> None:
    table = torch.randn(19, 8, device=device, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(19, (6,), device=device)

    def tied(head: Tensor) -> Tensor:
        return linear_cross_entropy(head[tokens] * 2, head, tokens.roll(-1), label_smoothing=0.1)

    assert torch.autograd.gradcheck(tied, table)


# ---- edge cases ----


@backends
@pytest.mark.parametrize("flags", ["none", "sum", "mean"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_inputs(tokens: int, flags: str, backend: str, device: torch.device) -> None:
    leaves, target = linear_case(tokens, 5, 4, torch.float64, device)
    if tokens:
        judge(leaves, target, options(flags, 5, device), backend=backend)
        return
    loss, stats = linear_cross_entropy(
        **leaves, target=target, reduction=flags, return_statistics=True, backend=backend
    )
    loss.sum().backward()
    assert stats.lse.shape == (0,)
    assert leaves["input"].grad.shape == (0, 4)
    assert not leaves["linear_weight"].grad.any()


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "        outputs.dlinear_weight.zero_()\n", ""
)
@backends
@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("flags", ["mean", "none"])
def test_all_ignored_is_zero_with_a_connected_graph(
    flags: str, head: Callable[..., dict[str, Tensor]], backend: str, device: torch.device
) -> None:
    leaves, target = linear_case(3, 17, 8, torch.bfloat16, device)
    measured = measure(
        linear_cross_entropy, head(leaves), target.fill_(-100), backend=backend, reduction=flags
    )
    for name, value in measured.items():
        assert not value.any(), name


@pytest.mark.kills("ual_kernels/functional.py", "hidden.to(acc).masked_fill(ignored, 0.0)", "hidden.to(acc)")
@backends
@pytest.mark.parametrize("nothing", [torch.nan, torch.inf])
def test_inputs_of_an_ignored_token_are_not_used(nothing: float, backend: str, device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 8, torch.float64, device)
    clean = measure(linear_cross_entropy, leaves, target, backend=backend)
    with torch.no_grad():
        for name in ("input", "label_smoothing", "sample_weight"):
            leaves[name][1] = nothing
    dirty = measure(linear_cross_entropy, leaves, target, backend=backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.kills("ual_kernels/_torch/linear_cross_entropy.py", "a = a + chunk.nan_mask", "pass")
@backends
@pytest.mark.parametrize(
    ("label", "smoothing", "weight"),
    [(17, 0.5, 1.0), (-1, 0.5, 1.0), (2, 1.5, 1.0), (2, -0.1, 1.0), (2, 0.5, -1.0), (2, 0.5, torch.nan)],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_out_of_range_makes_one_token_nan(
    softcap: float | None, label: int, smoothing: float, weight: float, backend: str, device: torch.device
) -> None:
    """With a frozen head. The gradient of a trained head is a sum over tokens and becomes NaN."""
    leaves, target = linear_case(4, 17, 8, torch.float64, device)
    flags = {"reduction": "none", "softcap": softcap, "backend": backend}
    clean = measure(linear_cross_entropy, frozen(leaves), target, **flags)
    target[2] = label
    with torch.no_grad():
        leaves["label_smoothing"][2], leaves["sample_weight"][2] = smoothing, weight
    dirty = measure(linear_cross_entropy, frozen(leaves), target, **flags)
    others = [0, 1, 3]
    assert dirty["loss"].isnan().tolist() == [False, False, True, False]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        torch.testing.assert_close(dirty[name][others], clean[name][others], rtol=1e-12, atol=1e-12)
    head = measure(linear_cross_entropy, leaves, target, **flags)["linear_weight"]
    assert head.isnan().any()


def test_masked_classes(device: torch.device) -> None:
    """A bias of -inf masks a class."""
    leaves, target = linear_case(4, 17, 8, torch.float64, device)
    target[:] = torch.tensor([0, -100, 3, 4])
    few = {name: leaf.detach()[:12] if name in HEAD else leaf.detach() for name, leaf in leaves.items()}
    few["label_smoothing"].zero_()
    all_ = few | {
        "linear_weight": leaves["linear_weight"].detach(),
        "linear_bias": leaves["linear_bias"].detach(),
    }
    all_["linear_bias"][12:] = -torch.inf
    shorter, longer = (
        measure(linear_cross_entropy, case | {"input": case["input"].clone().requires_grad_()}, target)
        for case in (few, all_)
    )
    for name in shorter:
        torch.testing.assert_close(longer[name], shorter[name])


# ---- autograd ----


@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_again_on_a_retained_graph(
    reduction: str, head: Callable[..., dict[str, Tensor]], device: torch.device
) -> None:
    leaves, target = linear_case(4, 17, 8, torch.float32, device)
    leaves = head(leaves)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    loss = linear_cross_entropy(**leaves, target=target, reduction=reduction).sum()
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.kills(
    "ual_kernels/_matrices.py", "torch.mul(block, of_block, out=product)", "product.copy_(block)"
)
def test_a_power_of_two_upstream_scales_a_16_bit_heads_gradient_exactly(device: torch.device) -> None:
    leaves, target = linear_case(9, 301, 8, torch.bfloat16, device)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    loss = linear_cross_entropy(**leaves, target=target)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    scaled = torch.autograd.grad(loss, wanted, torch.full_like(loss, 0.25))
    for a, b, leaf in zip(plain, scaled, wanted, strict=True):
        assert b.dtype == leaf.dtype
        assert torch.equal(a * 0.25, b)


@pytest.mark.kills("ual_kernels/ops.py", "or _keeps_graph() or", "or")
@pytest.mark.kills("ual_kernels/ops.py", "overwrite=_reads_once(upstream[0]))", "overwrite=False)")
@pytest.mark.kills("ual_kernels/_matrices.py", "    if out is None:\n", "    if True:\n")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_backward_scales_the_saved_gradient_in_place(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """A second [N, D] would double what a frozen head allocates beyond the returned gradient."""
    leaves, target = linear_case(6, 31, 8, dtype, device)
    leaves = frozen(leaves)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = linear_cross_entropy(**leaves, target=target, backend=backend)
    places = {tensor.data_ptr() for tensor in saved if tensor.shape == leaves["input"].shape}
    upstream = torch.full_like(loss, 0.25)
    first, second = (
        torch.autograd.grad(loss, leaves["input"], upstream, retain_graph=True)[0] for _ in range(2)
    )
    (last,) = torch.autograd.grad(loss, leaves["input"], upstream)
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.data_ptr() not in places
    assert last.data_ptr() in places


@pytest.mark.kills("ual_kernels/ops.py", " or _is_batch(upstream):", ":")
def test_a_batch_of_upstream_gradients_reads_the_saved_gradient_for_each(device: torch.device) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float32, device)
    leaves = frozen(leaves)
    loss = linear_cross_entropy(**leaves, target=target, backend="triton")
    upstream = torch.tensor([1.0, 0.5, 2.0], device=device)
    one_by_one = [torch.autograd.grad(loss, leaves["input"], u, retain_graph=True)[0] for u in upstream]
    (batch,) = torch.autograd.grad(loss, leaves["input"], upstream, is_grads_batched=True)
    assert torch.equal(batch, torch.stack(one_by_one))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("by", ["input", *HEAD, "label_smoothing", "sample_weight"])
def test_a_second_derivative_is_refused(by: str, reduction: str, device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 8, torch.float32, device)
    loss = linear_cross_entropy(**leaves, target=target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_same_inputs_same_bits(device: torch.device) -> None:
    leaves, target = linear_case(64, 101, 16, torch.bfloat16, device)
    target[target != -100] = 7  # every token adds to one row of the head's gradient
    first, second = (measure(linear_cross_entropy, leaves, target) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_weight": torch.zeros(5)}, r"linear_weight must be \[V, D\] with V >= 1, got \[5\]"),
        ({"linear_weight": torch.zeros(0, 3)}, r"linear_weight must be \[V, D\] with V >= 1, got \[0, 3\]"),
        (
            {"linear_weight": torch.zeros(5, 2)},
            r"input must be \[..., 2\] to match linear_weight",
        ),
        ({"linear_weight": torch.zeros(5, 3).double()}, "linear_weight must be torch.float32 like input"),
        ({"linear_weight": torch.zeros(5, 3, device="meta")}, "linear_weight must be on cpu, got meta"),
        ({"input": torch.zeros(())}, r"input must be \[..., 3\]"),
        ({"input": torch.zeros(4, 3, dtype=torch.long)}, "input must be bfloat16, float16"),
        ({"linear_bias": torch.zeros(4)}, r"linear_bias must be \[5\], got \[4\]"),
        ({"target": torch.zeros(4)}, "target must be class indices or a SparseTarget, .* got torch.float32"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \[4\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be an integer >= 1 or None, got 0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\]"),
        ({"weight": torch.ones(3)}, r"weight must be \[5\]"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"backend": "liger"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "input": torch.zeros(4, 3),
        "linear_weight": torch.zeros(5, 3),
        "target": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))

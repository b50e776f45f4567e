"""The Triton backend of linear_cross_entropy against the definition, in all variants."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.launches import watching
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
from ual_kernels import UnsupportedError, losses, ops
from ual_kernels._operands import ALL_TOKENS, LinearInputs, LinearSpec
from ual_kernels._triton import linear_cross_entropy as kernels


def trainable(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with a trained head and a frozen bias; a trained bias needs the exact variant."""
    return {name: leaf.detach().requires_grad_(name != "linear_bias") for name, leaf in leaves.items()}


heads = pytest.mark.parametrize("head", [frozen, trainable])
variants = pytest.mark.parametrize("variant", ["tma", "pointer", "cublas", "exact"], indirect=True)


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "VARIANT", request.param)
    return str(request.param)


def ours(**arguments: Any) -> Any:
    return linear_cross_entropy(**arguments, backend="triton")


def at_the_floor(leaves: dict[str, Tensor], target: Tensor, **flags: Any) -> None:
    assert_at_the_floor(
        actual=measure(ours, leaves, target, **flags),
        exact=measure(linear_definition, as_float64(leaves), target, **flags),
    )


# ---- values and gradients ----


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "rate = tl.where(rounded > 0.0, coefficient * rest / rounded, rate)",
    "rate = tl.where(rounded > 0.0, rest / rounded, rate)",
)
@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "at_target = (at_target - s * c_y / V) * slope",
    "at_target = at_target * slope",
)
@variants
@heads
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.slow(spare=8)
def test_every_flag(
    flags: str, head: Callable[..., dict[str, Tensor]], variant: str, device: torch.device
) -> None:
    """Tokens, classes, features and chunks are not multiples of tiles; the second token is ignored."""
    leaves, target = linear_case(19, 131, 48, torch.bfloat16, device)
    leaves, chosen = head(leaves), options(flags, 131, device)
    assert_at_the_floor(
        actual=measure(ours, leaves, target, **chosen, chunk_tokens=17),
        exact=measure(linear_definition, as_float64(leaves), target, **chosen),
    )


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "_HEADROOM if self.x_dtype == torch.float16 else 0.0",
    "_HEADROOM * 2",
)
@pytest.mark.parametrize("head", [frozen, trainable, dict], ids=["frozen", "trainable", "bias"])
@pytest.mark.parametrize("dtype", names([torch.float32, torch.float16]))
@pytest.mark.parametrize("flags", ["mean", "softcap", "all"])
def test_other_dtypes(
    flags: str, dtype: torch.dtype, head: Callable[..., dict[str, Tensor]], device: torch.device
) -> None:
    leaves, target = linear_case(19, 131, 24, dtype, device)
    leaves, chosen = head(leaves), options(flags, 131, device)
    actual = measure(ours, leaves, target, **chosen)
    exact = measure(linear_definition, as_float64(leaves), target, **chosen)
    if dtype in HALVES:
        assert_at_the_floor(actual, exact)
        return
    eager = measure(linear_definition, leaves, target, **chosen, dtype=torch.float32)
    assert_as_accurate_as_eager(actual, eager, exact)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "outputs.dlinear_bias.add_(of_x @ x)",
    "outputs.dlinear_bias.add_(of_x @ x.bfloat16().float())",
)
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_a_trained_bias(flags: str, device: torch.device) -> None:
    leaves, target = linear_case(24, 131, 48, torch.bfloat16, device)
    at_the_floor(leaves, target, **options(flags, 131, device))


@variants
def test_without_a_bias(variant: str, device: torch.device) -> None:
    leaves, target = linear_case(37, 101, 32, torch.bfloat16, device)
    del leaves["linear_bias"]
    at_the_floor(leaves, target, **options("classes", 101, device))


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "(column[None, :] == y[:, None]) | (column[None, :] >= V)",
    "column[None, :] == y[:, None]",
)
@variants
@pytest.mark.parametrize("vocab", [1, 2, 64, 65])
def test_any_width(vocab: int, variant: str, device: torch.device) -> None:
    leaves, target = linear_case(5, vocab, 16, torch.bfloat16, device)
    leaves = {name: leaf.detach().requires_grad_(name == "input") for name, leaf in leaves.items()}
    actual = measure(ours, leaves, target, reduction="none")
    exact = measure(linear_definition, as_float64(leaves), target, reduction="none")
    torch.testing.assert_close(actual["loss"].double(), exact["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual["input"].double(), exact["input"], rtol=1e-2, atol=1e-2)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "(column[None, :] == y[:, None]) | (column[None, :] >= V)",
    "column[None, :] >= V",
)
@variants
def test_confident_predictions_are_at_the_floor(variant: str, device: torch.device) -> None:
    """With a confident prediction p - 1 cancels; the error of each token is bounded."""
    leaves, target = linear_case(24, 131, 48, torch.bfloat16, device)
    leaves = frozen(leaves)
    with torch.no_grad():
        pull = torch.linspace(0.0, 1.5, 24, device=device)[:, None]
        leaves["input"] += pull * leaves["linear_weight"][target.clamp(min=0)]
        leaves["label_smoothing"].zero_()
    actual = measure(ours, leaves, target, reduction="none")["input"].double()
    exact = measure(linear_definition, as_float64(leaves), target, reduction="none")["input"]
    selected = target != -100
    errors = ((actual - exact).norm(dim=-1) / exact.norm(dim=-1))[selected]
    assert errors.max() <= 1.5 * torch.finfo(torch.bfloat16).eps / 12**0.5


# ---- far tokens ----


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "in_range = total < _LARGEST_TOTAL",
    "in_range = total != 0.5",
)
@variants
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("distance", [30.0, 80.0, 105.0, 115.0, 125.0, 200.0, 2_000.0])
@pytest.mark.slow(spare=8)
def test_a_target_far_below_the_maximum(
    distance: float, statistics: bool, variant: str, device: torch.device
) -> None:
    leaves, target = linear_case(6, 101, 16, torch.bfloat16, device)
    leaves = frozen(leaves)
    with torch.no_grad():
        target[3] = 7
        leaves["linear_bias"][7] = -distance
        leaves["linear_bias"][8] = distance / 8
    flags = {"reduction": "none"}
    exact = measure(linear_definition, as_float64(leaves), target, **flags)
    actual = measure(ours, leaves, target, **flags)
    assert_at_the_floor(actual, exact)
    if statistics:
        compare_statistics(leaves, target)


@variants
@pytest.mark.parametrize("masked", ["target", "others", "both"])
def test_masked_classes(masked: str, variant: str, device: torch.device) -> None:
    """Logits of -inf without smoothing: a class without mass, or a target with an infinite loss."""
    leaves, target = linear_case(4, 77, 16, torch.bfloat16, device)
    leaves = frozen(leaves)
    target[:] = torch.tensor([0, -100, 3, 4])
    out = {"target": [3], "others": range(40, 77), "both": [3, *range(40, 77)]}[masked]
    with torch.no_grad():
        leaves["linear_bias"][list(out)] = -torch.inf
        leaves["label_smoothing"].zero_()
    wide = as_float64(leaves)
    logits = torch.nn.functional.linear(wide["input"], wide["linear_weight"], wide["linear_bias"])
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (gradient,) = torch.autograd.grad(exact[[0, 3]].sum(), wide["input"])
    input = leaves["input"]
    loss = linear_cross_entropy(
        input, leaves["linear_weight"], target, linear_bias=leaves["linear_bias"], label_smoothing=0.0,
        reduction="none", backend="triton",
    )  # fmt: skip
    # sums are relative to the reference point; differences reach 40
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=8 * 40 * torch.finfo(torch.float32).eps)
    (actual,) = torch.autograd.grad(loss, input, torch.tensor([1.0, 1, 0, 1], device=device))
    tokens = [0, 3]
    torch.testing.assert_close(actual[tokens].double(), gradient[tokens], rtol=1e-2, atol=1e-2)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "_LARGEST_TOTAL: tl.constexpr = tl.constexpr(2.0**100)",
    "_LARGEST_TOTAL: tl.constexpr = tl.constexpr(0.0)",
)
def test_only_a_far_token_is_recomputed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel for far tokens, far tokens are not finite and other tokens do not change."""
    leaves, target = linear_case(6, 101, 16, torch.bfloat16, device)
    leaves = frozen(leaves)
    target[:] = torch.tensor([1, -100, 2, 7, 3, 4])
    with torch.no_grad():
        leaves["linear_bias"][7] = -200.0
    complete = measure(ours, leaves, target, reduction="none")
    monkeypatch.setattr(kernels, "_far_tokens_kernel", {(1,): lambda *_, **__: None})
    without = measure(ours, leaves, target, reduction="none")
    near = [0, 1, 2, 4, 5]
    for name in ("loss", "input"):
        assert torch.equal(complete[name][near], without[name][near])
        assert not torch.isfinite(without[name][3]).all()


# ---- statistics ----


def compare_statistics(leaves: dict[str, Tensor], target: Tensor, **flags: Any) -> None:
    wide = as_float64(leaves)
    logits = torch.nn.functional.linear(wide["input"], wide["linear_weight"], wide["linear_bias"])
    theirs = cross_entropy(logits, target, **flags, return_statistics=True, backend="reference")[1]
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            mine = ours(**leaves, target=target, **flags, return_statistics=True)[1]
        for field, truth in theirs._asdict().items():
            value = getattr(mine, field)
            if value.is_floating_point():
                scale = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 1.0
                # sums are relative to the reference point; differences reach 40
                atol = 16 * torch.finfo(torch.float32).eps * (40 + scale)
                torch.testing.assert_close(
                    value.double(), truth, rtol=0, atol=atol, equal_nan=True, msg=field
                )
            else:
                assert torch.equal(value, truth), field


@pytest.mark.kills(
    "ual_kernels/_triton/math.py",
    "tl.maximum(high, other_high), merge_two_largest(high, second, other_high, other_second)",
    "tl.maximum(high, other_high), tl.maximum(second, other_second)",
)
@variants
@pytest.mark.parametrize("flags", ["mean", "classes", "scaled", "all"])
@pytest.mark.slow(spare=4)
def test_statistics(flags: str, variant: str, device: torch.device) -> None:
    leaves, target = linear_case(24, 131, 48, torch.bfloat16, device)
    target[3] = 131
    with torch.no_grad():
        # confident predictions, so that the target is often the largest or second largest logit
        leaves["input"][8:] += leaves["linear_weight"][target[8:]] * 0.5
        # two equal largest logits in one tile for every token
        leaves["linear_weight"][8] = leaves["linear_weight"][7]
        leaves["linear_bias"][7:9] = 30.0
    compare_statistics(frozen(leaves), target, **options(flags, 131, device))


# ---- ignored and invalid tokens ----


@variants
@heads
@pytest.mark.parametrize("flags", ["mean", "none"])
def test_all_ignored_is_zero(
    flags: str, head: Callable[..., dict[str, Tensor]], variant: str, device: torch.device
) -> None:
    leaves, target = linear_case(3, 17, 16, torch.bfloat16, device)
    for name, value in measure(ours, head(leaves), target.fill_(-100), reduction=flags).items():
        assert not value.any(), name


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "nan_mask = tl.where(valid | (target == ignore_index), 0.0, nan)",
    "nan_mask = tl.where(valid | (target == ignore_index), 0.0, 0.0)",
)
@variants
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("label", "smoothing", "weight"),
    [(17, 0.5, 1.0), (-1, 0.5, 1.0), (2, 1.5, 1.0), (2, 0.5, -1.0)],
)
def test_out_of_range_makes_one_token_nan(
    label: int, smoothing: float, weight: float, softcap: float | None, variant: str, device: torch.device
) -> None:
    leaves, target = linear_case(4, 17, 16, torch.bfloat16, device)
    leaves = frozen(leaves)
    flags = {"reduction": "none", "softcap": softcap}
    clean = measure(ours, leaves, target, **flags)
    target[2] = label
    with torch.no_grad():
        leaves["label_smoothing"][2], leaves["sample_weight"][2] = smoothing, weight
    dirty = measure(ours, leaves, target, **flags)
    assert dirty["loss"].isnan().tolist() == [False, False, True, False]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        assert torch.equal(dirty[name][[0, 1, 3]], clean[name][[0, 1, 3]]), name


@variants
def test_inputs_of_an_ignored_token_are_not_used(variant: str, device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 16, torch.bfloat16, device)
    clean = measure(ours, leaves, target)
    with torch.no_grad():
        for name in ("input", "label_smoothing", "sample_weight"):
            leaves[name][1] = torch.nan
    dirty = measure(ours, leaves, target)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


# ---- products, determinism, operator checks ----


@variants
def test_no_gradient_stops_after_the_loss(
    variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    expected = ours(**leaves, target=target)
    products: list[tuple[int, int]] = []
    multiply, add = kernels.product, kernels.add_product

    def added(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        products.append((a.shape[0], b.shape[1]))
        return add(out, a, b)

    def counted(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        products.append((a.shape[0], b.shape[1]))
        return multiply(a, b, out)

    monkeypatch.setattr(kernels, "product", counted)
    monkeypatch.setattr(kernels, "add_product", added)
    monkeypatch.setattr(kernels.Platform, "of", lambda tensor: kernels.Platform("interpreter", 1, waves=1))
    with torch.no_grad():
        assert torch.equal(ours(**leaves, target=target), expected)
    logits = {"exact": [(11, 101)], "cublas": [(11, 64), (11, 37)]}.get(variant, [])
    assert products == logits
    products.clear()
    measure(ours, frozen(leaves), target)
    slices = 1 if variant == "exact" else 2
    assert sorted(products) == sorted([*logits, *[(11, 16)] * slices])


@variants
def test_same_inputs_same_bits(variant: str, device: torch.device) -> None:
    leaves, target = linear_case(24, 101, 16, torch.bfloat16, device)
    target[target != -100] = 7
    first, second = (measure(ours, trainable(leaves), target) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@variants
@pytest.mark.parametrize("dtype", names([torch.bfloat16, torch.float32]))
def test_opcheck(dtype: torch.dtype, variant: str, device: torch.device) -> None:
    leaves, target = linear_case(5, 13, 16, dtype, device)
    smoothing, scale = leaves["label_smoothing"], leaves["sample_weight"]
    adapter = torch.randn(2, 16, device=device), torch.randn(13, 2, device=device)
    for *gradients, lora in (
        (True, True, False, False, False, False, (None, None)),
        (True, False, False, False, False, True, (None, None)),
        (False, False, False, False, False, False, (None, None)),
        (True, True, False, True, False, False, adapter),
    ):
        torch.library.opcheck(
            ops.linear_cross_entropy_op,
            (
                *LinearInputs(
                    leaves["input"], leaves["linear_weight"], None, *lora, target, smoothing, scale, None
                ),
                *LinearSpec(
                    -100, 0.0, 1.0, 0.5, 1e-3, 0.0, True, *gradients, ALL_TOKENS, 2, "high", "triton"
                ),
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "at_target -= coefficient * rest",
    "at_target += coefficient * rest",
)
@pytest.mark.parametrize("max_loss_tokens", [-1, 10, 11, 12], ids=["counted", "told", "more", "all"])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_equals_the_torch_backend(
    softcap: float, adapter: bool, max_loss_tokens: int, device: torch.device
) -> None:
    """All outputs of the operator, including unused state, in float32."""
    leaves, target = linear_case(12, 67, 24, torch.float32, device)
    target[4], target[7] = 67, -100
    with torch.no_grad():
        leaves["input"][7] = torch.nan
    weight = torch.linspace(0.0, 2.0, 67, device=device)
    lora = (torch.randn(3, 24, device=device), torch.randn(67, 3, device=device)) if adapter else (None, None)
    detached = {name: leaf.detach() for name, leaf in leaves.items()}
    inputs = LinearInputs(
        detached["input"], detached["linear_weight"], detached["linear_bias"], *lora, target,
        detached["label_smoothing"], detached["sample_weight"], weight,
    )  # fmt: skip
    gradients = (
        True,
        True,
        True,
        adapter,
        False,
        False,
    )  # of input, head, bias, adapter, probabilities; per_token
    flags = (-100, softcap, 0.5, 0.25, 1e-3, 0.0, True, *gradients, max_loss_tokens, 5, "high")
    theirs = ops.linear_cross_entropy_op(*inputs, *LinearSpec(*flags, "torch"))
    mine = ops.linear_cross_entropy_op(*inputs, *LinearSpec(*flags, "triton"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)


def lora_definition(linear_weight: Tensor, lora_a: Tensor, lora_b: Tensor, **rest: Any) -> Tensor:
    return linear_definition(linear_weight=linear_weight + 0.5 * lora_b @ lora_a, **rest)


def lora_loss(lora_a: Tensor, lora_b: Tensor, **rest: Any) -> Tensor:
    return ours(linear_lora=(lora_a, lora_b, 0.5), **rest)  # type: ignore[no-any-return]


@heads
@pytest.mark.parametrize("flags", ["mean", "none", "all"])
@pytest.mark.slow(spare=3)
def test_an_adapter_on_the_head(
    flags: str, head: Callable[..., dict[str, Tensor]], device: torch.device
) -> None:
    """A and B are float32 with bfloat16 hidden states, and are not merged into the 16-bit head."""
    leaves, target = linear_case(48, 301, 32, torch.bfloat16, device)
    leaves = head(leaves)
    leaves["lora_a"] = (torch.randn(4, 32, device=device) / 4).requires_grad_()
    leaves["lora_b"] = torch.randn(301, 4, device=device).requires_grad_()
    chosen = options(flags, 301, device)
    actual = measure(lora_loss, leaves, target, **chosen)
    exact = measure(lora_definition, as_float64(leaves), target, **chosen)
    for name in ("lora_a", "lora_b"):
        # sums over the vocabulary of probabilities that are stored in 16 bits
        error = (actual.pop(name) - exact[name]).norm() / exact.pop(name).norm()
        assert error <= torch.finfo(torch.bfloat16).eps / 12**0.5
    assert_at_the_floor(actual, exact)


@variants
def test_numbers_chosen_from_the_statistics(variant: str, device: torch.device) -> None:
    leaves, target = linear_case(24, 101, 32, torch.bfloat16, device)
    leaves = {name: leaf.detach() for name, leaf in trainable(leaves).items()}
    del leaves["sample_weight"], leaves["label_smoothing"]
    for name in ("input", "linear_weight"):
        leaves[name].requires_grad_()
    statistics = ours(**leaves, target=target, return_statistics=True)[1]
    by_hand = measure(
        ours,
        leaves,
        target,
        label_smoothing=statistics.top1_prob.nan_to_num(0.0) / 2,
        sample_weight=statistics.entropy.nan_to_num(0.0),
        reduction="sum",
        chunk_tokens=7,
    )
    chosen = measure(
        ours,
        leaves,
        target,
        label_smoothing=lambda statistics: statistics.top1_prob / 2,
        sample_weight=lambda statistics: statistics.entropy,
        reduction="sum",
        chunk_tokens=7,
    )
    for name in by_hand:
        torch.testing.assert_close(chosen[name], by_hand[name], rtol=1e-5, atol=1e-5)


@variants
def test_smoothing_learns_under_a_weight_from_the_statistics(variant: str, device: torch.device) -> None:
    leaves, target = linear_case(24, 101, 32, torch.bfloat16, device)
    weighted = {name: leaf for name, leaf in frozen(leaves).items() if name != "sample_weight"}
    weight = ours(**weighted, target=target, return_statistics=True)[1].entropy.nan_to_num(0.0)
    by_hand = measure(ours, weighted, target, sample_weight=weight, reduction="none")
    chosen = measure(
        ours, weighted, target, sample_weight=lambda statistics: statistics.entropy, reduction="none"
    )
    for name in by_hand:
        torch.testing.assert_close(chosen[name], by_hand[name], rtol=1e-5, atol=1e-5)


@variants
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upper_bound_that_is_too_small_gives_nan(
    reduction: str, variant: str, device: torch.device
) -> None:
    leaves, target = linear_case(12, 67, 16, torch.bfloat16, device)
    found = measure(ours, frozen(leaves), target, reduction=reduction, max_loss_tokens=5)
    selected = target != -100
    assert found["loss"][selected if reduction == "none" else ...].isnan().all()
    assert found["input"][selected].isnan().all()


def test_fast_rounds_logits(device: torch.device) -> None:
    """The error is that of bfloat16 logits; between 8 and 16 half a unit in the last place is 2^-5."""
    leaves, target = linear_case(64, 1_000, 64, torch.bfloat16, device)
    leaves = frozen(leaves)
    del leaves["linear_bias"]
    exact = measure(linear_definition, as_float64(leaves), target)["input"]
    errors = {
        precision: (
            (measure(ours, leaves, target, precision=precision)["input"] - exact).norm() / exact.norm()
        )
        for precision in ("high", "fast")
    }
    assert errors["high"] <= torch.finfo(torch.bfloat16).eps / 12**0.5 < errors["fast"] <= 2**-5


# ---- errors ----


def test_a_filter_is_refused(device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 16, torch.bfloat16, device)
    with pytest.raises(UnsupportedError, match="does not support gradient_filter"):
        ours(**leaves, target=target, gradient_filter=1e-3)


# ---- sizes of chunks and slices ----


@pytest.mark.parametrize("budget", [1 << 29, 1 << 30])
@pytest.mark.parametrize("vocab", [32_000, 128_256, 262_144])
def test_an_exact_chunk_fits_its_budget_in_whole_tiles(vocab: int, budget: int) -> None:
    tokens = kernels.exact_tokens(vocab, budget)
    assert tokens % 128 == 0
    assert budget // (1 << 20) <= tokens <= 4_096
    assert tokens * vocab * 4 <= 1.12 * budget


def test_a_vocabulary_beyond_the_budget_still_gets_a_tile() -> None:
    assert kernels.exact_tokens(1 << 24) == 128


@pytest.mark.parametrize("vocab", [1_000, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("tokens", [1, 100, 1_024, 8_192])
def test_a_slice_fills_whole_waves_and_stays_small(tokens: int, vocab: int) -> None:
    h100 = kernels.Platform("sm_90", 132)
    width = kernels.slice_columns(tokens, vocab, 128, 256, h100)
    assert width % 256 == 0
    assert 2 * tokens * width <= 300e6 or width == 256
    if width < vocab:
        tiles = -(-tokens // 128) * width // 256
        assert tiles / 132 > 0.97 * -(-tiles // 132), "the last wave is full"


def test_a_slice_of_the_largest_block_is_32_whole_waves() -> None:
    assert kernels.slice_columns(8_192, 128_256, 128, 256, kernels.Platform("sm_90", 132)) == 66 * 256


def test_chunks_cover_every_token_once_and_start_on_tiles() -> None:
    for tokens in (1, 127, 128, 4_097, 8_192):
        for most in (128, 2_048, 4_096):
            chunks = list(kernels._chunks(tokens, most))
            assert [token for c in chunks for token in range(c.start, c.stop)] == list(range(tokens))
            assert all(c.start % 128 == 0 and c.stop - c.start <= most for c in chunks)
            assert len(chunks) == -(-tokens // most)


def test_float64_is_refused(device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 16, torch.float64, device)
    with pytest.raises(UnsupportedError, match='does not support float64; use backend="torch"'):
        ours(**leaves, target=target)


# ---- alignment, rounding, NaN, launch order, chunks ----


def moved(tensor: Tensor, elements: int) -> Tensor:
    """Copy a tensor into a flat buffer, at an offset of some elements."""
    buffer = tensor.new_empty(tensor.numel() + elements)
    view = buffer[elements:].view(tensor.shape)
    view.copy_(tensor.detach())
    return view


def linear_spec(**changes: Any) -> LinearSpec:
    gradients = (True, False, False, False, False, False)
    flags = (-100, 0.0, 1.0, 1.0, 0.0, 0.0, False, *gradients, ALL_TOKENS, 0, "high", "triton")
    return LinearSpec(*flags)._replace(**changes)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py", "weight.data_ptr() % 16 == 0", "weight.data_ptr() % 2 == 0"
)
@pytest.mark.parametrize(
    ("features", "start", "expected"),
    [
        (32, 0, "tma"),
        (24, 0, "tma"),
        (32, 1, "pointer"),
        (32, 8, "tma"),
        (20, 0, "cublas"),
        (24, 4, "cublas"),
    ],
)
def test_descriptors_need_16_byte_alignment(
    features: int, start: int, expected: str, device: torch.device
) -> None:
    head = moved(torch.randn(50, features, device=device).bfloat16(), start)
    hidden, numbers = head[:4], torch.zeros(4, device=device)
    inputs = LinearInputs(hidden, head, None, None, None, numbers.long(), numbers, numbers, None)
    assert kernels.choose_variant(inputs, linear_spec(), head) == expected


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "return hidden.clone() if hidden.data_ptr() % 16 else hidden",
    "return hidden",
)
@pytest.mark.parametrize("trained", [False, True])
def test_views_into_flat_buffers(
    trained: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and a head with an alignment of 2 bytes, as in flattened parameters."""
    described: list[int] = []
    make = kernels._descriptor

    def recorded(tensor: Tensor, block: list[int], stride: int) -> Any:
        described.append(tensor.data_ptr() % 16)
        return make(tensor, block, stride)

    monkeypatch.setattr(kernels, "_descriptor", recorded)
    leaves, target = linear_case(24, 101, 32, torch.bfloat16, device)
    target.clamp_(min=0)  # no token is ignored, so nothing is gathered
    leaves = trainable(leaves) if trained else frozen(leaves)
    plain = measure(ours, leaves, target)
    assert described
    assert set(described) == {0}
    for name in ("input", "linear_weight"):
        leaves[name] = moved(leaves[name], 3).requires_grad_(leaves[name].requires_grad)
        shifted = measure(ours, leaves, target)
        assert set(described) == {0}
        for key in plain:
            torch.testing.assert_close(shifted[key], plain[key], rtol=2e-2, atol=1e-6)


def test_every_tokens_logits_start_on_16_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stride of logits is padded for an odd vocabulary, because cuBLAS has no fast kernel otherwise."""
    strides: list[int] = []
    multiply = kernels.product

    def recorded(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None and out.shape[1] != 16:
            strides.append(out.stride(0))
        return multiply(a, b, out)

    monkeypatch.setattr(kernels, "product", recorded)
    for variant in ("exact", "cublas"):
        monkeypatch.setattr(kernels, "VARIANT", variant)
        leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
        at_the_floor(frozen(leaves), target)
    assert strides
    assert all(stride % 8 == 0 for stride in strides)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "(x.to(tl.int32, bitcast=True) + 0x8000)",
    "x.to(tl.int32, bitcast=True)",
)
def test_rounding_by_integers(device: torch.device) -> None:
    """Rounds to nearest like hardware, except ties. Infinity stays; a NaN of all ones becomes -0."""
    bits = torch.randint(0, 0x7F80_0000 - 0x8000, (4_096,), device=device, dtype=torch.int32)
    bits = bits[(bits & 0xFFFF) != 0x8000]
    special = torch.tensor([0, 0x7F80_0000, 0x7FFF_FFFF], device=device, dtype=torch.int32)
    x = torch.cat([bits, special]).view(torch.float32)
    stored = torch.empty(8_192, device=device, dtype=torch.bfloat16)
    wide = torch.empty(8_192, device=device)
    _rounding_kernel[(1,)](x, stored, wide, len(x), BLOCK=8_192)
    stored, wide = stored[: len(x)], wide[: len(x)]
    assert torch.equal(stored[:-1], x[:-1].bfloat16())
    assert torch.equal(wide[:-1], stored[:-1].float())
    assert stored[-1].view(torch.int16).item() == -0x8000


@triton.jit
def _rounding_kernel(x_ptr, stored_ptr, wide_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    stored, wide = kernels._round_to_bfloat16(tl.load(x_ptr + i, mask=i < N, other=0.0))
    tl.store(stored_ptr + i, stored, mask=i < N)
    tl.store(wide_ptr + i, wide, mask=i < N)


@variants
@pytest.mark.parametrize("trained", [False, True])
def test_nan_hidden_states_make_one_token_nan(trained: bool, variant: str, device: torch.device) -> None:
    """The total of a token with NaN inputs is NaN, and so are its loss and gradient, for any x."""
    leaves, target = linear_case(6, 101, 16, torch.bfloat16, device)
    leaves = trainable(leaves) if trained else frozen(leaves)
    clean = measure(ours, leaves, target, reduction="none")
    with torch.no_grad():
        leaves["input"][3] = torch.nan
    found = measure(ours, leaves, target, reduction="none")
    others = torch.arange(6, device=device) != 3
    assert found["loss"].isnan().tolist() == (~others).tolist()
    assert found["input"][3].isnan().all()
    assert torch.equal(found["loss"][others], clean["loss"][others])
    if not trained:
        assert torch.equal(found["input"][others], clean["input"][others])


def test_the_mean_is_launched_before_the_count_is_waited_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, the pass over the head overlaps the synchronization for the number of loss tokens."""
    order: list[str] = []
    mean, select = kernels.column_mean, kernels.select_loss_tokens

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(kernels, "column_mean", recorded("mean", mean))
    monkeypatch.setattr(kernels, "select_loss_tokens", recorded("count", select))
    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    ours(**frozen(leaves), target=target)
    assert order.index("mean") < order.index("count")


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "masked = tokens.selected is not None and sums",
    "masked = sums",
)
@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "masked = tokens.selected is not None and sums",
    "masked = False",
)
@pytest.mark.parametrize("learn", [frozen, trainable])
@pytest.mark.parametrize("flags", [{}, {"compact": False}], ids=["compact", "not-compact"])
@pytest.mark.parametrize("everything", [False, True])
def test_hidden_states_are_copied_only_where_necessary(
    everything: bool, flags: dict[str, Any], learn: Callable[..., Any], device: torch.device
) -> None:
    """Ignored tokens are dropped by a copy. Where they are kept, a frozen head reads the input itself."""
    seen: list[int] = []

    @contextmanager
    def look(arguments: dict[str, Any]) -> Iterator[None]:
        seen.append(arguments["e_ptr"].data_ptr())
        yield

    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    if everything:
        target.clamp_(min=0)
    leaves = learn(leaves)
    with watching(kernels, "_prepare_kernel", look):
        ours(**leaves, target=target, **flags)
    read_in_place = learn is frozen if flags else everything
    assert (seen == [leaves["input"].data_ptr()]) is read_in_place


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "return (in_range == 0) & (target != ignore_index)",
    "return in_range == 0",
)
@pytest.mark.kills("ual_kernels/_triton/linear_cross_entropy.py", "de = tl.where(selected, de, 0.0)", "pass")
def test_an_ignored_token_of_nan_is_not_computed_again(device: torch.device) -> None:
    """Padding may hold NaN in many tokens, and computing one token again takes as long as thousands."""
    tables: list[Tensor] = []

    @contextmanager
    def look(arguments: dict[str, Any]) -> Iterator[None]:
        tables.append(arguments["table_ptr"].clone())
        yield
        tables.append(arguments["table_ptr"].clone())

    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    target[3:] = -100
    leaves = frozen(leaves)
    with torch.no_grad():
        leaves["input"][3:] = torch.nan
    with watching(kernels, "_far_tokens_kernel", look):
        gradient = measure(ours, leaves, target, compact=False)["input"]
    before, after = (table.view(torch.int32) for table in tables)
    assert torch.equal(before, after)
    assert torch.equal(gradient[3:], torch.zeros_like(gradient[3:]))


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py", "mask=(feature < D) & selected", "mask=feature < D"
)
@variants
@pytest.mark.parametrize("flags", [{"compact": False}, {"max_loss_tokens": 8}], ids=str)
@pytest.mark.parametrize("learn", [trainable, dict], ids=["trainable", "everything"])
@pytest.mark.slow(spare=4)
def test_sums_over_tokens_do_not_see_an_ignored_token(
    learn: Callable[..., Any], flags: dict[str, Any], variant: str, device: torch.device
) -> None:
    """With 8 tokens for 5 loss tokens, ignored tokens are computed as zeros."""
    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    target[:5], target[5:] = 7, -100
    leaves = learn(leaves)
    clean = measure(ours, leaves, target, **flags)
    with torch.no_grad():
        leaves["input"][5:] = torch.nan
    dirty = measure(ours, leaves, target, **flags)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "        if self.started:\n            add_product",
    "        if False:\n            add_product",
)
@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "acc = tl.load(out_ptrs, mask=inside, other=0.0)",
    "acc = tl.zeros((BLOCK_D,), tl.float32)",
)
@variants
@pytest.mark.parametrize("classes", [False, True])
def test_a_trained_head_over_several_chunks(classes: bool, variant: str, device: torch.device) -> None:
    """The first chunk initializes dC and further chunks add to it; one label is in all chunks."""
    leaves, target = linear_case(50, 101, 16, torch.bfloat16, device)
    target[5:40] = 7
    flags = {"chunk_tokens": 16}
    if classes:
        flags["weight"] = torch.linspace(0.0, 2.0, 101, device=device)  # type: ignore[assignment]
    exact_flags = {k: v for k, v in flags.items() if k != "chunk_tokens"}
    actual = measure(ours, trainable(leaves), target, **flags)
    exact = measure(linear_definition, as_float64(trainable(leaves)), target, **exact_flags)
    assert_at_the_floor(actual, exact)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py", "de += tl.load(through_ptr", "tl.load(through_ptr"
)
@variants
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.slow(spare=4)
def test_lora_heads_in_every_variant(label_smoothing: float, variant: str, device: torch.device) -> None:
    """An adapter and a trained head: u B is part of the GEMM and x is kept, also for far tokens."""
    leaves, target = linear_case(40, 101, 32, torch.bfloat16, device)
    leaves = trainable(leaves)
    leaves["lora_a"] = (torch.randn(5, 32, device=device) / 6).requires_grad_()
    leaves["lora_b"] = torch.randn(101, 5, device=device).requires_grad_()
    with torch.no_grad():
        target[3] = 7
        leaves["linear_bias"][7] = -120.0
        leaves["label_smoothing"].mul_(label_smoothing)
    actual = measure(lora_loss, leaves, target, reduction="none")
    exact = measure(lora_definition, as_float64(leaves), target, reduction="none")
    for name in ("lora_a", "lora_b"):
        error = (actual.pop(name) - exact[name]).norm() / exact.pop(name).norm()
        assert error <= torch.finfo(torch.bfloat16).eps / 12**0.5, name
    assert_at_the_floor(actual, exact)


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "            self.smoothing, self.scale = self.smoothing.clone(), self.scale.clone()\n",
    "            pass\n",
)
@variants
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_weight_function_does_not_modify_the_inputs(
    reduction: str, variant: str, device: torch.device
) -> None:
    """No token is ignored, so smoothing and scale are views; the weight must not be applied twice."""
    leaves, target = linear_case(9, 101, 16, torch.bfloat16, device)
    target.clamp_(min=0)
    leaves = trainable(leaves)
    del leaves["sample_weight"]
    flags = {"reduction": reduction, **losses.dft()}
    actual = measure(ours, leaves, target, **flags)
    expected = measure(linear_cross_entropy, leaves, target, **flags, backend="torch")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-2, atol=2e-2 * value.abs().max().item())


def test_selected_tokens_have_statistics_in_every_backend(device: torch.device) -> None:
    """If max_loss_tokens is too small, the loss is NaN, but the selected tokens have statistics."""
    leaves, target = linear_case(6, 50, 16, torch.bfloat16, device)
    found = [
        linear_cross_entropy(
            **frozen(leaves), target=target, max_loss_tokens=3, return_statistics=True, backend=backend
        )
        for backend in ("torch", "triton")
    ]
    for loss, statistics in found:
        assert loss.isnan()
        assert int((~statistics.lse.isnan()).sum()) == 3
    for mine, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_one_token_of_a_wider_matrix(device: torch.device) -> None:
    """The stride of a single token is arbitrary and may be invalid for a descriptor."""
    leaves, target = linear_case(1, 101, 32, torch.bfloat16, device)
    target.clamp_(min=0)
    leaves = frozen(leaves)
    plain = measure(ours, leaves, target)
    wide = torch.zeros(1, 1_001, device=device, dtype=torch.bfloat16)
    wide[:, :32] = leaves["input"].detach()
    leaves["input"] = wide[:, :32].requires_grad_()
    shifted = measure(ours, leaves, target)
    for name, value in plain.items():
        assert torch.equal(shifted[name], value), name


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py", "tl.load(bias_high_ptr) * _LOG2E + _OFFSET", "k"
)
def test_ignored_tokens_are_never_far(device: torch.device) -> None:
    """With compact=False ignored tokens are computed; a masked class must not take them out of range."""
    leaves, target = linear_case(12, 101, 16, torch.bfloat16, device)
    target[3:] = -100
    leaves = frozen(leaves)
    with torch.no_grad():
        leaves["linear_bias"][0] = -1e4
    far: list[int] = []

    @contextmanager
    def look(arguments: dict[str, Any]) -> Iterator[None]:
        total = arguments["table_ptr"][kernels._TOTAL.value]
        far.append(int((~(total < kernels._LARGEST_TOTAL.value)).sum()))
        yield

    target[target == 0] = 1
    with watching(kernels, "_far_tokens_kernel", look):
        compact = measure(ours, leaves, target)
        not_compact = measure(ours, leaves, target, compact=False)
    assert far == [0, 0]
    for name, value in compact.items():
        assert torch.equal(not_compact[name], value), name

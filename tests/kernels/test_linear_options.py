"""Options of linear_cross_entropy: LoRA, padding, upper bounds, precision, filters, functions of statistics.

Small tiles are set, so that small vocabularies have several of them.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import (
    ADAPTER_SCALE,
    HALVES,
    OPTIONS,
    adapted,
    as_float64,
    assert_as_accurate_as_eager,
    assert_at_the_floor,
    cross_entropy,
    frozen,
    frozen_with_adapter,
    linear_case,
    linear_cross_entropy,
    measure,
    merged_definition,
    names,
    options,
    with_adapter,
)
from ual_kernels import TokenStatistics, UnsupportedError
from ual_kernels._torch import linear_cross_entropy as tiled

Leaves = dict[str, Tensor]
Tiles = Callable[[int, int], None]

HEAD = ("linear_weight", "linear_bias")

heads = pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
every_head = pytest.mark.parametrize(
    "head",
    [frozen, dict, frozen_with_adapter, with_adapter],
    ids=["frozen", "trainable", "lora", "trainable-lora"],
)


def ours(**arguments: Any) -> Any:
    return adapted(linear_cross_entropy, **arguments)


def judge(leaves: Leaves, target: Tensor, flags: dict[str, Any], **how: Any) -> None:
    assert_as_accurate_as_eager(
        actual=measure(ours, leaves, target, **flags, **how),
        eager=measure(merged_definition, leaves, target, **flags, dtype=leaves["label_smoothing"].dtype),
        exact=measure(merged_definition, as_float64(leaves), target, **flags),
    )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def logits_of(leaves: Leaves, flags: dict[str, Any]) -> Tensor:
    """Return final logits in float64."""
    wide = as_float64(leaves)
    head = wide["linear_weight"]
    if "lora_a" in wide:
        head = head + ADAPTER_SCALE * wide["lora_b"] @ wide["lora_a"]
    z = torch.nn.functional.linear(wide["input"], head, wide.get("linear_bias")).detach()
    z = z * flags.get("logit_scale", 1.0)
    cap = flags.get("softcap")
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """Return a function that sets the number of tokens per chunk and of columns per tile."""

    def choose(tokens: int, width: int) -> None:
        monkeypatch.setattr(tiled, "tile_shape", lambda *_: tiled.TileShape(tokens, width))

    return choose


# ---- tiles ----


@pytest.mark.kills("ual_kernels/_torch/linear_cross_entropy.py", "x_right.mul_(rescale[:, None])", "pass")
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "(chunk.column < part.stop)", "(chunk.column <= part.stop)"
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "factors.of_x * rescale)[:, None])",
    "factors.of_x)[:, None])",
)
@every_head
@pytest.mark.parametrize(("tokens", "width"), [(5, 3), (7, 64), (24, 100)])
@pytest.mark.parametrize("flags", OPTIONS)
def test_every_flag_over_many_tiles(
    flags: str, tokens: int, width: int, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    """Targets are at both ends of the vocabulary and at both sides of tile boundaries."""
    tiles(tokens, width)
    leaves, target = linear_case(24, 101, 8, torch.float64, device)
    edges = [0, 2, 3, 63, 64, 99, 100]
    target[2 : 2 + len(edges)] = torch.tensor(edges, device=device)
    judge(head(leaves), target, options(flags, 101, device))


@heads
@pytest.mark.parametrize("flags", ["mean", "softcap", "all"])
def test_float32_over_many_tiles(
    flags: str, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    tiles(7, 13)
    leaves, target = linear_case(24, 101, 32, torch.float32, device)
    judge(head(leaves), target, options(flags, 101, device))


@pytest.mark.parametrize("head", [frozen, with_adapter], ids=["frozen", "trainable-lora"])
@pytest.mark.parametrize("dtype", names(HALVES))
@pytest.mark.parametrize("flags", OPTIONS)
def test_sixteen_bits_are_rounded_once_over_many_tiles(
    flags: str, dtype: torch.dtype, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    tiles(50, 200)
    leaves, target = linear_case(64, 500, 64, dtype, device)
    leaves, chosen = head(leaves), options(flags, 500, device)
    assert_at_the_floor(
        actual=measure(ours, leaves, target, **chosen),
        exact=measure(merged_definition, as_float64(leaves), target, **chosen),
    )


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "rescale = torch.exp(before - reference)",
    "rescale = torch.ones_like(before)",
)
@heads
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("slope", [1.0, -1.0], ids=["late", "early"])
def test_the_maximum_may_come_late_or_early(
    slope: float, softcap: float | None, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    """Logits that increase or decrease by 5 from tile to tile, with a total range of 200."""
    tiles(3, 5)
    leaves, target = linear_case(9, 101, 2, torch.float64, device)
    with torch.no_grad():
        leaves["input"][:, 0], leaves["input"][:, 1] = slope, 0.01
        leaves["linear_weight"][:, 0] = torch.linspace(-50, 50, 101, device=device)
        leaves["linear_bias"].copy_(torch.linspace(-50, 50, 101, device=device) * slope)
        target[2:] = torch.tensor([0, 4, 5, 50, 96, 99, 100], device=device)
    flags = {"softcap": softcap, "reduction": "none", "z_loss": 1e-3}
    judge(head(leaves), target, flags)
    statistics = ours(**leaves, target=target, **flags, return_statistics=True)[1]
    theirs = ours(**leaves, target=target, **flags, return_statistics=True, backend="reference")[1]
    torch.testing.assert_close(statistics, theirs, equal_nan=True, rtol=1e-10, atol=1e-12)


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "start + place.squeeze(1), self.top)",
    "place.squeeze(1), self.top)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "self.second = torch.maximum(second, torch.minimum(self.largest, largest.squeeze(1)))",
    "self.second = second",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "self.moment = rescale * (self.moment + moved)",
    "self.moment = rescale * self.moment",
)
@pytest.mark.parametrize(("tokens", "width"), [(5, 1), (24, 7), (2, 100)])
@pytest.mark.parametrize("flags", ["mean", "softcap", "all"])
def test_statistics_over_many_tiles(
    flags: str, tokens: int, width: int, tiles: Tiles, device: torch.device
) -> None:
    tiles(tokens, width)
    leaves, target = linear_case(9, 101, 8, torch.float64, device)
    target[3] = 101
    with torch.no_grad():
        leaves["linear_weight"][10] *= 5
        for name in HEAD:  # the three largest are equal, two of them in neighboring columns
            leaves[name][[10, 11, 60]] = leaves[name][[10, 10, 10]]
        leaves["input"][:4] = leaves["linear_weight"][10]
    chosen = options(flags, 101, device) | {"return_statistics": True}
    actual = ours(**leaves, target=target, **chosen)[1]
    expected = ours(**leaves, target=target, **chosen, backend="reference")[1]
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-10, atol=1e-12)
    assert (expected.margin[[0, 2]] < 1e-9).all()


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "reference = finite(self.largest)\n        rescale",
    "reference = self.largest\n        rescale",
)
@heads
@pytest.mark.parametrize("where", [slice(0, 7), slice(7, 14), slice(95, 101), slice(0, 14)])
def test_complete_tiles_of_masked_classes(
    where: slice, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    """A bias of -inf over a complete tile gives the result without these classes."""
    tiles(2, 7)
    leaves, _ = linear_case(6, 101, 8, torch.float64, device)
    leaves["label_smoothing"].detach().zero_()
    allowed = torch.ones(101, dtype=torch.bool, device=device)
    allowed[where] = False
    few = {name: leaf.detach()[allowed] if name in HEAD else leaf.detach() for name, leaf in leaves.items()}
    with torch.no_grad():
        leaves["linear_bias"][where] = -torch.inf
    of_few = torch.tensor([0, -100, 20, 50, 80, len(few["linear_bias"]) - 1], device=device)
    of_all = allowed.nonzero().squeeze(1)[of_few.clamp(min=0)].where(of_few >= 0, -100)
    shorter = measure(ours, head({name: leaf.requires_grad_() for name, leaf in few.items()}), of_few)
    longer = measure(ours, head(leaves), of_all)
    del shorter["label_smoothing"], longer["label_smoothing"]  # -inf / V: the mean of these logits
    for name in HEAD:
        if name in longer:
            assert not longer[name][where].any()
            longer[name] = longer[name][allowed]
    assert_same(longer, shorter)
    of_all[0] = where.start  # a masked target
    statistics = ours(**leaves, target=of_all, return_statistics=True)[1]
    expected = ours(**leaves, target=of_all, return_statistics=True, backend="reference")[1]
    assert expected.log_prob[0] == -torch.inf
    torch.testing.assert_close(statistics, expected, equal_nan=True, rtol=1e-10, atol=1e-12)


def test_more_tiles_allocate_no_more_memory(tiles: Tiles, device: torch.device) -> None:
    """With a frozen head the largest allocation is one tile, for any size of the vocabulary."""
    tiles(16, 64)
    leaves, target = linear_case(17, 4_096, 4, torch.float32, device)
    leaves = frozen(leaves)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        linear_cross_entropy(**leaves, target=target).backward()
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest <= 4_096 * 4 * 4  # the head's bytes; logits would be four times as many


@heads
def test_no_features(head: Callable[..., Leaves], device: torch.device) -> None:
    """A head without features has only a bias."""
    leaves, target = linear_case(6, 19, 1, torch.float64, device)
    leaves = head(
        leaves
        | {
            "input": torch.zeros(6, 0, device=device, dtype=torch.float64, requires_grad=True),
            "linear_weight": torch.zeros(19, 0, device=device, dtype=torch.float64, requires_grad=True),
        }
    )
    judge(leaves, target, {})


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("features", [1, 64, 4_096, 65_536])
@pytest.mark.parametrize("vocab", [1, 63, 64, 1_000, 128_256, 262_144, 20_000_000, 600_000_000])
def test_a_tile_shape_fits_its_budgets(vocab: int, features: int, keep: bool, cuda: bool) -> None:
    larger = 32 if cuda else 1
    for chunk_tokens, count in product((0, 1, 300, 100_000), (1, 128, 1_000_000)):
        tokens, width = tiled.tile_shape(vocab, features, count, keep, cuda, chunk_tokens)
        assert 1 <= tokens <= count
        assert width >= 1
        assert width == vocab or width % 64 == 0
        assert width - 64 < vocab
        if width > 64:  # the smallest width of a tile; width is rounded up to a multiple of 64
            assert tokens * (width - 64) * 4 < larger * (8 << 20)
            assert features * (width - 64) * 4 < larger * (8 << 20)
        if chunk_tokens:
            assert tokens == min(chunk_tokens, count)
        elif keep:
            assert tokens == 1 or tokens * vocab * 4 <= max(larger * (64 << 20), vocab * features)
        else:
            assert tokens == min(4_096 if cuda else 1_024, count)


# ---- a LoRA adapter on the head ----


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "outputs.dlora_a.addmm_(summed.T, chunk.hidden.to(acc))",
    "pass",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "through_b = du * spec.lora_scale",
    "through_b = du",
)
@pytest.mark.parametrize("head", [frozen_with_adapter, with_adapter], ids=["frozen", "trainable"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("flags", OPTIONS)
def test_an_adapter_equals_a_merged_head(
    flags: str, backend: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = linear_case(12, 31, 8, torch.float64, device)
    judge(head(leaves), target, options(flags, 31, device), backend=backend, chunk_tokens=5)


@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("flags", OPTIONS)
def test_a_float32_adapter_of_a_sixteen_bit_head_is_exact_to_float32(
    flags: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    """The gradients of A and B are float32, with an error of at most 64 roundings of float32."""
    leaves, target = linear_case(64, 300, 64, torch.bfloat16, device)
    leaves = with_adapter(head(leaves), dtype=torch.float32)
    chosen = options(flags, 300, device)
    actual = measure(ours, leaves, target, **chosen)
    assert actual["lora_a"].dtype == actual["lora_b"].dtype == torch.float32
    assert_at_the_floor(actual, exact=measure(merged_definition, as_float64(leaves), target, **chosen))


@pytest.mark.parametrize("dtype", names([torch.bfloat16, torch.float32]))
def test_products_stay_exact_if_onednn_may_round(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's setting to multiply float32 as bfloat16 affects neither the adapter nor a float32 head."""
    leaves, target = linear_case(64, 300, 64, dtype, device)
    leaves = with_adapter(leaves, rank=32, dtype=torch.float32)
    before = measure(ours, leaves, target)
    monkeypatch.setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")
    after = measure(ours, leaves, target)
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(("lora", "base"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_an_adapter_of_another_dtype(lora: torch.dtype, base: torch.dtype, device: torch.device) -> None:
    leaves, target = linear_case(24, 101, 32, base, device)
    leaves = with_adapter(leaves, dtype=lora)
    actual = measure(ours, leaves, target)
    exact = measure(merged_definition, as_float64(leaves), target)
    assert actual["lora_a"].dtype == lora
    assert_at_the_floor(actual, exact)


@pytest.mark.parametrize("wanted", ["lora_a", "lora_b", "input", "linear_weight"])
@pytest.mark.parametrize("flags", ["mean", "none", "softcap"])
def test_one_gradient_alone_beside_an_adapter(flags: str, wanted: str, device: torch.device) -> None:
    leaves, target = linear_case(9, 19, 8, torch.float64, device)
    leaves = with_adapter(leaves)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    judge(leaves, target, options(flags, 19, device))


def test_an_adapter_allocates_no_gradient_of_the_head(device: torch.device) -> None:
    """With trained A and B, the gradient of a frozen head is neither computed nor allocated."""
    leaves, target = linear_case(12, 50, 64, torch.float32, device)
    leaves = frozen_with_adapter(leaves)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        ours(**leaves, target=target).backward()
    assert max(event.self_cpu_memory_usage for event in seen.events()) < 50 * 64 * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by", ["lora_a", "lora_b"])
def test_a_second_derivative_by_an_adapter_is_refused(by: str, reduction: str, device: torch.device) -> None:
    leaves, target = linear_case(4, 17, 8, torch.float32, device)
    leaves = with_adapter(leaves)
    loss = ours(**leaves, target=target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(5, 2), 1.0), r"linear_lora's A must be \[2, 3\], got \[2, 4\]"),
        ((torch.zeros(3), torch.zeros(5, 2), 1.0), r"linear_lora's A must be \[r, 3\], got \[3\]"),
        ((torch.zeros(2, 3), torch.zeros(4, 2), 1.0), r"linear_lora's B must be \[5, 2\], got \[4, 2\]"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1.0), r"linear_lora's B must be \[5, 2\], got \[5, 3\]"),
        ((torch.zeros(2, 3).long(), torch.zeros(5, 2), 1.0), "linear_lora's A must be bfloat16"),
        ((torch.zeros(2, 3), torch.zeros(5, 2).int(), 1.0), "linear_lora's B must be bfloat16"),
        ((torch.zeros(2, 3, device="meta"), torch.zeros(5, 2), 1.0), "linear_lora's A must be on cpu"),
        ((torch.zeros(2, 3), torch.zeros(5, 2, device="meta"), 1.0), "linear_lora's B must be on cpu"),
        ((torch.zeros(2, 3), torch.zeros(5, 2), torch.inf), "linear_lora's scale must be finite, got inf"),
        ((torch.zeros(2, 3), torch.zeros(5, 2), torch.nan), "linear_lora's scale must be finite, got nan"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(lora: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), linear_lora=lora
        )


# ---- a padded vocabulary ----


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_padding_of_the_head_is_not_read(
    flags: str, filling: float, backend: str, device: torch.device
) -> None:
    """The result has the bits of a head without padding, and the gradient of the padding is exactly 0."""
    leaves, target = linear_case(12, 19, 8, torch.float64, device)
    real = with_adapter(leaves)
    padded = {
        name: torch.cat([leaf.detach(), leaf.new_full((5, *leaf.shape[1:]), filling)]).requires_grad_()
        if name in (*HEAD, "lora_b")
        else leaf
        for name, leaf in real.items()
    }
    chosen = options(flags, 19, device) | {"backend": backend}
    without = measure(ours, real, target, **chosen)
    within = measure(ours, padded, target, **chosen, vocab_size=19)
    for name in without:
        if name in (*HEAD, "lora_b"):
            assert (within[name][19:] == 0).all(), name
            within[name] = within[name][:19]
        assert torch.equal(within[name], without[name]), name


@pytest.mark.parametrize("flags", ["mean", "all"])
def test_a_vocabulary_without_padding(flags: str, device: torch.device) -> None:
    leaves, target = linear_case(12, 19, 8, torch.float64, device)
    judge(leaves, target, options(flags, 19, device), vocab_size=19)


def test_a_label_in_the_padding_is_invalid(device: torch.device) -> None:
    leaves, target = linear_case(4, 19, 8, torch.float64, device)
    target[:] = torch.tensor([17, 3, 16, 0], device=device)
    loss = ours(**leaves, target=target, reduction="none", vocab_size=17)
    assert loss.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 4, "weight": torch.ones(5)}, r"weight must be \[4\]"),
        ({"precision": "low"}, "precision must be one of"),
        ({"gradient_filter": "off"}, r"gradient_filter must be a number in \[0, 1\), got 'off'"),
        ({"gradient_filter": -1}, r"gradient_filter must .* got -1"),
        ({"gradient_filter": 1.0}, r"gradient_filter must .* got 1.0"),
        ({"gradient_filter": torch.nan}, r"gradient_filter must .* got nan"),
        ({"max_loss_tokens": -1}, "max_loss_tokens must be an integer >= 0 or None, got -1"),
        (
            {"max_loss_tokens": 2, "compact": False},
            "max_loss_tokens has no effect with compact=False, got 2",
        ),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **change)


# ---- upper bounds of the number of loss tokens ----


def with_padding(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Leaves, Tensor]:
    """Return a case in which 13 of 20 tokens are loss tokens."""
    leaves, target = linear_case(20, 31, 8, dtype, device)
    target[[0, 4, 5, 11, 18, 19]] = -100
    return with_adapter(leaves), target


@heads
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.parametrize("count", [13, 14, 19, 20, 1_000])
def test_an_upper_bound_changes_no_value(
    count: int, flags: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = with_padding(device)
    leaves, chosen = head(leaves), options(flags, 31, device)
    assert (target != -100).sum() == 13
    counted = measure(ours, leaves, target, **chosen)
    told = measure(ours, leaves, target, **chosen, max_loss_tokens=count)
    for name in counted:
        if count == 13:
            assert torch.equal(told[name], counted[name]), name
    assert_same(told, counted)


@heads
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [3, None])
def test_kept_ignored_tokens_change_no_value(
    chunk_tokens: int | None, flags: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = with_padding(device)
    judge(head(leaves), target, options(flags, 31, device), compact=False, chunk_tokens=chunk_tokens)


BOUNDS = [{"max_loss_tokens": 13}, {"max_loss_tokens": 15}, {"max_loss_tokens": 20}, {"compact": False}]
bounds = pytest.mark.parametrize("bound", BOUNDS, ids=["exact", "more", "all", "not-compact"])


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "hidden.masked_fill(~tokens.selected[part][:, None], 0.0)",
    "hidden",
)
@bounds
@heads
@pytest.mark.parametrize("nothing", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_inputs_of_a_kept_ignored_token_are_not_used(
    softcap: float | None,
    nothing: float,
    head: Callable[..., Leaves],
    bound: dict[str, Any],
    device: torch.device,
) -> None:
    leaves, target = with_padding(device)
    leaves = head(leaves)
    flags = {"softcap": softcap, "reduction": "sum"} | bound
    clean = measure(ours, leaves, target, **flags)
    with torch.no_grad():
        for name in ("input", "label_smoothing", "sample_weight"):
            leaves[name][target == -100] = nothing
    dirty = measure(ours, leaves, target, **flags)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@bounds
def test_a_kept_ignored_token_with_a_masked_class(bound: dict[str, Any], device: torch.device) -> None:
    """An ignored token is computed with target 0, whose logit may be -inf."""
    leaves, target = with_padding(device)
    with torch.no_grad():
        leaves["linear_bias"][0] = -torch.inf
        leaves["label_smoothing"].zero_()
        target[target == 0] = 1
    default = measure(ours, leaves, target)
    told = measure(ours, leaves, target, **bound)
    # the gradients of loss tokens are infinite, because their mean logit is
    smoothing = [measured.pop("label_smoothing")[target == -100] for measured in (default, told)]
    assert not any(gradient.any() for gradient in smoothing)
    assert all(value.isfinite().all() for value in default.values())
    assert_same(told, default)


@bounds
def test_statistics_with_an_upper_bound(bound: dict[str, Any], device: torch.device) -> None:
    leaves, target = with_padding(device)
    target[2] = 31
    default = ours(**leaves, target=target, return_statistics=True)[1]
    told = ours(**leaves, target=target, return_statistics=True, **bound)[1]
    torch.testing.assert_close(told, default, equal_nan=True, rtol=1e-12, atol=1e-12)


@bounds
def test_an_upper_bound_where_all_are_ignored(bound: dict[str, Any], device: torch.device) -> None:
    leaves, target = with_padding(device)
    measured = measure(ours, leaves, target.fill_(-100), **bound)
    for name, value in measured.items():
        assert not value.any(), name


def test_an_upper_bound_of_zero(device: torch.device) -> None:
    leaves, target = with_padding(device)
    for name, value in measure(ours, leaves, target.fill_(-100), max_loss_tokens=0).items():
        assert not value.any(), name


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "torch.where(tokens.complete, nan_mask, torch.nan)",
    "nan_mask",
)
@heads
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_an_upper_bound_that_is_too_small_gives_nan(
    count: int, reduction: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = with_padding(device)
    selected = target != -100
    measured = measure(ours, head(leaves), target, reduction=reduction, max_loss_tokens=count)
    if reduction == "none":
        assert torch.equal(measured["loss"].isnan(), selected)
    else:
        assert measured["loss"].isnan()
    for name in ("input", "label_smoothing", "sample_weight"):
        assert measured[name][selected].isnan().all(), name
    for name in measured.keys() - {"loss", "input", "label_smoothing", "sample_weight"}:
        assert measured[name].isnan().any(), name


@bounds
@heads
def test_out_of_range_makes_one_token_nan_with_an_upper_bound(
    head: Callable[..., Leaves], bound: dict[str, Any], device: torch.device
) -> None:
    leaves, target = with_padding(device)
    leaves = frozen({name: leaf for name, leaf in leaves.items() if "lora" not in name})
    flags = {"reduction": "none"} | bound
    clean = measure(ours, leaves, target, **flags)
    target[2] = 31
    dirty = measure(ours, leaves, target, **flags)
    rest = torch.arange(20, device=device) != 2
    assert dirty["loss"].isnan().tolist() == [token == 2 for token in range(20)]
    assert dirty["input"][2].isnan().all()
    for name in clean:
        torch.testing.assert_close(dirty[name][rest], clean[name][rest], rtol=1e-12, atol=1e-12)


WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def waits(step: Callable[[], Any]) -> set[str]:
    """Return the operations of a step that synchronize with the host."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return {event.name for event in seen.events()} & WAITS


@bounds
@pytest.mark.parametrize(("flags", "head"), [("mean", dict), ("all", with_adapter)], ids=["mean", "all"])
def test_an_upper_bound_avoids_synchronization(
    flags: str, head: Callable[..., Leaves], bound: dict[str, Any], device: torch.device
) -> None:
    leaves, target = with_padding(device, torch.float32)
    leaves, chosen = head(leaves), options(flags, 31, device)
    upstream = torch.ones((), device=device)

    def step(**bound: Any) -> None:
        loss, _ = ours(**leaves, target=target, **chosen, return_statistics=True, **bound)
        loss.sum().backward(upstream)

    assert "aten::nonzero" in waits(step)
    assert not waits(lambda: step(**bound))


# ---- precision="fast" ----


@pytest.mark.kills(
    "ual_kernels/_torch/gemm.py",
    'self._fast = precision == "fast" and self._sixteen',
    "self._fast = False",
)
@pytest.mark.parametrize("head", [frozen, dict], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", names(HALVES))
@pytest.mark.parametrize("items", [64, 1_000_000])
@pytest.mark.parametrize("spread", [0.01, 1.0], ids=["flat", "peaked"])
def test_the_error_of_fast_is_that_of_rounded_logits(
    spread: float, items: int, dtype: torch.dtype, head: Callable[..., Leaves], device: torch.device
) -> None:
    """The relative error of a rounding is at most u.

    A logit changes by at most d = u max|z|, a probability by a factor of at most e^(2d). Each factor and each
    result of a rounded product adds u, and so does the store.
    """
    leaves, target = linear_case(64, 1_000, 64, dtype, device)
    with torch.no_grad():
        for name in HEAD:
            leaves[name].mul_(spread)
    leaves, scaling = head(leaves), 2.0**16

    def scaled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **arguments: scaling * loss(**arguments, reduction="mean", num_items=items)

    high, fast = (measure(scaled(ours), leaves, target, precision=how) for how in ("high", "fast"))
    exact = measure(scaled(merged_definition), as_float64(leaves), target)

    u = torch.finfo(dtype).eps / 2
    selected = target != -100
    wide = as_float64(leaves)
    z = logits_of(leaves, {})[selected]
    p, y = z.softmax(1), target[selected]
    raw = torch.nn.functional.linear(wide["input"], wide["linear_weight"])[selected].detach()
    moved = u * raw.abs().amax(1)
    p_moved = torch.expm1(2 * moved)
    # 0.5 is the upstream gradient of `measure`
    w = (wide["sample_weight"][selected] * (0.5 * scaling / items)).detach()
    lengths, hidden = (wide[name].detach().norm(dim=1) for name in ("linear_weight", "input"))
    rest = 1 - p.gather(1, y[:, None]).squeeze(1)

    slack = 64 * torch.finfo(torch.float32).eps * exact["loss"].abs()
    assert (fast["loss"] - exact["loss"]).abs() <= (2 * w * 2 * moved).sum() + slack

    error = (fast["input"].double() - exact["input"]).norm(dim=1)
    stored = 2 * u * exact["input"].norm(dim=1)
    bound = w * ((p_moved * (1 + 2 * u) + 2.1 * u) * (p @ lengths) + p_moved * rest * lengths[y])
    assert (error[selected] <= bound + stored[selected]).all()
    if spread == 1.0:
        assert error.norm() > 1.5 * (high["input"].double() - exact["input"]).norm()
    if "linear_weight" in exact:
        error = (fast["linear_weight"].double() - exact["linear_weight"]).norm(dim=1)
        each = (w * hidden[selected])[:, None]
        bound = ((p_moved * (1 + 2 * u) + 3.1 * u)[:, None] * each * p).sum(0)
        bound.index_add_(0, y, p_moved * rest * each[:, 0])
        assert (error <= bound + 2 * u * exact["linear_weight"].norm(dim=1)).all()
        assert not fast["linear_weight"].equal(high["linear_weight"])


@heads
@pytest.mark.parametrize("dtype", names([torch.float32, torch.float64]))
def test_fast_of_wide_numbers_is_high(
    dtype: torch.dtype, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = linear_case(12, 101, 8, dtype, device)
    leaves = head(leaves)
    high, fast = (measure(ours, leaves, target, precision=how) for how in ("high", "fast"))
    for name in high:
        assert torch.equal(high[name], fast[name]), name


# ---- a filter of the gradient ----


def peaked(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Leaves, Tensor]:
    """Two of 8 tiles of 8 columns hold all but about 2e-3 of the probability; all tiles have targets."""
    leaves, target = linear_case(12, 64, 8, dtype, device)
    with torch.no_grad():
        leaves["linear_weight"].mul_(0.3)
        # a feature that is zero in all hidden states, so that a tile's mean affects only gradients
        leaves["linear_weight"][:, 0] += 10.0
        leaves["input"][:, 0] = 0.0
        leaves["linear_bias"].zero_()
        leaves["linear_bias"][8:16] = 9.0
        leaves["linear_bias"][40:48] = 7.0
    return leaves, target


FILTERED = {
    "plain": {},
    "softcap": {"softcap": 20.0},
    "all": {"softcap": 20.0, "logit_scale": 1.25, "z_loss": 1e-2, "smoothing_over": "others", "weight": None},
}


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "together.amax(1) < self.spec.gradient_filter",
    "together.amin(1) < self.spec.gradient_filter",
)
@every_head
@pytest.mark.parametrize("flags", FILTERED)
@pytest.mark.parametrize(("reduction", "tau"), [("none", 1e-3), ("sum", 1e-2)])
def test_the_error_of_a_filter_is_bounded_by_the_dropped_mass(
    reduction: str,
    flags: str,
    tau: float,
    head: Callable[..., Leaves],
    tiles: Tiles,
    device: torch.device,
) -> None:
    """Spreading mass m of token i over a tile changes dleft_i by at most m K max |right_v - mean right|.

    K is the coefficient of p. A row of the gradient dright changes by at most twice the mass times each
    left factor. The column sums of a tile do not change.
    """
    tiles(5, 8)
    leaves, target = peaked(device)
    leaves = head(leaves)
    chosen = FILTERED[flags] | {"reduction": reduction}
    if "weight" in chosen:
        chosen["weight"] = torch.linspace(0.5, 2.0, 64, device=device, dtype=torch.float64)
    exact = measure(ours, leaves, target, **chosen)
    filtered = measure(ours, leaves, target, **chosen, gradient_filter=tau)
    statistics = ours(**leaves, target=target, **chosen, gradient_filter=tau, return_statistics=True)[1]
    selected = target != -100
    dropped = statistics.dropped_mass[selected]
    assert (dropped <= tau).all()
    assert dropped.max() > tau / 100
    for name in ("loss", "label_smoothing", "sample_weight"):
        assert torch.equal(filtered[name], exact[name]), name

    wide = {name: leaf.detach() for name, leaf in leaves.items()}
    z, y = logits_of(leaves, chosen)[selected], target[selected]
    c = chosen.get("weight", torch.ones(64, device=device, dtype=torch.float64))
    s = wide["label_smoothing"][selected] * (64 / 63 if flags == "all" else 1.0)
    q = (1 - s) * c[y] + s * c.mean()
    k = q + 2 * chosen.get("z_loss", 0.0) * z.logsumexp(1)
    upstream = torch.linspace(0.5, 2.0, 12, device=device)[selected] if reduction == "none" else 0.5
    a = upstream * wide["sample_weight"][selected] * chosen.get("logit_scale", 1.0) * k * dropped

    def widest(right: Tensor) -> float:
        parts = right.reshape(8, 8, -1)
        return (parts - parts.mean(1, keepdim=True)).norm(dim=-1).max().item()

    merged_head = wide["linear_weight"]
    lefts = {"linear_weight": wide["input"], "linear_bias": torch.ones(12, 1, device=device)}
    if "lora_a" in wide:
        merged_head = merged_head + ADAPTER_SCALE * wide["lora_b"] @ wide["lora_a"]
        lefts["lora_b"] = ADAPTER_SCALE * wide["input"] @ wide["lora_a"].T
    off = (filtered["input"] - exact["input"])[selected].norm(dim=1)
    assert (off <= a * widest(merged_head) * (1 + 1e-9)).all()
    assert off.any()
    for name in lefts.keys() & filtered.keys():
        moved = (filtered[name] - exact[name]).reshape(8, 8, -1)
        most = 2 * (a * lefts[name][selected].norm(dim=1)).sum()
        assert moved.norm(dim=-1).sum() <= most * (1 + 1e-9), name
        assert moved.any(), name
        assert moved.sum(1).abs().max() <= 1e-12, name


@heads
@pytest.mark.parametrize("off", [0, 0.0])
def test_no_filter_is_exact(
    off: float, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    tiles(5, 8)
    leaves, target = peaked(device)
    leaves = head(leaves)
    plain = measure(ours, leaves, target)
    unfiltered = measure(ours, leaves, target, gradient_filter=off)
    for name in plain:
        assert torch.equal(plain[name], unfiltered[name]), name
    statistics = ours(**leaves, target=target, gradient_filter=off, return_statistics=True)[1]
    assert not statistics.dropped_mass[target != -100].any()
    assert statistics.dropped_mass[target == -100].isnan().all()


@every_head
@pytest.mark.parametrize("flags", OPTIONS)
def test_a_filter_that_drops_nothing_changes_nothing(
    flags: str, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    tiles(5, 8)
    leaves, target = linear_case(12, 64, 8, torch.float64, device)
    judge(head(leaves), target, options(flags, 64, device), gradient_filter=1e-14)


@heads
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_dropped_mass_is_that_of_the_skipped_tiles(
    reduction: str, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    """In one chunk: the tiles with the least mass, as long as no token loses more than the threshold.

    The mass of a tile is the largest over its tokens.
    """
    tiles(12, 8)
    leaves, target = peaked(device)
    selected = target != -100
    z, y = logits_of(leaves, {})[selected], target[selected]
    mass = z.softmax(1).scatter(1, y[:, None], 0.0).reshape(-1, 8, 8).sum(2)
    order = mass.amax(0).argsort()
    together = mass[:, order].cumsum(1)
    for tau in (5e-4, 2e-3, 0.5):
        count = int((together.amax(0) < tau).sum())
        expected = together[:, count - 1] if count else torch.zeros_like(together[:, 0])
        statistics = ours(
            **head(leaves),
            target=target,
            gradient_filter=tau,
            reduction=reduction,
            return_statistics=True,
        )[1]
        torch.testing.assert_close(statistics.dropped_mass[selected], expected, rtol=1e-9, atol=1e-15)
    assert count >= 6


@pytest.mark.parametrize("bound", [{"compact": False}, {"max_loss_tokens": 11}, {"max_loss_tokens": 12}])
def test_kept_ignored_tokens_do_not_affect_a_filter(
    bound: dict[str, Any], tiles: Tiles, device: torch.device
) -> None:
    tiles(12, 8)
    leaves, target = peaked(device)
    with torch.no_grad():
        leaves["linear_weight"][:, 0] += leaves["linear_bias"] / 3
        leaves["linear_bias"].zero_()
        leaves["input"][:, 0] = 3.0
    flags = {"gradient_filter": 1e-2, "return_statistics": True}
    alone = ours(**leaves, target=target, **flags)[1].dropped_mass
    beside = ours(**leaves, target=target, **flags, **bound)[1].dropped_mass
    assert alone[target != -100].all()
    torch.testing.assert_close(beside, alone, equal_nan=True, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_filter_needs_the_torch_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._arguments._INTERPRETING", True)
    arguments = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="gradient_filter"):
        linear_cross_entropy(*arguments, gradient_filter=1e-3, backend=backend)
    linear_cross_entropy(*arguments, gradient_filter=0.0, backend=backend)


def test_fast_is_refused_by_the_reference() -> None:
    arguments = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match='does not support gradient_filter and precision="fast"'):
        linear_cross_entropy(*arguments, precision="fast", backend="reference")


# ---- functions of the statistics ----


def smoothing_fn(statistics: TokenStatistics) -> Tensor:
    return 0.6 * statistics.entropy / (1 + statistics.entropy) + 0.1 * statistics.top1_prob


def weight_fn(statistics: TokenStatistics) -> Tensor:
    return (
        statistics.log_prob.exp()
        + 0.2 * statistics.margin.tanh()
        + 0.1 * statistics.correct
        + (statistics.lse - statistics.mean_logit) / 9
    )


TOKEN_FNS = {
    "smoothing": {"label_smoothing": smoothing_fn},
    "weight": {"sample_weight": weight_fn},
    "both": {"label_smoothing": smoothing_fn, "sample_weight": weight_fn},
}
token_fns = pytest.mark.parametrize("token_fn", TOKEN_FNS)


def by_tensors(token_fn: str) -> Callable[..., Tensor]:
    """Compute the same values in a first pass. In the divisor a weight function counts as 1."""

    def loss(**arguments: Any) -> Tensor:
        target, selected = arguments["target"], arguments["target"] != -100
        arguments = {"label_smoothing": 0.0, "sample_weight": None} | arguments
        with torch.no_grad():
            first = {
                k: v
                for k, v in arguments.items()
                if k
                in (
                    "input",
                    "linear_weight",
                    "linear_bias",
                    "lora_a",
                    "lora_b",
                    "target",
                    "softcap",
                    "logit_scale",
                    "weight",
                )
            }
            statistics = ours(**first, return_statistics=True, backend="reference")[1]
        for name, function in TOKEN_FNS[token_fn].items():
            arguments[name] = function(statistics).where(selected, 0.0)
        if "sample_weight" in TOKEN_FNS[token_fn] and arguments.get("reduction", "mean") == "mean":
            classes = arguments.get("weight")
            counted = selected.sum() if classes is None else classes.double()[target[selected]].sum()
            arguments.setdefault("num_items", counted.double())
        return merged_definition(**arguments)

    return loss


@pytest.fixture(params=["one-tile", "many-tiles"])
def any_tiles(request: pytest.FixtureRequest, tiles: Tiles) -> None:
    if request.param == "many-tiles":
        tiles(5, 7)


@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py",
    "chunk = chunk._replace(smoothing=tokens.zero_ignored(smoothing, part))",
    "pass",
)
@pytest.mark.kills(
    "ual_kernels/_torch/linear_cross_entropy.py", "a = tokens.zero_ignored(a * weight, part)", "pass"
)
@token_fns
@every_head
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.usefixtures("any_tiles")
def test_a_token_fn_equals_the_tensor_that_it_returns(
    backend: str, flags: str, head: Callable[..., Leaves], token_fn: str, device: torch.device
) -> None:
    leaves, target = linear_case(12, 31, 8, torch.float64, device)
    leaves = {name: leaf for name, leaf in head(leaves).items() if name not in TOKEN_FNS[token_fn]}
    chosen = options(flags, 31, device)
    expected = measure(by_tensors(token_fn), leaves, target, **chosen)
    actual = measure(ours, leaves, target, **chosen, **TOKEN_FNS[token_fn], backend=backend)
    assert_same(actual, expected, 1e-10)


@token_fns
@pytest.mark.parametrize("flags", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_token_fn_of_given_logits(backend: str, flags: str, token_fn: str, device: torch.device) -> None:
    leaves, target = linear_case(12, 31, 8, torch.float64, device)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in TOKEN_FNS[token_fn]}
    chosen = options(flags, 31, device)

    def of_the_product(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, **rest: Any) -> Tensor:
        return cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), **rest)

    expected = measure(by_tensors(token_fn), leaves, target, **chosen)
    actual = measure(of_the_product, leaves, target, **chosen, **TOKEN_FNS[token_fn], backend=backend)
    assert_same(actual, expected, 1e-10)


@token_fns
@bounds
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_a_token_fn_with_an_upper_bound(
    flags: str, token_fn: str, bound: dict[str, Any], device: torch.device
) -> None:
    leaves, target = with_padding(device)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in TOKEN_FNS[token_fn]}
    chosen = options(flags, 31, device) | TOKEN_FNS[token_fn]
    assert_same(measure(ours, leaves, target, **chosen, **bound), measure(ours, leaves, target, **chosen))


@heads
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("token_fn", ["smoothing"])
def test_a_zero_weight_has_a_gradient_with_a_token_fn(
    token_fn: str, reduction: str, head: Callable[..., Leaves], device: torch.device
) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    leaves = head({name: leaf for name, leaf in leaves.items() if name not in TOKEN_FNS[token_fn]})
    with torch.no_grad():
        leaves["sample_weight"][3] = 0.0
    expected = measure(by_tensors(token_fn), leaves, target, reduction=reduction)
    actual = measure(ours, leaves, target, reduction=reduction, **TOKEN_FNS[token_fn])
    assert actual["sample_weight"][3] != 0
    assert_same(actual, expected, 1e-10)


@token_fns
def test_float32_accuracy_with_a_token_fn(token_fn: str, device: torch.device) -> None:
    """The error of the function itself is included: its argument is statistics in float32."""
    leaves, target = linear_case(24, 101, 32, torch.float32, device)
    leaves = {name: leaf for name, leaf in frozen(leaves).items() if name not in TOKEN_FNS[token_fn]}
    exact = measure(by_tensors(token_fn), as_float64(leaves), target)
    actual = measure(ours, leaves, target, **TOKEN_FNS[token_fn])
    for name in exact:
        off = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        assert off <= 64 * torch.finfo(torch.float32).eps, name


@token_fns
def test_statistics_with_a_token_fn(token_fn: str, device: torch.device) -> None:
    leaves, target = linear_case(12, 31, 8, torch.float64, device)
    for name in TOKEN_FNS[token_fn]:
        del leaves[name]
    plain = ours(**leaves, target=target, return_statistics=True)[1]
    with_fn = ours(**leaves, target=target, return_statistics=True, **TOKEN_FNS[token_fn])[1]
    torch.testing.assert_close(with_fn, plain, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_token_fn_may_overwrite_its_argument(backend: str, device: torch.device) -> None:
    def careless(statistics: TokenStatistics) -> Tensor:
        return statistics.entropy.mul_(0.1).clamp_(0, 1)

    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    arguments = {k: leaves[k] for k in ("input", *HEAD)} | {"target": target, "return_statistics": True}
    plain = ours(**arguments, backend=backend)[1]
    loss, statistics = ours(**arguments, label_smoothing=careless, sample_weight=careless, backend=backend)
    torch.testing.assert_close(statistics, plain, equal_nan=True, rtol=0, atol=0)
    twin = careless(plain).nan_to_num()
    expected = ours(
        **{k: leaves[k] for k in ("input", *HEAD)}, target=target, label_smoothing=twin, sample_weight=twin,
        num_items=5,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["label_smoothing", "sample_weight"])
@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda statistics: statistics.entropy[:1], r"got \[1\]"),
        (lambda statistics: statistics.entropy.mean(), r"got \[\]"),
        (lambda statistics: 0.1, "got float"),
        (lambda statistics: None, "got NoneType"),
        (lambda statistics: statistics.correct.long(), "got"),
        (lambda statistics: statistics.correct, "got"),
    ],
    ids=["short", "scalar", "float", "none", "int", "bool"],
)
def test_a_token_fn_must_return_one_number_per_token(
    made: Callable[..., Any], got: str, name: str, backend: str, loss: Callable[..., Any]
) -> None:
    given = [torch.zeros(4, 3)] + [torch.zeros(5, 3)] * (loss is linear_cross_entropy)
    message = rf"{name}\(statistics\) must return a floating-point tensor \[4\].*{got}"
    with pytest.raises(ValueError, match=message):
        loss(*given, torch.zeros(4, dtype=torch.long), **{name: made}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing", 1.5), ("label_smoothing", -0.1), ("label_smoothing", torch.nan),
     ("sample_weight", -1.0), ("sample_weight", torch.nan)],
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_token_fn_out_of_range_makes_one_token_nan(
    reduction: str, name: str, value: float, backend: str, device: torch.device
) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    leaves = {k: leaf for k, leaf in frozen(leaves).items() if k != name}
    highest = ours(**leaves, target=target, return_statistics=True)[1].entropy.nan_to_num().argmax()

    def good(statistics: TokenStatistics) -> Tensor:
        return torch.full_like(statistics.entropy, 0.5)

    def bad(statistics: TokenStatistics) -> Tensor:
        return torch.where(
            statistics.entropy == statistics.entropy.nan_to_num(-1).max(), value, good(statistics)
        )

    flags = {"reduction": reduction, "backend": backend}
    clean = measure(ours, leaves, target, **{name: good}, **flags)
    dirty = measure(ours, leaves, target, **{name: bad}, **flags)
    rest = torch.arange(6, device=device) != highest
    assert dirty["input"][highest].isnan().all()
    if reduction == "none":
        assert torch.equal(dirty["loss"].isnan(), ~rest)
        torch.testing.assert_close(dirty["loss"][rest], clean["loss"][rest], rtol=1e-12, atol=1e-12)
    else:
        assert dirty["loss"].isnan()
    for field in clean.keys() - {"loss"}:
        torch.testing.assert_close(dirty[field][rest], clean[field][rest], rtol=1e-12, atol=1e-12)


@token_fns
def test_an_invalid_label_with_a_token_fn_makes_one_token_nan(token_fn: str, device: torch.device) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    leaves = {k: leaf for k, leaf in frozen(leaves).items() if k not in TOKEN_FNS[token_fn]}
    flags = TOKEN_FNS[token_fn] | {"reduction": "none"}
    clean = measure(ours, leaves, target, **flags)
    target[3] = 31
    dirty = measure(ours, leaves, target, **flags)
    rest = torch.arange(6, device=device) != 3
    assert torch.equal(dirty["loss"].isnan(), ~rest)
    assert dirty["input"][3].isnan().all()
    for field in clean:
        torch.testing.assert_close(dirty[field][rest], clean[field][rest], rtol=1e-12, atol=1e-12)


@token_fns
@every_head
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_token_fn_on_a_retained_graph(
    reduction: str, head: Callable[..., Leaves], token_fn: str, device: torch.device
) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float32, device)
    leaves = {k: leaf for k, leaf in head(leaves).items() if k not in TOKEN_FNS[token_fn]}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    loss = ours(**leaves, target=target, reduction=reduction, **TOKEN_FNS[token_fn]).sum()
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    (gradient,) = torch.autograd.grad(loss, wanted[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@token_fns
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_token_fn_is_called_without_a_graph(token_fn: str, backend: str, device: torch.device) -> None:
    """Parameters that the function uses get no gradient; its result is a constant."""
    factor = torch.ones((), device=device, dtype=torch.float64, requires_grad=True)

    def learned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda statistics: function(statistics) * factor

    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    leaves = {k: leaf for k, leaf in leaves.items() if k not in TOKEN_FNS[token_fn]}
    functions = {k: learned(f) for k, f in TOKEN_FNS[token_fn].items()}
    loss = ours(**leaves, target=target, backend=backend, **functions)
    loss.backward()
    assert factor.grad is None
    assert leaves["input"].grad is not None


@token_fns
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_token_fn_where_all_are_ignored(token_fn: str, reduction: str, device: torch.device) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float64, device)
    leaves = {k: leaf for k, leaf in leaves.items() if k not in TOKEN_FNS[token_fn]}
    target.fill_(-100)
    for name, value in measure(ours, leaves, target, reduction=reduction, **TOKEN_FNS[token_fn]).items():
        assert not value.any(), name


@token_fns
def test_a_token_fn_is_refused_under_a_compiler(token_fn: str, device: torch.device) -> None:
    leaves, target = linear_case(6, 31, 8, torch.float32, device)
    functions = TOKEN_FNS[token_fn]
    given = {k: leaf.detach() for k, leaf in leaves.items() if k not in functions} | functions

    def step(target: Tensor) -> Tensor:
        return linear_cross_entropy(**given, target=target)

    with pytest.raises(Exception, match="functions of the statistics and process_group are not supported"):
        torch.compile(step, fullgraph=True, backend="eager")(target)


@heads
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_token_fn_with_a_filter(
    reduction: str, head: Callable[..., Leaves], tiles: Tiles, device: torch.device
) -> None:
    """A filter does not change the statistics of a function or the loss."""
    tiles(5, 8)
    leaves, target = peaked(device)
    leaves = {k: leaf for k, leaf in head(leaves).items() if k not in TOKEN_FNS["both"]}
    flags = TOKEN_FNS["both"] | {"reduction": reduction, "return_statistics": True}
    plain, _ = ours(**leaves, target=target, **flags)
    filtered, statistics = ours(**leaves, target=target, **flags, gradient_filter=1e-2)
    assert torch.equal(plain, filtered)
    assert statistics.dropped_mass[target != -100].any()

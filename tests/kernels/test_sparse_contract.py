"""Operators, autograd, compilers, memory and cost of targets of several classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import (
    adapted,
    cross_entropy,
    frozen,
    frozen_with_adapter,
    linear_case,
    linear_cross_entropy,
    linear_definition,
    logits_case,
    measure,
    of_several,
    options,
    with_adapter,
    with_probabilities,
)
from ual_kernels import SparseTarget, UnsupportedError, ops
from ual_kernels._operands import (
    ALL_TOKENS,
    LinearInputs,
    LinearSpec,
    LogitsInputs,
    LogitsOutputs,
    LogitsSpec,
)

Leaves = dict[str, Tensor]


def of_logits(**arguments: Any) -> Any:
    return of_several(cross_entropy)(**arguments)


def of_hidden(**arguments: Any) -> Any:
    return of_several(lambda **rest: adapted(linear_cross_entropy, **rest))(**arguments)


LOSSES = [
    pytest.param(of_logits, "torch", id="logits-torch"),
    pytest.param(of_logits, "triton", id="logits-triton"),
    pytest.param(of_hidden, "torch", id="linear-torch"),
]
every_loss = pytest.mark.parametrize(
    ("loss", "backend"), [*LOSSES, pytest.param(of_hidden, "triton", id="linear-triton")]
)


def case(
    loss: Callable[..., Any],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    vocab: int = 29,
    count: int = 3,
) -> tuple[Leaves, Tensor]:
    if loss is of_logits:
        return with_probabilities(*logits_case(tokens, vocab, dtype, device), count, vocab)
    features = 3 if dtype == torch.float64 else 16
    return with_probabilities(*linear_case(tokens, vocab, features, dtype, device), count, vocab)


def positive(leaves: Leaves, target: Tensor) -> tuple[Leaves, Tensor]:
    """Return the case with probabilities that are all positive."""
    p = torch.rand_like(leaves["probabilities"]).softmax(-1)
    return leaves | {"probabilities": p.requires_grad_()}, target


# ---- operators ----

# opcheck compares outputs for equality, so no output may be NaN: no token is ignored


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.slow(spare=8)
def test_opcheck_logits(
    backend: str, tokens: int, count: int, dtype: torch.dtype, device: torch.device
) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(tokens, 13, device=device, dtype=dtype)
    classes = torch.stack([torch.randperm(13, device=device)[:count] for _ in range(tokens)] or [
        torch.zeros(count, device=device, dtype=torch.long)
    ])[:tokens]  # fmt: skip
    inputs = LogitsInputs(
        logits=logits.requires_grad_(),
        target=classes[:, 0].contiguous(),
        smoothing=torch.rand(tokens, device=device, dtype=acc).requires_grad_(),
        class_weight=torch.rand(13, device=device, dtype=acc),
        classes=classes,
        probabilities=torch.rand(tokens, count, device=device, dtype=acc).softmax(-1).requires_grad_(),
    )
    spec = LogitsSpec(
        ignore_index=-100, softcap=5.0, logit_scale=1.5, z_loss=1e-3, statistics=True, probability_grad=True,
        backend=backend,
    )  # fmt: skip
    torch.library.opcheck(ops.cross_entropy_op, (*inputs, *spec))
    inputs = inputs._make(None if x is None else x.detach() for x in inputs)
    scale = torch.rand(tokens, device=device, dtype=acc)
    state = LogitsOutputs(*ops.cross_entropy_op(*inputs, *spec)).state
    torch.library.opcheck(ops.cross_entropy_backward_op, (scale, state, *inputs, *spec))
    inputs = inputs._replace(logits=inputs.logits.clone(), class_weight=None)
    torch.library.opcheck(ops.cross_entropy_inplace_op, (*inputs, scale, *spec))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.slow(spare=6)
def test_opcheck_linear(per_token: bool, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    leaves, _ = linear_case(tokens, 13, 4, dtype, device)
    acc = leaves["label_smoothing"].dtype
    classes = torch.arange(3, device=device).repeat(tokens, 1) + torch.arange(tokens, device=device)[:, None]
    inputs = LinearInputs(
        input=leaves["input"],
        linear_weight=leaves["linear_weight"],
        linear_bias=leaves["linear_bias"],
        lora_a=torch.randn(2, 4, device=device),
        lora_b=torch.randn(13, 2, device=device),
        target=classes[:, 0].contiguous(),
        smoothing=leaves["label_smoothing"],
        token_scale=leaves["sample_weight"],
        class_weight=None,
        classes=classes,
        probabilities=torch.rand(tokens, 3, device=device, dtype=acc).softmax(-1).requires_grad_(),
    )
    spec = LinearSpec(
        ignore_index=-100, softcap=0.0, logit_scale=1.0, lora_scale=0.5, z_loss=1e-3, gradient_filter=0.0,
        statistics=True, input_grad=not per_token, head_grad=not per_token, bias_grad=not per_token,
        lora_grad=not per_token, probability_grad=True, per_token=per_token, max_loss_tokens=ALL_TOKENS,
        chunk_tokens=2, precision="high", backend="torch",
    )  # fmt: skip
    torch.library.opcheck(ops.linear_cross_entropy_op, (*inputs, *spec))


@pytest.mark.parametrize(
    ("loss", "backend", "count", "flags"),
    [
        (loss, "torch", *case)
        for loss in (of_logits, of_hidden)
        for case in [(1, "mean"), (4, "mean"), (4, "classes"), (4, "all")]
    ]
    + [pytest.param(of_logits, "triton", 4, "all", marks=pytest.mark.slow)],
)
def test_gradcheck(
    loss: Callable[..., Tensor], backend: str, count: int, flags: str, device: torch.device
) -> None:
    """With respect to every leaf, the probabilities included.

    A step of gradcheck changes a sum of probabilities by 1e-6, which is within the tolerance. It would make a
    probability of 0 negative, so all are positive.
    """
    leaves, target = positive(*case(loss, 3, device, torch.float64, vocab=5, count=count))
    chosen = options(flags, 5, device)
    assert torch.autograd.gradcheck(
        lambda *values: loss(
            **dict(zip(leaves, values, strict=True)), target=target, **chosen, backend=backend
        ),
        tuple(leaves.values()),
    )


def test_the_reference_has_second_derivatives(device: torch.device) -> None:
    leaves, target = positive(*case(of_logits, 3, device, torch.float64, vocab=5))
    assert torch.autograd.gradgradcheck(
        lambda *values: of_logits(
            **dict(zip(leaves, values, strict=True)), target=target, backend="reference"
        ),
        tuple(leaves.values()),
    )


# ---- torch.compile, checkpointing, fake tensors, autocast ----


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
@pytest.mark.parametrize("how", [{"compact": False}, {"max_loss_tokens": 5}, {"precision": "fast"}], ids=str)
@pytest.mark.slow(spare=3)
def test_options_compile(how: dict[str, Any], backend: str, device: torch.device) -> None:
    torch.compiler.reset()

    def loss(**rest: Any) -> Any:
        return of_hidden(**rest, **how, backend=backend)

    leaves, target = case(of_hidden, 5, device, torch.bfloat16)
    leaves = with_adapter(leaves)
    plain, traced = (
        measure(f, leaves, target) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    )
    for name in plain:
        assert torch.equal(plain[name], traced[name]), name


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fake_tensors_agree_with_real_ones(
    reduction: str, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    def everything(leaves: Leaves, target: Tensor) -> list[Tensor]:
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


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_autocast_changes_no_loss_of_given_logits(backend: str, device: torch.device) -> None:
    leaves, target = case(of_logits, 6, device)
    chosen = options("classes", 29, device) | {"backend": backend}
    plain = measure(of_logits, leaves, target, **chosen)
    with torch.autocast(device.type, torch.bfloat16):
        cast = measure(of_logits, leaves, target, **chosen)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_autocast_casts_the_operands_and_nothing_inside(backend: str, device: torch.device) -> None:
    leaves, target = case(of_hidden, 24, device, vocab=131)
    if backend == "triton":
        leaves = frozen(leaves)
    chosen = options("classes", 131, device) | {"backend": backend}
    rounded = {
        name: leaf.detach().bfloat16().requires_grad_(leaf.requires_grad)
        if name in ("input", "linear_weight", "linear_bias")
        else leaf
        for name, leaf in leaves.items()
    }
    by_hand = measure(of_hidden, rounded, target, **chosen)

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return of_hidden(**arguments)

    cast = measure(under_autocast, leaves, target, **chosen)
    for name in cast:
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], by_hand[name].float()), name


# ---- autograd ----


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_again_on_a_retained_graph(
    reduction: str, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    leaves, target = case(loss, 5, device)
    value = loss(**leaves, target=target, reduction=reduction, backend=backend).sum()
    first, second = (torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_loss
@pytest.mark.parametrize("by", ["input", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_derivative_is_refused(
    reduction: str, by: str, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    leaves, target = case(loss, 5, device)
    value = loss(**leaves, target=target, reduction=reduction, backend=backend).sum()
    (gradient,) = torch.autograd.grad(value, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@every_loss
def test_no_grad_builds_no_graph(loss: Callable[..., Any], backend: str, device: torch.device) -> None:
    leaves, target = case(loss, 5, device)
    with torch.no_grad():
        value = loss(**leaves, target=target, backend=backend)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(**leaves, target=target, backend=backend).detach())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_inputs_same_bits(
    dtype: torch.dtype, loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    leaves, target = case(loss, 24, device, dtype, vocab=131, count=8)
    target[target[:, 0] != -100] = torch.arange(
        8, device=device
    )  # every token adds to the same rows of the head
    first, second = (measure(loss, leaves, target, backend=backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@every_loss
def test_probabilities_made_from_parameters_are_trained(
    loss: Callable[..., Any], backend: str, device: torch.device
) -> None:
    """A learned distribution over the classes: softmax's gradient sums to 0, and a step lowers the loss."""
    leaves, target = case(loss, 5, device)
    rest = {name: leaf.detach() for name, leaf in leaves.items() if name != "probabilities"}
    raw = torch.zeros(target.shape, device=device, requires_grad=True)

    def value() -> Tensor:
        return loss(**rest, probabilities=raw.softmax(-1), target=target, backend=backend)

    before = value()
    (gradient,) = torch.autograd.grad(before, raw)
    selected = target[:, 0] != -100
    assert gradient[selected].abs().sum(-1).min() > 0
    assert gradient.sum(-1).abs().max() < 1e-6
    assert not gradient[~selected].any()
    raw.data -= 0.1 * gradient
    assert value() < before


# ---- memory and cost ----


def work(step: Callable[[], Any]) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Return the shapes of the matrix products in a step, and its largest allocation in bytes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        step()
    names = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}
    factors = [event.input_shapes[names[event.name]] for event in seen.events() if event.name in names]
    products = [(left, right) for left, right in factors if min(*left, *right) > 1]
    largest = max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in seen.events())
    return products, largest


@pytest.mark.parametrize("flags", ["mean", "none", "classes", "all"])
@pytest.mark.parametrize("head", [frozen, dict, frozen_with_adapter], ids=["frozen", "trainable", "lora"])
@pytest.mark.slow(spare=6)
def test_no_allocation_has_all_classes_of_all_tokens(
    head: Callable[[Leaves], Leaves], flags: str, device: torch.device
) -> None:
    """[N, K, D] is 16 MiB, of which at most the eighth is allocated at once; the head is 256 KiB."""
    leaves, target = with_probabilities(*linear_case(128, 128, 512, torch.float32, device), 64, 128)
    leaves = head(leaves)
    _, largest = work(
        lambda: of_hidden(**leaves, target=target, **options(flags, 128, device)).sum().backward()
    )
    assert largest <= 128 * 64 * 512 * 4 // 8


@pytest.mark.parametrize("flags", ["mean", "none", "softcap"])
def test_twenty_classes_do_not_materialize_the_vocabulary(flags: str, device: torch.device) -> None:
    """All logits, and a dense target, are 1 MiB; the logits of a chunk of 8 tokens are 64 KiB."""
    leaves, target = with_probabilities(*linear_case(128, 2_048, 4, torch.float32, device), 20, 2_048)
    leaves = frozen(leaves)
    chosen = options(flags, 2_048, device)
    products, largest = work(
        lambda: of_hidden(**leaves, target=target, **chosen, chunk_tokens=8).sum().backward()
    )
    assert max(left[0] for left, _ in products) == 8
    assert largest <= 8 * 2_048 * 4


@pytest.mark.parametrize("head", [frozen, dict, frozen_with_adapter], ids=["frozen", "trainable", "lora"])
def test_several_classes_add_no_product_over_the_vocabulary(
    head: Callable[[Leaves], Leaves], device: torch.device
) -> None:
    leaves, target = linear_case(12, 50, 64, torch.float32, device)
    leaves = head(leaves)
    several, indices = with_probabilities(leaves, target, 20, 50)
    plain, _ = work(lambda: adapted(linear_cross_entropy, **leaves, target=target).backward())
    ours, _ = work(lambda: of_hidden(**several, target=indices).backward())
    mine, theirs = ([x for x in found if 50 in (*x[0], *x[1])] for found in (ours, plain))
    assert mine == theirs


def test_ignored_tokens_are_dropped_before_the_first_product(device: torch.device) -> None:
    leaves, target = with_probabilities(*linear_case(12, 50, 64, torch.float32, device), 4, 50)
    target[3:, 0] = -100
    products, _ = work(lambda: of_hidden(**frozen(leaves), target=target).backward())
    assert [shapes for shapes in products if 50 in shapes[1]] == [([2, 64], [64, 50]), ([2, 50], [50, 64])]


WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


@pytest.mark.parametrize("bound", [{"max_loss_tokens": 13}, {"compact": False}], ids=["exact", "not-compact"])
@pytest.mark.parametrize("flags", ["mean", "all"])
def test_an_upper_bound_avoids_synchronization(
    flags: str, bound: dict[str, Any], device: torch.device
) -> None:
    leaves, target = with_probabilities(*linear_case(14, 31, 8, torch.float32, device), 5, 31)
    leaves, chosen = with_adapter(leaves), options(flags, 31, device)
    upstream = torch.ones((), device=device)

    def step(**bound: Any) -> None:
        loss, _ = of_hidden(**leaves, target=target, **chosen, return_statistics=True, **bound)
        loss.sum().backward(upstream)

    def waits(**bound: Any) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(**bound)
        return {event.name for event in seen.events()} & WAITS

    assert "aten::nonzero" in waits()
    assert not waits(**bound)


def test_the_loss_of_given_logits_does_not_synchronize(device: torch.device) -> None:
    leaves, target = case(of_logits, 14, device)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        of_logits(**leaves, target=target, return_statistics=True)
    assert not {event.name for event in seen.events()} & WAITS


# ---- accuracy where the model agrees with its target ----


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "tl.store(x_ptr + column, tl.zeros((BLOCK_C,), x_ptr.dtype.element_ty), mask=counts)",
    "pass",
)
@pytest.mark.parametrize(
    ("backend", "variant"),
    [("torch", ""), ("triton", "tma"), ("triton", "pointer"), ("triton", "cublas"), ("triton", "exact")],
    ids=str,
)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("count", [2, 64])
@pytest.mark.parametrize("noise", [1.0, 0.01])
@pytest.mark.slow(spare=8)
def test_sixteen_bits_near_convergence(
    noise: float, count: int, trained: bool, backend: str, variant: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The target is the model's own distribution with noise, so that p - q cancels in its classes.

    A probability that is rounded to 16 bits before q is subtracted has an error of 2e-3 p, while the gradient
    is noise * p. The naive dense loss with float32 logits rounds p - q, and its error is the bound's.
    """
    if variant:
        from ual_kernels._triton import linear_cross_entropy as kernels

        monkeypatch.setattr(kernels, "VARIANT", variant)
    tokens, vocab, features = (24, 131, 48) if backend == "triton" else (64, 1_000, 64)
    wide = {"device": device, "dtype": torch.float64}
    hidden = torch.randn(tokens, features, **wide).bfloat16()
    head = (torch.randn(vocab, features, **wide) * 3 / features**0.5).bfloat16()
    top, indices = (hidden.double() @ head.double().T).softmax(-1).topk(count)
    p = (top * torch.exp(noise * torch.randn_like(top))).float()
    target = SparseTarget(indices, p).normalized()

    def gradients(loss: Callable[..., Tensor], dtype: torch.dtype, **how: Any) -> list[Tensor]:
        e, c = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(trained)
        value = loss(input=e, linear_weight=c, target=target, label_smoothing=0.01, **how)
        return list(torch.autograd.grad(value, [e, c] if trained else [e]))

    exact = gradients(linear_definition, torch.float64)
    for ours, truth in zip(
        gradients(linear_cross_entropy, torch.bfloat16, backend=backend), exact, strict=True
    ):
        error = ((ours.double() - truth).norm() / truth.norm()).item()
        assert error <= 2.2e-3


@pytest.mark.kills("ual_kernels/_tokens.py", "torch.where(self.z[:, :1] == -torch.inf, 0.0, ", "(")
@pytest.mark.kills("ual_kernels/_tokens.py", "torch.where(z_y == -torch.inf, lse[:, None] - z, ", "(")
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "(q == 0) | (z_y == -torch.inf), 0.0", "(q == 0), 0.0"
)
@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    'tl.where(live, tl.where(z_y == float("-inf"), 0.0, ',
    "tl.where(live, (",
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_target_of_probability_zero_is_an_infinite_loss(
    dense: bool, backend: str, device: torch.device
) -> None:
    """A mask of -inf on the most probable class, as PyTorch and the reference compute it."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0], [2.0, 0.0, 1.0]], device=device)
    q = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]], device=device).requires_grad_()
    target = q if dense else SparseTarget(torch.arange(3, device=device).expand(2, 3), q)
    loss = cross_entropy(logits, target, reduction="none", backend=backend)
    truth = torch.nn.functional.cross_entropy(logits, q, reduction="none")
    assert loss[0] == truth[0] == torch.inf
    torch.testing.assert_close(loss[1], truth[1])
    if backend == "triton":  # its gradient by probabilities is NaN here (docs/kernels.md)
        return
    (ours,), (theirs,) = (torch.autograd.grad(value.sum(), q) for value in (loss, truth))
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:])
    assert ours[0, 0] == torch.inf


@pytest.mark.kills("ual_kernels/_arguments.py", "if arguments.ignore_index >= 0:", "if False:")
def test_probabilities_have_no_ignore_index() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="ignore_index must be negative for a target of probabilities"):
        cross_entropy(logits, logits.softmax(-1), ignore_index=0)


@pytest.mark.parametrize("name", ["indices", "probabilities"])
def test_lists_are_no_targets(name: str) -> None:
    target = SparseTarget(torch.tensor([[1]]), torch.tensor([[1.0]]))
    target = target._replace(**{name: getattr(target, name).tolist()})
    with pytest.raises(ValueError, match=rf"target\.{name} must be a torch\.Tensor, got list"):
        cross_entropy(torch.zeros(1, 3), target)


@pytest.mark.kills(
    "ual_kernels/ops.py", "if hidden or (wants.probabilities and not spec.probability_grad):", "if hidden:"
)
@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy"])
def test_gradients_that_vmap_hides_are_refused(loss: str) -> None:
    hidden, head = torch.randn(2, 3, 5), torch.randn(4, 5)
    indices, p = torch.randint(0, 4, (2, 3, 2)), torch.full((2, 3, 2), 0.5)

    def total(p: Tensor) -> Tensor:
        def one(h: Tensor, i: Tensor, q: Tensor) -> Tensor:
            target = SparseTarget(i, q)
            if loss == "cross_entropy":
                return cross_entropy(h @ head.T, target)  # type: ignore[no-any-return]
            return linear_cross_entropy(h, head, target)  # type: ignore[no-any-return]

        return torch.vmap(one)(hidden, indices, p).sum()

    with pytest.raises(UnsupportedError, match=f"hides which gradients {loss} must compute"):
        torch.func.grad(total)(p)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_an_empty_batch_has_a_gradient_by_probabilities(inplace_backward: bool) -> None:
    p = torch.zeros(0, 2, requires_grad=True)
    logits = torch.zeros(0, 3, requires_grad=True)
    target = SparseTarget(torch.zeros(0, 2, dtype=torch.long), p)
    loss = cross_entropy(logits * 1, target, inplace_backward=inplace_backward)
    (gradient,) = torch.autograd.grad(loss, p)
    assert gradient.shape == (0, 2)

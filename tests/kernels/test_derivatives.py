"""Second derivatives, forward mode and functorch's transforms: right, or an error with the next step."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional, graph

from tests.kernels.cases import (
    adapted,
    cross_entropy,
    linear_case,
    linear_cross_entropy,
    logits_case,
    of_several,
    options,
    with_adapter,
    with_probabilities,
)
from ual_kernels import TokenStatistics, UnsupportedError

# torch.func imports decompositions that torch.jit compiles
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Leaves = dict[str, Tensor]
Loss = Callable[..., Tensor]
Values = tuple[Tensor, ...]

VOCAB = 7
LEAVES = {
    "logits": ("input", "label_smoothing", "sample_weight"),
    "inplace": ("input", "label_smoothing", "sample_weight"),
    "linear": (
        "input",
        "linear_weight",
        "linear_bias",
        "lora_a",
        "lora_b",
        "label_smoothing",
        "sample_weight",
    ),
}
SEVERAL = {f"{kind}-several": (*names, "probabilities") for kind, names in LEAVES.items()}
EACH = [(kind, (name,)) for kind, names in LEAVES.items() for name in names]
EACH += [(kind, ("probabilities",)) for kind in SEVERAL]
PAIRS = [(kind, ("input", name)) for kind, names in LEAVES.items() for name in names[1:]]
PAIRS += [(kind, ("input", "probabilities")) for kind in SEVERAL]
ALL = list((LEAVES | SEVERAL).items())


def problem(kind: str, device: torch.device) -> tuple[Leaves, Tensor]:
    """Return the case of a kind; "-several" has targets of three classes."""
    base, _, several = kind.partition("-")
    if several:
        return with_probabilities(*problem(base, device), 3, VOCAB)
    if kind != "linear":
        return logits_case(4, VOCAB, torch.float64, device)
    leaves, target = linear_case(4, VOCAB, 3, torch.float64, device)
    return with_adapter(leaves), target


def call(kind: str, **given: Any) -> Any:
    base, _, several = kind.partition("-")

    def linear(**given: Any) -> Any:
        return adapted(linear_cross_entropy, **given)

    loss = linear if base == "linear" else cross_entropy
    return (of_several(loss) if several else loss)(**given)


def losses_of(
    kind: str, names: tuple[str, ...], reduction: str, device: torch.device, **keywords: Any
) -> tuple[Values, Loss, Loss]:
    """Return differentiable values, and our loss and the reference as functions of them."""
    leaves, target = problem(kind, device)
    rest = {name: leaf.detach() for name, leaf in leaves.items() if name not in names}
    keywords = options(reduction, VOCAB, device) | keywords

    def total(*values: Tensor, **how: Any) -> Tensor:
        given = rest | dict(zip(names, values, strict=True)) | keywords | how
        given["input"] = given["input"] * 1.0  # in place needs a computed tensor
        found = call(kind, target=target, **given)
        loss = found[0] if isinstance(found, tuple) else found
        return (
            loss * torch.linspace(0.5, 2.0, loss.numel(), device=device).reshape(loss.shape).to(loss)
        ).sum()

    def ours(*values: Tensor) -> Tensor:
        return total(*values, **({"inplace_backward": True} if kind.startswith("inplace") else {}))

    def reference(*values: Tensor) -> Tensor:
        return total(*values, backend="reference")

    return tuple(leaves[name] for name in names), ours, reference


def fresh(values: Values) -> Values:
    return tuple(value.detach().clone().requires_grad_() for value in values)


def compare(found: Any, expected: Any, name: str = "") -> None:
    if isinstance(expected, str):
        assert found == expected, name
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")


# ---- second derivatives and forward mode ----


def penalty(loss: Loss, values: Values) -> Tensor:
    return sum(g.square().sum() for g in torch.autograd.grad(loss(*values), values, create_graph=True))


def backward(loss: Loss, values: Values) -> Any:
    values = fresh(values)
    penalty(loss, values).backward()
    return tuple(value.grad for value in values)


def backward_of_the_last(loss: Loss, values: Values) -> Any:
    values = fresh(values)
    penalty(loss, values).backward(inputs=[values[-1]])
    return values[-1].grad


def grad_of_the_last(loss: Loss, values: Values) -> Any:
    values = fresh(values)
    (first,) = torch.autograd.grad(loss(*values), values[:1], create_graph=True)
    return torch.autograd.grad(first.square().sum(), values[-1])


def every(values: Values) -> tuple[int, ...]:
    return tuple(range(len(values)))


ROUTES: dict[str, Callable[[Loss, Values], Any]] = {
    "backward": backward,
    "inputs": backward_of_the_last,
    "grad": grad_of_the_last,
    "hvp": lambda loss, values: functional.hvp(loss, values, values)[1],
    "vhp": lambda loss, values: functional.vhp(loss, values, values)[1],
    "hessian": functional.hessian,
    "func-hessian": lambda loss, values: torch.func.hessian(loss, every(values))(*values),
    "func-jvp": lambda loss, values: torch.func.jvp(loss, values, values),
    "jvp-of-grad": lambda loss, values: torch.func.jvp(torch.func.grad(loss), values, values),
    "grad-of-grad": lambda loss, values: torch.func.grad(
        lambda *given: torch.func.grad(loss)(*given).square().sum()
    )(*values),
}


def outcome(derivative: Callable[[Loss, Values], Any], loss: Loss, values: Values) -> Any:
    try:
        return derivative(loss, values)
    except RuntimeError as error:
        return str(error)


@pytest.mark.kills("ual_kernels/ops.py", "return torch.cat(found) if found else None", "return None")
@pytest.mark.kills("ual_kernels/ops.py", "torch.cat(found) if found", "found[0] if found")
@pytest.mark.kills("ual_kernels/ops.py", "linked = (_link((*inputs, token_scale)),)", "linked = (None,)")
@pytest.mark.kills(
    "ual_kernels/ops.py",
    "dlogits, dsmoothing, dp = _Gradients.apply(",
    "dlogits, dsmoothing, dp = (lambda compute, *tensors: compute(*tensors))(",
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("kind", "names"), [*EACH, *PAIRS, *ALL], ids=str)
def test_second_derivatives_are_right_or_refused(
    kind: str, names: tuple[str, ...], reduction: str, device: torch.device
) -> None:
    """By every route and for every differentiable input, alone and with others."""
    values, ours, reference = losses_of(kind, names, reduction, device, return_statistics=reduction == "none")
    for route, derivative in ROUTES.items():
        found = outcome(derivative, ours, values)
        if not (isinstance(found, str) and "second derivatives" in found):
            # a loss that is linear in its only leaf has no second derivative in PyTorch either
            compare(found, outcome(derivative, reference, values), route)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_function_of_the_statistics_has_no_second_derivatives(reduction: str, device: torch.device) -> None:
    leaves, target = linear_case(4, VOCAB, 3, torch.float64, device)
    del leaves["sample_weight"]
    loss = linear_cross_entropy(**leaves, target=target, reduction=reduction, sample_weight=weight_fn).sum()
    (gradient,) = torch.autograd.grad(loss, leaves["linear_bias"], create_graph=True)
    with pytest.raises(
        UnsupportedError, match=r'neither second derivatives nor forward mode; use backend="ref'
    ):
        torch.autograd.grad(gradient.square().sum(), leaves["input"])


def weight_fn(statistics: TokenStatistics) -> Tensor:
    return statistics.log_prob.exp()


@pytest.mark.kills("ual_kernels/ops.py", "    def jvp(ctx", "    def no_jvp(ctx")
@pytest.mark.parametrize(("kind", "names"), EACH, ids=str)
def test_forward_mode_is_refused(kind: str, names: tuple[str, ...], device: torch.device) -> None:
    """Operators of `torch.library` ignore tangents, so the derivative was 0."""
    values, ours, reference = losses_of(kind, names, "mean", device)

    def tangent(loss: Loss, values: Values) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(values[0].detach(), torch.ones_like(values[0]))
            return forward_ad.unpack_dual(loss(dual)).tangent

    found = outcome(tangent, ours, values)
    if "linear" not in kind and names == ("sample_weight",):  # multiplied outside of the operator
        compare(found, tangent(reference, values))
    else:
        assert isinstance(found, str)
        assert 'nor forward mode; use backend="reference"' in found


# ---- first derivatives with a graph ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("kind", "names"), ALL, ids=str)
def test_first_gradients_with_a_graph(
    kind: str, names: tuple[str, ...], reduction: str, device: torch.device
) -> None:
    """The upstream gradient requires a gradient: a learnable weight of the loss, and its square."""
    values, ours, reference = losses_of(kind, names, reduction, device)

    def gradients(loss: Loss) -> Any:
        weight = torch.tensor(1.5, dtype=torch.float64, device=device, requires_grad=True)
        weighted = weight * loss(*values)
        squared = loss(*values) ** 2
        return [
            torch.autograd.grad(weighted, (*values, weight), create_graph=True),
            torch.autograd.grad(squared, values, create_graph=True),
        ]

    compare(gradients(ours), gradients(reference))


class AsIs(torch.autograd.Function):
    """Return a buffer that it was given, as kernels of quantized layers do."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.copy_(leaf)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clone(), None


@pytest.mark.kills(
    "ual_kernels/ops.py",
    "ctx.save_for_backward(*output[2:], token_scale, *linked)",
    "ctx.save_for_backward(*output[2:], token_scale, _link(inputs))",
)
def test_logits_in_place_are_a_view_of_the_result_of_a_function(device: torch.device) -> None:
    """Autograd refuses to differentiate such a view after it was overwritten."""
    leaves, target = logits_case(4, VOCAB, torch.float64, device)

    def gradient(**how: Any) -> Tensor:
        logits = AsIs.apply(leaves["input"], torch.empty_like(leaves["input"])).reshape(2, 2, VOCAB)
        loss = cross_entropy(logits, target.reshape(2, 2), **how)
        return torch.autograd.grad(loss, leaves["input"])[0]

    compare(gradient(inplace_backward=True), gradient(backend="reference"))


def test_the_linear_loss_saves_no_input(device: torch.device) -> None:
    """Neither hidden states nor head; the tensor that connects the graphs has no memory."""
    leaves, target = problem("linear", device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(linear_cross_entropy, **leaves, target=target)
    owners = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.numel()}
    assert owners.isdisjoint(leaf.untyped_storage().data_ptr() for leaf in leaves.values())
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in saved if not tensor.numel())


@pytest.mark.parametrize("kind", ["logits", "linear", "logits-several", "linear-several"])
def test_every_leaf_has_one_edge(kind: str, device: torch.device) -> None:
    """Compiled autograd does not support a second edge whose gradient is undefined."""
    leaves, target = problem(kind, device)
    loss = call(kind, target=target, **leaves, reduction="sum")
    edges: dict[Any, int] = {}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                if following is not None:
                    edges[following] = edges.get(following, 0) + 1
                    waiting.append(following)
    accumulate = [count for node, count in edges.items() if hasattr(node, "variable")]
    assert accumulate == [1] * len(leaves)


# ---- functorch ----


def stacked(values: Values) -> Values:
    """Two samples. The second differs by so little that a sum of probabilities is still valid."""
    return tuple(torch.stack([value.detach(), 0.9995 * value.detach()]) for value in values)


def per_token(loss: Loss) -> Loss:
    return lambda *values: loss(*values) * torch.ones(2, dtype=torch.float64, device=values[0].device)


TRANSFORMS: dict[str, Callable[[Loss, Values], Any]] = {
    "grad": lambda loss, values: torch.func.grad(loss, every(values))(*values),
    "vmap": lambda loss, values: torch.vmap(loss)(*stacked(values)),
    "vmap-first": lambda loss, values: torch.vmap(loss, (0, *(None for _ in values[1:])))(
        stacked(values)[0], *values[1:]
    ),
    "vmap-of-grad": lambda loss, values: torch.vmap(torch.func.grad(loss, every(values)))(*stacked(values)),
    "vjp": lambda loss, values: torch.func.vjp(loss, *values)[1](torch.tensor(2.0).to(values[0])),
    "jacrev": lambda loss, values: torch.func.jacrev(per_token(loss), every(values))(*values),
}


@pytest.mark.kills(
    "ual_kernels/ops.py",
    "class _InplaceGradients(_Inplace, _Gradients)",
    "class _InplaceGradients(_Gradients)",
)
@pytest.mark.kills("ual_kernels/ops.py", "value if dim is None else value.select(dim, sample)", "value")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("kind", "names"), ALL, ids=str)
def test_transforms_match_the_reference(
    kind: str, names: tuple[str, ...], reduction: str, device: torch.device
) -> None:
    values, ours, reference = losses_of(kind, names, reduction, device)
    for name, transform in TRANSFORMS.items():
        found = outcome(transform, ours, fresh(values))
        if kind.startswith("inplace") and name in ("vmap-of-grad", "jacrev"):
            assert isinstance(found, str), name
            assert "inplace_backward is not supported under torch.vmap and jacrev" in found, name
        else:
            compare(found, transform(reference, fresh(values)), name)


@pytest.mark.kills("ual_kernels/ops.py", "hidden = not again and any(", "hidden = again and any(")
def test_a_gradient_of_a_batched_linear_loss_is_refused(device: torch.device) -> None:
    """Gradients are computed in forward, and `requires_grad` of a batched tensor is False."""
    values, ours, _ = losses_of("linear", ("input",), "mean", device)
    with pytest.raises(UnsupportedError, match=r"apply torch\.func\.grad inside of torch\.vmap"):
        torch.func.grad(lambda given: torch.vmap(ours)(given).sum())(*stacked(values))


def test_functional_call(device: torch.device) -> None:
    model = torch.nn.Linear(3, VOCAB, device=device, dtype=torch.float64)
    (hidden,), target = (
        torch.randn(1, 4, 3, dtype=torch.float64, device=device),
        torch.tensor([0, -100, 3, 6]),
    )

    def of(backend: str) -> Any:
        def loss(parameters: Leaves) -> Any:
            logits = torch.func.functional_call(model, parameters, (hidden,))
            linear = linear_cross_entropy(
                hidden,
                parameters["weight"],
                target.to(device),
                linear_bias=parameters["bias"],
                backend=backend,
            )
            return linear + cross_entropy(logits, target.to(device), backend=backend)

        return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})

    compare(of("torch"), of("reference"))


# ---- meta tensors ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", LEAVES | SEVERAL)
def test_meta_tensors_give_shapes(kind: str, reduction: str, device: torch.device) -> None:
    leaves, target = problem(kind, device)
    chosen = options(reduction, VOCAB, torch.device("meta"))
    given = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in leaves.items()}
    called = (
        given
        | {"input": given["input"] * 1.0}
        | ({"inplace_backward": True} if kind.startswith("inplace") else {})
    )
    value, statistics = call(kind, target=target.to("meta"), **called, **chosen, return_statistics=True)
    assert value.is_meta
    tokens = leaves["label_smoothing"].shape
    assert value.shape == (tokens if reduction == "none" else ())
    assert statistics.lse.shape == tokens
    value.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in given.values())


@pytest.mark.kills("ual_kernels/ops.py", "if inputs.input.is_meta or (", "if (")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_functions_of_the_statistics_on_meta_tensors(backend: str) -> None:
    hidden, head = torch.zeros(4, 3, device="meta", requires_grad=True), torch.zeros(5, 3, device="meta")
    target = torch.zeros(4, dtype=torch.long, device="meta")
    loss = linear_cross_entropy(hidden, head, target, sample_weight=weight_fn, backend=backend)
    loss.backward()
    assert hidden.grad.shape == (4, 3)


# ---- floating-point operations ----


@pytest.mark.kills("ual_kernels/flops.py", "flops += head + a\n", "flops += head\n")
@pytest.mark.kills("ual_kernels/flops.py", "flops += b  #", "flops += a  #")
@pytest.mark.kills(
    "ual_kernels/flops.py", "    if spec.head_grad:\n        flops += head", "    if False:\n        pass"
)
@pytest.mark.kills("ual_kernels/flops.py", "flops += a + b", "flops += a")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["frozen", "lora", "head", "all"])
def test_flops_are_those_of_the_unfused_loss(trained: str, reduction: str, device: torch.device) -> None:
    """Per-token losses with trained matrices compute the logits twice."""
    import ual_kernels.flops  # noqa: F401  (PyTorch's counter imports Triton)

    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode
    leaves, target = linear_case(5, VOCAB, 3, torch.float32, device)
    if trained in ("lora", "all"):
        leaves = with_adapter(leaves, rank=2)
    if trained in ("frozen", "lora"):
        leaves = {k: leaf.detach().requires_grad_("linear" not in k) for k, leaf in leaves.items()}

    def unfused(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, **rest: Any) -> Tensor:
        logits = input @ linear_weight.T + linear_bias
        if (adapter := rest.pop("linear_lora")) is not None:
            logits = logits + input @ adapter[0].T @ adapter[1].T
        return cross_entropy(logits, **rest)  # type: ignore[no-any-return]

    def flops(loss: Callable[..., Tensor], backward: bool) -> int:
        with counter(display=False) as counted:
            value = adapted(loss, **leaves, target=target, reduction=reduction)
            if backward:
                value.sum().backward()
        return int(counted.get_total_flops())

    again = flops(unfused, False) if reduction == "none" and trained != "frozen" else 0
    assert flops(linear_cross_entropy, True) == flops(unfused, True) + again > 0
    with torch.no_grad():
        assert flops(linear_cross_entropy, False) == flops(unfused, False)

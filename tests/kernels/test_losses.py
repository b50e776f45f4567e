"""Every preset against the formula of its paper, in float64 and differentiated by autograd."""

import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import as_float64, assert_at_the_floor, cross_entropy, linear_cross_entropy, measure
from ual_kernels import TokenStatistics, losses

HEAD = ("linear_weight", "linear_bias")
V, D, B, T = 29, 8, 3, 4
REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "items": {"num_items": 7},
}


# ---- formulas: loss [M] of final logits z [M, V], targets y [M] and per-sample values n [M] ----


def nll(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(1, y[:, None]).squeeze(1)


def entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).detach()


def smoothed(z: Tensor, y: Tensor, s: Tensor) -> Tensor:
    onehot = torch.nn.functional.one_hot(y, z.shape[1])
    q = (1 - s[:, None]) * onehot + s[:, None] / z.shape[1]
    return -(q * z.log_softmax(-1)).sum(-1)


def gem_of_the_paper(z: Tensor, y: Tensor, beta: float) -> Tensor:
    q = (z / beta).softmax(-1).detach()
    return (q * z.log_softmax(-1)).sum(-1) + nll(z, y)


def gem(z: Tensor, y: Tensor, beta: float) -> Tensor:
    return gem_of_the_paper(z, y, beta) + beta * entropy(z / beta)


class Preset(NamedTuple):
    options: Callable[[Tensor], Any]
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    final: Callable[[Tensor], Tensor] = lambda x: x  # final logits of raw logits
    learns: bool = False  # whether gradients flow to n
    divides: bool = False  # whether n counts in the mean's divisor


def capped(x: Tensor) -> Tensor:
    return 3.0 * torch.tanh(0.5 * x / 3.0)


PRESETS = {
    "ual": Preset(losses.ual, smoothed, learns=True),
    "uniform": Preset(
        lambda n: losses.uniform(0.1),
        lambda z, y, n: torch.nn.functional.cross_entropy(z, y, label_smoothing=0.1, reduction="none"),
    ),
    "weighted": Preset(losses.weighted, lambda z, y, n: n * nll(z, y), learns=True, divides=True),
    "dft": Preset(lambda n: losses.dft(), lambda z, y, n: torch.exp(-nll(z, y)).detach() * nll(z, y)),
    "power": Preset(
        lambda n: losses.power(2.5), lambda z, y, n: torch.exp(-2.5 * nll(z, y)).detach() * nll(z, y)
    ),
    "reverse": Preset(
        lambda n: losses.reverse(3.0), lambda z, y, n: 3.0 * torch.exp(-nll(z, y)).detach() * nll(z, y)
    ),
    "eaft": Preset(lambda n: losses.eaft(), lambda z, y, n: entropy(z) / math.log(20) * nll(z, y)),
    "eaft-5-root": Preset(
        lambda n: losses.eaft(top_k=5, alpha=0.5),
        lambda z, y, n: (entropy(z) / math.log(5)).sqrt() * nll(z, y),
    ),
    "mile": Preset(lambda n: losses.mile(), lambda z, y, n: (1 + entropy(z)) * nll(z, y)),
    "mile-square": Preset(
        lambda n: losses.mile(gamma=2.0, sigma=0.25),
        lambda z, y, n: (0.25 + entropy(z)).square() * nll(z, y),
    ),
    "gem": Preset(lambda n: losses.gem(), lambda z, y, n: gem(z, y, 0.7)),
    "gem-capped": Preset(
        lambda n: losses.gem(0.4, logit_scale=0.5, softcap=3.0), lambda z, y, n: gem(z, y, 0.4), final=capped
    ),
    "ual-eaft": Preset(
        lambda n: losses.ual(n) | losses.eaft(),
        lambda z, y, n: entropy(z) / math.log(20) * smoothed(z, y, n),
        learns=True,
    ),
}
presets = pytest.mark.parametrize("name", PRESETS)


def paper(
    preset: Preset,
    *,
    input: Tensor,
    target: Tensor,
    n: Tensor,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    """The reduced formula over loss tokens."""
    x = input if linear_weight is None else torch.nn.functional.linear(input, linear_weight, linear_bias)
    selected = target != -100
    n = n[:, None].expand(target.shape)[selected]
    loss = preset.formula(preset.final(x[selected]), target[selected], n)
    if reduction == "none":
        return loss.new_zeros(target.shape).masked_scatter(selected, loss)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (num_items or (n.sum() if preset.divides else selected.sum()))


def ours(loss: Callable[..., Tensor], preset: Preset) -> Callable[..., Tensor]:
    return lambda *, n, **rest: loss(**rest, **preset.options(n))


def case(
    name: str, device: torch.device, *, linear: bool, frozen: bool = False, tokens: int = T, features: int = D
) -> dict[str, Tensor]:
    """Leaves to differentiate: hidden states and head, or logits, of a standard deviation of about 2."""
    wide = {"device": device, "dtype": torch.float64}
    leaves = {"n": torch.rand(B, **wide).requires_grad_(PRESETS[name].learns)}
    if linear:
        leaves["input"] = torch.randn(B, tokens, features, **wide).requires_grad_()
        head = torch.randn(V, features, **wide) * 2 / math.sqrt(features)
        leaves["linear_weight"] = head.requires_grad_(not frozen)
        leaves["linear_bias"] = torch.randn(V, **wide).requires_grad_(not frozen)
    else:
        leaves["input"] = (torch.randn(B, tokens, V, **wide) * 2).requires_grad_()
    return leaves


def targets(device: torch.device, tokens: int = T) -> Tensor:
    """Targets in which prompts of different lengths and one complete sample are ignored."""
    target = torch.randint(V, (B, tokens), device=device)
    target[0, :2] = target[1, :1] = target[2] = -100
    return target


def compare(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert actual.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(
            actual[name], exact[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.kills("ual_kernels/losses.py", '"logit_scale": logit_scale / beta', '"logit_scale": 1 / beta')
@presets
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_linear_loss_is_the_papers(
    backend: str, frozen: bool, reduction: str, name: str, device: torch.device
) -> None:
    preset, target = PRESETS[name], targets(device)
    leaves = case(name, device, linear=True, frozen=frozen)
    flags = REDUCTIONS[reduction]
    exact = measure(lambda **arguments: paper(preset, **arguments), leaves, target, **flags)
    # several chunks: the function is called once per chunk
    how = {"backend": backend, "chunk_tokens": 2}
    compare(measure(ours(linear_cross_entropy, preset), leaves, target, **flags, **how), exact)


@presets
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_loss_of_logits_is_the_papers(
    backend: str, reduction: str, name: str, device: torch.device
) -> None:
    preset, target, flags = PRESETS[name], targets(device), REDUCTIONS[reduction]
    leaves = case(name, device, linear=False)
    exact = measure(lambda **arguments: paper(preset, **arguments), leaves, target, **flags)
    compare(measure(ours(cross_entropy, preset), leaves, target, **flags, backend=backend), exact)


@presets
def test_sixteen_bits_are_rounded_once(name: str, device: torch.device) -> None:
    """Weights from float32 statistics do not add a visible error to a bfloat16 gradient."""
    preset, target = PRESETS[name], targets(device, tokens=64)
    leaves = case(name, device, linear=True, tokens=64, features=64)
    for key, leaf in leaves.items():
        dtype = torch.float32 if key == "n" else torch.bfloat16
        # the gradient of a weight is the loss minus the mean loss, which cancels
        leaves[key] = leaf.detach().to(dtype).requires_grad_(key != "n")
    assert_at_the_floor(
        actual=measure(ours(linear_cross_entropy, preset), leaves, target),
        exact=measure(lambda **arguments: paper(preset, **arguments), as_float64(leaves), target),
    )


@presets
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_all_ignored_is_zero_with_a_connected_graph(name: str, backend: str, device: torch.device) -> None:
    leaves, target = case(name, device, linear=False), torch.full((B, T), -100, device=device)
    for key, value in measure(ours(cross_entropy, PRESETS[name]), leaves, target, backend=backend).items():
        assert not value.any(), key


# ---- properties of single presets ----


@pytest.mark.kills("ual_kernels/losses.py", "statistics.log_prob.exp()", "statistics.top1_prob")
def test_dft_is_the_gradient_of_the_probability(device: torch.device) -> None:
    logits, target = case("dft", device, linear=False)["input"], targets(device)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target, **losses.dft(), reduction="sum"), logits)
    selected = target != -100
    p = logits.softmax(-1)[selected].gather(1, target[selected][:, None]).sum()
    torch.testing.assert_close(gradient, -torch.autograd.grad(p, logits)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.kills("ual_kernels/losses.py", "(self.power * statistics.log_prob)", "(statistics.log_prob)")
@pytest.mark.parametrize("k", [0.5, 1.0, 10.0])
def test_powers_gradient_is_the_papers(k: float, device: torch.device) -> None:
    """That of (1 - p^k) / k; for k = 0 the limit is cross entropy, and k = 1 is DFT, bit for bit."""
    logits, target = case("power", device, linear=False)["input"], targets(device)

    def gradient(options: Any) -> Tensor:
        loss = cross_entropy(logits, target, **options, reduction="sum")
        return torch.autograd.grad(loss, logits)[0]

    selected = target != -100
    p = logits.softmax(-1)[selected].gather(1, target[selected][:, None])
    (exact,) = torch.autograd.grad(((1 - p**k) / k).sum(), logits)
    torch.testing.assert_close(gradient(losses.power(k)), exact, rtol=1e-12, atol=1e-12)
    assert gradient(losses.power(0)).equal(gradient({}))
    assert gradient(losses.power()).equal(gradient(losses.dft()))


@pytest.mark.kills(
    "ual_kernels/losses.py", "shift=cross_entropy, factor=A", "shift=cross_entropy, factor=A**2"
)
@pytest.mark.kills("ual_kernels/losses.py", "(shift=cross_entropy,", "(shift=0.0,")
@pytest.mark.parametrize(("alpha", "beta", "A"), [(0.0, 1.0, -4.0), (0.1, 1.0, -6.0), (6.0, 0.1, -4.0)])
def test_reverses_gradient_is_that_of_symmetric_cross_entropy(
    alpha: float, beta: float, A: float, device: torch.device
) -> None:
    """alpha CE + beta RCE, where RCE = -sum_v p_v log q_v with log 0 := A < 0 has no more terms than V."""
    logits, target = case("reverse", device, linear=False)["input"], targets(device)
    loss = cross_entropy(logits, target, **losses.reverse(-beta * A, cross_entropy=alpha), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    z, y = logits[target != -100], target[target != -100]
    log_q = torch.full_like(z, A).scatter(1, y[:, None], 0.0)
    reverse = -(z.softmax(-1) * log_q).sum(-1)
    torch.testing.assert_close(reverse, -A * (1 - torch.exp(-nll(z, y))), rtol=1e-12, atol=1e-12)
    (exact,) = torch.autograd.grad((alpha * nll(z, y) + beta * reverse).sum(), logits)
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)


def eaft_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the weights of `losses.eaft` and of the paper, which renormalizes the largest logits."""
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    _, statistics = cross_entropy(logits, target, return_statistics=True)
    of_the_paper = entropy(logits.topk(top_k).values) / math.log(top_k)
    return losses.eaft(top_k)["sample_weight"](statistics), of_the_paper


@pytest.mark.parametrize("rest", [-200.0, -12.0, -6.0, 0.0])
def test_eaft_uses_the_entropy_of_the_complete_vocabulary(rest: float, device: torch.device) -> None:
    """H = H_k + h(m) + m (ln(V - k) - H_k) if the mass m is uniform over the V - k smallest logits."""
    vocab, k = 5_000, 20
    logits = torch.full((4, vocab), rest, device=device, dtype=torch.float64)
    logits[:, :k] = 1 + torch.rand(4, k, device=device, dtype=torch.float64)
    complete, top = eaft_weights(logits, k)
    p, unit = logits.softmax(-1), math.log(k)
    inside, m = p[:, :k].sum(-1), p[:, k:].sum(-1)
    h = torch.special.entr(m) + torch.special.entr(inside)
    difference = (h + m * (math.log(vocab - k) - top * unit)) / unit
    torch.testing.assert_close(complete - top, difference, rtol=1e-9, atol=1e-12)
    if rest == -200:
        torch.testing.assert_close(complete, top, rtol=1e-12, atol=1e-12)


@pytest.mark.kills("ual_kernels/losses.py", "unit=math.log(top_k)", "unit=3.0")
def test_eaft_weights_exceed_one_for_uniform_logits(device: torch.device) -> None:
    logits = torch.zeros(2, 5_000, device=device, dtype=torch.float64)
    complete, top = eaft_weights(logits, 20)
    torch.testing.assert_close(complete, torch.full_like(complete, math.log(5_000) / math.log(20)))
    torch.testing.assert_close(top, torch.ones_like(top))


def test_the_figures_in_eafts_docstring() -> None:
    m, vocab, k = 0.01, 151_936, 20
    most = (-m * math.log(m) - (1 - m) * math.log(1 - m) + m * math.log(vocab - k)) / math.log(k)
    assert 0.055 < most < 0.06
    assert round(math.log(vocab) / math.log(k), 2) == 3.98


@pytest.mark.kills("ual_kernels/losses.py", "shift=sigma, unit=1.0", "shift=1.0, unit=1.0")
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0, "sigma": 0.25}, {"gamma": -1.0}], ids=str)
def test_miles_scale_is_a_division(options: dict[str, float], linear: bool, device: torch.device) -> None:
    """alpha = 1 / mean((sigma + H)^gamma) can be applied to the loss instead of to every token."""
    leaves, target = case("mile", device, linear=linear), targets(device)
    loss = linear_cross_entropy if linear else cross_entropy
    gamma, sigma = options.get("gamma", 1.0), options.get("sigma", 1.0)

    def rescaled(*, n: Tensor, **arguments: Any) -> Tensor:
        chosen = losses.mile(**options)
        value, statistics = loss(**arguments, **chosen, return_statistics=True)
        return value / chosen["sample_weight"](statistics).nanmean()

    def alpha_of_the_paper(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
        w = (sigma + entropy(z)) ** gamma
        return w / w.mean() * nll(z, y)

    preset = Preset(losses.mile, alpha_of_the_paper)
    exact = measure(lambda **arguments: paper(preset, **arguments), leaves, target)
    compare(measure(rescaled, leaves, target), exact)


@pytest.mark.kills(
    "ual_kernels/losses.py", '"sample_weight": Constant(beta)', '"sample_weight": Constant(1.0)'
)
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("beta", [0.5, 0.7, 1.0, 1.5])
def test_gems_value_is_beta_entropies_less(beta: float, backend: str, device: torch.device) -> None:
    logits, target = case("gem", device, linear=False)["input"], targets(device)
    selected = target != -100
    loss, statistics = cross_entropy(
        logits, target, **losses.gem(beta), reduction="none", return_statistics=True, backend=backend
    )
    value = (loss - beta * statistics.entropy)[selected]
    exact = gem_of_the_paper(logits[selected], target[selected], beta)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    q_minus_onehot = (logits / beta).softmax(-1) - torch.nn.functional.one_hot(target.clamp(min=0), V)
    torch.testing.assert_close(gradient, q_minus_onehot * selected[..., None], rtol=1e-12, atol=1e-12)


def test_gem_does_not_overwrite_the_models_own_scale() -> None:
    logits, target = torch.zeros(2, V), torch.zeros(2, dtype=torch.long)
    for own in ({"logit_scale": 0.5}, {"softcap": 30.0}):
        with pytest.raises(TypeError, match="multiple values for keyword argument"):
            cross_entropy(logits, target, **own, **losses.gem())  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [losses.eaft(), losses.eaft(alpha=0.5), losses.dft(), losses.power(0.5), losses.reverse()],
    ids=["eaft", "root", "dft", "power", "reverse"],
)
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_certain_tokens_have_no_loss(options: Any, backend: str, device: torch.device) -> None:
    """H, or p_y, is 0 up to rounding; weights are 0, not NaN."""
    logits = (case("eaft", device, linear=False)["input"].detach().float() * 1_000).requires_grad_()
    target = targets(device)
    certain = logits.argmax(-1)
    target[target != -100] = (certain + 1)[target != -100] % V
    loss = cross_entropy(logits, target, **options, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.kills("ual_kernels/losses.py", "statistics.entropy.clamp(min=0.0)", "statistics.entropy")
def test_an_entropy_rounded_below_zero_is_zero() -> None:
    fields = dict.fromkeys(TokenStatistics._fields, torch.zeros(2))
    statistics = TokenStatistics(**fields | {"entropy": torch.tensor([-1e-7, 0.0])})
    assert losses.eaft(alpha=0.5)["sample_weight"](statistics).tolist() == [0.0, 0.0]
    assert losses.eaft()["sample_weight"](statistics).tolist() == [0.0, 0.0]
    assert losses.mile(sigma=1e-8)["sample_weight"](statistics).min() > 0


@pytest.mark.parametrize(
    "make", [losses.dft, losses.power, losses.reverse, losses.eaft, losses.mile, losses.gem]
)
def test_token_fns_can_be_pickled(make: Callable[[], dict[str, Any]]) -> None:
    assert pickle.loads(pickle.dumps(make())) == make()


@pytest.mark.kills("ual_kernels/losses.py", "if not 0 < beta < math.inf", "if beta <= 0")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: losses.uniform(1.5),
            r"uniform's smoothing must be in \[0, 1\], got 1.5; a common value is 0.1",
        ),
        (lambda: losses.uniform(-0.1), r"uniform's smoothing must be in \[0, 1\], got -0.1"),
        (lambda: losses.uniform(math.nan), r"uniform's smoothing must be in \[0, 1\], got nan"),
        (lambda: losses.eaft(top_k=1), "eaft's top_k must be an integer >= 2, got 1; the paper uses 20"),
        (lambda: losses.power(-1), "power's k must be a number >= 0, got -1; the paper uses 1 and 10"),
        (lambda: losses.power(math.nan), "power's k must be a number >= 0, got nan"),
        (lambda: losses.reverse(-4.0), "reverse's A must be a positive number, got -4.0; log 0 is replaced"),
        (lambda: losses.reverse(math.inf), "reverse's A must be a positive number, got inf"),
        (
            lambda: losses.reverse(cross_entropy=-0.1),
            "reverse's cross_entropy must be a number >= 0, got -0.1; 0 is the reverse alone",
        ),
        (
            lambda: losses.eaft(alpha=-1.0),
            "eaft's alpha must be a number >= 0, got -1.0; the paper uses 1.0",
        ),
        (lambda: losses.eaft(alpha=math.nan), "eaft's alpha must be a number >= 0, got nan"),
        (lambda: losses.eaft(alpha=math.inf), "eaft's alpha must be a number >= 0, got inf"),
        (lambda: losses.mile(gamma=math.inf), "mile's gamma must be finite, got inf; the paper uses 1.0"),
        (lambda: losses.mile(gamma=math.nan), "mile's gamma must be finite, got nan"),
        (lambda: losses.mile(sigma=0.0), "mile's sigma must be a positive number, got 0.0; the paper uses"),
        (lambda: losses.mile(sigma=math.inf), "mile's sigma must be a positive number, got inf"),
        (lambda: losses.gem(0.0), "gem's beta must be a positive number, got 0.0; the paper uses 0.7"),
        (lambda: losses.gem(-1.0), "gem's beta must be a positive number, got -1.0"),
        (lambda: losses.gem(math.nan), "gem's beta must be a positive number, got nan"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

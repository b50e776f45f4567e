"""Properties of the loss for arbitrary inputs, which hypothesis generates."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cases import cross_entropy, linear_cross_entropy

law = settings(max_examples=20)
backends = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])


class Problem(NamedTuple):
    logits: Tensor  # [N, V] float64
    target: Tensor  # [N]
    smoothing: Tensor  # [N]
    weight: Tensor  # [V], class weights


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tokens, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    wide = {"generator": generator, "dtype": torch.float64}
    return Problem(
        torch.randn(tokens, vocab, **wide) * scale,
        torch.randint(vocab, (tokens,), generator=generator),
        torch.rand(tokens, **wide),
        torch.rand(vocab, **wide) + 0.1,
    )


def token_losses(problem: Problem, backend: str, smoothing: Tensor | float | None = None) -> Tensor:
    s = problem.smoothing if smoothing is None else smoothing
    return cross_entropy(problem.logits, problem.target, label_smoothing=s, reduction="none", backend=backend)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@backends
@law
@given(problems(), st.floats(-100, 100))
def test_shifting_the_logits_changes_nothing(backend: str, problem: Problem, shift: float) -> None:
    close(
        token_losses(problem._replace(logits=problem.logits + shift), backend), token_losses(problem, backend)
    )


@backends
@law
@given(problems())
def test_the_gradient_of_a_token_sums_to_zero(backend: str, problem: Problem) -> None:
    logits = problem.logits.requires_grad_()
    loss = cross_entropy(
        logits, problem.target, label_smoothing=problem.smoothing, weight=problem.weight, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.sum(-1).abs().max() < 1e-12


@backends
@law
@given(problems())
def test_the_loss_is_affine_in_the_smoothing(backend: str, problem: Problem) -> None:
    hard, soft = token_losses(problem, backend, 0.0), token_losses(problem, backend, 1.0)
    close(token_losses(problem, backend), hard + problem.smoothing * (soft - hard))


@backends
@law
@given(problems())
def test_smoothing_is_a_correction_to_plain_cross_entropy(backend: str, problem: Problem) -> None:
    """loss = CE + s (z_y - mean z)."""
    z_y = problem.logits.gather(1, problem.target[:, None]).squeeze(1)
    correction = problem.smoothing * (z_y - problem.logits.mean(1))
    close(token_losses(problem, backend), token_losses(problem, backend, 0.0) + correction)


@backends
@law
@given(problems())
def test_a_token_does_not_depend_on_its_neighbors(backend: str, problem: Problem) -> None:
    def gradient(some: Problem) -> Tensor:
        logits = some.logits.detach().requires_grad_()
        return torch.autograd.grad(token_losses(some._replace(logits=logits), backend).sum(), logits)[0]

    together, gradients = token_losses(problem, backend), gradient(problem)
    for i in range(len(problem.logits)):
        tokens = slice(i, i + 1)
        alone = Problem(
            problem.logits[tokens], problem.target[tokens], problem.smoothing[tokens], problem.weight
        )
        assert torch.equal(token_losses(alone, backend), together[tokens])
        assert torch.equal(gradient(alone), gradients[tokens])


@backends
@law
@given(problems(), st.floats(0, 1), st.sampled_from(["none", "sum", "mean"]), st.booleans())
def test_equal_smoothing_is_pytorchs_own_loss(
    backend: str, problem: Problem, uniform: float, reduction: str, weighted: bool
) -> None:
    weight = problem.weight if weighted else None
    theirs = torch.nn.functional.cross_entropy(
        problem.logits, problem.target, weight=weight, label_smoothing=uniform, reduction=reduction
    )
    smoothing = torch.full_like(problem.smoothing, uniform)
    close(
        cross_entropy(
            problem.logits,
            problem.target,
            label_smoothing=smoothing,
            weight=weight,
            reduction=reduction,
            backend=backend,
        ),
        theirs,
    )


@backends
@law
@given(problems())
def test_the_other_convention_spreads_over_the_other_classes(backend: str, problem: Problem) -> None:
    vocab = problem.logits.shape[1]
    hit = torch.nn.functional.one_hot(problem.target, vocab).double()
    s = problem.smoothing[:, None]
    q = (1 - s) * hit + s * (1 - hit) / max(vocab - 1, 1)
    if vocab == 1:
        q = hit  # there are no others
    theirs = torch.nn.functional.cross_entropy(problem.logits, q, reduction="none")
    ours = cross_entropy(
        problem.logits,
        problem.target,
        label_smoothing=problem.smoothing,
        smoothing_over="others",
        reduction="none",
        backend=backend,
    )
    close(ours, theirs)


@backends
@law
@given(problems(), st.floats(0, 3))
def test_the_sum_is_linear_in_the_sample_weights(backend: str, problem: Problem, factor: float) -> None:
    losses = token_losses(problem, backend)
    weights = factor * torch.linspace(0.0, 1.0, len(losses), dtype=torch.float64)
    arguments = {"label_smoothing": problem.smoothing, "sample_weight": weights, "backend": backend}
    total = cross_entropy(problem.logits, problem.target, reduction="sum", **arguments)
    close(total, (weights * losses).sum())
    mean = cross_entropy(problem.logits, problem.target, reduction="mean", **arguments)
    close(mean * weights.sum(), total)


@backends
@law
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_matter(backend: str, problem: Problem, random) -> None:
    order = list(range(len(problem.target)))
    random.shuffle(order)
    shuffled = Problem(problem.logits[order], problem.target[order], problem.smoothing[order], problem.weight)
    assert torch.equal(token_losses(shuffled, backend), token_losses(problem, backend)[order])


@backends
@law
@given(problems(), st.integers(0, 2**31 - 1))
def test_the_order_of_classes_does_not_matter(backend: str, problem: Problem, seed: int) -> None:
    order = torch.randperm(problem.logits.shape[1], generator=torch.Generator().manual_seed(seed))
    renamed = problem._replace(logits=problem.logits[:, order], target=order.argsort()[problem.target])
    close(token_losses(renamed, backend), token_losses(problem, backend))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@law
@given(problems(), st.integers(1, 6), st.sampled_from([None, 5.0]), st.integers(1, 5))
def test_the_linear_loss_is_the_loss_of_the_product(
    backend: str, problem: Problem, features: int, softcap: float | None, chunk_tokens: int
) -> None:
    tokens, vocab = problem.logits.shape
    generator = torch.Generator().manual_seed(tokens * vocab)
    hidden = torch.randn(tokens, features, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocab, features, generator=generator, dtype=torch.float64, requires_grad=True)
    flags = {"label_smoothing": problem.smoothing, "weight": problem.weight, "softcap": softcap}
    ours = linear_cross_entropy(
        hidden, head, problem.target, **flags, chunk_tokens=chunk_tokens, backend=backend
    )
    theirs = cross_entropy(hidden @ head.T, problem.target, **flags, backend="reference")
    close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs)), strict=True):
        close(a, b)

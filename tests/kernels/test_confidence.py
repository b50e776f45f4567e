"""The confidence loss of weak-to-strong generalization, against its definition and an exact assignment."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.kernels.cases import cross_entropy
from ual_kernels import SparseTarget, confidence, linear_cross_entropy

FILE = "ual_kernels/confidence.py"
N, K, D, V = 24, 3, 16, 50


def problem(options: int = K, tokens: int = N) -> tuple[Tensor, Tensor, SparseTarget]:
    """Hidden states, a head, and weak labels of options that all tokens share."""
    hidden, head = torch.randn(tokens, D), torch.randn(V, D)
    indices = torch.randperm(V)[:options].expand(tokens, options)
    return hidden, head, SparseTarget(indices, torch.rand(tokens, options).softmax(-1))


def published(logits: Tensor, labels: Tensor, coefficient: float) -> Tensor:
    """The loss per token of two options, as the paper and its code define it, with the paper's threshold."""
    p = logits.softmax(-1)
    threshold = torch.quantile(p[:, 0], labels.mean(0)[1])
    first = p[:, 0] >= threshold
    own = torch.stack([first, ~first], 1).to(labels.dtype)
    mixed = (1 - coefficient) * labels + coefficient * own.detach()
    return -(mixed * logits.log_softmax(-1)).sum(-1)


@pytest.mark.kills(FILE, "coefficient * (hardened - p[selected])", "coefficient * hardened")
@pytest.mark.kills(FILE, "share * total for share in shares", "total / len(shares) for share in shares")
@pytest.mark.parametrize("ones", [0, 4, 9, 12, 20, 23])
def test_two_options_are_the_published_loss(ones: int) -> None:
    """Hard labels: both thresholds select equally many tokens, unless option 0 is never a label.

    The published threshold is then the largest p, and still selects one token.
    """
    hidden, head, labels = problem(2)
    hard = torch.zeros(N, 2)
    hard[:ones, 1] = hard[ones:, 0] = 1.0
    labels = labels._replace(probabilities=hard[torch.randperm(N)])
    made = confidence.target(hidden, head, labels, coefficient=0.4)
    logits = hidden.double() @ head.double().T
    of_options = logits.gather(1, labels.indices).requires_grad_()
    exact = published(of_options, labels.probabilities.double(), 0.4)
    # over the options alone, as the published classifier
    ours = -(made.probabilities * of_options.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)  # float32 probabilities
    loss = linear_cross_entropy(hidden, head, made, reduction="none")
    dense = torch.zeros(N, V).scatter_add(1, made.indices, made.probabilities)
    reference = cross_entropy(logits, dense.double(), reduction="none", backend="reference")
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.kills(FILE, "for _ in range(options):", "for _ in range(1):")
@pytest.mark.parametrize("seed", range(12))
def test_own_predictions_are_the_likeliest_with_the_labels_frequencies(seed: int) -> None:
    """Against an exact assignment of tokens to places, of which each option has its number."""
    torch.manual_seed(seed)
    options, tokens = 2 + seed % 5, 11 + seed
    logits = torch.randn(tokens, options, dtype=torch.float64) + 2 * torch.randn(options)
    shares = torch.rand(options, dtype=torch.float64).square()
    own = confidence._balanced(logits, shares)
    counts = np.bincount(own.numpy(), minlength=options)
    assert np.abs(counts - (shares / shares.sum()).numpy() * tokens).max() < 1
    places = np.repeat(np.arange(options), counts)
    best = linear_sum_assignment(-logits.numpy()[:, places])
    exact = logits.numpy()[:, places][best].sum()
    found = logits.gather(1, own[:, None]).sum().item()
    assert found == pytest.approx(exact, abs=tokens * 2.0**-32)


def test_counts_are_rounded_to_the_nearest_with_their_sum() -> None:
    assert confidence._counts([0.5, 0.5], 5) == [3, 2]
    assert confidence._counts([0.05, 0.95], 8) == [0, 8]
    assert confidence._counts([0.34, 0.33, 0.33], 10) == [4, 3, 3]
    assert confidence._counts([1.0, 0.0], 3) == [3, 0]


def test_without_balance_own_is_the_largest_logit() -> None:
    hidden, head, labels = problem()
    bias = torch.randn(V)
    made = confidence.target(
        hidden, head, labels, coefficient=1.0, balance=False, linear_bias=bias, logit_scale=0.5, softcap=3.0
    )
    logits = 3 * torch.tanh((hidden @ head.T + bias) * 0.5 / 3)
    own = logits.gather(1, labels.indices).argmax(1)
    assert made.probabilities.equal(torch.nn.functional.one_hot(own, K).float())
    assert made.indices.equal(labels.indices)


@pytest.mark.kills(FILE, "scale * (input @ a", "(input @ a")
def test_an_adapter_is_as_if_merged() -> None:
    hidden, head, labels = problem()
    a, b, scale = torch.randn(4, D), torch.randn(V, 4), 2.0
    how: dict[str, Any] = {"coefficient": 1.0, "balance": False, "linear_bias": torch.randn(V)}
    made = confidence.target(hidden, head, labels, **how, linear_lora=(a, b, scale))
    assert made.probabilities.equal(
        confidence.target(hidden, head + scale * b @ a, labels, **how).probabilities
    )
    for ignored in ((a, b, 1.0), None):
        other = confidence.target(hidden, head, labels, **how, linear_lora=ignored)
        assert not made.probabilities.equal(other.probabilities)


@pytest.mark.kills(FILE, "logits.masked_fill(padding[selected], -torch.inf)", "logits")
@pytest.mark.kills(FILE, "p.masked_fill(padding, 0.0)", "p.clone()")
@pytest.mark.parametrize("balance", [True, False])
def test_ignored_tokens_and_padding(balance: bool) -> None:
    hidden, head, labels = problem(4)
    indices, p = labels.indices.clone(), labels.probabilities.clone()
    indices[:, 3] = -1  # padding, with a probability that is not used
    p[:, :3] /= p[:, :3].sum(1, keepdim=True)
    indices[::3, 0] = -100
    hidden[::3] = torch.nan
    made = confidence.target(hidden, head, SparseTarget(indices, p), coefficient=0.5, balance=balance)
    selected = indices[:, 0] != -100
    assert made.indices[:, 0].equal(indices[:, 0])
    assert not made.indices[:, 3].any()
    assert not made.probabilities[selected, 3].any()
    alone = confidence.target(
        hidden[selected], head, SparseTarget(indices[selected, :3], p[selected, :3]), coefficient=0.5,
        balance=balance,
    )  # fmt: skip
    assert made.probabilities[selected, :3].equal(alone.probabilities)
    loss = linear_cross_entropy(hidden, head, made, reduction="none")
    assert not loss[~selected].any()
    assert loss[selected].isfinite().all()


def test_no_token_at_all_and_logits_that_are_not_finite() -> None:
    hidden, head, labels = problem()
    ignored = labels._replace(indices=torch.full((N, K), -100))
    made = confidence.target(hidden, head, ignored, coefficient=0.5)
    assert linear_cross_entropy(hidden, head, made).item() == 0
    for value in (torch.nan, torch.inf):  # its own loss is NaN, and the others have a target
        hidden[3] = value
        made = confidence.target(hidden, head, labels, coefficient=0.5)
        loss = linear_cross_entropy(hidden, head, made, reduction="none")
        assert loss.isfinite().sum() == N - 1


def test_it_is_constant_and_follows_the_shape_and_dtype() -> None:
    hidden, head, labels = problem()
    shaped = SparseTarget(*(part.view(4, 6, K) for part in labels))
    a = torch.tensor(0.25)
    made = confidence.target(hidden.view(4, 6, D).bfloat16().requires_grad_(), head, shaped, coefficient=a)
    assert made.probabilities.shape == (4, 6, K)
    assert made.probabilities.dtype == torch.float32
    assert not made.probabilities.requires_grad
    assert made.probabilities.sum(-1).allclose(torch.ones(4, 6))


@pytest.mark.kills(FILE, "min(progress / share, 1.0)", "min(progress, 1.0)")
def test_the_warm_up_is_linear_and_continuous() -> None:
    found = [confidence.warm_up(progress, 0.75, 0.2) for progress in (0, 0.1, 0.2, 0.2001, 1)]
    assert found == pytest.approx([0, 0.375, 0.75, 0.75, 0.75])
    assert confidence.warm_up(0.0, 0.5, 0.0) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w, t: confidence.target(x, w, t, coefficient=1.5),
            r"coefficient must be in \[0, 1\], got 1.5",
        ),
        (lambda x, w, t: confidence.target(x[1:], w, t, coefficient=0.5), r"labels must be \[23, 'K'\]"),
        (lambda x, w, t: confidence.warm_up(-0.1), r"warm_up's progress must be in \[0, 1\], got -0.1"),
        (lambda x, w, t: confidence.warm_up(0.1, math.nan), "warm_up's coefficient must be in"),
        (lambda x, w, t: confidence.warm_up(0.1, 0.5, 2), "warm_up's share must be in"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*problem())


@pytest.mark.kills("ual_kernels/confidence.py", "hardened.masked_fill(padding[selected], 0.0)", "hardened")
@pytest.mark.kills("ual_kernels/confidence.py", "indices.clamp(0, len(head) - 1)", "indices.clamp(min=0)")
def test_a_token_without_options_or_with_one_out_of_range_is_nan() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    labels = SparseTarget(
        torch.tensor([[1, 2], [-1, -1], [1, 5]]), torch.tensor([[0.5, 0.5], [0, 0], [0.5, 0.5]])
    )
    for coefficient in (0.5, 1.0):
        target = confidence.target(hidden, head, labels, coefficient=coefficient, balance=False)
        loss = linear_cross_entropy(hidden, head, target, reduction="none")
        assert loss.isnan().tolist() == [False, True, True]

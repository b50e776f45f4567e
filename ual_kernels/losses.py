"""Losses from the literature as keyword arguments of the loss functions.

    linear_cross_entropy(hidden, head, target, **losses.dft())

With p = softmax(z) of the final logits, target y and H = -sum_v p_v log p_v, per token:

    ual, uniform    -sum_v q_v log p_v,  q = (1 - s) onehot(y) + s / V      s per sample, or one for all
    weighted        -w log p_y                                              w per sample or token
    dft             -p_y log p_y                                            p_y without gradient
    power           -p_y^k log p_y                                          p_y without gradient
    reverse         -(a + A p_y) log p_y                                    p_y without gradient
    eaft            -(H / ln 20)^alpha log p_y                              H without gradient
    mile            -(sigma + H)^gamma log p_y                              H without gradient
    gem             sum_v q_v log p_v - log p_y,  q = softmax(z / beta)     q without gradient

The result of a preset can be passed to both loss functions, and to the constructors of `ual_kernels.modules`
if it contains no tensor. A preset that smooths can be combined with a preset that weights. With
reduction="mean" all presets except `weighted` divide by the number of non-ignored tokens or by `num_items`.
"""

import math
from dataclasses import dataclass
from typing import Generic, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from ual_kernels.statistics import TokenFn, TokenStatistics

T = TypeVar("T")
S = TypeVar("S", float, Tensor, float | Tensor)


class Smoothing(TypedDict, Generic[T]):
    """Keyword arguments of a loss with smoothed targets."""

    label_smoothing: T


class Weighting(TypedDict, Generic[T]):
    """Keyword arguments of a loss with weighted tokens."""

    sample_weight: T


class Matching(TypedDict):
    """Keyword arguments of a loss with tempered logits."""

    sample_weight: TokenFn
    logit_scale: float
    softcap: float | None


def ual(smoothing: Tensor) -> Smoothing[Tensor]:
    """Uncertainty-aware learning: a separate label smoothing per sample (arXiv 2406.04854).

    The smoothing s increases with the sample's uncertainty, which a more capable LLM estimates.
    `ual.methods.smoothing` computes smoothing from uncertainty. The gradients are
    dz = p - (1 - s) onehot(y) - s / V and ds = z_y - mean(z).

    Args:
        smoothing: in [0, 1], shaped like leading dimensions of `target` ([B]: one value per sample). A value
            out of range makes the loss of its tokens NaN.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> options = ual(torch.tensor([0.0, 0.2]))
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), **options).item(), 4)  # log 4
    1.3863
    """
    return {"label_smoothing": smoothing}


def uniform(smoothing: float) -> Smoothing[float]:
    """Label smoothing, the same for all samples, the baseline of `ual` (arXiv 1512.00567).

    Args:
        smoothing: in [0, 1].

    Raises:
        ValueError: `smoothing` is outside [0, 1].

    >>> uniform(0.1)
    {'label_smoothing': 0.1}
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"uniform's smoothing must be in [0, 1], got {smoothing}; a common value is 0.1")
    return {"label_smoothing": smoothing}


@overload
def others(smoothing: TokenFn, vocab_size: int) -> TokenFn: ...


@overload
def others(smoothing: S, vocab_size: int) -> S: ...


def others(smoothing: float | Tensor | TokenFn, vocab_size: int) -> float | Tensor | TokenFn:
    """Convert a smoothing over the V - 1 other classes (Megatron-LM, fairseq) to PyTorch's convention.

    (1 - s) on the target and s / (V - 1) on every other class is the distribution
    (1 - s') onehot(y) + s' / V of PyTorch's convention with s' = s V / (V - 1).

    Args:
        smoothing: a float or tensor in [0, 1], or a function of the statistics. 16-bit tensors are converted
            to float32.
        vocab_size: V, the sum over all shards. For V = 1 there are no other classes and the result is 0.

    Returns:
        s', in [0, V / (V - 1)], for `label_smoothing`.

    Raises:
        ValueError: `vocab_size` is below 1, or a float `smoothing` is outside [0, 1].

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    >>> round(cross_entropy(logits, target, label_smoothing=others(1.0, 3)).item(), 4)  # all on the others
    2.2395
    """
    if vocab_size < 1:
        raise ValueError(f"others' vocab_size must be an integer >= 1, got {vocab_size}")
    ratio = vocab_size / (vocab_size - 1) if vocab_size > 1 else 0.0
    if callable(smoothing):
        return Scaled(smoothing, ratio)
    if isinstance(smoothing, Tensor):
        return smoothing.to(torch.promote_types(smoothing.dtype, torch.float32)) * ratio
    if not 0 <= smoothing <= 1:
        raise ValueError(f"others' smoothing must be in [0, 1], got {smoothing}")
    return smoothing * ratio


def weighted(weight: Tensor) -> Weighting[Tensor]:
    """Negative log likelihood with a weight per sample or token.

    With the reliabilities of weak labels as weights it is the re-weighting of arXiv 2406.19032. With
    reduction="mean" the sum is divided by the sum of weights over non-ignored tokens, so the scale of the
    weights does not matter. `num_items` divides by a number of tokens instead.

    Args:
        weight: >= 0, shaped like leading dimensions of `target`. A negative value makes the loss of its
            tokens NaN.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> logits, target = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
    >>> round(cross_entropy(logits, target, **weighted(torch.tensor([0.5, 0.0]))).item(), 4)  # log 2
    0.6931
    """
    return {"sample_weight": weight}


def dft() -> Weighting[TokenFn]:
    """Dynamic fine-tuning: w = p_y without its gradient, in [0, 1] (arXiv 2508.05629).

    The gradient of a token is p_y (p - onehot(y)) = -dp_y / dz, the policy gradient if only the target is
    rewarded. Tokens to which the model assigns a low probability have a small weight.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), **dft()).item(), 4)  # log(4) / 4
    0.3466
    """
    return {"sample_weight": target_probability}


def power(k: float = 1.0) -> Weighting[TokenFn]:
    """Probability-based objectives: w = p_y^k without its gradient, in [0, 1] (arXiv 2510.00526).

    The gradient of a token is p_y^k (p - onehot(y)), that of (1 - p_y^k) / k. The value differs from this
    term. k = 1 is `dft`. The larger k is, the less is learned from tokens with a low probability. In the
    paper, k = 1 and k = 10 are better than cross entropy (k = 0) where the model already knows the task well.

    Args:
        k: >= 0; 0 is plain cross entropy.

    Raises:
        ValueError: `k` is out of range.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), **power(2)).item(), 4)  # log(4) / 16
    0.0866
    """
    if not 0 <= k < math.inf:
        raise ValueError(f"power's k must be a number >= 0, got {k}; the paper uses 1 and 10")
    return {"sample_weight": ProbabilityPower(shift=0.0, factor=1.0, power=k)}


def reverse(A: float = 4.0, *, cross_entropy: float = 0.0) -> Weighting[TokenFn]:
    """Reverse or symmetric cross entropy: w = cross_entropy + A p_y without its gradient (arXiv 1908.06112).

    Reverse cross entropy is -sum_v p_v log q_v. For q = onehot(y) and log 0 := -A it is A (1 - p_y), because
    log q_y = 0. Its gradient, -A dp_y = A p_y d(-log p_y), is that of the weight A p_y. The value differs.
    The paper's symmetric loss is alpha CE + beta RCE. Pass beta |A| as `A`, for the paper's A is negative,
    and alpha as `cross_entropy`. The default is 4 times `dft`.

    Args:
        A: > 0, minus the logarithm that stands for log 0, times the paper's beta.
        cross_entropy: >= 0, the factor of cross entropy, the paper's alpha.

    Raises:
        ValueError: `A` or `cross_entropy` is out of range.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> cross_entropy(logits, torch.tensor([1]), **reverse(4.0)).backward()
    >>> logits.grad  # A p_y (p - onehot(y)) with A p_y = 1
    tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
    """
    if not 0 < A < math.inf:
        raise ValueError(f"reverse's A must be a positive number, got {A}; log 0 is replaced by -A")
    if not 0 <= cross_entropy < math.inf:
        raise ValueError(
            f"reverse's cross_entropy must be a number >= 0, got {cross_entropy}; 0 is the reverse alone"
        )
    return {"sample_weight": ProbabilityPower(shift=cross_entropy, factor=A, power=1.0)}


def eaft(top_k: int = 20, alpha: float = 1.0) -> Weighting[TokenFn]:
    """Entropy-adaptive fine-tuning: w = (H / ln top_k)^alpha without its gradient (arXiv 2601.02151).

    Tokens with a confident prediction, correct or not, have a small weight. `ual` does the opposite: it
    smooths uncertain samples. The paper approximates H by the entropy H_k of the `top_k` largest logits,
    renormalized, so its w <= 1. This implementation uses the entropy over the complete vocabulary, in
    [0, ln V], which the same pass computes. Here w can reach (ln V / ln top_k)^alpha, 3.98 for V = 151,936.
    With mass m outside the top k, H - H_k = h(m) + m (H_rest - H_k), where
    h(m) = -m ln m - (1 - m) ln(1 - m). The difference is 0 for m = 0 and at most 0.06 in w for m = 0.01. The
    published code divides by 3.0, which differs from ln 20 by 0.14 %.

    Args:
        top_k: >= 2, the number of classes whose uniform distribution has weight 1.
        alpha: >= 0; 0 is plain cross entropy.

    Raises:
        ValueError: `top_k` or `alpha` is out of range.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> round(cross_entropy(torch.zeros(2, 20), torch.tensor([1, 2]), **eaft()).item(), 4)  # log 20, weight 1
    2.9957
    """
    if not 2 <= top_k < math.inf:
        raise ValueError(f"eaft's top_k must be an integer >= 2, got {top_k}; the paper uses 20")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"eaft's alpha must be a number >= 0, got {alpha}; the paper uses 1.0")
    return {"sample_weight": EntropyPower(shift=0.0, unit=math.log(top_k), power=alpha)}


def mile(gamma: float = 1.0, sigma: float = 1.0) -> Weighting[TokenFn]:
    """MiLe loss: w = (sigma + H)^gamma without its gradient, over the complete vocabulary (arXiv 2310.19531).

    Tokens with many likely continuations have a larger weight. The paper also divides by the mean of w over
    the tokens of the batch, so that the loss has the scale of plain cross entropy. A function of the
    statistics cannot compute this mean; divide the loss by it, as in the example (ignored tokens are NaN).

    Args:
        gamma: finite; 0 is plain cross entropy, a negative value gives easy tokens a larger weight.
        sigma: > 0, the weight of tokens with zero entropy for gamma = 1.

    Raises:
        ValueError: `gamma` or `sigma` is out of range.

    >>> import torch
    >>> from ual_kernels import cross_entropy_with_statistics
    >>> logits, target, options = torch.zeros(3, 4), torch.tensor([1, 2, -100]), mile()
    >>> loss, statistics = cross_entropy_with_statistics(logits, target, **options)
    >>> loss = loss / options["sample_weight"](statistics).nanmean()
    >>> round(loss.item(), 4)  # log 4: all weights are equal
    1.3863
    """
    if not -math.inf < gamma < math.inf:
        raise ValueError(f"mile's gamma must be finite, got {gamma}; the paper uses 1.0")
    if not 0 < sigma < math.inf:
        raise ValueError(f"mile's sigma must be a positive number, got {sigma}; the paper uses 1.0")
    return {"sample_weight": EntropyPower(shift=sigma, unit=1.0, power=gamma)}


def gem(beta: float = 0.7, *, logit_scale: float = 1.0, softcap: float | None = None) -> Matching:
    """GEM with linear h: sum_v q_v log p_v - log p_y, q = softmax(z / beta) without gradient.

    Its gradient is dz = q - onehot(y), because the normalizers of log p cancel. This is the gradient of
    beta CE(z / beta), which these arguments compute. The value is the paper's plus beta H(q). The statistics
    are those of q, so their `entropy` is H(q); the example computes the paper's value. An additional `z_loss`
    is that of z / beta, times beta. (arXiv 2408.16673)

    Args:
        beta: > 0; the values below 1 of the paper reduce overconfidence.
        logit_scale, softcap: the model's values, as in `cross_entropy`. The result contains both, because the
            softcap acts on the scaled logits.

    Raises:
        ValueError: `beta` is not a positive number.

    >>> import torch
    >>> from ual_kernels import cross_entropy_with_statistics
    >>> logits, target = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1])
    >>> loss, statistics = cross_entropy_with_statistics(logits, target, **gem(0.7))
    >>> round((loss - 0.7 * statistics.entropy.nanmean()).item(), 4)
    0.7267
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"gem's beta must be a positive number, got {beta}; the paper uses 0.7")
    return {
        "sample_weight": Constant(beta),
        "logit_scale": logit_scale / beta,
        "softcap": None if softcap is None else softcap / beta,
    }


# ---- functions of the statistics: picklable, with a readable repr ----


def target_probability(statistics: TokenStatistics) -> Tensor:
    """p_y, in [0, 1]."""
    return statistics.log_prob.exp()


@dataclass(frozen=True)
class ProbabilityPower:
    """shift + factor p_y^power."""

    shift: float
    factor: float
    power: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return self.shift + self.factor * (self.power * statistics.log_prob).exp()


@dataclass(frozen=True)
class EntropyPower:
    """(shift + H / unit)^power, H in nats."""

    shift: float
    unit: float
    power: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        # H of a confident prediction may round to a negative value, whose root is NaN
        weight: Tensor = (self.shift + statistics.entropy.clamp(min=0.0) / self.unit) ** self.power
        return weight


@dataclass(frozen=True)
class Scaled:
    """Another function times a factor."""

    function: TokenFn
    factor: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return self.function(statistics) * self.factor


@dataclass(frozen=True)
class Constant:
    """The same value for every token."""

    value: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return torch.full_like(statistics.lse, self.value)

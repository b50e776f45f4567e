"""Losses of the literature as keyword options: `linear_cross_entropy(hidden, head, target, **losses.dft())`.

With p = softmax(z) of the final logits, target y and H = -sum_v p_v log p_v, per token:

    ual, uniform    -sum_v q_v log p_v,  q = (1 - s) onehot(y) + s / V      s per sample, or one for all
    weighted        -w log p_y                                              w per sample or token
    dft             -p_y log p_y                                            p_y without gradient
    eaft            -(H / ln 20)^alpha log p_y                              H without gradient
    mile            -(sigma + H)^gamma log p_y                              H without gradient
    gem             sum_v q_v log p_v - log p_y,  q = softmax(z / beta)     q without gradient

The result of a preset is passed to either loss function, or to the constructors of `ual_kernels.modules` if
it holds no tensor. A preset that smooths can be combined with one that weights. Under reduction="mean" all
but `weighted` divide by the number of non-ignored tokens, or by `num_items`.
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
    """Options of a loss whose targets are smoothed."""

    label_smoothing: T


class Weighting(TypedDict, Generic[T]):
    """Options of a loss whose tokens are weighted."""

    sample_weight: T


class Matching(TypedDict):
    """Options of a loss of tempered logits."""

    sample_weight: TokenFn
    logit_scale: float
    softcap: float | None


def ual(smoothing: Tensor) -> Smoothing[Tensor]:
    """Uncertainty-aware learning: every sample has its own label smoothing (arXiv 2406.04854).

    The smoothing s grows with the sample's uncertainty, which a more capable LLM supplies; `ual.smoothing`
    makes the one from the other. The gradients:  dz = p - (1 - s) onehot(y) - s / V,  ds = z_y - mean(z).

    Args:
        smoothing: shaped like a leading part of `target` ([B]: one number per sample), in [0, 1]; a number
            outside makes its own rows NaN.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> options = ual(torch.tensor([0.0, 0.2]))
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), **options).item(), 4)  # log 4
    1.3863
    """
    return {"label_smoothing": smoothing}


def uniform(smoothing: float) -> Smoothing[float]:
    """Label smoothing, the same for all samples (arXiv 1512.00567): the baseline of `ual`.

    Args:
        smoothing: in [0, 1].

    Raises:
        ValueError: `smoothing` is outside.

    >>> uniform(0.1)
    {'label_smoothing': 0.1}
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"uniform's smoothing must be in [0, 1], got {smoothing}; 0.1 is customary")
    return {"label_smoothing": smoothing}


@overload
def others(smoothing: TokenFn, vocab_size: int) -> TokenFn: ...


@overload
def others(smoothing: S, vocab_size: int) -> S: ...


def others(smoothing: float | Tensor | TokenFn, vocab_size: int) -> float | Tensor | TokenFn:
    """Convert a smoothing that is spread over the V - 1 other classes (Megatron-LM, fairseq) to ours.

    (1 - s) on the target and s / (V - 1) on every other class is the distribution of s' = s V / (V - 1) in
    PyTorch's convention, (1 - s') onehot(y) + s' / V.

    Args:
        smoothing: a float or tensor in [0, 1], or a function of the statistics; 16-bit tensors become
            float32.
        vocab_size: V, of all shards together; with V = 1 there are no other classes, and the result is 0.

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
    """Negative log likelihood with a weight for every sample or token.

    With the reliabilities of weak labels it is the re-weighting of arXiv 2406.19032. Under reduction="mean"
    the sum is divided by the sum of weights over non-ignored tokens, so that their scale does not matter;
    `num_items` divides by the number of tokens instead.

    Args:
        weight: shaped like a leading part of `target`, >= 0; a negative number makes its own rows NaN.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> logits, target = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
    >>> round(cross_entropy(logits, target, **weighted(torch.tensor([0.5, 0.0]))).item(), 4)  # log 2
    0.6931
    """
    return {"sample_weight": weight}


def dft() -> Weighting[TokenFn]:
    """Dynamic fine-tuning: w = p_y without its gradient, in [0, 1] (arXiv 2508.05629).

    The gradient of a token is p_y (p - onehot(y)) = -dp_y / dz: this is policy gradient with the target as
    the only action that is rewarded. Tokens the model finds unlikely hardly count.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), **dft()).item(), 4)  # log(4) / 4
    0.3466
    """
    return {"sample_weight": target_probability}


def eaft(top_k: int = 20, alpha: float = 1.0) -> Weighting[TokenFn]:
    """Entropy-adaptive fine-tuning: w = (H / ln top_k)^alpha without its gradient (arXiv 2601.02151).

    Tokens of which the model is certain hardly count, whether it is right or wrong: the opposite of `ual`,
    which takes the pressure from the uncertain. The paper approximates H by the entropy H_k of the `top_k`
    largest logits, renormalised, so that its w <= 1. Ours is the entropy over the whole vocabulary, which the
    same pass yields, in [0, ln V]: w may exceed 1, up to (ln V / ln top_k)^alpha, 3.98 for V = 151,936. With
    mass m outside the top, H - H_k = h(m) + m (H_rest - H_k), where h(m) = -m ln m - (1 - m) ln(1 - m):
    no difference for m = 0, at most 0.06 in w for m = 0.01. (The published code divides by 3.0, which is
    ln 20 but for 0.14 %.)

    Args:
        top_k: >= 2, the number of classes whose uniform distribution has weight 1.
        alpha: >= 0; 0 is plain cross entropy.

    Raises:
        ValueError: `top_k` or `alpha` is outside.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> round(cross_entropy(torch.zeros(2, 20), torch.tensor([1, 2]), **eaft()).item(), 4)  # log 20, weight 1
    2.9957
    """
    if not 2 <= top_k < math.inf:
        raise ValueError(f"eaft's top_k must be an integer >= 2, got {top_k}; the paper takes 20")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"eaft's alpha must be a number >= 0, got {alpha}; the paper takes 1.0")
    return {"sample_weight": EntropyPower(shift=0.0, unit=math.log(top_k), power=alpha)}


def mile(gamma: float = 1.0, sigma: float = 1.0) -> Weighting[TokenFn]:
    """MiLe loss: w = (sigma + H)^gamma without its gradient, over the whole vocabulary (arXiv 2310.19531).

    Difficult tokens, those with many likely successors, count more. The paper also divides by the mean of w
    over the batch's tokens, so that the loss keeps the scale of plain cross entropy. No token knows that mean
    while it is weighted: divide by it afterwards, as the example does (ignored tokens are NaN there).

    Args:
        gamma: finite; 0 is plain cross entropy, below 0 easy tokens count more.
        sigma: > 0, what keeps tokens of no entropy in the loss.

    Raises:
        ValueError: `gamma` or `sigma` is outside.

    >>> import torch
    >>> from ual_kernels import cross_entropy_with_statistics
    >>> logits, target, options = torch.zeros(3, 4), torch.tensor([1, 2, -100]), mile()
    >>> loss, statistics = cross_entropy_with_statistics(logits, target, **options)
    >>> loss = loss / options["sample_weight"](statistics).nanmean()
    >>> round(loss.item(), 4)  # log 4: equal weights are no weights
    1.3863
    """
    if not -math.inf < gamma < math.inf:
        raise ValueError(f"mile's gamma must be finite, got {gamma}; the paper takes 1.0")
    if not 0 < sigma < math.inf:
        raise ValueError(f"mile's sigma must be a positive number, got {sigma}; the paper takes 1.0")
    return {"sample_weight": EntropyPower(shift=sigma, unit=1.0, power=gamma)}


def gem(beta: float = 0.7, *, logit_scale: float = 1.0, softcap: float | None = None) -> Matching:
    """GEM with linear h: sum_v q_v log p_v - log p_y, q = softmax(z / beta) without gradient (2408.16673).

    Its gradient is dz = q - onehot(y), for the normalisers of log p cancel: that of beta CE(z / beta), which
    is what these options compute. The value is the paper's plus beta H(q). The statistics are then those of
    q, so their `entropy` is H(q), and the example gives the paper's value. A `z_loss` beside it
    would be that of z / beta, times beta.

    Args:
        beta: > 0; the paper's, below 1, keep the model from becoming more certain than the data ask.
        logit_scale, softcap: the model's own, as in `cross_entropy`; they are part of what is returned,
            because the softcap acts on the scaled logits.

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
        raise ValueError(f"gem's beta must be a positive number, got {beta}; the paper takes 0.7")
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
class EntropyPower:
    """(shift + H / unit)^power, H in nats."""

    shift: float
    unit: float
    power: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        # H of a certain token may round to just below 0, whose roots and weights are NaN
        weight: Tensor = (self.shift + statistics.entropy.clamp(min=0.0) / self.unit) ** self.power
        return weight


@dataclass(frozen=True)
class Scaled:
    """A multiple of another function."""

    function: TokenFn
    factor: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return self.function(statistics) * self.factor


@dataclass(frozen=True)
class Constant:
    """The same for every token."""

    value: float

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return torch.full_like(statistics.lse, self.value)

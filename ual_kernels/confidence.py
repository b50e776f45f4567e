"""The confidence loss of weak-to-strong generalization (arXiv 2312.09390, appendix A.4), as a sparse target.

    labels = SparseTarget(options, weak)  # [N, K]: the options' classes and the weak label's probabilities
    target = confidence.target(hidden, head, labels, coefficient=confidence.warm_up(step / steps))
    loss = linear_cross_entropy(hidden, head, target)

A strong model is trained on labels of a weak one. With a coefficient a, the target of a token is
(1 - a) label + a onehot(own), where own is the model's own prediction among the options. Own predictions are
hardened, so that the model becomes confident where it disagrees with the weak label.
"""

import torch
from torch import Tensor

from ual_kernels._types import IGNORE_INDEX
from ual_kernels.targets import SparseTarget

_BITS = 32  # after the binary point, of logits that are compared as integers
_LARGEST = 2**12  # logits beyond are equal
_NEVER = 2**56  # half of it is more than the sum of 1024 differences of logits, of 2^45 at most


def warm_up(progress: float, coefficient: float = 0.5, share: float = 0.1) -> float:
    """Return the coefficient at some progress: linear from 0 over the first share of training.

    openai/weak-to-strong multiplies by the progress itself up to its `warmup_frac`, and by 1 after it. Its
    coefficient therefore jumps from 0.05 to 0.5. Here it is continuous, as in the paper.

    Args:
        progress: the share of training steps that are done, in [0, 1].
        coefficient: the value after the warm-up, in [0, 1].
        share: of the warm-up in training, in [0, 1]; 0 is no warm-up.

    Raises:
        ValueError: an argument is outside [0, 1].

    >>> [warm_up(progress) for progress in (0.0, 0.05, 0.1, 1.0)]
    [0.0, 0.25, 0.5, 0.5]
    """
    for name, value in (("progress", progress), ("coefficient", coefficient), ("share", share)):
        if not 0 <= value <= 1:
            raise ValueError(f"warm_up's {name} must be in [0, 1], got {value}")
    return coefficient * (min(progress / share, 1.0) if share else 1.0)


@torch.no_grad()
def target(
    input: Tensor,
    linear_weight: Tensor,
    labels: SparseTarget,
    *,
    coefficient: float | Tensor,
    balance: bool = True,
    linear_bias: Tensor | None = None,
    linear_lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> SparseTarget:
    """Mix labels with the model's own hardened predictions among the options: (1 - a) label + a onehot(own).

    Only the logits of the options are computed, from the options' rows of the head.

    Args:
        input: [..., D] hidden states.
        linear_weight: [V, D], the head.
        labels: the options as indices [..., K], and the label's probabilities [..., K]. A token whose first
            index is `ignore_index` is ignored. Any other negative index is padding.
        coefficient: a, a float, or a tensor without dimensions, in [0, 1].
        balance: own predictions are the likeliest among those that predict each option as often as the labels
            do, to the nearest token. So the model cannot agree with itself on one option for all tokens. For
            two options, this is the threshold of the published code. Option k must have one meaning in all
            tokens, such as "no" and "yes", and a call should have many tokens: for a single token, own is the
            option with the largest mean label. The logits of the options are read back to the host once. For
            more than two options, the time grows with the square of the number of tokens; 2048 tokens of four
            options take half a second on a CPU.
            False takes the largest logit of each token.
        linear_bias, linear_lora, softcap, logit_scale, ignore_index: as in `linear_cross_entropy`.

    Returns:
        A target with the indices of `labels` and float32 probabilities (float64 for float64 labels), without
        gradient. Padding has class 0 and probability 0.

    Raises:
        ValueError: a shape is wrong, or a float `coefficient` is outside [0, 1].

    >>> import torch
    >>> hidden, head = torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 4.0], [9.0, 9.0]])
    >>> labels = SparseTarget(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    >>> target(hidden, head, labels, coefficient=0.5, balance=False).probabilities  # own: 1, 1
    tensor([[0.5000, 0.5000],
            [0.2500, 0.7500]])
    """
    indices, probabilities = labels
    if indices.shape != probabilities.shape or indices.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"labels must be {[*input.shape[:-1], 'K']} to match input, got indices {list(indices.shape)} "
            f"and probabilities {list(probabilities.shape)}"
        )
    if not isinstance(coefficient, Tensor) and not 0 <= coefficient <= 1:
        raise ValueError(f"coefficient must be in [0, 1], got {coefficient}; see confidence.warm_up")
    selected, padding = indices[..., 0] != ignore_index, indices < 0
    p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    p = p.masked_fill(padding, 0.0)
    logits = _logits(input[selected], linear_weight, indices[selected], linear_bias, linear_lora)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(padding[selected], -torch.inf)
    own = _balanced(logits, p[selected].double().mean(0)) if balance else logits.argmax(-1)
    hardened = torch.zeros_like(p[selected]).scatter_(-1, own[:, None], 1.0)
    hardened = hardened.masked_fill(padding[selected], 0.0)  # the loss of a token without options is NaN
    p[selected] = p[selected] + coefficient * (hardened - p[selected])
    classes = indices.clamp(min=0)
    classes[..., 0] = classes[..., 0].where(selected, ignore_index)
    return SparseTarget(classes, p)


def _logits(
    input: Tensor,
    head: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """Return the options' logits [M, K] of hidden states [M, D], one option at a time."""
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    summands = [(input, head)]
    if bias is not None:
        summands.append((torch.ones_like(input[:, :1]), bias[:, None]))
    if lora is not None:
        a, b, scale = lora
        summands.append((scale * (input @ a.to(input).T), b))
    columns = []
    for column in indices.clamp(0, len(head) - 1).unbind(-1):  # the loss of an index out of range is NaN
        columns.append(torch.stack([(x * matrix[column]).sum(-1) for x, matrix in summands]).sum(0))
    return torch.stack(columns, -1)


def _counts(shares: list[float], total: int) -> list[int]:
    """Return integers with a sum, near multiples of shares: the largest remainders are rounded up."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts


def _balanced(logits: Tensor, shares: Tensor) -> Tensor:
    """Return one option per token [M], with the largest sum of logits among those with the shares' counts.

    It begins with the largest logits. While an option has too many tokens, the cheapest chain of exchanges
    from such an option to one with too few is applied (successive shortest paths on K options). Logits are
    integers there, because rounding could close a chain to a cycle.
    """
    if not (total := shares.sum().item()) > 0:  # no token, or no label
        return logits.argmax(1)
    wanted = torch.tensor(_counts([share / total for share in shares.tolist()], len(logits)))
    fixed = logits.double().cpu().nan_to_num(0.0, posinf=_LARGEST, neginf=-torch.inf)
    padded = fixed == -torch.inf
    z = (fixed.clamp(-_LARGEST, _LARGEST) * 2**_BITS).round().long().masked_fill(padded, -_NEVER)
    if z.shape[1] == 2:  # the chains would end here too
        order = (z[:, 0] - z[:, 1]).argsort(descending=True, stable=True)
        own = torch.ones_like(order).index_fill(0, order[: int(wanted[0])], 0)
        return own.to(logits.device)
    own = z.argmax(1)
    while True:
        surplus = torch.bincount(own, minlength=len(wanted)) - wanted
        chain = _cheapest(z, own, surplus)
        if chain is None:
            return torch.as_tensor(own, device=logits.device)
        for source, sink in chain:
            of_source = (own == source).nonzero()[:, 0]
            loss = z[of_source, source] - z[of_source, sink]
            own[of_source[loss.argmin()]] = sink


def _cheapest(z: Tensor, own: Tensor, surplus: Tensor) -> list[tuple[int, int]] | None:
    """Return the exchanges (source, sink) from a surplus to a deficit that lose least, the last one first."""
    options = z.shape[1]
    loss = z.gather(1, own[:, None]) - z
    cost = z.new_full((options, options), _NEVER).scatter_reduce(
        0, own[:, None].expand_as(loss), loss, "amin"
    )
    distance = torch.where(surplus > 0, 0, _NEVER)
    before = torch.full((options,), -1)
    for _ in range(options):
        reached, source = (distance[:, None] + cost).min(0)
        before = torch.where(reached < distance, source, before)
        distance = torch.minimum(reached, distance)
    end = int(torch.where(surplus < 0, distance, _NEVER).argmin())
    if surplus[end] >= 0 or distance[end] >= _NEVER // 2:
        return None
    chain = []
    while before[end] >= 0:
        chain.append((int(before[end]), end))
        end = chain[-1][0]
    return chain

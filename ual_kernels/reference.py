"""The reference implementation: the definition of the loss in eager PyTorch, in the dtype of its input.

    z    = softcap tanh(logit_scale x / softcap)           (z = logit_scale x without a softcap)
    q    = (1 - s) sum_k p_k onehot(i_k) + s / V           (onehot(y) for a class index)
    loss = - sum_v c_v q_v log softmax(z)_v  +  z_loss lse(z)^2

s is one value per token; c are class weights (1 without them). It allocates [N, V] several times. Every other
backend is compared with it in float64. It is twice differentiable.
"""

import torch
from torch import Tensor

from ual_kernels._types import IGNORE_INDEX


def cross_entropy(
    input: Tensor,  # [N, V] floating
    target: Tensor,  # [N] int
    label_smoothing: Tensor,  # [N], in [0, 1]
    *,
    classes: Tensor | None = None,  # [N, K]
    probabilities: Tensor | None = None,  # [N, K], or [N, V] without `classes`
    weight: Tensor | None = None,  # [V]
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:  # [N]
    """Per-token loss: 0 if ignored, even if logits are NaN; NaN if the target is out of range."""
    vocab = input.shape[-1]
    selected = target != ignore_index
    valid = (target >= 0) & (target < vocab)
    y = torch.where(selected & valid, target, 0).long()[:, None]
    z = final_logits(input.where(selected[:, None], 0.0), softcap=softcap, logit_scale=logit_scale)
    log_p = torch.log_softmax(z, dim=-1)
    weighted = log_p if weight is None else log_p * weight.to(log_p.dtype)
    nll = -_expected(weighted, y, classes, probabilities)
    uniform = -weighted.mean(dim=-1)
    # a logit of -inf makes `uniform` infinite; tokens without smoothing must not use it (0 * inf is NaN)
    uniform = torch.where((label_smoothing == 0) & uniform.isinf(), 0.0, uniform)
    loss = (1 - label_smoothing) * nll + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square()
    nan_mask = torch.where(selected & ~valid, torch.nan, 1.0).to(loss.dtype)
    return (loss * nan_mask).where(selected, 0.0)


def statistics(
    input: Tensor,  # [N, V]
    target: Tensor,  # [N], the class with the largest probability
    *,
    classes: Tensor | None = None,  # [N, K]
    probabilities: Tensor | None = None,  # [N, K], or [N, V] without `classes`
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # [8, N], the fields of TokenStatistics
    """Per-token statistics by definition; ignored tokens are NaN, 0 in `correct` and -1 in `predicted`."""
    with torch.no_grad():
        vocab = input.shape[-1]
        selected = (target != ignore_index) & (target >= 0) & (target < vocab)
        y = torch.where(selected, target, 0).long()[:, None]
        z = final_logits(input, softcap=softcap, logit_scale=logit_scale)
        log_p = torch.log_softmax(z, dim=-1)
        z_y = z.gather(-1, y).squeeze(-1)
        top = z.topk(min(2, vocab), dim=-1).values
        correct = z_y >= top[:, 0]
        packed = torch.stack(
            [
                torch.logsumexp(z, dim=-1),
                _expected(log_p, y, classes, probabilities),
                torch.special.entr(log_p.exp()).sum(-1),
                log_p.max(dim=-1).values.exp(),
                top[:, 0] - top[:, 1] if vocab > 1 else torch.full_like(z_y, torch.inf),
                z.mean(dim=-1),
                correct.to(z.dtype),
                torch.where(correct, y.squeeze(-1), z.argmax(dim=-1)).to(z.dtype),
            ]
        )
        ignored = packed.new_tensor([torch.nan] * 6 + [0.0, -1.0])[:, None]
        return torch.where(selected, packed, ignored)


def _expected(
    log_p: Tensor,  # [N, V]
    y: Tensor,  # [N, 1]
    classes: Tensor | None,  # [N, K]
    probabilities: Tensor | None,  # [N, K], or [N, V] without `classes`
) -> Tensor:  # [N]
    """The expectation of log_p under the target; a class of probability 0 may have log_p = -inf."""
    if probabilities is None:
        return log_p.gather(-1, y).squeeze(-1)
    values = log_p if classes is None else log_p.gather(-1, classes)
    impossible = (probabilities == 0) & values.isinf()
    return (probabilities * torch.where(impossible, 0.0, values)).sum(-1)


def final_logits(input: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """Scale and cap raw logits: softcap * tanh(logit_scale * x / softcap)."""
    z = input * logit_scale if logit_scale != 1.0 else input
    return z if softcap is None else softcap * torch.tanh(z / softcap)

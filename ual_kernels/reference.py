"""The reference implementation: the definition of the loss in eager PyTorch, in the dtype of its input.

    z    = softcap tanh(logit_scale x / softcap)           (z = logit_scale x without a softcap)
    q    = (1 - s) onehot(y) + s / V
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
    nll = -log_p.gather(-1, y).squeeze(-1)
    if weight is None:
        uniform = -log_p.mean(dim=-1)
    else:
        nll = nll * weight.to(nll.dtype)[y.squeeze(-1)]
        uniform = -(log_p * weight.to(nll.dtype)).mean(dim=-1)
    # a logit of -inf makes `uniform` infinite; tokens without smoothing must not use it (0 * inf is NaN)
    uniform = torch.where((label_smoothing == 0) & uniform.isinf(), 0.0, uniform)
    loss = (1 - label_smoothing) * nll + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square()
    nan_mask = torch.where(selected & ~valid, torch.nan, 1.0).to(loss.dtype)
    return (loss * nan_mask).where(selected, 0.0)


def statistics(
    input: Tensor,  # [N, V]
    target: Tensor,  # [N]
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # [7, N], the fields of TokenStatistics
    """Per-token statistics by their definitions; ignored tokens are NaN, and 0 in `correct`."""
    with torch.no_grad():
        vocab = input.shape[-1]
        selected = (target != ignore_index) & (target >= 0) & (target < vocab)
        y = torch.where(selected, target, 0).long()[:, None]
        z = final_logits(input, softcap=softcap, logit_scale=logit_scale)
        log_p = torch.log_softmax(z, dim=-1)
        z_y = z.gather(-1, y).squeeze(-1)
        top = z.topk(min(2, vocab), dim=-1).values
        packed = torch.stack(
            [
                torch.logsumexp(z, dim=-1),
                log_p.gather(-1, y).squeeze(-1),
                torch.special.entr(log_p.exp()).sum(-1),
                log_p.max(dim=-1).values.exp(),
                top[:, 0] - top[:, 1] if vocab > 1 else torch.full_like(z_y, torch.inf),
                z.mean(dim=-1),
                (z_y >= top[:, 0]).to(z.dtype),
            ]
        )
        ignored = packed.new_tensor([torch.nan] * 6 + [0.0])[:, None]
        return torch.where(selected, packed, ignored)


def final_logits(input: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """Scale and cap raw logits: softcap * tanh(logit_scale * x / softcap)."""
    z = input * logit_scale if logit_scale != 1.0 else input
    return z if softcap is None else softcap * torch.tanh(z / softcap)

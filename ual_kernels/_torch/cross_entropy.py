"""Cross entropy of given logits in plain PyTorch, a chunk of rows at a time: any device.

With logits z, target y, smoothing s, and class weights c (1 without them):

    Q      = (1 - s) c_y + s mean(c)                          # 1 without class weights
    loss   = Q (lse(z) - z_y) - s mean(c (z - z_y)) + z_loss lse(z)^2
    dz     = K p - (1 - s) c_y onehot(y) - (s / V) c          K = Q + 2 z_loss lse(z)
    ds     = (mean(c) - c_y) (lse(z) - z_y) - mean(c (z - z_y))

Differences are measured from the row's maximum or its target, never as lse(z) itself, which near 100 has
already lost 4e-6 of every probability in float32. A softcap bends z: then dz is multiplied by
1 - (z / softcap)^2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ual_kernels._rows import LOGITS_STATISTICS, dead_statistics, labels

# fp32 numbers in one [rows, V] chunk. On a CPU 2 MiB, so that every pass but the first finds it in cache
# (measured on one core, V = 49152: a third of the time of 64 MiB); elsewhere launches count, and 64 MiB is a
# small part of a model.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def forward(
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    *,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of `ops.cross_entropy`; with `row_scale`, of `ops.cross_entropy_inplace`."""
    rows, vocab = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_zeros(rows, dtype=acc)
    state = logits.new_zeros((4, rows), dtype=acc)
    stats = dead_statistics(logits, LOGITS_STATISTICS, rows if statistics else 0, acc)
    for chunk in _chunks(logits):
        y, live, legal = labels(target[chunk], vocab, ignore_index)
        z = _final(logits[chunk].to(acc, copy=True), softcap, logit_scale)
        s, c_y, c_mean = smoothing[chunk], *_class_terms(class_weight, y, vocab)
        z_y = z.gather(1, y[:, None]).squeeze(1)
        high = _shift_in_place(z)
        gap = _weighted_mean(z, class_weight) - c_mean * (z_y - high)
        log_sum, stats_chunk = _exp_in_place(z, high, z_y, statistics)
        unit, k, ds = _row_terms(high, log_sum, z_y, gap, s, c_y, c_mean, z_loss)
        poison = torch.where(legal, 0.0, torch.nan).to(acc)
        loss[chunk] = torch.where(live, unit + poison, 0.0)
        state[:, chunk] = torch.where(live, torch.stack([high, log_sum, k + poison, ds]), 0.0)
        if statistics:
            stats[:, chunk] = torch.where(live & legal, stats_chunk, stats[:, chunk])
        if row_scale is not None:
            p = z.mul_(torch.exp(-log_sum)[:, None])
            scale = torch.where(live, row_scale[chunk] + poison, 0.0)
            logits[chunk] = _dlogits(
                p, logits[chunk], y, live, s, k, c_y, class_weight, scale, softcap, logit_scale
            )
    return loss, state, stats


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    smoothing: Tensor,
    class_weight: Tensor | None,
    state: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """The body of `ops.cross_entropy_backward`."""
    vocab = logits.shape[1]
    acc = state.dtype
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for chunk in _chunks(logits):
        y, live, _ = labels(target[chunk], vocab, ignore_index)
        high, log_sum, k, _ = state[:, chunk].unbind(0)
        c_y, _ = _class_terms(class_weight, y, vocab)
        z = _final(logits[chunk].to(acc), softcap, logit_scale)
        p = torch.exp(z.sub(high[:, None]).sub_(log_sum[:, None]))
        scale = torch.where(live, dloss[chunk].to(acc), 0.0)
        dlogits[chunk] = _dlogits(
            p, logits[chunk], y, live, smoothing[chunk], k, c_y, class_weight, scale, softcap, logit_scale
        )
    return dlogits


def scale_rows(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply the rows of `buffer` in place; on a CPU, where asking is free, not at all if all are 1."""
    if buffer.is_cpu and bool((scale == 1).all()):
        return buffer
    return buffer.mul_(scale[:, None])


# ---- pieces ----


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Even slices of at most the rows that the device's budget holds."""
    rows, vocab = logits.shape
    most = max(1, _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // vocab)
    pieces = -(-rows // most)
    for i in range(pieces):
        yield slice(rows * i // pieces, rows * (i + 1) // pieces)


def _final(z: Tensor, softcap: float, logit_scale: float) -> Tensor:
    if logit_scale != 1.0:
        z = z * logit_scale
    return torch.tanh(z / softcap) * softcap if softcap else z


def _class_terms(class_weight: Tensor | None, y: Tensor, vocab: int) -> tuple[Tensor | float, Tensor | float]:
    if class_weight is None:
        return 1.0, 1.0
    return class_weight[y], class_weight.mean()


def _weighted_mean(z: Tensor, class_weight: Tensor | None) -> Tensor:
    return z.mean(1) if class_weight is None else z @ class_weight / z.shape[1]


def _shift_in_place(z: Tensor) -> Tensor:
    """Overwrite z with z - high; return high, the rows' maxima."""
    high = z.amax(1)
    z.sub_(high[:, None])
    return high


def _exp_in_place(z: Tensor, high: Tensor, z_y: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    """Overwrite z - high with its exp; return the logarithm of the sum and the statistics [7, rows]."""
    if not statistics:
        log_sum = z.exp_().sum(1).log()
        return log_sum, log_sum
    mean = high + z.mean(1)
    margin = z.topk(2, dim=1).values[:, 1].abs() if z.shape[1] > 1 else torch.full_like(high, torch.inf)
    shifted = z.clone()
    total = z.exp_().sum(1)
    weighted = shifted.masked_fill_(z == 0, 0.0).mul_(z).sum(1)
    log_sum = total.log()
    rows = [
        high + log_sum,
        (z_y - high) - log_sum,
        log_sum - weighted / total,
        1 / total,
        margin,
        mean,
        (z_y >= high).to(z.dtype),
    ]
    return log_sum, torch.stack(rows)


def _row_terms(
    high: Tensor,
    log_sum: Tensor,
    z_y: Tensor,
    gap: Tensor,
    s: Tensor,
    c_y: Tensor | float,
    c_mean: Tensor | float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit loss, the coefficient K of p, and d(unit loss)/ds."""
    nll = (high - z_y) + log_sum
    q = (1 - s) * c_y + s * c_mean
    # a row that does not smooth must not see the mean of a vocabulary with -inf in it (0 inf = nan)
    unit = q * nll - torch.where(s == 0, 0.0, s * gap)
    k = q
    if z_loss:
        lse = high + log_sum
        unit, k = unit + z_loss * lse.square(), k + 2 * z_loss * lse
    return unit, k, (c_mean - c_y) * nll - gap


def _dlogits(
    p: Tensor,
    raw: Tensor,
    y: Tensor,
    live: Tensor,
    s: Tensor,
    k: Tensor,
    c_y: Tensor | float,
    class_weight: Tensor | None,
    scale: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Overwrite p with the gradient of the raw logits, times `scale`; rows that are not live become 0."""
    scale = scale * logit_scale
    p *= (scale * k)[:, None]
    p -= (scale * s / p.shape[1])[:, None] * (1.0 if class_weight is None else class_weight)
    # one column a row: the same as scatter_add_, which CUDA refuses where determinism is asked for
    p.scatter_(1, y[:, None], p.gather(1, y[:, None]) - (scale * (1 - s) * c_y)[:, None])
    if softcap:
        p *= 1 - torch.tanh(raw.to(p.dtype) * (logit_scale / softcap)).square()
    if p.is_cpu and bool(live.all()):  # asking is free here, and saves a pass
        return p
    return p.masked_fill_(~live[:, None], 0.0)

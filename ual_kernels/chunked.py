"""Both losses in plain PyTorch, a chunk of rows at a time: any device, and the fast path of a CPU.

With z = C e + b for a row's hidden state e, target y, smoothing s, and class weights c (1 without them):

    Q      = (1 - s) c_y + s mean(c)                          # 1 without class weights
    loss   = Q (lse(z) - z_y) - s mean(c (z - z_y)) + z_loss lse(z)^2
    dz     = K p - (1 - s) c_y onehot(y) - (s / V) c          K = Q + 2 z_loss lse(z)
    ds     = (mean(c) - c_y) (lse(z) - z_y) - mean(c (z - z_y))

Differences are measured from the row's maximum or its target, never as lse(z) itself, which near 100 has
already lost 4e-6 of every probability in float32. A linear head makes the smoothing rank one: with
cbar = mean_v c_v C_v,

    mean(c z) = e . cbar + mean(c b)
    de = K sum_v p_v C_v - (1 - s) c_y C_y - s cbar
    dC = sum_i K_i p_i (x) e_i - scatter_y((1 - s) c_y e) - (c / V) (x) sum_i s_i e_i

so the V-wide work is that of the plain softmax whatever s is, and the only V-wide numbers that are ever
rounded are probabilities, the target's apart. A softcap bends z and ends the rank-one form: then dz is made
whole, chunk by chunk, and multiplied by (1 - (z / softcap)^2).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# fp32 numbers in one [rows, V] chunk: 64 MiB, a few rounds of the last-level cache, a small part of a model
_CHUNK_ELEMENTS = 1 << 24


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
    stats = _dead_statistics(logits, rows if statistics else 0, acc)
    for chunk in _chunks(rows, vocab):
        y, live, legal = _labels(target[chunk], vocab, ignore_index)
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
    rows, vocab = logits.shape
    acc = state.dtype
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for chunk in _chunks(rows, vocab):
        y, live, _ = _labels(target[chunk], vocab, ignore_index)
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


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    per_row: bool,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The body of `ops.linear_cross_entropy`. Ignored rows leave before the first GEMM (one host read)."""
    rows, features = input.shape
    vocab = linear_weight.shape[0]
    acc = torch.promote_types(input.dtype, torch.float32)
    kept = (target != ignore_index).nonzero().squeeze(1)
    count = len(kept)

    loss = input.new_zeros(rows, dtype=acc)
    state = input.new_zeros((2, rows), dtype=acc)
    stats = _dead_statistics(input, rows if statistics else 0, acc)
    dinput = input.new_zeros((rows if input_grad else 0, features), dtype=stored_dtype(input.dtype, per_row))
    dhead = input.new_zeros((vocab if head_grad else 0, features), dtype=acc)
    dbias = input.new_zeros(vocab if head_grad and linear_bias is not None else 0, dtype=acc)
    smoothed_rows = input.new_zeros(features, dtype=acc)  # sum of s a e, for the rank-one part of dC
    smoothed_count = input.new_zeros((), dtype=acc)  # sum of s a, likewise for the bias
    if count == 0:
        return loss, state, stats, dinput, dhead, dbias

    head = linear_weight.detach()
    bias = None if linear_bias is None else linear_bias.detach().to(acc)
    capped = bool(softcap)
    operand = _operand(head, acc)
    column_mean = None if capped else _column_mean(operand, class_weight, acc)
    bias_mean = 0.0 if bias is None or capped else _weighted_mean(bias[None], class_weight)
    rounds = input.dtype == torch.bfloat16
    # one buffer for the logits of every chunk: fresh pages cost a CPU as much as an exponential
    buffer = input.new_empty(
        (max(c.stop - c.start for c in _chunks(count, vocab, chunk_tokens)), vocab), dtype=acc
    )
    for chunk in _chunks(count, vocab, chunk_tokens):
        index = kept[chunk]
        e = input[index]
        y, _, legal = _labels(target[index], vocab, ignore_index)
        s, c_y, c_mean = smoothing[index], *_class_terms(class_weight, y, vocab)
        poison = torch.where(legal, 0.0, torch.nan).to(acc)
        a = row_scale[index] + poison

        raw = _matmul(e, operand.T, rounds, buffer[: len(index)])
        if bias is not None:
            raw += bias
        z = _final(raw, softcap, logit_scale)
        z_y = z.gather(1, y[:, None]).squeeze(1)
        slope = (1 - (z / softcap).square()) if capped and (input_grad or head_grad) else None
        high = _shift_in_place(z)
        if column_mean is None:
            gap = _weighted_mean(z, class_weight) - c_mean * (z_y - high)
        else:
            gap = (e.to(acc) @ column_mean + bias_mean) * logit_scale - c_mean * z_y
        log_sum, stats_chunk = _exp_in_place(z, high, z_y, statistics)
        unit, k, ds = _row_terms(high, log_sum, z_y, gap, s, c_y, c_mean, z_loss)
        loss[index] = a * unit
        state[:, index] = torch.stack([unit + poison, ds + poison])
        if statistics:
            stats[:, index] = torch.where(legal, stats_chunk, stats[:, index])
        if not (input_grad or head_grad):
            continue

        # dz = rate * x + (target column) + (rank-one part), x = exp(z - high) with the target column 0
        rate = k * torch.exp(-log_sum)
        at_target = rate * torch.exp(z_y - high) - (1 - s) * c_y
        z.scatter_(1, y[:, None], 0.0)
        if slope is not None:
            z *= rate[:, None]
            z -= (s / vocab)[:, None] * (1.0 if class_weight is None else class_weight)
            z *= slope
            z.scatter_(1, y[:, None], 0.0)
            at_target = (at_target - s * c_y / vocab) * slope.gather(1, y[:, None]).squeeze(1)
            rate, spread = torch.ones_like(s), torch.zeros_like(s)
        else:
            spread = s
        a = a * logit_scale
        if input_grad:
            de = _matmul(z, operand, rounds, e.new_empty(e.shape, dtype=acc)).mul_(rate[:, None])
            de.addcmul_(at_target[:, None], head[y].to(acc))
            if column_mean is not None:
                de.addcmul_(spread[:, None], column_mean, value=-1)
            dinput[index] = de.mul_(a[:, None]).to(dinput.dtype)
        if head_grad:
            wide = e.to(acc)
            scaled = wide * (a * rate)[:, None]
            _matmul(z.T, scaled, rounds, dhead, add=True)
            _add_rows(dhead, y, wide * (a * at_target)[:, None])
            smoothed_rows += (spread * a) @ wide
            if dbias.numel():
                dbias += (a * rate) @ z
                _add_rows(dbias, y, a * at_target)
                smoothed_count += (spread * a).sum()
    if head_grad and not capped:
        over = head.new_ones(vocab, dtype=acc) if class_weight is None else class_weight
        dhead.addr_(over, smoothed_rows, alpha=-1.0 / vocab)
        if dbias.numel():
            dbias -= over * (smoothed_count / vocab)
    return loss, state, stats, dinput, dhead, dbias


# ---- pieces ----


def stored_dtype(dtype: torch.dtype, per_row: bool) -> torch.dtype:
    """The dtype in which forward keeps dinput.

    bfloat16 has float32's range, so a gradient that is only multiplied by a constant later may be kept in it.
    float16 has not (1 / tokens underflows before a loss scaler's factor arrives), and arbitrary upstream
    gradients would round a second time.
    """
    return dtype if dtype == torch.bfloat16 and not per_row else torch.promote_types(dtype, torch.float32)


def _chunks(rows: int, vocab: int, chunk_tokens: int = 0) -> Iterator[slice]:
    """Even slices of at most `chunk_tokens` rows, or of the rows that the default budget holds."""
    most = chunk_tokens or max(1, _CHUNK_ELEMENTS // vocab)
    pieces = -(-rows // most)
    for i in range(pieces):
        yield slice(rows * i // pieces, rows * (i + 1) // pieces)


def _labels(target: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """A column that exists for every row, which rows count, and which hold a legal label."""
    live = target != ignore_index
    legal = (target >= 0) & (target < vocab)
    return torch.where(live & legal, target, 0).long(), live, legal


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
    p *= k[:, None]
    p -= (s / p.shape[1])[:, None] * (1.0 if class_weight is None else class_weight)
    # one column a row: the same as scatter_add_, which CUDA refuses where determinism is asked for
    p.scatter_(1, y[:, None], p.gather(1, y[:, None]) - ((1 - s) * c_y)[:, None])
    if softcap:
        p *= 1 - torch.tanh(raw.to(p.dtype) * (logit_scale / softcap)).square()
    p *= (scale * logit_scale)[:, None]
    return p.masked_fill_(~live[:, None], 0.0)


def _column_mean(head: Tensor, class_weight: Tensor | None, acc: torch.dtype) -> Tensor:
    """Mean over v of c_v C_v, [D]."""
    if class_weight is None:
        return head.mean(0, dtype=acc)
    return class_weight @ head.to(acc) / len(head)


def _add_rows(out: Tensor, y: Tensor, rows: Tensor) -> None:
    """out[y] += rows, in the same order on every run."""
    if out.is_cuda:
        out.index_put_((y,), rows, accumulate=True)  # sorts by label, where index_add_ races
    else:
        out.index_add_(0, y, rows)


def _dead_statistics(like: Tensor, rows: int, acc: torch.dtype) -> Tensor:
    stats = like.new_full((7, rows), torch.nan, dtype=acc)
    stats[6] = 0.0
    return stats


def _operand(matrix: Tensor, acc: torch.dtype) -> Tensor:
    """What `_matmul` wants for a matrix: CUDA multiplies 16-bit factors into fp32, a CPU does not."""
    return matrix if matrix.is_cuda else matrix.to(acc)


def _matmul(a: Tensor, b: Tensor, rounds: bool, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in the accumulator's dtype: the result is never rounded to 16 bits.

    With `rounds` the factors may be rounded to bf16, which is exact for values that came from bf16. On CUDA
    that is a 16-bit GEMM with a float32 result; on a CPU oneDNN multiplies float32 matrices as bf16 products
    with float32 sums, four times faster than float32.
    """
    acc = out.dtype
    if a.is_cuda:
        factor = torch.bfloat16 if rounds else b.dtype
        if factor in (torch.float16, torch.bfloat16):
            product = torch.mm(a.to(factor), b.to(factor), out_dtype=acc)
            return out.add_(product) if add else product
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if rounds else before
    try:
        a, b = a.to(acc), b.to(acc)
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    finally:
        settings.fp32_precision = before

"""Cross entropy of given logits in plain PyTorch, a chunk of tokens at a time: any device.

The algebra is that of `_tokens`. Differences are measured from the token's largest logit or its target,
never as lse(z) itself, which near 100 has already lost 4e-6 of every probability in float32. A softcap bends
z: then dz is multiplied by 1 - (z / softcap)^2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ual_kernels._operands import LogitsInputs, LogitsOutputs, LogitsSpec, accumulator, fill_ignored
from ual_kernels._tokens import Labels, labels, token_statistics, token_terms
from ual_kernels._torch.gemm import even

# fp32 numbers in one chunk of logits. On a CPU 2 MiB, so that every pass but the first finds it in cache
# (measured on one core, V = 49152: a third of the time of 64 MiB). Elsewhere launches count, and 64 MiB is a
# small part of a model.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def forward(inputs: LogitsInputs, spec: LogitsSpec, *, inplace_scale: Tensor | None = None) -> LogitsOutputs:
    """The body of `ops.cross_entropy_op`; with `inplace_scale` [N], of `ops.cross_entropy_inplace_op`."""
    logits, target, smoothing, class_weight = inputs
    vocab, acc = logits.shape[1], accumulator(logits)
    outputs = LogitsOutputs.empty(inputs, spec)
    fill_ignored(outputs.statistics)
    for chunk in _chunks(logits):
        label = labels(target[chunk], vocab, spec.ignore_index)
        z = _final(logits[chunk].to(acc, copy=True), spec)
        z_y = z.gather(1, label.column[:, None]).squeeze(1)
        classes = _class_terms(class_weight, label)
        nan_mask = label.nan_mask.to(acc)
        sums = _Sums.of(z, z_y, class_weight, classes.mean, statistics=spec.statistics)  # overwrites z
        terms = token_terms(
            sums.nll,
            sums.lse,
            sums.smoothing_term,
            smoothing[chunk],
            classes.target,
            classes.mean,
            spec.z_loss,
        )
        state = torch.stack([sums.largest, sums.log_sum, terms.k + nan_mask, terms.ds])
        outputs.loss[chunk] = torch.where(label.selected, terms.loss + nan_mask, 0.0)
        outputs.state[:, chunk] = torch.where(label.selected, state, 0.0)
        if sums.statistics is not None:
            outputs.statistics[:, chunk] = torch.where(
                label.selected & label.valid, sums.statistics, outputs.statistics[:, chunk]
            )
        if inplace_scale is not None:
            p = z.mul_(torch.exp(-sums.log_sum)[:, None])
            scale = torch.where(label.selected, inplace_scale[chunk] + nan_mask, 0.0)
            logits[chunk] = _dlogits(p, inputs, spec, chunk, label, terms.k, scale)
    return outputs


def backward(dloss: Tensor, state: Tensor, inputs: LogitsInputs, spec: LogitsSpec) -> Tensor:
    """The body of `ops.cross_entropy_backward_op`."""
    logits, target, _, _ = inputs
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for chunk in _chunks(logits):
        label = labels(target[chunk], logits.shape[1], spec.ignore_index)
        largest, log_sum, k, _ = state[:, chunk].unbind(0)
        z = _final(logits[chunk].to(state.dtype), spec)
        p = torch.exp(z.sub(largest[:, None]).sub_(log_sum[:, None]))
        scale = torch.where(label.selected, dloss[chunk].to(state.dtype), 0.0)
        dlogits[chunk] = _dlogits(p, inputs, spec, chunk, label, k, scale)
    return dlogits


def scale_tokens(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply each token's row of `buffer` in place; on a CPU, where asking is free, not if all are 1."""
    if buffer.is_cpu and bool((scale == 1).all()):
        return buffer
    return buffer.mul_(scale[:, None])


# ---- pieces ----


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Even slices of at most the tokens that the device's budget holds."""
    tokens, vocab = logits.shape
    budget = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return even(tokens, max(1, budget // vocab))


def _final(z: Tensor, spec: LogitsSpec) -> Tensor:
    if spec.logit_scale != 1.0:
        z = z * spec.logit_scale
    return torch.tanh(z / spec.softcap) * spec.softcap if spec.softcap else z


class _ClassTerms(NamedTuple):
    target: Tensor | float  # c_y, [M]
    mean: Tensor | float


def _class_terms(class_weight: Tensor | None, label: Labels) -> _ClassTerms:
    if class_weight is None:
        return _ClassTerms(1.0, 1.0)
    return _ClassTerms(class_weight[label.column], class_weight.mean())


class _Sums(NamedTuple):
    """What the pass over the vocabulary sums up, [M] each."""

    largest: Tensor
    log_sum: Tensor  # of exp(z - largest)
    lse: Tensor
    nll: Tensor
    smoothing_term: Tensor
    statistics: Tensor | None  # [7, M]

    @classmethod
    def of(
        cls, z: Tensor, z_y: Tensor, class_weight: Tensor | None, c_mean: Tensor | float, *, statistics: bool
    ) -> "_Sums":
        """Sum over z [M, V], which becomes exp(z - largest)."""
        vocab = z.shape[1]
        second = None
        if statistics:
            two = z.topk(min(2, vocab), dim=1).values
            second = two[:, 1] if vocab > 1 else torch.full_like(z_y, -torch.inf)
        largest = z.amax(1)
        z.sub_(largest[:, None])
        weighted = z.mean(1) if class_weight is None else z @ class_weight / vocab
        smoothing_term = weighted - c_mean * (z_y - largest)
        shifted = mean = None
        if statistics:
            shifted, mean = z.clone(), largest + z.mean(1)
        total = z.exp_().sum(1)
        log_sum = total.log()
        nll = (largest - z_y) + log_sum
        packed = None
        if shifted is not None and second is not None and mean is not None:
            moment = shifted.masked_fill_(z == 0, 0.0).mul_(z).sum(1)
            packed = token_statistics(z_y, largest, total, nll, moment, largest, second, mean)
        return cls(largest, log_sum, largest + log_sum, nll, smoothing_term, packed)


def _dlogits(
    p: Tensor,
    inputs: LogitsInputs,
    spec: LogitsSpec,
    chunk: slice,
    label: Labels,
    k: Tensor,
    scale: Tensor,
) -> Tensor:
    """Overwrite p with the gradient of the raw logits, times `scale` [M]; ignored tokens become 0."""
    s, class_weight = inputs.smoothing[chunk], inputs.class_weight
    c_y = _class_terms(class_weight, label).target
    scale = scale * spec.logit_scale
    p *= (scale * k)[:, None]
    p -= (scale * s / p.shape[1])[:, None] * (1.0 if class_weight is None else class_weight)
    # one column a token: the same as scatter_add_, which CUDA refuses where determinism is requested
    column = label.column[:, None]
    p.scatter_(1, column, p.gather(1, column) - (scale * (1 - s) * c_y)[:, None])
    if spec.softcap:
        raw = inputs.logits[chunk].to(p.dtype)
        p *= 1 - torch.tanh(raw * (spec.logit_scale / spec.softcap)).square()
    if p.is_cpu and bool(label.selected.all()):  # asking is free here, and saves a pass
        return p
    return p.masked_fill_(~label.selected[:, None], 0.0)

"""Cross entropy of given logits in PyTorch, for any device, one chunk of tokens at a time.

The terms are those of `_tokens`. Sums are relative to the token's largest logit. lse(z) itself is not used to
compute probabilities: in float32, rounding an lse near 100 changes every probability by 4e-6. A softcap
multiplies dz by 1 - (z / softcap)^2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ual_kernels._operands import LogitsInputs, LogitsOutputs, LogitsSpec, accumulator, fill_ignored
from ual_kernels._tokens import Labels, labels, token_statistics, token_terms
from ual_kernels._torch.gemm import even
from ual_kernels._vocab_parallel import Place, Shards

# fp32 numbers in one chunk of logits. On a CPU 2 MiB stay in the cache after the first pass. Elsewhere larger
# chunks need fewer launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def forward(
    inputs: LogitsInputs,
    spec: LogitsSpec,
    *,
    inplace_scale: Tensor | None = None,
    shards: Shards | None = None,
) -> LogitsOutputs:
    """Implement `ops.cross_entropy_op` or, with `inplace_scale` [N], `ops.cross_entropy_inplace_op`."""
    logits, acc = inputs.logits, accumulator(inputs.logits)
    shards = shards or Shards(logits.shape[1])
    outputs = LogitsOutputs.empty(inputs, spec)
    fill_ignored(outputs.statistics)
    c_mean: Tensor | float = 1.0
    if inputs.class_weight is not None:
        c_mean = shards.sum(inputs.class_weight.sum()) / shards.vocab
    for chunk in _chunks(logits, shards):
        label = labels(inputs.target[chunk], shards.vocab, spec.ignore_index)
        place = shards.place(label.column)
        z = _final(logits[chunk].to(acc, copy=True), spec)
        z_y = shards.sum(_at(z, place))
        c_y: Tensor | float = 1.0
        if inputs.class_weight is not None:
            c_y = shards.sum(torch.where(place.held, inputs.class_weight[place.column], 0.0))
        nan_mask = label.nan_mask.to(acc)
        sums = _Sums.of(z, z_y, inputs.class_weight, c_mean, shards, statistics=spec.statistics)
        terms = token_terms(
            sums.nll, sums.lse, sums.smoothing_term, inputs.smoothing[chunk], c_y, c_mean, spec.z_loss
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
            logits[chunk] = _dlogits(p, inputs, spec, chunk, label, terms.k, scale, shards)
    return outputs


def backward(
    dloss: Tensor, state: Tensor, inputs: LogitsInputs, spec: LogitsSpec, shards: Shards | None = None
) -> Tensor:
    """Implement `ops.cross_entropy_backward_op`."""
    logits, shards = inputs.logits, shards or Shards(inputs.logits.shape[1])
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for chunk in _chunks(logits, shards):
        label = labels(inputs.target[chunk], shards.vocab, spec.ignore_index)
        largest, log_sum, k, _ = state[:, chunk].unbind(0)
        z = _final(logits[chunk].to(state.dtype), spec)
        p = torch.exp(z.sub(largest[:, None]).sub_(log_sum[:, None]))
        scale = torch.where(label.selected, dloss[chunk].to(state.dtype), 0.0)
        dlogits[chunk] = _dlogits(p, inputs, spec, chunk, label, k, scale, shards)
    return dlogits


def scale_tokens(buffer: Tensor, scale: Tensor) -> Tensor:
    """Multiply the values of each token in `buffer` by its scale in place.

    On a CPU, where the check needs no synchronization, nothing is done if all scales are 1.
    """
    if buffer.is_cpu and bool((scale == 1).all()):
        return buffer
    return buffer.mul_(scale[:, None])


# ---- helpers ----


def _chunks(logits: Tensor, shards: Shards) -> Iterator[slice]:
    """Yield even slices of tokens within the device's budget, the same on all shards."""
    budget = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return even(len(logits), max(1, budget // shards.largest))


def _final(z: Tensor, spec: LogitsSpec) -> Tensor:
    if spec.logit_scale != 1.0:
        z = z * spec.logit_scale
    return torch.tanh(z / spec.softcap) * spec.softcap if spec.softcap else z


def _at(z: Tensor, place: Place) -> Tensor:
    """Return z [M, V] in each token's column, 0 if another shard has the column."""
    return torch.where(place.held, z.gather(1, place.column[:, None]).squeeze(1), 0.0)


class _Sums(NamedTuple):
    """Sums over the vocabulary, [M] each."""

    largest: Tensor
    log_sum: Tensor  # of exp(z - largest)
    lse: Tensor
    nll: Tensor
    smoothing_term: Tensor
    statistics: Tensor | None  # [7, M]

    @classmethod
    def of(
        cls,
        z: Tensor,
        z_y: Tensor,
        class_weight: Tensor | None,
        c_mean: Tensor | float,
        shards: Shards,
        *,
        statistics: bool,
    ) -> "_Sums":
        """Sum over z [M, V], and overwrite z with exp(z - largest)."""
        second = None
        if statistics:
            two = z.topk(min(2, shards.size), dim=1).values
            own = two[:, 1] if shards.size > 1 else torch.full_like(z_y, -torch.inf)
            second = shards.second_largest(two[:, 0], own)
        largest = shards.maximum(z.amax(1))
        z.sub_(largest[:, None])
        weighted = shards.sum(z.sum(1) if class_weight is None else z @ class_weight) / shards.vocab
        smoothing_term = weighted - c_mean * (z_y - largest)
        shifted = mean = None
        if statistics:
            shifted, mean = z.clone(), largest + shards.sum(z.sum(1)) / shards.vocab
        total = shards.sum(z.exp_().sum(1))
        log_sum = total.log()
        nll = (largest - z_y) + log_sum
        packed = None
        if shifted is not None and second is not None and mean is not None:
            moment = shards.sum(shifted.masked_fill_(z == 0, 0.0).mul_(z).sum(1))
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
    shards: Shards,
) -> Tensor:
    """Overwrite p with the gradient of the raw logits, times `scale` [M]; ignored tokens become 0."""
    s, class_weight, place = inputs.smoothing[chunk], inputs.class_weight, shards.place(label.column)
    c_y = 1.0 if class_weight is None else class_weight[place.column]
    scale = scale * spec.logit_scale
    p *= (scale * k)[:, None]
    p -= (scale * s / shards.vocab)[:, None] * (1.0 if class_weight is None else class_weight)
    of_target = torch.where(place.held, scale * (1 - s) * c_y, 0.0)
    # one column per token: equal to scatter_add_, which CUDA rejects if determinism is requested
    column = place.column[:, None]
    p.scatter_(1, column, p.gather(1, column) - of_target[:, None])
    if spec.softcap:
        raw = inputs.logits[chunk].to(p.dtype)
        p *= 1 - torch.tanh(raw * (spec.logit_scale / spec.softcap)).square()
    if p.is_cpu and bool(label.selected.all()):  # no synchronization on a CPU, and it saves a pass
        return p
    return p.masked_fill_(~label.selected[:, None], 0.0)

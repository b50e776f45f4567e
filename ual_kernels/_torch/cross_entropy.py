"""Cross entropy of given logits in PyTorch, for any device, one chunk of tokens at a time.

The terms are those of `_tokens`. Sums are relative to the token's largest logit. lse(z) itself is not used to
compute probabilities: in float32, rounding an lse near 100 changes every probability by 4e-6. A softcap
multiplies dz by 1 - (z / softcap)^2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ual_kernels._matrices import subtract_at
from ual_kernels._operands import LogitsInputs, LogitsOutputs, LogitsSpec, accumulator, fill_ignored
from ual_kernels._tokens import Labels, TargetClasses, labels, minus_log_p, token_statistics, token_terms
from ual_kernels._torch.gemm import even
from ual_kernels._vocab_parallel import Shards

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
        z = _final(logits[chunk].to(acc, copy=True), spec)
        target = _target(inputs, spec, chunk, label, z, shards)
        nan_mask, s = label.nan_mask.to(acc), inputs.smoothing[chunk]
        sums = _Sums.of(z, target, label, inputs.class_weight, c_mean, shards, statistics=spec.statistics)
        terms = token_terms(
            sums.nll, sums.lse, sums.smoothing_term, s, target.weight, target.excess, c_mean, spec.z_loss
        )
        state = torch.stack([sums.largest, sums.log_sum, terms.k + nan_mask, terms.ds + nan_mask])
        outputs.loss[chunk] = torch.where(label.selected, terms.loss + nan_mask, 0.0)
        outputs.state[:, chunk] = torch.where(label.selected, state, 0.0)
        if sums.statistics is not None:
            outputs.statistics[:, chunk] = torch.where(
                label.selected & label.valid, sums.statistics, outputs.statistics[:, chunk]
            )
        if spec.probability_grad:
            dp = target.probability_gradient(sums.nll + nan_mask, sums.lse + nan_mask, s)
            outputs.dprobabilities[chunk] = torch.where(label.selected[:, None], dp, 0.0)
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


class _DenseTarget(NamedTuple):
    """A probability for every class of this shard; like `TargetClasses`."""

    z: Tensor  # [M, V], a copy if the gradient of the probabilities is requested
    class_weight: Tensor  # [V], or 1
    z_y: Tensor  # [M]
    weight: Tensor  # W, [M]
    excess: Tensor  # R, [M]
    probability: Tensor  # [M], their sum
    plain_excess: Tensor  # R without class weights, [M]

    def log_prob(self, nll: Tensor) -> Tensor:
        return -(self.probability * nll + self.plain_excess)

    def probability_gradient(self, nll: Tensor, lse: Tensor, s: Tensor) -> Tensor:
        return (1 - s)[:, None] * self.class_weight * minus_log_p(self.z, self.z_y[:, None], nll, lse)


def _target(
    inputs: LogitsInputs, spec: LogitsSpec, chunk: slice, label: Labels, z: Tensor, shards: Shards
) -> TargetClasses | _DenseTarget:
    """Return the classes of a chunk's targets with their logits, from z [M, V]."""
    if inputs.dense:
        return _dense_target(inputs, spec, chunk, label, z, shards)
    classes = label.column[:, None] if inputs.classes is None else inputs.classes[chunk]
    place = shards.place(classes)
    z_listed = shards.sum(torch.where(place.held, z.gather(1, place.column), 0.0))
    c = torch.ones_like(z_listed)
    if inputs.class_weight is not None:
        c = shards.sum(torch.where(place.held, inputs.class_weight[place.column], 0.0))
    probability = torch.ones_like(z_listed) if inputs.probabilities is None else inputs.probabilities[chunk]
    return TargetClasses(*place, probability, c, z_listed)


def _dense_target(
    inputs: LogitsInputs, spec: LogitsSpec, chunk: slice, label: Labels, z: Tensor, shards: Shards
) -> _DenseTarget:
    assert inputs.probabilities is not None
    q = inputs.probabilities[chunk]
    place = shards.place(label.column[:, None])
    z_y = shards.sum(torch.where(place.held, z.gather(1, place.column), 0.0))
    below = torch.where((q == 0) | (z_y == -torch.inf), 0.0, q * (z_y - z))
    probability, plain_excess = shards.sum(q.sum(1)), shards.sum(below.sum(1))
    weight, excess, c = probability, plain_excess, torch.ones_like(z[:1, :1])
    if inputs.class_weight is not None:
        c = inputs.class_weight
        weight, excess = shards.sum(q @ c), shards.sum(below @ c)
    kept = z.clone() if spec.probability_grad else z
    return _DenseTarget(kept, c, z_y[:, 0], weight, excess, probability, plain_excess)


class _Sums(NamedTuple):
    """Sums over the vocabulary, [M] each."""

    largest: Tensor
    log_sum: Tensor  # of exp(z - largest)
    lse: Tensor
    nll: Tensor
    smoothing_term: Tensor
    statistics: Tensor | None  # [8, M]

    @classmethod
    def of(
        cls,
        z: Tensor,
        target: TargetClasses | _DenseTarget,
        label: Labels,
        class_weight: Tensor | None,
        c_mean: Tensor | float,
        shards: Shards,
        *,
        statistics: bool,
    ) -> "_Sums":
        """Sum over z [M, V], and overwrite z with exp(z - largest)."""
        top, z_y = None, target.z_y
        if statistics:
            two, column = z.topk(min(2, shards.size), dim=1)
            own = two[:, 1] if shards.size > 1 else torch.full_like(z_y, -torch.inf)
            top = shards.top(two[:, 0], own, column[:, 0])
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
        if shifted is not None and top is not None and mean is not None:
            moment = shards.sum(shifted.masked_fill_(z == 0, 0.0).mul_(z).sum(1))
            packed = token_statistics(
                z_y, largest, total, target.log_prob(nll), moment, largest, top.second, mean,
                label.column, top.label,
            )  # fmt: skip
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
    s, class_weight = inputs.smoothing[chunk], inputs.class_weight
    scale = scale * spec.logit_scale
    p *= (scale * k)[:, None]
    p -= (scale * s / shards.vocab)[:, None] * (1.0 if class_weight is None else class_weight)
    of_target = (scale * (1 - s))[:, None]
    if inputs.dense:
        assert inputs.probabilities is not None
        p -= of_target * inputs.probabilities[chunk] * (1.0 if class_weight is None else class_weight)
    else:
        place = shards.place(label.column[:, None] if inputs.classes is None else inputs.classes[chunk])
        if inputs.probabilities is not None:
            of_target = of_target * inputs.probabilities[chunk]
        if class_weight is not None:
            of_target = of_target * class_weight[place.column]
        subtract_at(p, place.column, torch.where(place.held, of_target, 0.0))
    if spec.softcap:
        raw = inputs.logits[chunk].to(p.dtype)
        p *= 1 - torch.tanh(raw * (spec.logit_scale / spec.softcap)).square()
    if p.is_cpu and bool(label.selected.all()):  # no synchronization on a CPU, and it saves a pass
        return p
    return p.masked_fill_(~label.selected[:, None], 0.0)

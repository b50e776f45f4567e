"""Per-token statistics that one pass over the vocabulary computes."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

LINEAR_STATISTICS = 8  # the fields of TokenStatistics
LOGITS_STATISTICS = 7  # without dropped_mass: `cross_entropy` has no gradient_filter


class TokenStatistics(NamedTuple):
    """Detached statistics of softmax(z) for each token; z are the logits after `logit_scale` and `softcap`.

    Every field has the shape of `target`. The dtype is the accumulator's (float32; float64 for float64
    input), and bool for `correct`. Ignored tokens are NaN, and False in `correct`.
    """

    lse: Tensor
    """log sum exp(z), nats."""
    log_prob: Tensor
    """log p of the target, nats, <= 0."""
    entropy: Tensor
    """-sum p log p, nats, in [0, log V]."""
    top1_prob: Tensor
    """The largest probability, in [1 / V, 1]."""
    margin: Tensor
    """Largest logit minus the second largest, nats, >= 0 (inf for V = 1)."""
    mean_logit: Tensor
    """The mean of z over the vocabulary."""
    correct: Tensor
    """Whether no logit exceeds the target's."""
    dropped_mass: Tensor
    """Probability, in [0, 1], whose gradient `gradient_filter` spread evenly over its tile; 0 without it."""

    @classmethod
    def unpack(cls, packed: Tensor, shape: tuple[int, ...]) -> "TokenStatistics":
        """Convert an operator's output, [8, N] or [7, N] without dropped mass, to fields of a shape."""
        fields = [field.reshape(shape) for field in packed.unbind(0)]
        if len(fields) == LOGITS_STATISTICS:
            fields.append(torch.zeros_like(fields[0]).masked_fill(fields[0].isnan(), torch.nan))
        return cls._make([*fields[:6], fields[6] == 1, fields[7]])


TokenFn: TypeAlias = Callable[[TokenStatistics], Tensor]
"""A function that computes a value per token, [M], from the statistics of M tokens, whose fields are [M].

Ignored tokens may be among them (`cross_entropy`, compact=False); their values are not used.
"""

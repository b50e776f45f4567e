"""Per-token statistics of one pass over the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

LINEAR_STATISTICS = 8  # the fields of TokenStatistics
LOGITS_STATISTICS = 7  # all but dropped_mass: given logits, nothing is dropped


class TokenStatistics(NamedTuple):
    """Statistics of softmax(z) for each token, detached; z are the logits after `logit_scale` and `softcap`.

    Every field has the target's shape and the accumulator's dtype (float32; float64 for float64 input),
    except `correct`. Ignored tokens hold NaN, and False in `correct`.
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
    """bool: no logit exceeds the target's."""
    dropped_mass: Tensor
    """Probability whose gradient `gradient_filter` spread evenly over its tile, in [0, 1]; 0 without it."""

    @classmethod
    def unpack(cls, packed: Tensor, shape: tuple[int, ...]) -> "TokenStatistics":
        """Make the named view of an operator's output, [8, N] or, without dropped mass, [7, N]."""
        fields = [field.reshape(shape) for field in packed.unbind(0)]
        if len(fields) == LOGITS_STATISTICS:
            fields.append(torch.zeros_like(fields[0]).masked_fill(fields[0].isnan(), torch.nan))
        return cls._make([*fields[:6], fields[6] == 1, fields[7]])


TokenFn: TypeAlias = Callable[[TokenStatistics], Tensor]
"""A number for each token from its own statistics: fields [M] of some tokens in, [M] out.

Where ignored tokens are among them (`cross_entropy`, compact=False), what it returns for those is not used.
"""

"""Per-token statistics that one pass over the vocabulary computes."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

LINEAR_STATISTICS = 9  # the fields of TokenStatistics
LOGITS_STATISTICS = 8  # without dropped_mass: `cross_entropy` has no gradient_filter
CORRECT, PREDICTED = 6, 7  # places of the fields that are not floating point


class TokenStatistics(NamedTuple):
    """Detached statistics of softmax(z) for each token; z are the logits after `logit_scale` and `softcap`.

    Every field has one value per token. The dtype is the accumulator's (float32; float64 for float64 input),
    bool for `correct` and int64 for `predicted`. Ignored tokens are NaN, False in `correct` and -1 in
    `predicted`. For a target of several classes, "the target's class" is the one with the largest
    probability, the smallest class on a tie.
    """

    lse: Tensor
    """log sum exp(z), nats."""
    log_prob: Tensor
    """log p of the target, nats, <= 0; for a target of several classes sum_k p_k log p_ik."""
    entropy: Tensor
    """-sum p log p, nats, in [0, log V]."""
    top1_prob: Tensor
    """The largest probability, in [1 / V, 1]."""
    margin: Tensor
    """Largest logit minus the second largest, nats, >= 0 (inf for V = 1)."""
    mean_logit: Tensor
    """The mean of z over the vocabulary."""
    correct: Tensor
    """Whether no logit exceeds that of the target's class."""
    predicted: Tensor
    """The class with the largest logit; the target's class if it is one of several. Exact for V <= 2^24."""
    dropped_mass: Tensor
    """Probability, in [0, 1], whose gradient `gradient_filter` spread evenly over its tile; 0 without it."""

    @classmethod
    def unpack(cls, packed: Tensor, shape: tuple[int, ...]) -> "TokenStatistics":
        """Convert an operator's output, [9, N] or [8, N] without dropped mass, to fields of a shape."""
        fields = [field.reshape(shape) for field in packed.unbind(0)]
        if len(fields) == LOGITS_STATISTICS:
            fields.append(torch.zeros_like(fields[0]).masked_fill(fields[0].isnan(), torch.nan))
        fields[CORRECT] = fields[CORRECT] == 1
        fields[PREDICTED] = fields[PREDICTED].long()
        return cls._make(fields)


TokenFn: TypeAlias = Callable[[TokenStatistics], Tensor]
"""A function that computes a value per token, [M], from the statistics of M tokens, whose fields are [M].

Ignored tokens may be among them (`cross_entropy`, compact=False); their values are not used.
"""

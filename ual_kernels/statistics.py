"""What one pass over the vocabulary can tell about each token."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """Per-token facts of softmax(z), z being the final logits (after `logit_scale` and `softcap`), detached.

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
    """Probability whose gradient `gradient_filter` left to its tiles' means, in [0, 1]; 0 without it."""

    @classmethod
    def unpack(cls, rows: Tensor, shape: tuple[int, ...]) -> "TokenStatistics":
        """Make the named view of an operator's output, [8, N] or, without dropped mass, [7, N]."""
        numbers = [row.reshape(shape) for row in rows.unbind(0)]
        dropped = (
            numbers[7]
            if len(numbers) == 8
            else numbers[6].new_zeros(shape).masked_fill(numbers[0].isnan(), torch.nan)
        )
        return cls._make([*numbers[:6], numbers[6] == 1, dropped])

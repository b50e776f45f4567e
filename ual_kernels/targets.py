"""Targets that are distributions over a few classes."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseTarget(NamedTuple):
    """K classes and their probabilities for each token, in place of one class index.

    With smoothing s, a token is trained on q = (1 - s) sum_k p_k onehot(i_k) + s / V. The cost beyond that of
    a class index is O(K D) per token.

    The loss of a token is NaN if a probability is negative, if the probabilities are off a sum of 1 by more
    than 1e-3, or if a class is outside [0, V). Nothing is renormalized implicitly; see `normalized`.

    >>> import torch
    >>> from ual_kernels import cross_entropy
    >>> target = SparseTarget(torch.tensor([[1, 2]]), torch.tensor([[0.75, 0.25]]))
    >>> round(cross_entropy(torch.tensor([[0.0, 1.0, 0.0]]), target).item(), 4)
    0.8014
    """

    indices: Tensor
    """[..., K] int32 or int64 in [0, V). Where the first is `ignore_index`, the token is ignored. The
    probabilities of a class that is repeated add up. Pad with class 0 and probability 0."""
    probabilities: Tensor
    """[..., K] floating point, >= 0; float32 is recommended, because 16 bits round a sum by up to 4e-3."""

    def normalized(self) -> "SparseTarget":
        """Divide the probabilities by their sum, in float32 at least. Where the sum is 0, they stay 0."""
        p = self.probabilities.to(torch.promote_types(self.probabilities.dtype, torch.float32))
        total = p.sum(-1, keepdim=True)
        return self._replace(probabilities=p / torch.where(total == 0, 1.0, total))

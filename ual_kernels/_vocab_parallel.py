"""Vocab-parallel shards: the reductions over the ranks of a process group.

Each rank holds consecutive rows of the lm_head, in rank order, and all hidden states and targets. With m_r
the maximum of rank r and S_r its sum of exp(z - m_r), per token

    m = max_r m_r        S = sum_r S_r exp(m_r - m)        z_y, mean(c z) = sums over ranks

The gradient of the hidden states is the sum over ranks of the contributions of each rank's rows of the head.
A chunk of M tokens costs a few all-reduces of [M] and one of [M, D].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class Place(NamedTuple):
    """The column of each label in this shard."""

    column: Tensor  # [M], 0 if another shard has the label
    held: Tensor  # [M] bool, whether this shard has the label


class Shards:
    """A single shard: this process has all classes, and no communication is needed."""

    start = 0
    alone = True

    def __init__(self, classes: int) -> None:
        self.vocab = self.largest = self.size = classes

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; may overwrite its argument."""
        return tensor

    def sum_input_grad(self, tensor: Tensor) -> Tensor:
        """Sum a gradient of the hidden states over ranks, unless reduce_input_grad=False."""
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks; may overwrite its argument."""
        return tensor

    def second_largest(self, largest: Tensor, second: Tensor) -> Tensor:
        """Second largest over all classes, from each rank's largest and second largest."""
        return second

    def place(self, label: Tensor) -> "Place":
        """Return the columns in this shard of labels [M] of the complete vocabulary."""
        held = (label >= self.start) & (label < self.start + self.size)
        return Place(torch.where(held, label - self.start, 0), held)


class ProcessGroupShards(Shards):
    """A shard with classes [start, start + size) of `vocab`; other ranks have the other classes.

    The constructor gathers the sizes of all shards, the only host synchronization of a sharded loss.
    """

    alone = False

    def __init__(
        self, classes: int, group: dist.ProcessGroup, device: torch.device, *, reduce_input_grad: bool
    ) -> None:
        super().__init__(classes)
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._reduce_input_grad = reduce_input_grad
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self._ranks)]
        dist.all_gather(sizes, torch.tensor([classes], device=device), group=group)
        counts = torch.cat(sizes).tolist()
        self.start = sum(counts[: dist.get_rank(group)])
        self.vocab, self.largest = sum(counts), max(counts)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def sum_input_grad(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) if self._reduce_input_grad else tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def second_largest(self, largest: Tensor, second: Tensor) -> Tensor:
        own = torch.stack([largest, second])
        gathered = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(gathered, own, group=self._group)
        return torch.cat(gathered).topk(2, dim=0).values[1]

"""The head in vocabulary shards over a process group: what the ranks tell each other about each row.

Every rank holds some consecutive rows of the lm_head, in the order of the ranks, and all of the hidden states
and targets. With m_r a rank's maximum and S_r its sum of exp(z - m_r), per row of the batch

    m = max_r m_r        S = sum_r S_r exp(m_r - m)        z_y, mean(c z) = sums over ranks

and the gradient of the hidden states is the sum of what the ranks' own rows of the head contribute, so a
chunk of M rows costs a few all-reduces of [M] and one of [M, D].
"""

import torch
from torch import Tensor
from torch import distributed as dist


class Whole:
    """One process holds every row of the head."""

    start = 0

    def __init__(self, rows: int) -> None:
        self.vocab = self.largest = rows

    def sum(self, tensor: Tensor) -> Tensor:
        """Over ranks; may overwrite its argument."""
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Over ranks; may overwrite its argument."""
        return tensor

    def second_largest(self, high: Tensor, second: Tensor) -> Tensor:
        """Of the classes of all ranks, from the largest and the second largest of each."""
        return second


class Shards(Whole):
    """Rows [start, start + rows) of a head of `vocab` rows are here, the others on the other ranks.

    Reads the ranks' sizes once when it is made: the one host synchronisation of a sharded head.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._ranks = dist.get_world_size(group)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self._ranks)]
        dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
        counts = torch.cat(sizes).tolist()
        self.start = sum(counts[: dist.get_rank(group)])
        self.vocab, self.largest = sum(counts), max(counts)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def second_largest(self, high: Tensor, second: Tensor) -> Tensor:
        mine = torch.stack([high, second])
        everyone = [torch.empty_like(mine) for _ in range(self._ranks)]
        dist.all_gather(everyone, mine, group=self._group)
        return torch.cat(everyone).topk(2, dim=0).values[1]

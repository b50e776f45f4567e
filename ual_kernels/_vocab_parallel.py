"""Vocab-parallel shards: the reductions over the ranks of a process group.

Each rank holds consecutive rows of the lm_head, in rank order, and all hidden states and targets. With m_r
the maximum of rank r and S_r its sum of exp(z - m_r), per token

    m = max_r m_r        S = sum_r S_r exp(m_r - m)        z_y, mean(c z) = sums over ranks

The gradient of the hidden states is the sum over ranks of the contributions of each rank's rows of the head.
A chunk of M tokens costs a few all-reduces of [M] and one of [M, D].
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

_ERROR = -1  # gathered instead of a number of classes


class Place(NamedTuple):
    """The column of each class in this shard."""

    column: Tensor  # 0 if another shard has the class
    held: Tensor  # bool, whether this shard has the class


class Top(NamedTuple):
    """Of all classes, [M] each."""

    second: Tensor  # the second largest value
    label: Tensor  # int64, a class with the largest value


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

    def top(self, largest: Tensor, second: Tensor, column: Tensor) -> "Top":
        """The second largest value and the class of the largest, from those of each rank, [M]."""
        return Top(second, column)

    def place(self, label: Tensor) -> "Place":
        """Return the columns in this shard of classes of the complete vocabulary."""
        held = (label >= self.start) & (label < self.start + self.size)
        return Place(torch.where(held, label - self.start, 0), held)


class ProcessGroupShards(Shards):
    """A shard with classes [start, start + size) of `vocab`; other ranks have the other classes.

    The constructor gathers the sizes of all shards, the only host synchronization of a sharded loss. With the
    sizes it compares `shared`, the arguments by name that must be the same on all ranks.
    """

    alone = False

    def __init__(
        self,
        classes: int,
        group: dist.ProcessGroup,
        device: torch.device,
        shared: Mapping[str, str],
        *,
        reduce_input_grad: bool = True,
    ) -> None:
        super().__init__(classes)
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._reduce_input_grad = reduce_input_grad
        counts = _gather(classes, group, device, shared)
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

    def top(self, largest: Tensor, second: Tensor, column: Tensor) -> "Top":
        own = torch.stack([largest, second, (column + self.start).to(largest.dtype)])
        gathered = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(gathered, own, group=self._group)
        every = torch.stack(gathered)
        owner = every[:, 0].argmax(0, keepdim=True)
        return Top(
            every[:, :2].flatten(0, 1).topk(2, dim=0).values[1],
            every[:, 2].gather(0, owner).squeeze(0).long(),
        )


@contextmanager
def raised_on_every_rank(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Raise an error of one rank on all ranks of the group, in place of the gather of `ProcessGroupShards`.

    Otherwise the other ranks would wait in a collective for the rank that raised.
    """
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        _gather(_ERROR, group, device, {"error": message})


def _gather(
    classes: int, group: dist.ProcessGroup, device: torch.device, shared: Mapping[str, str]
) -> list[int]:
    """Return the number of classes of every rank; raise if a rank has an error or the ranks disagree."""
    own = torch.tensor([classes, zlib.crc32(repr(shared).encode())], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    counts, checksums = torch.stack(gathered, dim=1).tolist()
    if _ERROR in counts or len(set(checksums)) > 1:
        with torch.cuda.device_of(own):  # type: ignore[no-untyped-call]
            reports: list[dict[str, str]] = [{} for _ in counts]
            dist.all_gather_object(reports, dict(shared), group=group)
        _raise(reports)
    return list(counts)


def _raise(reports: list[dict[str, str]]) -> NoReturn:
    """Raise the same error on every rank."""
    for rank, report in enumerate(reports):
        if "error" in report:
            raise ValueError(f"rank {rank} of process_group: {report['error']}")
    name = next(name for name in reports[0] if len({report.get(name) for report in reports}) > 1)
    values = ", ".join(f"{report.get(name)} on rank {rank}" for rank, report in enumerate(reports))
    raise ValueError(f"{name} must be the same on all ranks of process_group, got {values}")

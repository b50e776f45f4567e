"""The processes of one run: who writes, and what they tell each other over host memory."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Return this process's number in the run; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes the run has; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_writer() -> bool:
    """Return whether this process prints and writes for all."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier(_host_group())


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns in the first process, which alone calls it."""
    if world_size() == 1:
        return make()
    box: list[Any] = [make() if is_writer() else None]
    dist.broadcast_object_list(box, src=0, group=_host_group())
    value: T = box[0]
    return value


def gather(value: T) -> list[T]:
    """Return every process's value, in the order of ranks, in each."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def highest(number: int) -> int:
    """Return the highest number that any process holds. Touches no device, so it may be asked every step."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_host_group())
    return int(tensor)


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that another process is gone. Gloo has no class for it, only its words."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _host_group() -> Any:
    return _gloo_beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _gloo_beside(world: Any) -> Any:
    """NCCL moves only what lies on devices, and an object or a flag lies on the host."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")

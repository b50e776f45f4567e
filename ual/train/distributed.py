"""The processes of a run: rank, world size, and communication over host memory."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ual.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_writer() -> bool:
    """Return whether this process prints and writes files."""
    return rank() == 0


def wait() -> None:
    """Wait until every process calls this."""
    if world_size() > 1:
        dist.barrier(_host_group(dist.group.WORLD))


def from_first(make: Callable[[], T]) -> T:
    """Return the result of `make` in rank 0, the only process that calls it.

    Raises:
        UserError: as `make`, in every process. Another exception of `make` is a UserError in the others.
    """
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    failed: Exception | None = None
    if is_writer():
        try:
            box[0] = make()
        except Exception as error:
            failed = error
            user = error if isinstance(error, UserError) else UserError(f"the first process failed: {error}")
            box[1] = (user.problem, user.place, user.remedy)
    dist.broadcast_object_list(box, src=0, group=_host_group(dist.group.WORLD))
    if failed is not None:
        raise failed
    value, refusal = box
    if refusal is not None:
        problem, place, remedy = refusal
        raise UserError(problem, place=place, remedy=remedy)
    result: T = value
    return result


def gather(value: T) -> list[T]:
    """Return the values of all processes in the order of ranks, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group(dist.group.WORLD))
    return values


def highest(number: int) -> int:
    """Return the largest number of all processes. Cheap enough for every step: no device is synchronized."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return int(tensor)


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that another process is lost. Gloo's errors have a text but no class."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@functools.lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    """Return a gloo group of all processes, because NCCL only moves data between devices."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")

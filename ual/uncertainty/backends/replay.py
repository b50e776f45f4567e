"""Answers from the cache alone: a run again, without asking anybody."""

from collections.abc import Mapping
from typing import Any

from ual.uncertainty.protocol import Backend, Reply, Request, RequestError, Task


class Replay:
    """Stands for a backend whose replies were recorded; whatever is not in the cache fails."""

    def __init__(self, identity: Mapping[str, Any], tasks: frozenset[Task]) -> None:
        self.identity, self.tasks = identity, tasks

    @classmethod
    def of(cls, backend: Backend) -> "Replay":
        return cls(backend.identity, backend.tasks)

    async def __call__(self, request: Request) -> Reply:
        raise RequestError("not recorded")

    async def close(self) -> None:
        """Nothing is open."""

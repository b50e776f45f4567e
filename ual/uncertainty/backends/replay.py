"""A backend without a model: replies come from the cache alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ual.uncertainty.protocol import NotRecordedError, Reply, Request, Task


@dataclass(slots=True)
class Replay:
    """Stands for the backend of this identity; a request that the cache does not answer fails."""

    identity: Mapping[str, Any]
    tasks: frozenset[Task]

    async def __call__(self, request: Request) -> Reply:
        raise NotRecordedError("no reply in the cache")

    async def drain(self, seconds: float) -> None:
        """Nothing that was sent is paid for."""

    async def close(self) -> None:
        """Nothing is open."""

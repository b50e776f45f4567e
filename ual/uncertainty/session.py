"""Ask through the cache, and take many samples through the estimators at once, in bounded memory."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ual.errors import UserError
from ual.records import Elicited, Sample
from ual.uncertainty import protocol
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Backend, Estimator, Reply, Request, RequestError, Task

S = TypeVar("S")


@dataclass(slots=True)
class Counts:
    """What happened so far: requests answered from the cache, by a backend, and not at all."""

    cached: int = 0
    answered: int = 0
    failed: int = 0
    in_a_row: int = 0
    """Failures since the last answer."""
    errors: Counter[str] = field(default_factory=Counter)
    """The distinct errors, at most a few."""


class Session:
    """The `Ask` of a run: cache first, then the backend that does the task; equal questions are asked once.

    Args:
        backends: the first one that can do a request's task answers it.
        cache: gets every answer before the estimator does.
        patience: failures in a row after which the run stops, since the backend is out of order.
    """

    _ERRORS_KEPT = 20

    def __init__(self, backends: Sequence[Backend], cache: Cache, *, patience: int = 20) -> None:
        self._backends, self._cache, self._patience = backends, cache, patience
        self._under_way: dict[bytes, asyncio.Task[Reply]] = {}
        self.counts = Counts()

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset[Task]().union(*(backend.tasks for backend in self._backends))

    async def __call__(self, request: Request) -> Reply:
        """Return the reply.

        Raises:
            RequestError: the request failed for good.
            UserError: so did many before it, or the cache cannot be written.
            BudgetReachedError: see `ual.uncertainty.budget`.
        """
        backend = next(b for b in self._backends if request.task in b.tasks)
        key = protocol.key(backend.identity, request)
        if (task := self._under_way.get(key)) is None:
            if (reply := self._cache.get(key)) is not None:
                self.counts.cached += 1
                return reply
            task = asyncio.create_task(self._answer(backend, key, request))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)  # another estimator may wait for it too

    def _forget(self, key: bytes, task: asyncio.Task[Reply]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen, also where whoever asked was cancelled

    async def _answer(self, backend: Backend, key: bytes, request: Request) -> Reply:
        counts = self.counts
        try:
            reply = await backend(request)
        except RequestError as error:
            counts.failed += 1
            counts.in_a_row += 1
            if len(counts.errors) < self._ERRORS_KEPT or str(error) in counts.errors:
                counts.errors[str(error)] += 1
            if counts.in_a_row >= self._patience:
                raise UserError(
                    f"{counts.in_a_row} requests in a row failed, the last one with: {error}",
                    remedy="mend the backend; the same command goes on from the cache",
                ) from error
            raise
        self._cache.add(key, reply)
        counts.answered += 1
        counts.in_a_row = 0
        return reply

    async def close(self) -> None:
        """Stop what is under way and release the backends."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for backend in self._backends:
            await backend.close()


async def elicit(
    samples: Iterable[tuple[S, Sample]], estimators: Sequence[Estimator], session: Any, *, window: int
) -> AsyncGenerator[tuple[S, Sample, list[Elicited]], None]:
    """Yield each sample, what came with it, and one record per estimator, in the samples' order.

    Args:
        samples: read one by one; at most `window` are held.
        estimators: each sees every sample; a failed request gives a record without a value, with the error
            as evidence.
        session: the `Ask`.
        window: samples under way at a time; several per request slot, for the slowest holds up the order.

    Raises:
        UserError, BudgetReachedError: from a request; what is under way is cancelled, what was answered is
        cached.
    """
    waiting: deque[tuple[S, Sample, asyncio.Task[list[Elicited]]]] = deque()
    try:
        for companion, sample in samples:
            waiting.append((companion, sample, asyncio.create_task(_records(sample, estimators, session))))
            if len(waiting) >= window:
                first = waiting.popleft()
                yield first[0], first[1], await first[2]
        while waiting:
            first = waiting.popleft()
            yield first[0], first[1], await first[2]
    finally:
        tasks = [task for *_, task in waiting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _records(sample: Sample, estimators: Sequence[Estimator], session: Any) -> list[Elicited]:
    if len(estimators) == 1:
        return [await _record(sample, estimators[0], session)]
    return await asyncio.gather(*(_record(sample, estimator, session) for estimator in estimators))


async def _record(sample: Sample, estimator: Estimator, session: Any) -> Elicited:
    try:
        return await estimator.estimate(sample, session)
    except RequestError as error:
        return Elicited(sample.id, estimator.label, None, {"error": str(error)})

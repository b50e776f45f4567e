"""Send requests through the cache, and take many samples through the estimators at once in bounded memory."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ual.errors import UserError
from ual.records import Elicited, Sample
from ual.uncertainty import protocol
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Ask, Backend, Estimator, Reply, Request, RequestError

S = TypeVar("S")


@dataclass(slots=True)
class Counts:
    """Requests answered from the cache, answered by a backend, and failed."""

    cached: int = 0
    answered: int = 0
    failed: int = 0
    in_a_row: int = 0
    """Failures since the last answer."""
    errors: Counter[str] = field(default_factory=Counter)
    """The first distinct errors."""


class Session:
    """The `Ask` of a run: the cache first, then the backend. Equal requests are sent once.

    Args:
        backends: the first one that can do a request's task answers it.
        cache: gets every reply before the estimator does.
        patience: consecutive failures after which the run stops.
    """

    _ERRORS_KEPT = 20

    def __init__(self, backends: Sequence[Backend], cache: Cache, *, patience: int = 20) -> None:
        self._backends, self._cache, self._patience = backends, cache, patience
        self._in_flight: dict[bytes, asyncio.Task[Reply]] = {}
        self.counts = Counts()

    async def __call__(self, request: Request) -> Reply:
        """Return the reply.

        Raises:
            RequestError: the request failed for good.
            UserError: so did many before it, or the cache cannot be written.
            BudgetReachedError: see `ual.uncertainty.budget`.
        """
        backend = next(b for b in self._backends if request.task in b.tasks)
        key = protocol.key(backend.identity, request)
        if (task := self._in_flight.get(key)) is None:
            if (reply := self._cache.get(key)) is not None:
                self.counts.cached += 1
                return reply
            task = asyncio.create_task(self._answer(backend, key, request))
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)  # another estimator may wait for it too

    def _forget(self, key: bytes, task: asyncio.Task[Reply]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # retrieved even if every waiter was cancelled, or asyncio logs it

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
                    f"{counts.in_a_row} consecutive requests failed, the last one with: {error}",
                    remedy="repair the backend and run the same command again; it resumes from the cache",
                ) from error
            raise
        self._cache.add(key, reply)
        counts.answered += 1
        counts.in_a_row = 0
        return reply

    async def aclose(self) -> None:
        """Cancel the requests in flight and close the backends."""
        await _cancel(self._in_flight.values())
        for backend in self._backends:
            await backend.close()


async def elicit(
    samples: Iterable[tuple[S, Sample]], estimators: Sequence[Estimator], ask: Ask, *, window: int
) -> AsyncGenerator[tuple[S, Sample, list[Elicited]], None]:
    """Yield each companion, its sample, and one record per estimator, in the samples' order.

    Args:
        samples: companions and samples, read one by one; at most `window` are held.
        estimators: each one sees every sample. A failed request gives a record without a value, with the
            error as evidence.
        ask: answers the requests.
        window: samples processed at the same time. Results keep the samples' order, so the slowest sample
            holds up the rest unless the window is several times the number of request slots.

    Raises:
        UserError, BudgetReachedError: from a request. Requests in flight are cancelled; replies are cached.
    """
    waiting: deque[tuple[S, Sample, asyncio.Task[list[Elicited]]]] = deque()
    try:
        for companion, sample in samples:
            waiting.append((companion, sample, asyncio.create_task(_records(sample, estimators, ask))))
            if len(waiting) >= window:
                companion, sample, records = waiting.popleft()
                yield companion, sample, await records
        while waiting:
            companion, sample, records = waiting.popleft()
            yield companion, sample, await records
    finally:
        await _cancel(task for *_, task in waiting)


async def _records(sample: Sample, estimators: Sequence[Estimator], ask: Ask) -> list[Elicited]:
    if len(estimators) == 1:  # without a task of its own
        return [await _record(sample, estimators[0], ask)]
    return await asyncio.gather(*(_record(sample, estimator, ask) for estimator in estimators))


async def _record(sample: Sample, estimator: Estimator, ask: Ask) -> Elicited:
    try:
        return await estimator.estimate(sample, ask)
    except RequestError as error:
        return Elicited(sample.id, estimator.label, None, {"error": str(error)})


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""Send requests through the cache, and take many samples through the estimators at once in bounded memory."""

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ual.errors import FailedRequestsError, UserError
from ual.records import Elicited, Sample
from ual.uncertainty import protocol
from ual.uncertainty.backends.completion import parse
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
    """The first distinct errors. Errors that differ in numbers and ids only are one."""


class Session:
    """The `Ask` of a run: the cache first, then the backend. Equal requests are sent once.

    Args:
        backends: the first one that can do a request's task answers it.
        cache: gets every reply before the estimator does.
        patience: consecutive failures after which the run stops. A failure that is the request's own counts
            only while nothing has been answered.
        reasoning_tokens: what the backend adds to the limit of a generated reply. It is not part of a key, so
            replies stay valid if it is raised.
        logprobs: whether the backend asks for log-probabilities where a request does.
        notice: takes what the user is told once, when it first happens.
    """

    _ERRORS_KEPT = 20
    _MOMENT = 3.0  # seconds

    def __init__(
        self,
        backends: Sequence[Backend],
        cache: Cache,
        *,
        patience: int = 20,
        reasoning_tokens: int = 0,
        logprobs: bool = True,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._backends, self._cache, self._patience, self._notice = backends, cache, patience, notice
        self._reasoning, self._logprobs = reasoning_tokens, logprobs
        self._in_flight: dict[bytes, asyncio.Task[Reply]] = {}
        self._kinds: dict[str, str] = {}
        self._told = set[str]()
        self._stop: UserError | None = None
        self.counts = Counts()

    async def __call__(self, request: Request) -> Reply:
        """Return the reply.

        Raises:
            RequestError: the request failed for good.
            FailedRequestsError: so did many before it.
            UserError: every request would fail, or the cache cannot be written.
            BudgetReachedError: see `ual.uncertainty.budget`.
        """
        backend = next(b for b in self._backends if request.task in b.tasks)
        request, recorded = recall(self._cache, backend.identity, request, self._reasoning)
        if recorded is not None:
            self.counts.cached += 1
            self._tell(request, recorded)
            return recorded
        key = protocol.key(backend.identity, request)
        if (task := self._in_flight.get(key)) is None:
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
            self._cache.add(key, reply)
        except RequestError as error:
            if error.body is not None:
                self._cache.keep_unread(key, error.body)
            if self._stop is not None:  # before it was sent
                raise self._stop from None
            self._count(error)
            if counts.in_a_row >= self._patience:
                stop = FailedRequestsError(
                    f"{counts.in_a_row} consecutive requests failed, the last one with: {error}",
                    remedy="repair the backend and run the same command again; it resumes from the cache",
                )
                await self._halt(backend, stop)
                raise stop from error
            raise
        except UserError as error:
            await self._halt(backend, error)
            raise
        counts.answered += 1
        counts.in_a_row = 0
        self._tell(request, reply)
        return reply

    async def _halt(self, backend: Backend, stop: UserError) -> None:
        """Send nothing more: every request would fail like this one."""
        self._stop = self._stop or stop
        await backend.drain(0.0)

    def _count(self, error: RequestError) -> None:
        counts = self.counts
        counts.failed += 1
        counts.in_a_row += not (error.own and counts.answered + counts.cached)
        kind = re.sub(r"(?<!answered )\b\w*\d\w*", "#", str(error))
        if kind in self._kinds or len(self._kinds) < self._ERRORS_KEPT:
            counts.errors[self._kinds.setdefault(kind, str(error))] += 1

    def _tell(self, request: Request, reply: Reply) -> None:
        if reply.unanswered:
            self._once(
                f"a reply reached its limit of {request.max_tokens + self._reasoning} tokens before its "
                "answer, and gives no value. If the model reasons, raise backend.reasoning_tokens (now "
                f"{self._reasoning}) or lower backend.reasoning_effort; if not, raise the estimator's "
                "max_tokens. After a change of reasoning_tokens, only such requests are sent again"
            )
        elif request.top_logprobs and self._logprobs and reply.text and not reply.tokens:
            self._once(
                "the server returns no log-probabilities: judge uses the written score. p_true, "
                "answer_distribution, and judge with read: first_token, have no value"
            )

    def _once(self, said: str) -> None:
        if said not in self._told:
            self._told.add(said)
            self._notice(said)

    async def drain(self, seconds: float) -> None:
        """Send nothing more, and wait for replies that are paid for."""
        await asyncio.gather(*(backend.drain(seconds) for backend in self._backends))

    async def aclose(self) -> None:
        """Cancel the requests in flight, after a moment for those that were sent, and close the backends."""
        await self.drain(self._MOMENT)
        await _cancel(self._in_flight.values())
        for backend in self._backends:
            await backend.close()


def recall(
    cache: Cache, identity: Mapping[str, Any], request: Request, reasoning_tokens: int
) -> tuple[Request, Reply | None]:
    """Return the request to send, and its reply if the cache has one.

    A reply that reached a lower limit before its answer counts no longer: the same request is sent again with
    the present limit.
    """
    limit = request.max_tokens + reasoning_tokens
    reply = _read(cache, protocol.key(identity, request))
    while reply is not None and reply.unanswered and request.task == "generate":
        if limit <= 1.1 * max(request.max_tokens, reply.completion_tokens):  # a server may count differently
            break
        request = replace(request, retry=request.retry + 1)
        reply = _read(cache, protocol.key(identity, request))
    return request, reply


def _read(cache: Cache, key: bytes) -> Reply | None:
    if (reply := cache.get(key)) is not None:
        return reply
    for body in cache.unread(key):  # this version may read what an earlier one could not
        try:
            reply = parse(body)
        except ValueError:
            continue
        cache.add(key, reply)
        return reply
    return None


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
        return Elicited(sample.id, estimator.label, None, {"error": str(error), "unparsed": error.reason})


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

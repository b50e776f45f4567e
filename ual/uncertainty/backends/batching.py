"""A backend that answers requests in batches, such as a model in memory."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ual.uncertainty.budget import Budget, Spent
from ual.uncertainty.protocol import Reply, Request, RequestError, Task

_Waiting = tuple[Request, "asyncio.Future[Reply]"]


class BatchingBackend:
    """Collects requests that arrive together and answers them in batches, in a thread.

    The requests of a batch have the same task, `max_tokens` and `top_logprobs`. A batch holds the request
    that has waited longest and those nearest to it in size, to minimize padding.

    Args:
        identity, tasks: see `ual.uncertainty.protocol.Backend`.
        answer: takes a batch; returns a reply or an error for each request, in order.
        batch_size: requests in a batch, at most.
        budget: counts every request.
        reasoning_tokens: added to the limit of each generated reply.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        tasks: frozenset[Task],
        answer: Callable[[Sequence[Request]], Sequence[Reply | RequestError]],
        batch_size: int,
        budget: Budget,
        reasoning_tokens: int = 0,
    ) -> None:
        self.identity, self.tasks, self._reasoning = identity, tasks, reasoning_tokens
        self._answer, self._size, self._budget = answer, batch_size, budget
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Reply:
        """Return the reply, after the batch that holds the request.

        Raises:
            RequestError: the request failed. Any other error of `answer` is raised for the complete batch.
        """
        if request.task == "generate":
            request = replace(request, max_tokens=request.max_tokens + self._reasoning)
        most = used = Spent(1, request.size, request.max_tokens)
        await self._budget.reserve(most)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            reply = await future
            used = Spent(1, reply.prompt_tokens, reply.completion_tokens)
        except RequestError:
            used = Spent(1)
            raise
        finally:
            await self._budget.settle(most, used)
        return reply

    async def _work(self) -> None:
        await asyncio.sleep(0)  # requests of the same moment join the batch
        while self._waiting:
            batch = self._take()
            replies: Sequence[Reply | Exception]
            try:
                replies = await asyncio.to_thread(self._answer, [request for request, _ in batch])
            except Exception as error:
                replies = [error] * len(batch)
            for (_, future), reply in zip(batch, replies, strict=True):
                if future.done():  # its waiter was cancelled
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def _take(self) -> list[_Waiting]:
        first, _ = self._waiting[0]
        alike = [w for w in self._waiting if _kind(w[0]) == _kind(first)]
        batch = sorted(alike, key=lambda w: abs(w[0].size - first.size))[: self._size]
        taken = {future for _, future in batch}
        self._waiting = [w for w in self._waiting if w[1] not in taken]
        return batch

    async def drain(self, seconds: float) -> None:
        """Nothing that was sent is paid for."""

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)


def _kind(request: Request) -> tuple[Task, int, int]:
    return request.task, request.max_tokens, request.top_logprobs

"""A backend for whatever answers many requests at once better than one by one, such as a model in memory."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ual.uncertainty.budget import Meter, Spent
from ual.uncertainty.protocol import Reply, Request, RequestError, Task

_Waiting = tuple[Request, "asyncio.Future[Reply]"]


class BatchingBackend:
    """Collects requests that arrive together and hands them over in batches, in a thread.

    A batch is of one kind (task, length, alternatives): the request that waits longest, and those nearest
    to it in size, which wastes the least padding.

    Args:
        identity, tasks: see `ual.uncertainty.protocol.Backend`.
        answer: takes a batch; gives a reply, or the error, for each request in order.
        batch_size: requests in a batch.
        meter: counts every request.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        tasks: frozenset[Task],
        answer: Callable[[Sequence[Request]], Sequence[Reply | RequestError]],
        batch_size: int,
        meter: Meter,
    ) -> None:
        self.identity, self.tasks = identity, tasks
        self._answer, self._size, self._meter = answer, batch_size, meter
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Reply:
        """Wait for the batch that holds the request.

        Raises:
            RequestError: the request failed; whatever else `answer` raises goes to the whole batch.
        """
        most = used = Spent(1, request.size, request.max_tokens)
        await self._meter.reserve(most)
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
            await self._meter.settle(most, used)
        return reply

    async def _work(self) -> None:
        await asyncio.sleep(0)  # let others of the same moment join
        while self._waiting:
            batch = self._take()
            try:
                replies = await asyncio.to_thread(self._answer, [request for request, _ in batch])
                for (_, future), reply in zip(batch, replies, strict=True):
                    if not future.done():  # else whoever asked has gone
                        if isinstance(reply, RequestError):
                            future.set_exception(reply)
                        else:
                            future.set_result(reply)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _take(self) -> list[_Waiting]:
        first = self._waiting[0][0]
        alike = [w for w in self._waiting[1:] if _kind(w[0]) == _kind(first)]
        alike.sort(key=lambda w: abs(w[0].size - first.size))
        batch = [self._waiting[0], *alike[: self._size - 1]]
        taken = {id(w) for w in batch}
        self._waiting = [w for w in self._waiting if id(w) not in taken]
        return batch

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)


def _kind(request: Request) -> tuple[Task, int, int]:
    return request.task, request.max_tokens, request.top_logprobs

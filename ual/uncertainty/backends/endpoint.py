"""A client of the OpenAI chat-completions protocol, for a commercial server, vLLM, llama.cpp or Transformers.

The `openai` SDK sends requests and classifies errors. This module adds rate limits, a budget, limits on the
time and bytes of a complete reply, and retries that the budget counts. Each attempt waits for, in this order:
the pause that the server asked for, the rate limits, the budget. The deadline then starts.
"""

import asyncio
import email.utils
import ipaddress
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
from aiolimiter import AsyncLimiter
from pydantic import SecretStr

from ual.config.elicit import EndpointConfig
from ual.errors import UserError
from ual.uncertainty.backends.completion import parse, usage_in
from ual.uncertainty.backends.faults import (
    SHOWN,
    Fault,
    ServerError,
    fault_of,
    quoted,
    stops,
    transient,
)
from ual.uncertainty.budget import Budget, Spent
from ual.uncertainty.protocol import Reply, Request, RequestError, Task

_NOT_SENT = "not sent, because the run stops"
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubles from there
_LONGEST_WAIT = 120.0  # seconds that a server may ask to wait
_OWN = {400, 413, 422}  # statuses for which the request itself is at fault
_HEADERS = {
    "host", "authorization", "content-type", "content-length", "accept", "accept-encoding", "connection",
    "user-agent",
}  # fmt: skip


class Endpoint:
    """A backend for one model of one server; see `ual.config.elicit.EndpointConfig` for the limits.

    Args:
        config: address, model, limits.
        api_key: sent to this address only, and removed from replies and errors.
        budget: counts every attempt.

    Raises:
        UserError: see `check_address`.
    """

    tasks: frozenset[Task] = frozenset({"generate"})

    def __init__(self, config: EndpointConfig, api_key: SecretStr | None, budget: Budget) -> None:
        check_address(config.base_url, allow_plain_http=config.allow_plain_http)
        self._config, self._key, self._budget = config, api_key, budget
        self.identity: Mapping[str, Any] = {
            "endpoint": config.base_url,
            "model": config.model,
            "seed": config.seed,
            "omit": sorted(config.omit),
            "extra_body": config.extra_body,
        } | ({"reasoning_effort": config.reasoning_effort} if config.reasoning_effort else {})
        self._slots = asyncio.Semaphore(config.concurrency)
        self._requests = _limiter(config.requests_per_minute, seconds_at_once=1)
        self._tokens = _limiter(config.tokens_per_minute, seconds_at_once=10)
        self._resume_at = 0.0
        self._on_the_wire, self._draining = 0, asyncio.Event()
        secure = config.base_url.startswith("https:")
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key.get_secret_value() if api_key else "none",
            max_retries=0,
            http_client=httpx2.AsyncClient(
                transport=_GuardedTransport(config.max_response_bytes, config.concurrency),
                follow_redirects=False,
                trust_env=secure,  # the environment's proxies and certificates; no proxy for plain http
                timeout=config.timeout,
            ),
        )

    async def __call__(self, request: Request) -> Reply:
        """Send the request, with retries after transient errors.

        Raises:
            RequestError: the request failed for good; the message does not contain the key.
            UserError: the server refuses the key, the model, the address or a field, or the account's quota
                is used up, so all requests would fail.
            BudgetReachedError: see `ual.uncertainty.budget`.
        """
        body = self.body(request)
        most = Spent(1, request.size, request.max_tokens + self._config.reasoning_tokens)
        async with self._slots:
            for attempt in range(self._config.max_retries + 1):
                await self._turn(request)
                if self._draining.is_set():
                    raise RequestError(_NOT_SENT)
                await self._budget.reserve(most)
                used = most  # what was sent without an answer may still be charged
                try:
                    reply = _charged(await self._attempt(body), most)
                    used = Spent(1, reply.prompt_tokens, reply.completion_tokens)
                    return reply
                except _AttemptError as error:
                    if error.used is not None:
                        used = error.used
                    if error.stops is not None:
                        raise error.stops from None
                    problem, own, unread = error.problem, error.own, error.body
                    if not error.transient:
                        break
                    wait = error.retry_after
                    if wait is not None and wait > _LONGEST_WAIT:
                        problem += f"; the server asks to wait {wait:.0f} s"
                        break
                    if wait is None:
                        wait = min(_FIRST_WAIT * 2**attempt, 30.0) * random.uniform(0.5, 1.0)  # noqa: S311
                    else:
                        self._resume_at = max(self._resume_at, time.monotonic() + wait)  # for all requests
                        wait *= random.uniform(1.0, 1.1)  # noqa: S311  spreads the retries
                finally:
                    await self._budget.settle(most, used)
                if attempt < self._config.max_retries:
                    await self._pause(wait)
            raise RequestError(problem, own=own, body=unread)

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of the HTTP request, which batch files contain too."""
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": m.role, "content": _encodable(m.content)} for m in request.messages],
            config.max_tokens_field: request.max_tokens + config.reasoning_tokens,
            "temperature": request.temperature,
        }
        if config.seed is not None:
            body["seed"] = config.seed + request.draw
        if config.reasoning_effort is not None:
            body["reasoning_effort"] = config.reasoning_effort
        if request.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if request.json_schema is not None:
            schema = {"name": "reply", "strict": True, "schema": dict(request.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {key: value for key, value in body.items() if key not in config.omit} | config.extra_body

    async def drain(self, seconds: float) -> None:
        """Send nothing more, and wait for the replies to requests that were sent: they are paid for."""
        self._draining.set()
        until = time.monotonic() + min(seconds, self._config.timeout)
        while self._on_the_wire and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self._client.close()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not longer than the backend sends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    async def _turn(self, request: Request) -> None:
        """Wait for the pause that the server asked for, then for the rate limits."""
        while (wait := self._resume_at - time.monotonic()) > 0 and not self._draining.is_set():
            await self._pause(wait)
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            likely = request.size / 4 + request.max_tokens + self._config.reasoning_tokens
            await self._tokens.acquire(min(likely, self._tokens.max_rate))

    async def _attempt(self, body: Mapping[str, Any]) -> Reply:
        if self._draining.is_set():
            raise _AttemptError(_NOT_SENT, used=Spent())
        self._on_the_wire += 1
        try:
            async with asyncio.timeout(self._config.timeout):
                response: httpx2.Response = await self._client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=body
                )
            text = self._scrubbed(response.content.decode("utf-8", "replace"))  # whatever the headers say
        except (_RefusedError, openai.APIError, httpx2.HTTPError, TimeoutError, ValueError, OSError) as error:
            raise self._explained(error, body) from None  # the SDK's exceptions hold the request, so the key
        finally:
            self._on_the_wire -= 1
        try:
            return parse(text)
        except ServerError as error:
            raise self._fault(error.fault.status, error.fault, body, *usage_in(text)) from None
        except ValueError as error:
            # a reply with token counts was paid for; the next one would be as unreadable
            raise _AttemptError(str(error), transient=not any(usage_in(text)), body=text) from None

    def _explained(self, error: Exception, body: Mapping[str, Any]) -> "_AttemptError":
        """Return the problem, what it costs, and whether a retry may help."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _RefusedError):
            cause = cause.__cause__
        if cause is not None:
            return _AttemptError(str(cause))
        if isinstance(error, openai.APIStatusError):
            return self._status(error, body)
        if isinstance(error, TimeoutError | openai.APITimeoutError | httpx2.TimeoutException):
            return _AttemptError(f"no reply within {self._config.timeout:g} s", transient=True)
        if isinstance(error, ValueError):
            return _AttemptError(self._scrubbed(str(error))[:SHOWN], transient=True)
        reason = error.__cause__ or error
        said = self._scrubbed(f"{type(reason).__name__}: {reason}")[:SHOWN]
        return _AttemptError(f"the connection failed: {said}", transient=True)

    def _status(self, error: openai.APIStatusError, body: Mapping[str, Any]) -> "_AttemptError":
        status, response = error.status_code, error.response
        if 300 <= status < 400:
            to = urlsplit(response.headers.get("location", "")).netloc or "another path"
            stop = UserError(
                f"{self._config.base_url} redirects to {self._scrubbed(to)[:100]}; redirects are not "
                "followed, since the request and its key would go there",
                place="configuration, backend.base_url",
                remedy="set base_url to the final address, if you trust it",
            )
            return _AttemptError(str(stop), used=Spent(1), stops=stop)
        found = self._fault(status, fault_of(self._scrubbed(response.text)), body)
        return replace(found, retry_after=_retry_after(response))

    def _fault(
        self, status: int | None, fault: Fault, body: Mapping[str, Any], prompt: int = 0, completion: int = 0
    ) -> "_AttemptError":
        """Return an error of the server, which it does not charge for unless it counts tokens."""
        code = "with an error" if status is None else status
        return _AttemptError(
            f"the server answered {code}: {quoted(fault.message)}",
            used=Spent(1, prompt, completion),
            transient=transient(status),
            own=status in _OWN,
            stops=stops(status, fault, self._config, body),
        )

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[key]") if self._key else text


def check_address(base_url: str, *, allow_plain_http: bool = False) -> None:
    """Refuse an address to which a key must not be sent.

    Raises:
        UserError: the address is not https, or holds a user, a password, a query or a fragment. Plain http is
            accepted for this machine, or if `allow_plain_http` is set.
    """
    place = "configuration, backend.base_url"
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise UserError(f"not an address: {error}", place=place) from error
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "the address must not hold a user, a password, a query or a fragment",
            place=place,
            remedy="put the key into an environment variable and name it with backend.api_key_env",
        )
    if parts.scheme not in ("https", "http") or not host:
        raise UserError(f"expected https://host/v1, got {base_url!r}", place=place)
    if parts.scheme == "http" and not allow_plain_http and not _loopback(host):
        raise UserError(
            f"plain http to {host} would show key and data to the network",
            place=place,
            remedy="use https, or pass --allow-plain-http on a network that you trust",
        )


def _charged(reply: Reply, most: Spent) -> Reply:
    """Return the reply with the most that it may have used, where the server does not count tokens."""
    counted = reply.prompt_tokens and (reply.completion_tokens or not reply.text) and not reply.unanswered
    return replace(
        reply,
        prompt_tokens=reply.prompt_tokens or most.prompt_tokens,
        completion_tokens=reply.completion_tokens if counted else most.completion_tokens,
    )


def _encodable(text: str) -> str:
    """Return the text with "?" for each lone surrogate, which UTF-8 cannot express."""
    return text.encode("utf-8", "replace").decode()


@dataclass(eq=False)
class _AttemptError(Exception):
    """One attempt failed.

    Attributes:
        used: what the server charges; None if unknown.
        transient: a retry may help.
        own: the request itself is at fault.
        body: a reply that cannot be read.
        stops: the error that every request would have.
    """

    problem: str
    used: Spent | None = None
    transient: bool = False
    retry_after: float | None = None
    own: bool = False
    body: str | None = None
    stops: UserError | None = None


class _RefusedError(Exception):
    """A reply whose encoding or size is not accepted."""


class _GuardedTransport(httpx2.AsyncHTTPTransport):
    """Sends only the protocol's headers, and reads a limited number of bytes of each reply."""

    def __init__(self, most: int, connections: int) -> None:
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        super().__init__(limits=limits)
        self._most = most

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        for name in set(request.headers) - _HEADERS:  # such as those of OPENAI_CUSTOM_HEADERS
            del request.headers[name]
        request.headers["accept-encoding"] = "identity"  # against decompression bombs
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise _RefusedError("the server compresses its reply despite accept-encoding: identity")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Limited(response.stream, self._most)
        return response


class _Limited(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, most: int) -> None:
        self._stream, self._left, self._most = stream, most, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise _RefusedError(f"the reply is longer than max_response_bytes, {self._most}")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _limiter(per_minute: float | None, *, seconds_at_once: float) -> AsyncLimiter | None:
    """Return a leaky bucket of `per_minute` that lets `seconds_at_once` seconds' worth through at once."""
    if per_minute is None:
        return None
    most = max(1.0, per_minute * seconds_at_once / 60)
    return AsyncLimiter(most, most * 60 / per_minute)


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that the server asks to wait, given as a number or a date; None if absent."""
    for header, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[header]) * unit
        except KeyError:
            continue
        except ValueError:
            date = email.utils.parsedate_tz(response.headers[header])
            seconds = email.utils.mktime_tz(date) - time.time() if date else -1.0
        if 0 <= seconds < float("inf"):
            return seconds
    return None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"

"""A loopback server that misbehaves on demand: raw sockets, one behavior per address."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Send = Callable[[bytes], Awaitable[None]]
Behavior = Callable[["Asked", Send], Awaitable[None]]


@dataclass
class Asked:
    """One request as it arrived; `number` counts the requests of its behavior from 1."""

    headers: str
    body: dict[str, Any]
    number: int


@dataclass
class Server:
    """The port, and every request that arrived."""

    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    canned: dict[str, list[bytes]] = field(default_factory=dict)
    """Replies by address, in turn; the last one repeats."""
    at_once: int = 0
    most_at_once: int = 0

    def url(self, behavior: str) -> str:
        return f"http://127.0.0.1:{self.port}/{behavior}"


def completion(text: str | None = "0.25", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage} | more


def response(body: Any, status: str = "200 OK", *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status}",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def well(asked: Asked, send: Send) -> None:
    await send(response(completion()))


async def uncounted(asked: Asked, send: Send) -> None:
    """Replies without token counts."""
    await send(response(completion(usage=None)))


async def storm(asked: Asked, send: Send) -> None:
    """Refuses the first three requests, and says when to retry."""
    if asked.number <= 3:
        await send(
            response({"error": {"message": "slow down"}}, "429 Too Many Requests", "retry-after-ms: 150")
        )
    else:
        await send(response(completion()))


async def patient(asked: Asked, send: Send) -> None:
    await send(response({"error": {}}, "429 Too Many Requests", "retry-after: 7200"))


async def broken(asked: Asked, send: Send) -> None:
    await send(response({"error": {"message": "oops"}}, "500 Internal Server Error"))


async def drip(asked: Asked, send: Send) -> None:
    """A byte every 50 ms: no read ever times out, and the reply never ends."""
    await send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    for _ in range(400):
        await send(b" ")
        await asyncio.sleep(0.05)


async def endless(asked: Asked, send: Send) -> None:
    """Ten gigabytes, unless the client stops it."""
    await send(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
    for _ in range(10_000):
        await send(b" " * 1_000_000)


async def bomb(asked: Asked, send: Send) -> None:
    import gzip

    await send(response(gzip.compress(b" " * 50_000_000), "200 OK", "content-encoding: gzip"))


async def endless_error(asked: Asked, send: Send) -> None:
    await send(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 10000000000\r\n\r\n")
    for _ in range(10_000):
        await send(b" " * 1_000_000)


async def away(asked: Asked, send: Send) -> None:
    await send(response({}, "307 Temporary Redirect", "location: http://localhost:9/v1/chat/completions"))


async def prose(asked: Asked, send: Send) -> None:
    await send(response(b"<html>a proxy's page</html>"))


async def schema(asked: Asked, send: Send) -> None:
    await send(response({"choices": [{"message": {"content": ["not", "text"]}}]}))


async def reset(asked: Asked, send: Send) -> None:
    """Closes the connection in the middle of the reply."""
    await send(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")


async def flaky(asked: Asked, send: Send) -> None:
    """Closes the connection after the first request, then answers."""
    if asked.number % 2:
        return
    await send(response(completion()))


async def refuses_key(asked: Asked, send: Send) -> None:
    """Repeats the request's headers, as some servers do."""
    await send(response({"error": {"message": f"Incorrect API key: {asked.headers}"}}, "401 Unauthorized"))


async def echo(asked: Asked, send: Send) -> None:
    """A reply with the request's headers, a formula and markup."""
    text = f"=HYPERLINK(1)<script>alert(1)</script>{asked.headers}"
    await send(response(completion(text)))


async def echo_error(asked: Asked, send: Send) -> None:
    await send(response({"error": {"message": asked.headers}}, "400 Bad Request"))


async def slow(asked: Asked, send: Send) -> None:
    await asyncio.sleep(0.05)
    await send(response(completion()))


async def hang(asked: Asked, send: Send) -> None:
    """Answers ten requests, then no more."""
    if asked.number > 10:
        await asyncio.sleep(30)
    await send(response(completion()))


_EFFORT = {"minimal": 20, "low": 200, "medium": 900, "high": 3000}  # reasoning tokens


def _refusal(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return OpenAI's error for a field that its reasoning models refuse."""
    error = {"type": "invalid_request_error", "param": None, "code": None}
    if "max_tokens" in body:
        said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        said += "'max_completion_tokens' instead."
        return error | {"message": said, "param": "max_tokens", "code": "unsupported_parameter"}
    if body.get("temperature", 1) != 1:
        said = (
            f"Unsupported value: 'temperature' does not support {body['temperature']} with this model. Only "
        )
        said += "the default (1) value is supported."
        return error | {"message": said, "param": "temperature", "code": "unsupported_value"}
    if body.get("logprobs") or "top_logprobs" in body:
        return error | {"message": "You are not allowed to request logprobs from this model"}
    return None


async def reasoner(asked: Asked, send: Send) -> None:
    """Like OpenAI's reasoning models: refuses fields, and spends tokens on reasoning before the answer."""
    if refusal := _refusal(asked.body):
        status = "403 Forbidden" if refusal["param"] is None else "400 Bad Request"
        await send(response({"error": refusal}, status))
        return
    limit = asked.body.get("max_completion_tokens", 10**6)
    reasoning = min(limit, _EFFORT[asked.body.get("reasoning_effort", "medium")])
    answered = limit > reasoning + 10
    text = '{"score": 3}' if "response_format" in asked.body else "0.25"
    usage = {"prompt_tokens": 10, "completion_tokens": reasoning + 10 if answered else limit}
    usage["total_tokens"] = sum(usage.values())
    message = {"role": "assistant", "content": text if answered else "", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if answered else "length"}
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    await send(response({"object": "chat.completion", "choices": [choice], "usage": usage | details}))


async def half(asked: Asked, send: Send) -> None:
    """Fails every second question for good."""
    number = int(asked.body["messages"][-1]["content"].split("What is ")[1].split()[0])
    if number % 2:
        await send(response({"error": {"message": f"request req_{number}x is bad"}}, "400 Bad Request"))
    else:
        await send(response(completion()))


async def stops(asked: Asked, send: Send) -> None:
    """Refuses the key of the first sample, while the second one takes longer."""
    if "What is 0 " in asked.body["messages"][-1]["content"]:
        await asyncio.sleep(0.5)
        await send(response({"error": {"message": "revoked"}}, "401 Unauthorized"))
    else:
        await asyncio.sleep(1.5)
        await send(response(completion()))


async def rewords(asked: Asked, send: Send) -> None:
    """A paraphrase of the prompt's last line, another one for each seed."""
    question = asked.body["messages"][-1]["content"].splitlines()[-1]
    await send(response(completion(f"Version {asked.body['seed']}: {question}")))


BEHAVIORS: dict[str, Behavior] = {
    f.__name__: f
    for f in (
        well, uncounted, storm, patient, broken, drip, endless, bomb, endless_error, away, prose, schema,
        reset, flaky, refuses_key, echo, echo_error, slow, hang, reasoner, half, rewords, stops,
    )
}  # fmt: skip


@contextmanager
def serving() -> Iterator[Server]:
    """Run the server in its own thread."""
    server, started, stop = Server(), threading.Event(), asyncio.Event()
    counts: dict[str, int] = {}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, _, headers = head.decode("latin-1").partition("\r\n")
                length = next(
                    (int(h.split(":")[1]) for h in headers.lower().split("\r\n") if "content-length:" in h), 0
                )
                body = await reader.readexactly(length)
                name = line.split("/")[1]
                counts[name] = counts.get(name, 0) + 1
                asked = Asked(head.decode("latin-1"), json.loads(body or b"{}"), counts[name])
                server.asked.append(asked)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    if name in server.canned:
                        replies = server.canned[name]
                        await send(replies[min(counts[name], len(replies)) - 1])
                    else:
                        await BEHAVIORS[name](asked, send)
                finally:
                    server.at_once -= 1
                if name in ("reset", "flaky") and (name == "reset" or asked.number % 2):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        listening = await asyncio.start_server(connection, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listening.close()

    loop = asyncio.new_event_loop()

    def work() -> None:
        loop.run_until_complete(main())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)

"""The client against a misbehaving server: time, bytes and requests are bounded, and the key stays hidden."""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from tests.elicit.servers import Server, serving
from ual.config.elicit import BudgetConfig, EndpointConfig, PricesConfig
from ual.errors import UserError
from ual.records import Message
from ual.uncertainty.backends.completion import parse
from ual.uncertainty.backends.endpoint import Endpoint, check_address
from ual.uncertainty.budget import Budget, BudgetReachedError, Spent
from ual.uncertainty.protocol import Reply, Request, RequestError

KEY = "sk-planted-0123456789"
QUESTION = Request((Message("user", "How sure are you?"),), max_tokens=8)


_LONGEST = 60.0  # seconds for all requests of a test


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def ask(url: str, *requests: Request, budget: Budget | None = None, **options: Any) -> list[Any]:
    """Send requests concurrently; return replies and errors."""
    options = {"timeout": 30.0, "max_retries": 2} | options

    async def main() -> list[Any]:
        config = EndpointConfig(model="m", base_url=url, **options)
        endpoint = Endpoint(config, SecretStr(KEY), budget or Budget())
        try:
            async with asyncio.timeout(_LONGEST):
                return await asyncio.gather(*map(endpoint, requests or [QUESTION]), return_exceptions=True)
        finally:
            await endpoint.close()

    return asyncio.run(main())


def test_a_reply_and_what_was_sent(server: Server) -> None:
    request = replace(QUESTION, top_logprobs=5, draw=3, temperature=0.5, json_schema={"type": "object"})
    (reply,) = ask(server.url("well"), request, extra_body={"guided": 1}, omit=["temperature"])
    assert reply == Reply("0.25", prompt_tokens=10, completion_tokens=3)
    body = server.asked[-1].body
    assert body["messages"] == [{"role": "user", "content": "How sure are you?"}]
    assert (body["seed"], body["max_tokens"], body["top_logprobs"], body["guided"]) == (3, 8, 5, 1)
    assert body["response_format"]["json_schema"]["strict"] is True
    assert "temperature" not in body


def test_a_storm_of_429_passes_after_the_wait_it_asks_for(server: Server) -> None:
    started = time.monotonic()
    replies = ask(server.url("storm"), *[replace(QUESTION, draw=i) for i in range(6)], max_retries=6)
    assert [reply.text for reply in replies] == ["0.25"] * 6
    assert time.monotonic() - started > 0.15


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", "if wait is not None and wait > _LONGEST_WAIT:", "if False:"
)
def test_a_wait_too_long_is_a_failure_at_once(server: Server) -> None:
    before, started = len(server.asked), time.monotonic()
    (error,) = ask(server.url("patient"))
    assert "asks to wait 7200 s" in str(error)
    assert len(server.asked) - before == 1
    assert time.monotonic() - started < 30


def test_500s_are_retried_and_counted(server: Server) -> None:
    budget, before = Budget(), len(server.asked)
    (error,) = ask(server.url("broken"), budget=budget, max_retries=2)
    assert isinstance(error, RequestError)
    assert "500" in str(error)
    assert "oops" in str(error)
    assert len(server.asked) - before == budget.spent.requests == 3
    assert budget.spent.tokens == 0  # an error status is not charged


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    "            self._left -= len(chunk)",
    "            self._left -= 0",
    only="endless-longer than max_response_bytes-1",
)
@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    "async with asyncio.timeout(self._config.timeout):",
    "if True:",
    only="drip-no reply within 0.4 s-2",
)
@pytest.mark.parametrize(
    ("behavior", "says", "attempts"),
    [
        ("drip", "no reply within 0.4 s", 2),
        ("endless", "longer than max_response_bytes", 1),
        ("endless_error", "longer than max_response_bytes", 1),
        ("bomb", "compresses", 1),
        ("prose", "not a chat completion", 2),
        ("schema", "choices.0.message.content", 2),
        ("reset", "the connection failed", 2),
        ("echo_error", "the server answered 400", 1),
    ],
)
def test_what_cannot_be_read_fails_in_bounded_time(
    server: Server, behavior: str, says: str, attempts: int
) -> None:
    budget, started = Budget(), time.monotonic()
    patience = 0.4 if behavior == "drip" else 20.0
    (error,) = ask(server.url(behavior), budget=budget, timeout=patience, max_retries=1)
    assert isinstance(error, RequestError), error
    assert says in str(error)
    assert budget.spent.requests == attempts
    assert time.monotonic() - started < 15  # the drip would take 20 s, the endless reply forever
    assert KEY not in str(error)


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", "used = most  # what was sent", "used = Spent(1)  # what was sent"
)
def test_a_broken_connection_is_charged_in_full_since_it_may_have_been_answered(server: Server) -> None:
    budget = Budget()
    ask(server.url("reset"), budget=budget, max_retries=0)
    assert budget.spent == Spent(1, QUESTION.size, QUESTION.max_tokens)


def test_a_dropped_connection_is_retried(server: Server) -> None:
    (reply,) = ask(server.url("flaky"))
    assert reply.text == "0.25"


@pytest.mark.kills("ual/uncertainty/backends/endpoint.py", "follow_redirects=False", "follow_redirects=True")
def test_redirects_are_not_followed(server: Server) -> None:
    before = len(server.asked)
    (error,) = ask(server.url("away"))
    assert isinstance(error, UserError)
    assert "localhost:9" in str(error)
    assert len(server.asked) - before == 1


def test_a_closed_port() -> None:
    (error,) = ask("http://127.0.0.1:9", max_retries=0)
    assert "the connection failed" in str(error)


def test_concurrency_is_limited(server: Server) -> None:
    server.most_at_once = 0
    ask(server.url("slow"), *[replace(QUESTION, draw=i) for i in range(12)], concurrency=3)
    assert server.most_at_once == 3


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", "        async with self._slots:", "        if True:"
)
def test_waiting_for_a_slot_is_not_waiting_for_the_reply(server: Server) -> None:
    requests = [replace(QUESTION, draw=i) for i in range(50)]  # 50 ms each, one after another
    replies = ask(server.url("slow"), *requests, concurrency=1, timeout=2, max_retries=0)
    assert all(isinstance(reply, Reply) for reply in replies)


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", "            await self._requests.acquire()", "            pass"
)
def test_requests_per_minute(server: Server) -> None:
    started = time.monotonic()
    ask(server.url("well"), *[replace(QUESTION, draw=i) for i in range(14)], requests_per_minute=300)
    assert 1.7 < time.monotonic() - started < 10  # 5 pass at once, then one every 200 ms


def test_tokens_per_minute(server: Server) -> None:
    large = replace(QUESTION, max_tokens=200)  # 208 tokens with the prompt; 10 seconds' worth pass at once
    started = time.monotonic()
    ask(server.url("well"), *[replace(large, draw=i) for i in range(6)], tokens_per_minute=6000)
    assert 0.2 < time.monotonic() - started < 5


@pytest.mark.kills(
    "ual/uncertainty/budget.py",
    "self.total + self._reserved + most",
    "self.total + most",
)
@pytest.mark.kills(
    "ual/uncertainty/budget.py", "                if not self._in_flight:", "                if True:"
)
def test_the_budget_is_never_exceeded(server: Server) -> None:
    requests = [replace(QUESTION, draw=i) for i in range(10)]
    budget, before = Budget(BudgetConfig(requests=4)), len(server.asked)
    results = ask(server.url("well"), *requests, budget=budget)
    assert len(server.asked) - before == budget.spent.requests == 4
    assert sum(isinstance(r, BudgetReachedError) for r in results) == 6
    # a request may use 33 + 8 tokens and uses 13: the cap admits as many as fit one after another
    budget = Budget(BudgetConfig(tokens=QUESTION.size + 8 + 2 * 13))
    assert sum(isinstance(r, Reply) for r in ask(server.url("well"), *requests, budget=budget)) == 3
    assert budget.spent.tokens == 39
    budget = Budget(BudgetConfig(money=1e-6), PricesConfig(prompt=1.0))
    assert all(isinstance(r, BudgetReachedError) for r in ask(server.url("well"), *requests, budget=budget))


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    "reply.completion_tokens if counted else",
    "reply.completion_tokens if True else",
)
def test_a_server_that_counts_no_tokens_is_charged_the_maximum(server: Server) -> None:
    budget = Budget()
    (reply,) = ask(server.url("uncounted"), budget=budget)
    assert (reply.prompt_tokens, reply.completion_tokens) == (QUESTION.size, QUESTION.max_tokens)
    assert budget.spent == Spent(1, QUESTION.size, QUESTION.max_tokens)


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", "for name in set(request.headers) - _HEADERS:", "for name in ():"
)
@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    'return text.replace(self._key.get_secret_value(), "[key]") if self._key else text',
    "return text",
)
def test_the_key_is_sent_and_never_shown(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-other: sk-other-secret")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    caplog.set_level(logging.DEBUG)
    (refused,) = ask(server.url("refuses_key"))
    (failed,) = ask(server.url("echo_error"))
    (reply,) = ask(server.url("echo"))
    assert f"Bearer {KEY}" in server.asked[-1].headers
    assert "secret" not in server.asked[-1].headers
    assert isinstance(refused, UserError)
    assert "[key]" in str(refused)
    for where in (str(refused), repr(refused), str(failed), repr(reply), caplog.text):
        assert KEY not in where
    seen: list[BaseException] = [refused, failed]
    for error in seen:
        assert error.__cause__ is None or KEY not in repr(vars(error.__cause__))


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    "not allow_plain_http and not _loopback(host)",
    "not allow_plain_http and 'localhost' not in host and '127' not in host",
)
@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://example.com/v1", "plain http"),
        ("http://127.0.0.1.example.com/v1", "plain http"),
        ("http://localhost@example.com/v1", "must not hold a user"),
        ("https://me:sk-secret@example.com/v1", "must not hold a user"),
        ("https://example.com/v1?key=sk-secret", "must not hold"),
        ("ftp://example.com", "expected https"),
        ("https://", "expected https"),
        ("http://[::1", "not an address"),
    ],
)
def test_a_key_is_not_sent_to_these_addresses(url: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as error:
        check_address(url)
    assert "sk-secret" not in str(error.value)


def test_a_key_is_sent_to_these_addresses() -> None:
    for url in (
        "https://example.com/v1",
        "http://localhost:8000/v1",
        "http://127.8.9.1/v1",
        "http://[::1]:80",
    ):
        check_address(url)
    check_address("http://gpu-box:8000/v1", allow_plain_http=True)


def test_parsing_a_refusal_and_log_probabilities() -> None:
    refusal = '{"choices": [{"message": {"content": null, "refusal": "I will not"}}]}'
    assert parse(refusal).text is None
    content = (
        '{"choices": [{"message": {"content": "7"}, "finish_reason": "length", "logprobs": {"content": '
        '[{"token": "7", "logprob": -0.5, "bytes": [55], '
        '"top_logprobs": [{"token": "8", "logprob": -1.0}]}]}}]}'
    )
    reply = parse(content)
    assert reply.truncated
    assert reply.tokens[0].alternatives == (("8", -1.0),)
    for bad in (
        '{"choices": []}',
        '{"choices": [{"message": {"content": 7}}]}',
        "[]",
        "",
        '{"choices": [{}]}',
    ):
        with pytest.raises(ValueError, match="not a chat completion"):
            parse(bad)

"""No paid reply is lost: every server's form is read, kept and charged, and errors name the next step."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.elicit.servers import Server, completion, response, serving
from ual.config.elicit import BudgetConfig, EndpointConfig
from ual.errors import UserError
from ual.pipelines.elicit import secret
from ual.records import Message
from ual.uncertainty import thinking
from ual.uncertainty.backends import completion as reader
from ual.uncertainty.backends.batching import BatchingBackend
from ual.uncertainty.backends.completion import parse
from ual.uncertainty.backends.endpoint import Endpoint
from ual.uncertainty.budget import Budget, BudgetReachedError, Spent
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Reply, Request, RequestError
from ual.uncertainty.session import Session

ENDPOINT, FAULTS = "ual/uncertainty/backends/endpoint.py", "ual/uncertainty/backends/faults.py"
READER, SESSION = "ual/uncertainty/backends/completion.py", "ual/uncertainty/session.py"
QUESTION = Request((Message("user", "How sure are you?"),), max_tokens=8, top_logprobs=2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def ask(
    server: Server, *canned: bytes, request: Request = QUESTION, budget: Budget | None = None, **options: Any
) -> tuple[Any, int]:
    """Let the server answer with these bytes, in turn; return the reply or the error, and the requests."""
    name, before = f"canned{len(server.canned)}", len(server.asked)
    server.canned[name] = list(canned)

    async def main() -> Any:
        config = EndpointConfig(
            model="m", base_url=server.url(name), **{"timeout": 20.0, "max_retries": 1} | options
        )
        endpoint = Endpoint(config, SecretStr("sk-planted"), budget or Budget())
        try:
            return await endpoint(request)
        except (RequestError, UserError, BudgetReachedError) as error:
            return error
        finally:
            await endpoint.close()

    return asyncio.run(main()), len(server.asked) - before


def chat(message: dict[str, Any], logprobs: Any = None, usage: Any = None, **choice: Any) -> dict[str, Any]:
    choices = [{"message": message, "finish_reason": "stop", "logprobs": logprobs} | choice]
    return {"choices": choices, "usage": usage}


def likely(*pairs: tuple[str, Any], token: str = "A", logprob: Any = -0.1) -> dict[str, Any]:
    alternatives = [{"token": text, "logprob": value, "bytes": None} for text, value in pairs]
    return {"content": [{"token": token, "logprob": logprob, "top_logprobs": alternatives}]}


GOOD = {"content": "A"}
LEGACY = {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -0.1}]}
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "A"}]


@pytest.mark.kills(READER, "and number <= _ROUNDING else None", "and number <= 0 else None", only="positive")
@pytest.mark.kills(READER, "isinstance(top, list) else []", "True else []", only="null alternatives")
@pytest.mark.kills(
    READER, "    parts = [value] if isinstance(value, dict) else value", "    parts = 0", only="parts"
)
@pytest.mark.parametrize(
    ("body", "alternatives"),
    [
        (chat(GOOD, likely(("A", -0.1), ("B", -2.0))), (("A", -0.1), ("B", -2.0))),
        (chat(GOOD, {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": None}]}), ()),
        (chat(GOOD, likely(("A", -0.1), ("B", None), logprob=None)), (("A", -0.1),)),
        (chat(GOOD, likely(("A", -0.1), ("B", float("-inf")))), (("A", -0.1),)),
        (chat(GOOD, likely(("A", float("nan")), ("B", -2.0))), (("B", -2.0),)),
        (chat(GOOD, likely(("A", 1e-3), ("B", -2), logprob=1e-3)), (("A", 0.0), ("B", -2.0))),
        (chat(GOOD, likely(("A", 3.0), ("B", -2.0))), (("B", -2.0),)),
        (chat(GOOD, {"content": None}), None),
        (chat(GOOD, {"content": [None, 7]}), ()),
        (chat(GOOD, LEGACY), (("A", -0.1),)),
        (chat({"content": PARTS}), None),
        (chat({"content": "A", "tool_calls": None, "refusal": None, "annotations": []}, unknown=1), None),
        (chat(GOOD, finish_reason="eos"), None),
        (chat(GOOD, finish_reason=None), None),
        (chat(GOOD) | {"object": "chat.completion", "error": None, "created": 1.5, "x": {}}, None),
        (chat(GOOD) | {"choices": [chat(GOOD)["choices"][0], None]}, None),
        ({"choices": [{"text": "A", "finish_reason": "stop"}], "usage": None}, None),
    ],
    ids=[
        "good", "null alternatives", "null", "-inf", "nan", "positive", "nonsense", "null content",
        "no tokens", "legacy", "parts", "extra", "finish", "no finish", "error null", "second choice",
        "without chat",
    ],
)  # fmt: skip
def test_a_good_text_is_never_discarded(
    server: Server, body: dict[str, Any], alternatives: tuple[Any, ...] | None
) -> None:
    reply, requests = ask(server, response(body))
    assert isinstance(reply, Reply), reply
    assert (reply.text, requests) == ("A", 1)
    assert (reply.tokens[0].alternatives if reply.tokens else None) == alternatives
    assert Reply.parse(reply.dump()) == reply
    assert not {"NaN", "Infinity"} & set(reply.dump().replace(",", " ").split())


@pytest.mark.kills(READER, 'if isinstance(value, dict) and not {"type", "text"}', "if False and {0}")
@pytest.mark.parametrize(
    ("content", "text"),
    [({"score": 3}, '{"score": 3}'), ({"type": "text", "text": "A"}, "A")],
)
def test_structured_output_that_a_server_has_read_is_text_again(
    server: Server, content: Any, text: str
) -> None:
    assert ask(server, response(chat({"content": content})))[0].text == text


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py", 'response.content.decode("utf-8", "replace")', "response.text"
)
def test_json_is_utf8_whatever_the_headers_say(server: Server) -> None:
    content = json.dumps(chat({"content": "Café 😀"}), ensure_ascii=False).encode()
    headers = f"HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=latin-1\r\ncontent-length: {len(content)}"
    assert ask(server, f"{headers}\r\n\r\n".encode() + content)[0].text == "Café 😀"


def test_a_lone_surrogate_is_kept_and_can_be_asked_about(server: Server) -> None:
    reply, requests = ask(server, response(b'{"choices": [{"message": {"content": "0.5 \\ud83d"}}]}'))
    assert (reply.text, requests) == ("0.5 \ud83d", 1)
    assert Reply.parse(reply.dump()) == reply
    again = Request((Message("user", reply.text),), max_tokens=8)
    reply, requests = ask(server, response(completion()), request=again)
    assert (reply.text, requests) == ("0.25", 1)
    assert server.asked[-1].body["messages"][0]["content"] == "0.5 ?"


@pytest.mark.kills(READER, "max(completion, reasoned)", "completion", only="usage4-10-40")
@pytest.mark.kills(READER, "0 <= number <= _MOST", "0 <= number", only="usage5-0-0")
@pytest.mark.parametrize(
    ("usage", "prompt", "completion"),
    [
        (None, 0, 0),
        ({"prompt_tokens": 10.0, "completion_tokens": 3.0}, 10, 3),
        ({"prompt_tokens": None, "completion_tokens": "3", "total_tokens": 13}, 0, 0),
        ({"prompt_tokens": 10, "completion_tokens": -3}, 10, 0),
        ({"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 50}, 10, 40),  # reasoning in the total
        ({"prompt_tokens": 10**30, "completion_tokens": float("nan")}, 0, 0),
        ([], 0, 0),
    ],
)
def test_token_counts_of_any_form(server: Server, usage: Any, prompt: int, completion: int) -> None:
    body = chat({"content": "0.25"}, usage=usage)
    found = parse(json.dumps(body))
    assert (found.prompt_tokens, found.completion_tokens) == (prompt, completion)
    budget = Budget()
    ask(server, response(body), budget=budget, reasoning_tokens=100)
    assert budget.spent == Spent(1, prompt or QUESTION.size, completion or 108)  # the most, if unknown


def test_the_budget_reserves_room_for_reasoning(server: Server) -> None:
    budget = Budget(BudgetConfig(tokens=QUESTION.size + 107))
    error, requests = ask(server, response(completion()), budget=budget, reasoning_tokens=100)
    assert (type(error), requests) == (BudgetReachedError, 0)
    budget = Budget(BudgetConfig(tokens=QUESTION.size + 108))
    reply, _ = ask(server, response(completion()), budget=budget, reasoning_tokens=100)
    assert reply.text == "0.25"
    assert server.asked[-1].body["max_tokens"] == 108


@pytest.mark.kills(
    "ual/uncertainty/backends/batching.py",
    "max_tokens=request.max_tokens + self._reasoning)",
    "draw=request.draw)",
)
def test_a_model_on_this_machine_has_room_for_reasoning_too() -> None:
    asked: list[Request] = []

    def answer(requests: Sequence[Request]) -> list[Reply | RequestError]:
        asked.extend(requests)
        return [Reply("0.25", prompt_tokens=9, completion_tokens=90) for _ in requests]

    async def main() -> None:
        backend = BatchingBackend({}, frozenset({"generate"}), answer, 4, budget, reasoning_tokens=100)
        await backend(QUESTION)
        await backend.close()

    budget = Budget(BudgetConfig(tokens=QUESTION.size + 107))
    with pytest.raises(BudgetReachedError):
        asyncio.run(main())
    budget = Budget()
    asyncio.run(main())
    assert [request.max_tokens for request in asked] == [108]


OPENAI = {
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "type": "insufficient_quota", "param": None, "code": "insufficient_quota",
}  # fmt: skip
DAILY = {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}
MINUTE = {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}
GEMINI = {"code": 429, "message": "You exceeded your current quota.", "status": "RESOURCE_EXHAUSTED"}
CLAUDE = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."


@pytest.mark.kills(FAULTS, "fault.codes & _SPENT_CODES or", "", only="429-body0")
@pytest.mark.kills(FAULTS, "status == 402 or", "", only="402-body2")
@pytest.mark.kills(FAULTS, "if isinstance(body, list) and len(body) == 1:", "if False:", only="429-body5")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("429", {"error": OPENAI}),
        ("429", {"error": {"message": "no more", "type": "insufficient_quota"}}),
        ("402", {"error": {"message": "Payment needed", "code": 402}}),  # OpenRouter
        ("402", {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}),  # DeepSeek
        ("400", {"error": {"message": CLAUDE, "type": "invalid_request_error"}}),
        ("429", [{"error": GEMINI | {"details": [DAILY]}}]),
        (
            "429",
            {"error": {"message": "Your account is suspended", "type": "exceeded_current_quota_error"}},
        ),  # Kimi
        ("400", {"error": {"message": "Access denied", "code": "Arrearage"}}),  # Qwen
        ("200", {"error": OPENAI}),
        ("200", {"error": {"message": "Payment needed", "code": 402}, "user_id": "u"}),
    ],
)
def test_an_exhausted_quota_stops_the_run_at_once(server: Server, status: str, body: Any) -> None:
    budget = Budget()
    error, requests = ask(server, response(body, f"{status} X"), budget=budget)
    assert isinstance(error, UserError)
    assert requests == 1
    assert budget.spent == Spent(1)
    assert "quota" in error.remedy
    assert "resumes" in error.remedy
    words = body[0] if isinstance(body, list) else body
    assert words["error"]["message"][:20] in error.problem


def test_a_limit_per_minute_is_no_exhausted_quota(server: Server) -> None:
    busy = response([{"error": GEMINI | {"details": [MINUTE]}}], "429 X", "retry-after-ms: 10")
    reply, requests = ask(server, busy, response(completion()))
    assert (reply.text, requests) == ("0.25", 2)


@pytest.mark.kills(
    READER, 'if fault := fault_in({"error": choice.get("error")}):', "if fault := None:", only="choice"
)
@pytest.mark.kills(FAULTS, "    return status is None or", "    return", only="no code")
@pytest.mark.parametrize(
    ("body", "says", "requests"),
    [
        ({"error": {"message": "provider overloaded", "code": 503}}, "503: provider overloaded", 2),
        ({"error": {"message": "too fast", "code": "429"}}, "429: too fast", 2),
        ({"object": "error", "message": "too long by 9", "code": 400}, "400: too long by 9", 1),
        ({"error": "Unexpected endpoint or method"}, "an error: Unexpected endpoint or method", 2),
        ({"error": {"message": "broke off", "code": 502}, **chat({"content": ""})}, "502: broke off", 2),
        (chat({"content": "0."}, error={"message": "broke off", "code": 502}), "502: broke off", 2),
        (chat({"content": "0.2"}, finish_reason="abort"), "broke off with finish_reason abort", 2),
        ({"detail": [{"loc": ["body", "messages", 0], "msg": "bad", "type": "x"}]}, "messages.0: bad", 2),
    ],
    ids=["code", "text code", "vllm", "no code", "empty", "choice", "abort", "detail"],
)
def test_an_error_with_status_200_shows_the_servers_words(
    server: Server, body: Any, says: str, requests: int
) -> None:
    budget = Budget()
    error, sent = ask(server, response(body), budget=budget)
    assert isinstance(error, RequestError)
    assert says in str(error)
    assert (sent, budget.spent) == (requests, Spent(requests))


@pytest.mark.kills(READER, "it begins: {quoted(text) or '(nothing)'}", "", only="page")
@pytest.mark.kills(ENDPOINT, "transient=not any(usage_in(text))", "transient=True", only="paid")
@pytest.mark.parametrize(
    ("content", "says", "requests"),
    [
        (b"<html><head><title>Sign in to the proxy</title>", "Sign in to the proxy", 2),
        (b"", "(nothing)", 2),
        (b"[" * 100_000, "not JSON", 2),
        (json.dumps({"choices": [], "usage": {"prompt_tokens": 9}}).encode(), "no choices", 1),
    ],
    ids=["page", "empty", "deep", "paid"],
)  # fmt: skip
def test_what_is_no_completion_is_shown_and_kept(
    server: Server, content: bytes, says: str, requests: int
) -> None:
    error, sent = ask(server, response(content))
    assert isinstance(error, RequestError)
    assert says in str(error)
    assert sent == requests
    assert error.body == content.decode()


@pytest.mark.kills(
    SESSION, "                self._cache.keep_unread(key, error.body)", "                pass"
)
def test_a_paid_reply_that_a_later_version_can_read_is_not_sent_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"output": [{"text": "0.5"}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    server.canned["later"] = [response(body)]
    config = EndpointConfig(model="m", base_url=server.url("later"))

    async def send() -> Any:
        session = Session([Endpoint(config, None, Budget())], cache)
        try:
            return await session(QUESTION)
        except RequestError as error:
            return error
        finally:
            await session.aclose()

    before, cache = len(server.asked), Cache(tmp_path / "c.sqlite")
    assert "no choices" in str(asyncio.run(send()))
    assert len(server.asked) == before + 1
    monkeypatch.setattr(
        "ual.uncertainty.session.parse", lambda text: Reply(json.loads(text)["output"][0]["text"])
    )
    assert asyncio.run(send()).text == "0.5"
    assert len(server.asked) == before + 1
    monkeypatch.setattr("ual.uncertainty.session.parse", reader.parse)
    assert asyncio.run(send()).text == "0.5"  # from now on it is a reply
    cache.close()


@pytest.mark.kills(FAULTS, "named in sent and named not in _LIMITS:", "False:", only="seed")
@pytest.mark.kills(FAULTS, "if not _UNSUPPORTED.search(", "if not ''.join(", only="too long")
@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [
        ("400", {"message": "no", "param": "seed", "code": "invalid_value"}, "set backend.omit: [seed]"),
        (
            "422",
            {"message": "Unsupported fields in the request: {'top_logprobs'}"},
            "set backend.omit: [logprobs, top_logprobs]",
        ),
        ("400", {"message": "'guided' is unknown", "param": "guided"}, "remove guided in backend.extra_body"),
        (
            "400",
            {"message": "'reasoning_effort' does not support 'tiny'", "param": "reasoning_effort"},
            "correct or remove backend.reasoning_effort",
        ),
        (
            "400",
            {"message": "Unrecognized request argument supplied: max_completion_tokens"},
            "set backend.max_tokens_field: max_tokens",
        ),
        ("400", {"message": "'max_tokens' is too large: 9. The context is 4.", "param": "max_tokens"}, None),
        ("400", {"message": "The prompt is too long", "param": "messages"}, None),
    ],
    ids=["seed", "logprobs", "extra", "effort", "limit", "too long", "prompt"],
)  # fmt: skip
def test_a_refused_field_names_the_key_to_set(
    server: Server, status: str, error: dict[str, Any], remedy: str | None
) -> None:
    options: dict[str, Any] = {"extra_body": {"guided": 1}, "reasoning_effort": "tiny"}
    if "max_completion" in error["message"]:
        options["max_tokens_field"] = "max_completion_tokens"
    found, requests = ask(server, response({"error": error}, f"{status} X"), **options)
    assert requests == 1
    assert isinstance(found, UserError) == (remedy is not None)
    if remedy is None:
        assert found.own
    else:
        assert remedy in found.remedy


def test_a_wrong_key_with_status_400_stops_the_run(server: Server) -> None:
    said = {"code": 400, "message": "API key not valid. Please pass a valid API key."}
    error, requests = ask(server, response([{"error": said | {"status": "INVALID_ARGUMENT"}}], "400 X"))
    assert (type(error), requests) == (UserError, 1)
    assert "api_key_env" in error.remedy


def test_a_flagged_prompt_does_not_stop_the_run(server: Server) -> None:
    flagged = {"code": 403, "message": "flagged", "metadata": {"flagged_input": "text", "reasons": ["x"]}}
    error, _ = ask(server, response({"error": flagged}, "403 Forbidden"))
    assert isinstance(error, RequestError)


@pytest.mark.kills("ual/uncertainty/thinking.py", "if _OPENING.match(answer):", "if False:", only="twice")
@pytest.mark.kills(
    "ual/uncertainty/thinking.py",
    "if opened else _UNOPENED.search(text)",
    "if opened else None",
    only="unopened",
)
@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nIt is 9.\n</think>\n\n0.25", "It is 9.", "0.25"),
        ("  <thinking>0.9?</thinking>0.25", "0.9?", "0.25"),
        ("It is 9.\n</think>\n\n0.25", "It is 9.", "0.25"),
        ("<think>It is", "It is", ""),
        ("<think></think>0.25", "", "0.25"),
        ("<think>a</think><think>b</think>0.25", "a\n\nb", "0.25"),
        ("[THINK]a[/THINK]0.25", "a", "0.25"),
        ("Write `</think>` at the end.", "", "Write `</think>` at the end."),
        ("<b>0.25</b>", "", "<b>0.25</b>"),
    ],
    ids=["think", "thinking", "unopened", "unclosed", "empty", "twice", "mistral", "quoted", "markup"],
)
def test_reasoning_is_cut_from_an_answer(text: str, reasoning: str, answer: str) -> None:
    assert thinking.split(text) == (reasoning, answer)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_beside_the_text_is_evidence(field: str) -> None:
    reply = parse(json.dumps(chat({"content": "0.25", field: "It is 9."})))
    assert reply.evidence == {"reply": "0.25", "reasoning": "It is 9."}
    assert Reply.parse(reply.dump()) == reply


SERVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek": (
        chat(
            {"content": "0.25", "reasoning_content": "hm"},
            usage={"prompt_tokens": 9, "completion_tokens": 30},
        ),
        {"answer": "0.25", "reasoning": "hm", "completion_tokens": 30},
    ),
    "gemini without room": (
        {"choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant"}}]},
        {"answer": "", "unanswered": True},
    ),
    "ollama": (
        chat({"content": "0.25", "reasoning": "hm"}, finish_reason="stop")
        | {"system_fingerprint": "fp_ollama"},
        {"answer": "0.25", "reasoning": "hm"},
    ),
    "llama.cpp": (
        chat({"content": "0.25"}) | {"timings": {"predicted_ms": 1.5}, "__verbose": {"stop": True}},
        {"answer": "0.25"},
    ),
    "tgi": (chat({"content": "0.25"}, finish_reason="eos_token"), {"answer": "0.25", "truncated": False}),
    "mistral": (
        chat({"content": PARTS}, finish_reason="model_length"),
        {"reasoning": "hm", "truncated": True},
    ),
    "xai": (
        chat({"content": "0.25"}, usage={"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 50}),
        {"completion_tokens": 41},
    ),
    "azure": (
        chat({"content": None}, finish_reason="content_filter", content_filter_results={"hate": {}}),
        {"text": None},
    ),
    "refusal": (chat({"content": None, "refusal": "I cannot"}), {"text": None}),
    "refusal part": (chat({"content": [{"type": "refusal", "refusal": "I cannot"}]}), {"text": None}),
    "anthropic": (chat({"content": [{"text": "0.25"}]}, finish_reason="max_tokens"), {"truncated": True}),
}


@pytest.mark.kills(
    "ual/uncertainty/protocol.py",
    "return self.finish_reason.lower() in _CUT_OFF",
    'return self.finish_reason == "length"',
)
def test_replies_of_many_servers() -> None:
    for name, (body, expected) in SERVERS.items():
        reply = parse(json.dumps(body))
        assert {key: getattr(reply, key) for key in expected} == expected, name
        assert Reply.parse(reply.dump()) == reply


def test_the_first_token_of_an_answer_follows_the_reasoning() -> None:
    tokens = [
        {"token": t, "logprob": -0.1, "top_logprobs": []} for t in ("<think>", "B", "</think>", "\n\n", "A")
    ]
    reply = parse(json.dumps(chat({"content": "<think>B</think>\n\nA"}, {"content": tokens})))
    assert [token.text for token in reply.answer_tokens] == ["A"]
    cut = parse(json.dumps(chat({"content": "<think>B"}, {"content": tokens[:2]}, finish_reason="length")))
    assert (cut.answer_tokens, cut.unanswered) == ((), True)
    plain = parse(json.dumps(chat({"content": "A"}, {"content": tokens[4:]}, finish_reason="length")))
    assert (len(plain.answer_tokens), plain.unanswered) == (1, False)


@pytest.mark.kills(
    "ual/pipelines/elicit.py", "        value = value[1:-1].strip()", "        pass", only="quoted"
)
@pytest.mark.parametrize(
    "text",
    [
        '"sk-abc_1=="', "'sk-abc_1=='", "\ufeffsk-abc_1==\r\n", "OPENAI_API_KEY=sk-abc_1==",
        'export KEY="sk-abc_1=="\n', "sk-abc_1==",
    ],
    ids=["quoted", "single", "bom", "named", "export", "plain"],
)  # fmt: skip
def test_a_key_as_env_files_hold_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text, encoding="utf-8")
    for config, environment in (
        (EndpointConfig(model="m", api_key_env="KEY"), {"KEY": text}),
        (EndpointConfig(model="m", api_key_file=str(tmp_path / "key")), {}),
    ):
        found = secret(config, environment)
        assert found is not None
        assert found.get_secret_value() == "sk-abc_1=="


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "nothing"),
        ('""', "nothing"),
        ("A=sk-secret\nB=sk-secret", "2 lines"),
        ("Bearer sk-secret", "Bearer"),
        ('"sk-secret', "quotes"),
        ("\u201csk-secret\u201d", "not printable ASCII"),
        ("sk-secret # the key", "a blank"),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as error:
        secret(EndpointConfig(model="m", api_key_env="KEY"), {"KEY": text})
    assert "secret" not in str(error.value)

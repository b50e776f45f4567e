"""Read a chat completion of any server. A malformed part is no reason to discard the text beside it."""

import json
import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from ual.uncertainty.backends.faults import Fault, ServerError, fault_in, quoted
from ual.uncertainty.protocol import Reply, Token

_ROUNDING = 0.1  # nats above 0 that a log-probability may have by rounding in 16 bits
_MOST = 2**40  # a larger number of tokens is an error of the server
_BROKEN_OFF = ("abort", "error", "insufficient_system_resource")  # of vLLM, OpenRouter, DeepSeek
_THINKING = ("thinking", "reasoning", "reasoning_text", "reasoning_content")


def parse(text: str) -> Reply:
    """Return the reply in a chat completion.

    Token counts that are absent or malformed are 0. A token's log-probability that is not a number is None,
    and such an alternative is dropped.

    Raises:
        ServerError: the body is an error.
        ValueError: the text is not JSON, or holds no message; the error quotes its start.
    """
    try:
        body = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise _unreadable("its body is not JSON", text) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        if fault := fault_in(body):
            raise ServerError(fault)
        raise _unreadable("it has no choices", text)
    if fault := fault_in({"error": choice.get("error")}):
        raise ServerError(fault)
    if (finish := choice.get("finish_reason")) in _BROKEN_OFF:
        raise ServerError(Fault(f"the reply broke off with finish_reason {finish}"))
    message = choice.get("message")
    if message is None and choice.get("finish_reason"):
        message = {"content": choice.get("text")}  # of the protocol without chat
    if not isinstance(message, dict):
        raise _unreadable("choices.0.message is not an object", text)
    content = _content(message.get("content"))
    fault = fault_in(body)
    if fault and not (content and content["text"]):
        raise ServerError(fault)
    if content is None:
        raise _unreadable("choices.0.message.content is neither text nor a list of parts", text)
    return _reply(choice, message, content, body.get("usage"))


def usage_in(text: str) -> tuple[int, int]:
    """Return the prompt and completion tokens that a body counts; 0 where it counts none."""
    try:
        body = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return 0, 0
    return _usage(body.get("usage") if isinstance(body, dict) else None)


def _usage(usage: Any) -> tuple[int, int]:
    usage = usage if isinstance(usage, dict) else {}
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    completion = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    # some servers count reasoning in the total alone
    reasoned = _count(usage.get("total_tokens")) - prompt if prompt else 0
    return prompt, max(completion, reasoned)


def _reply(choice: dict[str, Any], message: dict[str, Any], content: dict[str, str], usage: Any) -> Reply:
    finish = choice.get("finish_reason")
    refused = (
        message.get("refusal") or content["refusal"] or (finish == "content_filter" and not content["text"])
    )
    beside = (_content(message.get(name)) for name in ("reasoning_content", "reasoning", "thinking"))
    reasoning = next(
        (text for found in beside if found and (text := found["text"] or found["reasoning"])), ""
    )
    prompt, completion = _usage(usage)
    return Reply(
        text=None if refused else content["text"],
        finish_reason=finish if isinstance(finish, str) and finish else "stop",
        tokens=_tokens(choice.get("logprobs")),
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning=content["reasoning"] or reasoning,
    )


def _content(value: Any) -> dict[str, str] | None:
    """Return text, reasoning and refusal of a message's content; None if it has another form."""
    found = {"text": "", "reasoning": "", "refusal": ""}
    if value is None or isinstance(value, str):
        return found | {"text": value or ""}
    if isinstance(value, dict) and not {"type", "text"} & {*value}:
        return found | {"text": json.dumps(value)}  # structured output that a server has already read
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    for part in parts:
        kind = str(part.get("type"))
        if kind in _THINKING:
            inner = _content(part.get(kind, part.get("text", part.get("thinking"))))
            found["reasoning"] += inner["text"] if inner else ""
        elif isinstance(part.get("refusal"), str):
            found["refusal"] += part["refusal"]
        elif isinstance(part.get("text"), str):
            found["text"] += part["text"]
    return found


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """Return the tokens in OpenAI's form, or in the older form of parallel lists."""
    if not isinstance(logprobs, dict):
        return ()
    content = logprobs.get("content")
    given: list[tuple[Any, Any, Any]]
    if isinstance(content, list):
        objects = [token if isinstance(token, dict) else {} for token in content]
        given = [(token.get("token"), token.get("logprob"), token.get("top_logprobs")) for token in objects]
    else:
        columns = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
        given = list(zip_longest(*(column if isinstance(column, list) else [] for column in columns)))
    return tuple(
        Token(text if isinstance(text, str) else "", _log_prob(log_prob), _alternatives(top))
        for text, log_prob, top in given
    )


def _alternatives(top: Any) -> tuple[tuple[str, float], ...]:
    if isinstance(top, dict):
        pairs = list(top.items())
    else:
        objects = [item for item in top if isinstance(item, dict)] if isinstance(top, list) else []
        pairs = [(item.get("token"), item.get("logprob")) for item in objects]
    found = ((text, _log_prob(log_prob)) for text, log_prob in pairs)
    return tuple((text, value) for text, value in found if isinstance(text, str) and value is not None)


def _log_prob(value: Any) -> float | None:
    number = _number(value)
    return min(number, 0.0) if number is not None and number <= _ROUNDING else None


def _count(value: Any) -> int:
    number = _number(value)
    return int(number) if number is not None and 0 <= number <= _MOST else 0


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _unreadable(why: str, text: str) -> ValueError:
    return ValueError(f"not a chat completion: {why}; it begins: {quoted(text) or '(nothing)'}")


def error_in(answer: Mapping[str, Any]) -> str:
    """Return the server's words in a failed line of a batch's output."""
    response = answer.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    fault = fault_in(body) or fault_in(answer)
    return quoted(fault.message) if fault else ""

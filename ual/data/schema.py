"""What a training sample, and a question with its answers, look like in a file."""

import json
import math
import re
import sys
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from ual.records import Message, Role

_MAX = sys.float_info.max
_UNSUPPORTED = ("function_call",)  # of messages
_SELECTS = ("weight", "train", "training", "loss")  # whether a turn is trained, in exports of several tools
_MEDIA = ("images", "videos", "audios")
OPTIONS = ("options", "label_distribution")
UNANSWERED = (Message("assistant", ""),)
_RESPONSES = {"prompt": "completion", "question": "answer", "instruction": "output"}
_SUM_ERROR = 1e-3  # of probabilities, as in `ual_kernels.SparseTarget`
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field


class FieldError(Exception):
    """The first fault of a record: a field, empty for the record itself, and what is wrong with it.

    `reason` is the problem without the record's own values, so that equal faults can be counted.
    """

    def __init__(self, field: str, problem: str, reason: str = "") -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem
        reason = reason or re.split(r", got |: ", problem, maxsplit=1)[0]
        field = re.sub(r"\[\d+\]", "[]", field)
        self.reason = f"{field}: {reason}" if field else reason


Record = TypeVar("Record", bound=BaseModel)


def check(kind: type[Record], value: Any, at: str = "") -> Record:
    """Return the validated record that is found in the field `at`.

    Raises:
        FieldError: a field is missing or wrong.
    """
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = at + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        problem = problem.replace("expected a valid", "expected a")
        if first["type"] == "missing":
            problem = f"is missing, got {', '.join(first['input']) or 'no fields'}"
        elif problem.startswith("expected"):
            problem += f", got {show(first['input'])}"
        raise FieldError(path.removeprefix("."), problem) from error


def show(value: Any, *, escaped: bool = False) -> str:
    """Return a value as JSON, at most 60 characters of it; `escaped` writes it in ASCII."""
    text = json.dumps(value, ensure_ascii=escaped, default=repr).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _identifier(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError("expected a non-empty string or an integer")
    return str(value)


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        raise ValueError("expected a string, a number or null")
    return value


def _objects(value: Any) -> Any:
    """Accept the JSON of a list too, since Arrow needs equal keys in all objects of a column."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"invalid JSON: {error}") from error
    if value in (None, "", {}):
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError("expected a list of objects, or its JSON")
    json.dumps(value, ensure_ascii=False, default=str).encode()  # half of a surrogate pair raises
    return _without_nulls(value)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _texts(value: Any) -> Any:
    value = _from_json(value)
    if not isinstance(value, list) or not _are_texts(value):
        raise ValueError("expected a list of texts that are not empty, or its JSON")
    _check_distinct(value)
    return value


def _are_texts(values: Collection[Any]) -> bool:
    return bool(values) and all(isinstance(text, str) and text.strip() for text in values)


def _check_distinct(texts: Collection[str]) -> None:
    """Refuse equal texts, and those that a reader cannot tell apart."""
    seen: dict[str, str] = {}
    for text in texts:
        looks = unicodedata.normalize("NFC", text).strip()
        if seen.get(looks) == text:
            raise ValueError(f"an option is there twice: {show(text)}")
        if looks in seen:
            alike = " and ".join(show(of, escaped=True) for of in (seen[looks], text))
            raise ValueError(f"the options {alike} look the same")
        seen[looks] = text


def _distribution(value: Any) -> Any:
    value = _from_json(value)
    wanted = 'expected {"text": probability, ...}'
    if not isinstance(value, Mapping):
        raise ValueError(f"{wanted}, or its JSON")
    value = _without_nulls(value)
    if not _are_texts(value):
        raise ValueError(f"{wanted} with texts that are not empty, or its JSON")
    _check_distinct(value)
    for text, p in value.items():
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= _MAX:
            raise ValueError(f"a probability is not a number >= 0: {show({text: p})}")
    total = math.fsum(value.values())
    if abs(total - 1) > _SUM_ERROR:
        raise ValueError(f"the probabilities must add up to 1, got {total:g} as the sum of {show(value)}")
    return {text: p / total for text, p in value.items()}


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all others, as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _number(interval: str = "", low: float = -_MAX, high: float = _MAX) -> BeforeValidator:
    def number(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"expected a finite number{interval}")
        return float(value)

    return BeforeValidator(number)


_ROLES: dict[str, Role] = {role: role for role in get_args(Role)} | {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "model", "chatgpt", "bard", "bing", "ai", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
}
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # half of a surrogate pair raises
Identifier = Annotated[Text, BeforeValidator(_identifier)]
Scalar = Annotated[Any, BeforeValidator(_scalar)]
Objects = Annotated[list[dict[str, Any]], BeforeValidator(_objects)]


def _role(value: Any) -> Any:
    role = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError("expected 'system', 'user', 'assistant', 'tool', 'human' or 'gpt'")
    return role


def _text_of(value: Any) -> Any:
    """Join the parts of a content in OpenAI's form."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and "text" not in kind:
            raise ValueError(f"part {i} is of type {kind!r}: only text can be trained")
        else:
            raise ValueError(f'expected {{"type": "text", "text": ...}} as part {i}')
    return "".join(texts)


class Turn(BaseModel):
    """A message of a conversation, also under ShareGPT's names; content may be a list of text parts."""

    role: Annotated[str, BeforeValidator(_role)] = Field(validation_alias=AliasChoices("role", "from"))
    content: Annotated[Text | None, BeforeValidator(_text_of)] = Field(
        None, validation_alias=AliasChoices("content", "value")
    )
    tool_calls: Objects = []
    name: Text | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = Field(None, validation_alias=AliasChoices(*_REASONING))


class SampleRecord(BaseModel):
    """What a sample may have beside its conversation."""

    id: Identifier | None = None
    source: Text | None = None
    uncertainty: Annotated[float, _number()] | None = None
    label_smoothing: Annotated[float, _number(" in [0, 1]", 0, 1)] | None = None
    sample_weight: Annotated[float, _number(" >= 0", 0)] | None = None
    tools: Objects = []


class OptionsRecord(BaseModel):
    """The texts that a response could be."""

    options: Annotated[list[Text], BeforeValidator(_texts)] | None = None


class DistributionRecord(BaseModel):
    """The texts that a response could be, and their probabilities, which add up to 1."""

    label_distribution: Annotated[dict[Text, float], BeforeValidator(_distribution)] | None = None


class AlpacaRecord(BaseModel):
    """The prompt of a sample in the form of Alpaca; the input follows the instruction after an empty line."""

    instruction: Text
    input: Text | None = None


class AnswerRecord(BaseModel):
    """An answer: the value is compared, the text is trained on."""

    value: Scalar = None
    answer: Scalar = None
    text: Text | None = None
    source: Text | None = None
    correct: bool | None = None

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if not {"value", "answer", "text"} & self.model_fields_set:
            raise ValueError('expected one of "value", "answer" and "text"')
        return self


class QuestionRecord(BaseModel):
    """A question, and its answers unless each has a record of its own. Its prompt is read by `turns`."""

    id: Identifier | None = Field(None, validation_alias=AliasChoices("question_id", "id"))
    answers: list[
        Annotated[AnswerRecord, BeforeValidator(lambda a: a if isinstance(a, Mapping) else {"value": a})]
    ] = Field([], validation_alias=AliasChoices("answers", "samples"))
    gold: Scalar = None
    source: Text | None = None
    subject: str | None = None


def turns(value: Any, field: str, role: Role | None = None) -> list[Message]:
    """Return the messages of a list, or the one of a string if it is known which `role` says it.

    Raises:
        FieldError: a message is wrong, or a prompt or a response is empty.
    """
    if role and isinstance(value, str):
        return [_message({"role": role, "content": value}, field, content=field)]
    if not isinstance(value, list) or not value:
        raise FieldError(
            field, f"expected a {'string or a ' if role else ''}list of messages, got {show(value)}"
        )
    return [_message(item, f"{field}[{i}]") for i, item in enumerate(value)]


def _message(value: Any, field: str, content: str = "") -> Message:
    if not isinstance(value, Mapping):
        raise FieldError(field, f'expected {{"role": ..., "content": ...}}, got {show(value)}')
    for key in _UNSUPPORTED:
        if value.get(key) not in (None, [], {}, ""):
            raise FieldError(
                f"{field}.{key}", "is not supported, and without it something else would be trained"
            )
    try:
        turn = check(Turn, value, field)
    except FieldError as fault:
        raise FieldError(content or fault.field, fault.problem) from fault
    content = content or f"{field}.{'value' if 'from' in value and 'role' not in value else 'content'}"
    role = _ROLES[turn.role]
    for key in _SELECTS if role == "assistant" else ():
        if (
            (given := value.get(key)) is False
            or given == 0
            or (key == "weight" and given not in (None, "", 1))
        ):
            raise FieldError(
                f"{field}.{key}",
                f"is not supported, and without it something else would be trained, got {show(given)}",
            )
    found, text, reasoning = turn.tool_calls, turn.content or "", turn.reasoning_content or ""
    if turn.role == "function_call":
        found, text = _calls(text, content), ""
    calls = tuple(_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(found))
    if calls and role != "assistant":
        raise FieldError(f"{field}.tool_calls", f"only the assistant calls tools, got the role {role!r}")
    thoughts = [key for key in _REASONING if value.get(key)]
    if thoughts and role != "assistant":
        raise FieldError(f"{field}.{thoughts[0]}", f"only the assistant reasons, got the role {role!r}")
    if any(value[key] != reasoning for key in thoughts):
        raise FieldError(f"{field}.{thoughts[1]}", f"differs from {thoughts[0]}, which has the same meaning")
    if turn.content is None and not calls:
        raise FieldError(content, "expected a string, got null")
    if role in ("user", "assistant") and not (text.strip() or calls):
        raise FieldError(content, f"the {'prompt' if role == 'user' else 'response'} is empty")
    return Message(role, text, calls, turn.name or "", turn.tool_call_id or "", reasoning)


def _call(call: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, as inference servers pass it to chat templates."""
    if "function" in call:
        field += ".function"
    else:  # the name and the arguments without OpenAI's `function` around them
        inner = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {key: value for key, value in call.items() if key not in inner} | {"function": inner}
    function = call["function"]
    if not isinstance(function, Mapping):
        raise FieldError(field, f"expected an object, got {show(function)}")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise FieldError(f"{field}.name", f"expected a non-empty string, got {show(function.get('name'))}")
    arguments = _decoded(function.get("arguments"), f"{field}.arguments")
    typed = call if "type" in call else {"type": "function", **call}
    return {**typed, "function": {**function, "arguments": arguments}}


def _decoded(arguments: Any, field: str) -> dict[str, Any]:
    """Return the arguments of a tool call, which OpenAI's API writes as a JSON text."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    written = arguments
    if isinstance(written, str):
        try:
            arguments = json.loads(written, parse_constant=refuse) if written.strip() else {}
            json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair raises
        except (ValueError, RecursionError) as error:
            raise FieldError(field, f"invalid JSON: {error}, got {show(written)}") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise FieldError(field, f"expected an object, or its JSON, got {show(written)}")
    return dict(arguments)


def _calls(text: str, field: str) -> Any:
    """Return the tool calls of a turn of ShareGPT's role `function_call`."""
    try:
        found = _objects(json.loads(text) if text.lstrip().startswith("[") else [json.loads(text)])
    except (ValueError, RecursionError) as error:
        raise FieldError(field, f"expected the JSON of a function call, got {show(text)}") from error
    if not found or any("name" not in call for call in found):
        raise FieldError(field, f'expected {{"name": ..., "arguments": ...}}, got {show(text)}')
    return found


def conversation(written: Mapping[str, Any], columns: Sequence[str]) -> tuple[Message, ...]:
    """Return the messages of a sample.

    Args:
        written: the sample as it is written.
        columns: one that holds all messages, or one for the prompt and one for the response.

    Raises:
        FieldError: a message is wrong, or the order of the roles is.
    """
    for column in columns:
        if written.get(column) is None:
            raise FieldError(column, f"is missing, got {', '.join(written) or 'no columns'}")
    first, *last = columns
    if first == "instruction":
        said = _alpaca(written)
    else:
        said = turns(written[first], first, "user" if last else None)
    for column in last:
        of_column = written[column]
        said += UNANSWERED if of_column is UNANSWERED else turns(of_column, column, "assistant")
    said = _with_system(written.get("system"), said)
    for column in _MEDIA:
        if written.get(column) and any(f"<{column[:-1]}>" in message.content for message in said):
            raise FieldError(column, "the conversation shows them, and only text can be trained")
    roles = [message.role for message in said]
    if roles[-1] != "assistant":
        raise FieldError(first, f"the conversation must end with an assistant turn, it ends with {roles[-1]}")
    if "user" not in roles[: roles.index("assistant")]:
        raise FieldError(first, "the conversation needs a user turn before its first assistant turn")
    return tuple(said)


def with_response(written: Mapping[str, Any], *, unanswered: bool = False) -> Mapping[str, Any]:
    """Return the sample; if it has a prompt and no response, with the most probable text as its response.

    Args:
        written: the sample as it is written.
        unanswered: whether a sample without a label distribution gets `UNANSWERED` as its response.

    Raises:
        FieldError: the label distribution is wrong.
    """
    asked = [prompt for prompt in _RESPONSES if written.get(prompt) is not None]
    lacking = [_RESPONSES[prompt] for prompt in asked if written.get(_RESPONSES[prompt]) is None]
    if not lacking or written.get("messages") or written.get("conversations"):
        return written
    if written.get("label_distribution") is not None:
        found = check(DistributionRecord, written).label_distribution or {}
        return {**written, lacking[0]: max(found, key=found.__getitem__)}
    if unanswered and len(lacking) == len(asked):
        return {**written, lacking[0]: UNANSWERED}
    return written


def options(
    written: Mapping[str, Any],
    response: Message,
    wanted: Literal["options", "label_distribution"] | None,
    *,
    smoothed: bool,
) -> dict[str, float]:
    """Return the texts that a response could be, with their probabilities as the target.

    Args:
        written: the sample as it is written.
        response: its last message.
        wanted: the column that the loss uses. None returns nothing. A sample without `options` has those of
            its `label_distribution`.
        smoothed: whether the sample may have a smoothing above 0, so that it needs options.

    Raises:
        FieldError: the column is missing or wrong, or the response is none of its texts.
    """
    if wanted is None:
        return {}
    texts = check(OptionsRecord, written).options if wanted == "options" else None
    column = "options" if texts else "label_distribution"
    found = dict.fromkeys(texts or (), 0.0) or check(DistributionRecord, written).label_distribution
    if found is None and wanted == "label_distribution":
        reason = "is missing, and the loss needs it"
        raise FieldError(wanted, reason + '; {"response": 1} is a plain label', reason)
    if found is None or (wanted == "options" and len(found) < 2):
        if smoothed:
            lacks = "is missing" if found is None else "has one text only"
            reason = f"{lacks}, and smoothing.over is options"
            said = "; a sample with label_smoothing 0 needs none"
            raise FieldError(column if found else wanted, reason + said, reason)
        return {}
    if response.tool_calls:
        raise FieldError(column, "the response has tool calls, and an option is a text")
    if response.content not in found:
        said = f"the response is none of them, got {show(list(found))} and the response "
        raise FieldError(column, said + show(response.content))
    if wanted == "options":
        return {text: float(text == response.content) for text in found}
    return found


def _with_system(given: Any, said: list[Message]) -> list[Message]:
    """Return the messages after the system turn that a column of its own holds."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return said
    if not isinstance(given, str):
        raise FieldError("system", f"expected a string, got {show(given)}")
    system = turns(given, "system", "system")
    if said[0].role != "system":
        return system + said
    if said[0].content.strip() != given.strip():
        raise FieldError("system", f"differs from the conversation's system turn, got {show(given)}")
    return said


def _alpaca(written: Mapping[str, Any]) -> list[Message]:
    said: list[Message] = []
    history = written.get("history") or []
    if not isinstance(history, list):
        raise FieldError("history", f"expected a list of [question, answer] pairs, got {show(history)}")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FieldError(f"history[{i}]", f"expected a [question, answer] pair, got {show(pair)}")
        said += turns(pair[0], f"history[{i}][0]", "user") + turns(pair[1], f"history[{i}][1]", "assistant")
    given = check(AlpacaRecord, written)
    extra = given.input or ""
    return said + turns(given.instruction + f"\n\n{extra}" * bool(extra.strip()), "instruction", "user")

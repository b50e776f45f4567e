"""Chat templates: a conversation to the text that inference with the same template uses."""

import copy
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ual.config.base import nearest
from ual.errors import UserError
from ual.records import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)

_TOOLS = (
    "# Tools\n\nYou may call functions. Their JSON schemas are within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each call, write a JSON object with the function's name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <arguments>}\n'
    "</tool_call>",
)
BUILT_IN = {
    # Reasoning, calls and results of tools in the format of Hermes and Qwen.
    "chatml": (
        "{% set first = messages[0] if messages else {} %}"
        "{% if tools %}{{ '<|im_start|>system\n' }}"
        "{% if first.role == 'system' %}{{ first.content + '\n\n' }}{% endif %}"
        f"{{{{ {json.dumps(_TOOLS[0])} }}}}"
        "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
        f"{{{{ {json.dumps(_TOOLS[1])} + '<|im_end|>\n' }}}}{{% endif %}}"
        "{% for message in messages %}{% if not (tools and loop.first and message.role == 'system') %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}"
        "{% if message.reasoning_content %}"
        "{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}"
        "{{ message.content }}"
        "{% for call in message.tool_calls or [] %}"
        "{{ '\n' if message.content or not loop.first else '' }}"
        "{{ '<tool_call>\n{\"name\": ' + call.function.name | tojson }}"
        "{{ ', \"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endgeneration %}"
        "{% elif message.role == 'tool' %}"
        "{{ '<tool_response>\n' + message.content + '\n</tool_response><|im_end|>' }}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The space after "Assistant:" belongs to the response, since tokenizers join it to the next word.
    "plain": (
        "{% for message in messages %}"
        "{{ message.role.capitalize() + ':' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ ' ' + message.content + '\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
_CLOCK = "strftime_now"  # the function of transformers through which templates read the date
_PROBE = "probe-5a1f"


class RefusalError(Exception):
    """What prevents a conversation from being trained with a template, as the rest of a sentence about it."""


class ChatTemplate:
    """A chat template, with everything that it renders a conversation with.

    Args:
        tokenizer: whose special tokens, and own template, are used.
        source: None for the tokenizer's own; a name of `BUILT_IN`; or the path of a Jinja file.
        variables: more variables of the template, such as ``enable_thinking``.
        date: the day that templates read, at 00:00; None for today.

    Attributes:
        text: the template's source.
        place: what errors call the template.
        marks_turns: whether the template has ``{% generation %}`` blocks.

    Raises:
        UserError: there is no such template, or it has no such variable.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        source: str | None = None,
        variables: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self.text = _resolve(tokenizer, source)
        self.place = f"chat template {source!r}" if source else "the model's chat template"
        self.marks_turns = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.text))
        self._special = dict(tokenizer.special_tokens_map)
        self._variables = dict(variables or {})
        self._date = date or datetime.date.today()
        self._hidden: dict[Any, str] = {}
        words = set(re.findall(r"[A-Za-z_]\w*", self.text))
        for name in self._variables:
            if name not in words:
                close = nearest(name, sorted(words)) if len(words) > 1 else ""
                raise UserError(
                    f"{self.place} has no variable {name!r}",
                    place="configuration, data.chat_template_kwargs",
                    remedy=close if close.startswith("did you mean") else "remove it",
                )

    @property
    def made_by(self) -> dict[str, Any]:
        """What the text of a conversation depends on; the date only if the template reads it."""
        dated = {"date": self._date.isoformat()} if _CLOCK in self.text else {}
        return {"template": self.text, "special": self._special, "variables": self._variables, **dated}

    def using(self, **variables: Any) -> "ChatTemplate":
        """Return the template with other values of some variables."""
        other = copy.copy(self)
        other._variables, other._hidden = self._variables | variables, {}
        return other

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the characters in each ``{% generation %}`` block.

        Templates that cannot render the arguments of a call as an object get their JSON.

        Raises:
            RefusalError: the template raises an error.
        """
        chat = [message.as_dict() for message in messages]
        options = {"tools": list(tools) or None, "add_generation_prompt": generation_prompt}
        try:
            return self._rendered(chat, options)
        except Exception as error:  # a template raises whatever its expressions do
            if any(message.tool_calls for message in messages):
                try:
                    return self._rendered([_arguments_as_json(message) for message in chat], options)
                except Exception as second:  # the first error says what is wrong
                    error.__context__ = second
            said = str(error) or type(error).__name__
            raise RefusalError(f"refuses the conversation: {said}") from error

    def _rendered(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        # apply_chat_template renders with this function. Its own mask (return_assistant_tokens_mask) looks up
        # the tokens of a span's first and last characters. It loses half an emoji at the end of a span, and
        # the complete span if its first character has no token (transformers 5.23).
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # annotated -> str, returns a pair of lists
        with self._dated():
            texts, spans = render(
                conversations=[chat],
                chat_template=self.text,
                return_assistant_tokens_mask=self.marks_turns,
                **options,
                **(self._special | self._variables),
            )
        return texts[0], spans[0] if self.marks_turns else []

    @contextmanager
    def _dated(self) -> Iterator[None]:
        """Set the clock that the template reads.

        The compiled template is that of transformers' cache, so the clock is removed again.
        """
        if _CLOCK not in self.text:
            yield
            return
        from transformers.utils import chat_template_utils

        own = chat_template_utils._compile_jinja_template(self.text).globals
        own[_CLOCK] = datetime.datetime.combine(self._date, datetime.time()).strftime
        try:
            yield
        finally:
            del own[_CLOCK]

    def check_shown(self, sample: Sample) -> None:
        """Refuse a template that does not show a part of the sample: something else would be trained.

        Each part is replaced by a word of its own, which the text must contain. Only the shape of the
        conversation is used, so conversations of the same shape are checked once. The text of assistant
        turns is not checked here.

        Raises:
            RefusalError: the template does not show the tools, a call, or the text of another turn.
        """
        shape = bool(sample.tools), tuple(map(_shape, sample.messages))
        if shape not in self._hidden:
            self._hidden[shape] = self._find_hidden(sample)
        if self._hidden[shape]:
            raise RefusalError(self._hidden[shape])

    def _find_hidden(self, sample: Sample) -> str:
        messages = [_probed(message, i) for i, message in enumerate(sample.messages)]
        schema = {"name": f"{_PROBE}-tool", "description": _PROBE, "parameters": _NO_PARAMETERS}
        tools = [{"type": "function", "function": schema}] if sample.tools else []
        try:
            text = self.render(messages, tools)[0]
        except RefusalError:  # the template depends on what was replaced, so it shows it
            return ""
        if tools and f"{_PROBE}-tool" not in text:
            return "does not show the sample's tools"
        for i, message in enumerate(messages):
            for call in message.tool_calls:
                words = [call["function"]["name"], *call["function"]["arguments"]]
                if not all(word in text for word in words):
                    several = f" but one in turn {i} (counted from 0)" if len(message.tool_calls) > 1 else ""
                    return f"does not show the sample's tool_calls{several}"
            if message.role != "assistant" and message.content and message.content not in text:
                return f"does not show the text of turn {i} (counted from 0), of the role {message.role}"
        return ""


_NO_PARAMETERS = {"type": "object", "properties": {}, "required": []}


def _shape(message: Message) -> tuple[Any, ...]:
    calls = tuple(bool(call["function"]["arguments"]) for call in message.tool_calls)
    said = bool(message.content), bool(message.reasoning_content)
    return message.role, *said, calls, bool(message.name), bool(message.tool_call_id)


def _probed(message: Message, i: int) -> Message:
    """Return the message with a word of its own for each part. The ids of calls still match."""
    calls = []
    for j, call in enumerate(message.tool_calls):
        word = f"{_PROBE}-{i}-call-{j}"
        arguments = {f"{word}-key": word} if call["function"]["arguments"] else {}
        calls.append({**call, "function": {"name": f"{word}-name", "arguments": arguments}})
    return replace(
        message,
        content=f"{_PROBE}-{i}-text" if message.content else "",
        reasoning_content=f"{_PROBE}-{i}-thought" if message.reasoning_content else "",
        tool_calls=tuple(calls),
    )


def _arguments_as_json(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", ())
        for f in [call["function"]]
    ]
    return message | {"tool_calls": calls} if calls else message


def _resolve(tokenizer: "PreTrainedTokenizerBase", source: str | None) -> str:
    valid = f"valid: {', '.join(BUILT_IN)}, or the path of a Jinja file"
    if source is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                "the tokenizer has no chat template",
                place="configuration, data.chat_template or backend.chat_template",
                remedy=valid,
            ) from error
    if source in BUILT_IN:
        adds_bos = tokenizer.bos_token_id in tokenizer("").input_ids
        return ("{{ bos_token }}" if adds_bos else "") + BUILT_IN[source]
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"unknown chat template {source!r}; as the file {Path(source).absolute()}: {error}",
            place="configuration, data.chat_template or backend.chat_template",
            remedy=valid,
        ) from error

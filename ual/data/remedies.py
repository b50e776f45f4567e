"""Changes that let a refused conversation be trained. Each is tried before an error recommends it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from ual.data.template import ChatTemplate, RefusalError
from ual.data.turns import each_turn
from ual.errors import UserError
from ual.records import Message, Sample

if TYPE_CHECKING:
    from ual.data.render import Renderer


def remedies(renderer: "Renderer", sample: Sample) -> Iterator[str]:
    """Yield the changes, of the configuration or of the sample, after which `renderer` accepts the sample."""
    template = renderer.template
    settings = {"": renderer}
    for value in (False, True) if "enable_thinking" in template.text else ():
        words = f"set data.chat_template_kwargs to {{enable_thinking: {str(value).lower()}}}"
        settings[words] = renderer.using(template.using(enable_thinking=value))
    edited = {words: edit(sample) for words, edit in _EDITS.items()}
    edits = {"": sample} | {words: to for words, to in edited.items() if to != sample}
    if "<think>" not in renderer.opening:
        edits.pop(_EMPTY, None)
    apart = ("", _EACH) if renderer.train_on == "all" else ("",)
    found: list[list[str]] = []
    ways = ([words for words in way if words] for way in product(apart, settings, edits))
    for way in sorted(ways, key=lambda way: (len(way), not {_EACH, *settings}.issuperset(way)))[1:]:
        made_by = next((settings[words] for words in way if words in settings), renderer)
        changed = next((edits[words] for words in way if words in edits), sample)
        if not any(set(shorter) <= set(way) for shorter in found) and _works(made_by, changed, _EACH in way):
            found.append(way)
            yield " and ".join(way)
    if renderer.train_on == "all" and _works(renderer.using(template, train_on="last"), sample):
        yield 'set data.train_on to "last"'
    chatml = renderer.using(ChatTemplate(renderer.tokenizer, "chatml"))
    if chatml.template.text != template.text and _works(chatml, sample):
        yield 'set data.chat_template to "chatml"'


def _works(renderer: "Renderer", sample: Sample, apart: bool = False) -> bool:
    renderer = renderer.using(renderer.template, train_on="last") if apart else renderer
    try:
        for part in each_turn([sample]) if apart else [sample]:
            renderer.turns(part)
    except (RefusalError, UserError):
        return False
    return True


def _each_message(edit: Callable[[Message], Message]) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, messages=tuple(map(edit, sample.messages)))


def _inline(message: Message) -> Message:
    if not message.reasoning_content:
        return message
    content = f"<think>\n{message.reasoning_content}\n</think>\n\n{message.content}"
    return replace(message, content=content, reasoning_content="")


def _apart(message: Message) -> Message:
    opened, close, rest = message.content.partition("</think>")
    if not close or message.reasoning_content or not opened.lstrip().startswith("<think>"):
        return message
    reasoning = opened.lstrip().removeprefix("<think>").strip()
    return replace(message, content=rest.lstrip(), reasoning_content=reasoning)


def _empty(message: Message) -> Message:
    if message.role != "assistant" or message.reasoning_content or "<think>" in message.content:
        return message
    return replace(message, content=f"<think>\n\n</think>\n\n{message.content}")


def _system_in_user(sample: Sample) -> Sample:
    if [message.role for message in sample.messages[:2]] != ["system", "user"]:
        return sample
    system, user, *rest = sample.messages
    user = replace(user, content=f"{system.content}\n\n{user.content}")
    return replace(sample, messages=(user, *rest))


def _joined(sample: Sample) -> Sample:
    """Join consecutive turns of the assistant that have nothing but text."""
    messages: list[Message] = []
    for message in sample.messages:
        text = Message("assistant", message.content)
        if messages and message == text and messages[-1] == Message("assistant", messages[-1].content):
            messages[-1] = replace(text, content=f"{messages[-1].content}\n\n{message.content}")
        else:
            messages.append(message)
    return replace(sample, messages=tuple(messages))


_EACH = 'set data.train_on to "each"'
_EMPTY = r'begin the responses with "<think>\n\n</think>\n\n", an empty reasoning'
_EDITS: dict[str, Callable[[Sample], Sample]] = {
    "write the reasoning into the content, as <think>...</think>": _each_message(_inline),
    "write the reasoning into reasoning_content": _each_message(_apart),
    _EMPTY: _each_message(_empty),
    "move the text of the system turn into the first user turn": _system_in_user,
    "join consecutive assistant turns": _joined,
    "describe the tools in the system turn and remove `tools`": lambda sample: replace(sample, tools=()),
}

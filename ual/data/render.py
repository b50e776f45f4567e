"""Render conversations to tokens, with labels for exactly the tokens that the assistant wrote.

A conversation is rendered to text, and the text is tokenized once. A token has a label if its characters
belong to an assistant turn. One of two sources says which characters those are:

- the ``{% generation %}`` blocks of the template, if it has any;
- otherwise prefixes. P_k is the rendering of the messages before turn k and of its generation prompt. T_k is
  the rendering of the messages through turn k. The turn is T_k without P_k: what the model must write after
  this prompt, through its end-of-turn marker. P_k, and T_k through the marker, must be prefixes of the
  complete text; other templates are refused.
"""

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ual.errors import UserError
from ual.records import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

_BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}"
        "{% endfor %}"
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
_DEFAULT_LENGTH = 2048
_PROBE = "probe-5a1f"

_Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A rendered sample: `labels` are `input_ids`, with -100 for all tokens but the assistant's."""

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    truncated: bool = False

    @property
    def loss_tokens(self) -> int:
        """The number of tokens with a loss. The first token is not predicted, so it never has one."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


class Renderer:
    """Renders samples with one chat template.

    Every assistant turn is trained, with its end-of-turn marker. The last turn ends with the tokenizer's EOS.
    EOS is trained, and is appended if the template does not write it. White space after the end of the last
    turn is dropped, since no later token could learn from it.

    A token that crosses the boundary of a turn belongs to the assistant if it holds more of the turn than
    white space. So the first word of a response is trained if the prompt ends with a space.

    Args:
        tokenizer: a fast one, which knows the characters of each token.
        chat_template: None for the tokenizer's own; ``chatml``; ``plain`` for base models, which is
            ``User: ...``, ``Assistant: ...`` and EOS; or the path of a Jinja file. The built-in templates
            begin with BOS if the tokenizer adds one itself.
        max_length: the most tokens of a sample; None for min(context, 2048).
        context_length: of the model, in tokens; None for the tokenizer's, if it has one.
        overlong: ``refuse``; ``truncate`` to the first `max_length` tokens, without EOS, or drop the sample
            if none of them is the assistant's; or ``drop``.
        system_prompt: the system turn of conversations that have none.
        train_on: ``all`` assistant turns, or only the ``last`` one. Of a template with ``{% generation %}``,
            the last turn is its last block.

    Attributes:
        max_length: the limit in use.
        fingerprint: a hash of everything but the conversation that decides its tokens.
        counts: the number of samples that were "rendered" (completely), "truncated" and "dropped" so far.

    Raises:
        UserError: the tokenizer has no offsets, no EOS or no template; the template is unknown or broken;
            `max_length` exceeds the context.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        context_length: int | None = None,
        overlong: Literal["refuse", "truncate", "drop"] = "refuse",
        system_prompt: str | None = None,
        train_on: Literal["all", "last"] = "all",
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} does not know the characters of its tokens",
                place="model.tokenizer",
                remedy="name a model whose folder has a tokenizer.json",
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so a model cannot learn to stop",
                place="model.tokenizer",
                remedy='set "eos_token" in its tokenizer_config.json',
            )
        self._tokenizer = tokenizer
        self._template = _resolve(tokenizer, chat_template)
        self._place = f"chat template {chat_template!r}" if chat_template else "the model's chat template"
        self._marks_turns = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))
        self._closing = self._probe()
        self._context_length = _context_length(tokenizer, context_length)
        self.max_length = _max_length(max_length, self._context_length)
        self._overlong = overlong
        self._system_prompt = system_prompt
        self._train_on = train_on
        self.counts: Counter[str] = Counter()

    @property
    def chat_template(self) -> str:
        """The template in use, as text."""
        return self._template

    @property
    def fingerprint(self) -> str:
        made_by = {
            "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
            "special": {k: str(v) for k, v in self._tokenizer.special_tokens_map.items()},
            "template": self._template,
            "options": [self.max_length, self._overlong, self._system_prompt, self._train_on],
            "code": Path(__file__).read_text(encoding="utf-8"),
            "versions": [importlib.metadata.version(p) for p in ("transformers", "tokenizers")],
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def render(self, sample: Sample) -> TokenizedSample | None:
        """Return the sample's tokens and labels, or None if it is dropped for its length.

        Raises:
            UserError: the template refuses the conversation, does not show exactly which characters are the
                assistant's, or renders none of them; or the sample is too long, and `overlong` is "refuse".
        """
        text, spans = self._turns(self._with_system(sample))
        if self._train_on == "last":
            spans = spans[-1:]
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        end = max([len(text.rstrip()), *(b for _, b in spans)])
        tokens = [
            (token, _belongs(text, offset, spans))
            for token, offset in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if offset[0] < end or offset[1] == end
        ]
        if not any(trained for _, trained in tokens):
            raise UserError(
                f"{self._place} renders no assistant tokens, so there is nothing to train",
                place=sample.place,
                remedy="set data.chat_template to a template that renders the assistant's turns",
            )
        eos = self._tokenizer.eos_token_id
        if tokens[-1][0] == eos:
            tokens.pop()
        tokens.append((eos, True))
        return self._fit(
            sample,
            TokenizedSample(
                id=sample.id,
                input_ids=np.array([token for token, _ in tokens], dtype=np.int32),
                labels=np.array(
                    [token if trained else IGNORE_INDEX for token, trained in tokens], dtype=np.int32
                ),
            ),
        )

    def render_prompt(self, sample: Sample) -> str:
        """Return the text before the final response, with its generation prompt."""
        sample = self._with_system(sample)
        return self._text(sample.prompt, sample, generation_prompt=True)

    def _with_system(self, sample: Sample) -> Sample:
        if not self._system_prompt or sample.messages[0].role == "system":
            return sample
        return replace(sample, messages=(Message("system", self._system_prompt), *sample.messages))

    def _fit(self, sample: Sample, tokenized: TokenizedSample) -> TokenizedSample | None:
        n = len(tokenized.input_ids)
        if n <= self.max_length:
            self.counts["rendered"] += 1
            return tokenized
        if self._overlong == "refuse":
            context = self._context_length
            room = "" if context is None else f" to at most {context}, the model's context"
            longer = "" if self.max_length == context else f"raise data.max_length{room}, or "
            raise UserError(
                f"the sample has {n} tokens, data.max_length is {self.max_length}",
                place=sample.place,
                remedy=f'{longer}set data.overlong to "truncate" or "drop"',
            )
        if self._overlong == "truncate":
            ids, labels = (tokens[: self.max_length] for tokens in (tokenized.input_ids, tokenized.labels))
            cut = TokenizedSample(tokenized.id, ids, labels, truncated=True)
            if cut.loss_tokens:
                self.counts["truncated"] += 1
                return cut
        self.counts["dropped"] += 1
        return None

    def _turns(self, sample: Sample) -> tuple[str, list[_Span]]:
        text, spans = self._render(sample.messages, sample.place, sample.tools, marks=self._marks_turns)
        self._check_tools(sample, text)
        return text, spans if self._marks_turns else list(self._prefix_spans(sample, text))

    def _check_tools(self, sample: Sample, text: str) -> None:
        """Refuse a template that does not show the sample's tools: the prompt would be another one."""
        bare = tuple(replace(message, tool_calls=()) for message in sample.messages)
        for field, there, messages, tools in (
            ("tools", bool(sample.tools), sample.messages, ()),
            ("tool_calls", bare != sample.messages, bare, sample.tools),
        ):
            if there and self._render(messages, sample.place, tools)[0] == text:
                raise UserError(
                    f"{self._place} does not show the sample's {field}",
                    place=sample.place,
                    remedy=f"set data.chat_template to one that shows {field}, or remove the {field}",
                )

    def _prefix_spans(self, sample: Sample, text: str) -> Iterator[_Span]:
        for k, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            before = self._text(sample.messages[:k], sample, generation_prompt=True)
            through = self._text(sample.messages[: k + 1], sample)
            body = through.removesuffix(self._closing)
            if not (through.endswith(self._closing) and text.startswith(body) and body.startswith(before)):
                raise self._inexact(sample, k, "renders the turn differently if other turns surround it")
            if _squeeze(message.content) not in _squeeze(body[len(before) :]):
                raise self._inexact(sample, k, "changes its text")
            yield len(before), len(body) + len(self._closing_within(text[len(body) :]))

    def _closing_within(self, rest: str) -> str:
        """Return the part of the end-of-turn marker that `rest` begins with, in complete added tokens.

        A template may write more at the end of the conversation than between turns.
        """
        added = self._tokenizer.get_added_vocab()
        pieces = re.split(f"({'|'.join(map(re.escape, added))})", self._closing) if added else [self._closing]
        matched = ""
        for piece in pieces:
            if not rest.startswith(matched + piece):
                break
            matched += piece
        return matched.rstrip()

    def _inexact(self, sample: Sample, k: int, why: str) -> UserError:
        return UserError(
            f"{self._place} does not show which tokens are assistant turn {k} (counted from 0): it {why}",
            place=sample.place,
            remedy='set data.chat_template to "chatml" or to a Jinja file with {% generation %} around the '
            "assistant's text, or make a sample of each assistant turn",
        )

    def _probe(self) -> str:
        """Render a short conversation, to fail early, and return the text after its last response."""
        turns = (Message("user", "question"), Message("assistant", _PROBE))
        probe = Sample("", turns)
        self._text(turns[:1], probe, generation_prompt=True)
        _, found, closing = self._text(turns, probe).rpartition(_PROBE)
        if not found:
            raise UserError(
                f"{self._place} does not show the assistant's text",
                remedy="set data.chat_template to a template that renders the assistant's turns",
            )
        return closing

    def _text(self, messages: Sequence[Message], sample: Sample, *, generation_prompt: bool = False) -> str:
        return self._render(messages, sample.place, sample.tools, generation_prompt=generation_prompt)[0]

    def _render(
        self,
        messages: Sequence[Message],
        place: str,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[_Span]]:
        from jinja2 import TemplateError

        # apply_chat_template renders with this function. Its own mask (return_assistant_tokens_mask) looks up
        # the tokens of a span's first and last characters. It loses half an emoji at the end of a span, and
        # the complete span if its first character has no token (transformers 5.23).
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # annotated -> str, returns a pair of lists
        try:
            texts, spans = render(
                conversations=[[message.as_dict() for message in messages]],
                tools=list(tools) or None,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise UserError(f"{self._place} refuses the conversation: {error}", place=place) from error
        return texts[0], spans[0] if marks else []


def _resolve(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> str:
    valid = f"valid: {', '.join(_BUILT_IN)}, or the path of a Jinja file"
    if chat_template is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                "the tokenizer has no chat template",
                place="configuration, data.chat_template or backend.chat_template",
                remedy=valid,
            ) from error
    if chat_template in _BUILT_IN:
        adds_bos = tokenizer.bos_token_id in tokenizer("").input_ids
        return ("{{ bos_token }}" if adds_bos else "") + _BUILT_IN[chat_template]
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"unknown chat template {chat_template!r}; as a file: {error}",
            place="configuration, data.chat_template or backend.chat_template",
            remedy=valid,
        ) from error


def _context_length(tokenizer: "PreTrainedTokenizerBase", context_length: int | None) -> int | None:
    if context_length is not None:
        return context_length
    stated = tokenizer.model_max_length
    return None if stated > 1e9 else stated  # transformers writes 1e30 for "unknown"


def _max_length(max_length: int | None, context_length: int | None) -> int:
    if max_length is None:
        return min(context_length or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if context_length is not None and max_length > context_length:
        raise UserError(
            f"{max_length} exceeds the model's context of {context_length} tokens",
            place="data.max_length",
            remedy=f"set it to at most {context_length}",
        )
    return max_length


def _belongs(text: str, offset: _Span, spans: Sequence[_Span]) -> bool:
    start, end = offset
    for a, b in spans:
        if start == end:  # white space, of a byte-level tokenizer that trims offsets
            inside = a < end <= b
        else:
            inside = (a <= start and end <= b) or bool(text[max(start, a) : min(end, b)].strip())
        if inside:
            return True
    return False


def _squeeze(text: str) -> str:
    return "".join(text.split())

"""Render conversations to tokens, with labels for exactly the tokens that the assistant wrote.

A conversation is rendered to text, and the text is tokenized once. A token has a label if its characters
belong to an assistant turn. One of two sources says which characters those are:

- the ``{% generation %}`` blocks of the template, if it has any;
- otherwise prefixes. P_k is the rendering of the messages before turn k and of its generation prompt. T_k is
  the rendering of the messages through turn k. The turn is T_k without P_k: what the model must write after
  this prompt, through its end-of-turn marker. P_k, and T_k through the marker, must be prefixes of the
  complete text; other templates are refused.

If P_k is not a prefix only for the last turn, the complete text is P_k and the turn (`Renderer._behind`).
"""

import copy
import datetime
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ual.data import decision, markers, template
from ual.data.decision import Rendering, Token
from ual.data.markers import Markers
from ual.data.remedies import remedies
from ual.data.template import ChatTemplate, RefusalError, Span
from ual.errors import UserError
from ual.records import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

_DEFAULT_LENGTH = 2048
_PROBE = "probe-5a1f"
_QUESTION = Message("user", "question")


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A rendered sample: `labels` are `input_ids`, with -100 for all tokens but the assistant's.

    `decision` is the position of the token at which options differ, -1 without options. `option_ids` are the
    options' tokens there.
    """

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    truncated: bool = False
    decision: int = -1
    option_ids: tuple[int, ...] = ()

    @property
    def loss_tokens(self) -> int:
        """The number of tokens with a loss. The first token is not predicted, so it never has one."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))

    def deciding(self, options: Mapping[str, float]) -> dict[str, Any]:
        """Return the decision as collators take it, with the options' probabilities; empty without one."""
        if self.decision < 0:
            return {}
        probabilities = list(options.values())
        return {
            "decision": self.decision,
            "option_ids": self.option_ids,
            "option_probabilities": probabilities,
        }


class Renderer:
    """Renders samples with one chat template.

    Every assistant turn is trained, with its end-of-turn marker. The last turn ends with a token that stops
    generation: the first one that the template writes after the response, or else EOS, which is appended.
    The text after it is dropped, since no later token could learn from it. White space after a marker is
    not trained. A stop token directly after a turn is trained, also if a template writes it elsewhere.

    A token that crosses the boundary of a turn belongs to the assistant if it holds more of the turn than
    white space. So the first word of a response is trained if the prompt ends with a space.

    Args:
        tokenizer: a fast one, which knows the characters of each token.
        chat_template: None for the tokenizer's own; ``chatml``; ``plain`` for base models, which is
            ``User: ...``, ``Assistant: ...`` and EOS; or the path of a Jinja file. The built-in templates
            begin with BOS if the tokenizer adds one itself.
        chat_template_kwargs: more variables of the template, such as ``enable_thinking``.
        date: the day that templates read; None for today.
        stop_ids: tokens that stop generation, beside the tokenizer's EOS.
        max_length: the most tokens of a sample; None for min(context, 2048).
        context_length: of the model, in tokens; None for the tokenizer's, if it has one.
        overlong: ``refuse``; ``truncate`` to the first `max_length` tokens, without EOS, or drop the sample
            if none of them is the assistant's, or if its decision is not among them; or ``drop``.
        system_prompt: the system turn of conversations that have none.
        train_on: ``all`` assistant turns, or only the ``last`` one.
        undecided: ``refuse`` or ``drop`` a sample whose options have no decision token.

    Attributes:
        max_length: the limit in use.
        template: the chat template in use.
        opening: the generation prompt of a short conversation.
        fingerprint: a hash of everything but the conversation that decides its tokens.
        counts: the number of samples that were "rendered" (completely), "truncated", "dropped" for their
            length, and "undecided" and therefore dropped, so far.

    Raises:
        UserError: the tokenizer has no offsets, no EOS or no template; the template is unknown or broken, or
            has no such variable; `max_length` exceeds the context.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        stop_ids: Collection[int] = (),
        max_length: int | None = None,
        context_length: int | None = None,
        overlong: Literal["refuse", "truncate", "drop"] = "refuse",
        system_prompt: str | None = None,
        train_on: Literal["all", "last"] = "all",
        undecided: Literal["refuse", "drop"] = "refuse",
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
        self.tokenizer = tokenizer
        self._markers = Markers(tokenizer, {tokenizer.eos_token_id, *stop_ids})
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs, date)
        self._context_length = _context_length(tokenizer, context_length)
        self.max_length = _max_length(max_length, self._context_length)
        self._overlong = overlong
        self._system_prompt = system_prompt
        self.train_on = train_on
        self._undecided = undecided
        self.counts: Counter[str] = Counter()
        self._probe()

    def using(self, template: ChatTemplate, train_on: Literal["all", "last"] | None = None) -> "Renderer":
        """Return the renderer with another template, or for other turns.

        Raises:
            UserError: the template is broken.
        """
        other = copy.copy(self)
        other.template, other.train_on = template, train_on or self.train_on
        other._probe()
        return other

    @property
    def fingerprint(self) -> str:
        made_by = self.template.made_by | {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "stop": sorted(self._markers.stop_ids),
            "options": [
                self.max_length,
                self._overlong,
                self._system_prompt,
                self.train_on,
                self._undecided,
            ],
            "code": [
                Path(f).read_text("utf-8")
                for f in (__file__, decision.__file__, markers.__file__, template.__file__)
            ],
            "versions": [importlib.metadata.version(p) for p in ("transformers", "tokenizers")],
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def render(self, sample: Sample) -> TokenizedSample | None:
        """Return the sample's tokens and labels, or None if it is dropped.

        Raises:
            UserError: the template refuses the conversation, does not show a part of it or exactly which
                characters are the assistant's; the sample is too long, and `overlong` is "refuse"; or its
                options have no decision (`ual.data.decision.find`).
        """
        rendered = self._rendered(sample)
        tokens, decided = rendered.tokens, decision.Decision(-1, ())
        if len(sample.options) > 1:
            each = {
                option: rendered if option == sample.response else self._rendered(_saying(sample, option))
                for option in sample.options
            }
            try:
                decided = decision.find(each, sample.place)
            except decision.UndecidedError:
                if self._undecided == "refuse":
                    raise
                self.counts["undecided"] += 1
                return None
        return self._fit(
            sample,
            TokenizedSample(
                id=sample.id,
                input_ids=np.array([token.id for token in tokens], dtype=np.int32),
                labels=np.array(
                    [token.id if token.trained else IGNORE_INDEX for token in tokens], dtype=np.int32
                ),
                decision=decided.position,
                option_ids=decided.ids,
            ),
        )

    def _rendered(self, sample: Sample) -> Rendering:
        whole = self._with_system(sample)
        try:
            text, spans = self.turns(whole)
            if sample.options and not text.endswith(self._closing):
                raise RefusalError("ends this response otherwise than that of a short conversation")
            end = len(text.removesuffix(self._closing).rstrip())
            return Rendering(self._tokens(text, spans), end)
        except RefusalError as refused:
            raise self._error(refused, whole) from refused

    def render_prompt(self, sample: Sample) -> str:
        """Return the text before the final response, with its generation prompt.

        Raises:
            UserError: the template refuses the conversation.
        """
        sample = self._with_system(sample)
        try:
            return self._prompt(sample, len(sample.messages) - 1)
        except RefusalError as refused:
            raise self._error(refused, sample) from refused

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
            cut = replace(tokenized, input_ids=ids, labels=labels, truncated=True)
            if cut.loss_tokens and cut.decision < len(ids):
                self.counts["truncated"] += 1
                return cut
        self.counts["dropped"] += 1
        return None

    def _error(self, refused: RefusalError, sample: Sample) -> UserError:
        return UserError(
            f"{self.template.place} {refused}",
            place=sample.place,
            remedy=", or ".join(remedies(self, sample)) or "change or remove the sample",
        )

    def _tokens(self, text: str, spans: Sequence[Span]) -> list[Token]:
        """Return every token. The last one stops generation."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        trained = [_belongs(text, offset, spans) for offset in offsets]
        if not any(trained):
            raise RefusalError("renders no assistant tokens, so there is nothing to train")
        stops = self._markers.stop_ids
        for i in range(1, len(ids)):
            trained[i] |= trained[i - 1] and ids[i] in stops and ids[i - 1] not in stops
        last = max(i for i, belongs in enumerate(trained) if belongs)
        end = max([len(text.rstrip()), *(b for _, b in spans)])
        kept = [i for i, (a, b) in enumerate(offsets) if a < end or b == end]
        stop = next((i for i in range(last, len(ids)) if ids[i] in stops), kept[-1])
        if text[spans[-1][1] : offsets[stop][0]].strip():  # of another turn
            stop = kept[-1]
        if ids[stop] in stops:
            trained[stop] = True
            return [Token(ids[i], trained[i], offsets[i][0]) for i in range(stop + 1)]
        tokens = [Token(ids[i], trained[i], offsets[i][0]) for i in kept]
        return [*tokens, Token(self.tokenizer.eos_token_id, True, len(text))]

    def _text(self, sample: Sample, count: int) -> str:
        """Return the text of the first messages."""
        return self.template.render(sample.messages[:count], sample.tools)[0]

    def _prompt(self, sample: Sample, count: int) -> str:
        """Return the text of the first messages, and of the generation prompt after them."""
        if not count:
            raise _inexact(0, "no message is before it, so inference has no prompt for it")
        return self.template.render(sample.messages[:count], sample.tools, generation_prompt=True)[0]

    def turns(self, sample: Sample) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the characters of the assistant turns to train.

        Raises:
            RefusalError: the template does not show them.
        """
        self.template.check_shown(sample)
        turns = _assistant(sample)[-1:] if self.train_on == "last" else _assistant(sample)
        if self.template.marks_turns:
            return self._marked(sample, turns)
        return self._between_prefixes(sample, turns)

    def _marked(self, sample: Sample, turns: Sequence[int]) -> tuple[str, list[Span]]:
        text, blocks = self.template.render(sample.messages, sample.tools)
        found: list[Span] = []
        for k, of_turn in self._by_turn(sample, text, blocks).items():
            if k in turns and of_turn:
                message = sample.messages[k]
                begin, end = of_turn[0][0], of_turn[-1][1]
                region = text[max(begin - len(self.opening), 0) : end]
                _check_said(message, k, region)
                begin += self._of_prompt(text, begin)
                *before, (start, end) = self._through_stop(text, of_turn, message)
                spans = [*before, (start, start + self._markers.end_of_block(text[start:end], message))]
                found += [(max(a, begin), b) for a, b in spans if b > begin]
        return text, found

    def _through_stop(self, text: str, blocks: Sequence[Span], message: Message) -> list[Span]:
        """Return the blocks of a turn without those after its stop token, in which a template repeats EOS."""
        said = _squeeze(message.content)
        for i, (start, end) in enumerate([] if message.tool_calls else blocks, start=1):
            shown = _squeeze(text[blocks[0][0] : end])
            if said in shown and self._markers.stops(self._markers.trailing(text[start:end])):
                return list(blocks[:i])
        return list(blocks)

    def _of_prompt(self, text: str, start: int) -> int:
        """Return the number of characters at the start of a block that belong to the generation prompt."""
        opened = text.startswith(self.opening, start + self._marked_opening - len(self.opening))
        return self._marked_opening if opened else 0

    def _by_turn(self, sample: Sample, text: str, blocks: Sequence[Span]) -> dict[int, list[Span]]:
        """Return the blocks of each assistant turn. A template may write several in a turn, or none."""
        turns = _assistant(sample)
        if len(blocks) == len(turns):
            return {k: [block] for k, block in zip(turns, blocks, strict=True)}
        starts = [_common(text, self._text(sample, k)) if k else 0 for k in turns]
        found: dict[int, list[Span]] = {k: [] for k in turns}
        for block in blocks:
            found[turns[max(sum(start <= block[0] for start in starts) - 1, 0)]].append(block)
        return found

    def _between_prefixes(self, sample: Sample, turns: Sequence[int]) -> tuple[str, list[Span]]:
        final = len(sample.messages) - 1
        text, prompt = self._text(sample, final + 1), self._prompt(sample, final)
        if final in turns and not text.startswith(prompt):
            text = self._behind(prompt, sample, text)
        spans = []
        for k in turns:
            before = prompt if k == final else self._prompt(sample, k)
            through = text if k == final else self._text(sample, k + 1)
            spans.append(self._span(sample.messages[k], k, before, through, text))
        return text, spans

    def _span(self, message: Message, k: int, before: str, through: str, text: str) -> Span:
        """Return the characters of turn k in `text`: after `before`, to where `through` ends."""
        closing = self._markers.trailing(through) if message.tool_calls else self._closing
        body = through.removesuffix(closing)
        if not (through.endswith(closing) and text.startswith(body) and body.startswith(before)):
            raise _inexact(k, "it renders the turn differently if other turns surround it")
        closed = self._markers.shared(closing, text[len(body) :])
        if self._markers.any_in(closing) and not self._markers.any_in(closed):
            raise _inexact(k, "it renders the turn differently if other turns follow")
        opening = len(self.opening) if before.endswith(self.opening) else 0
        _check_said(message, k, body[len(before) - opening :])
        return len(before), len(body) + self._markers.end(closed)

    def _behind(self, before: str, sample: Sample, text: str) -> str:
        """Return the prompt of the last turn, and the turn, for a template that renders them otherwise.

        The template either renders earlier turns otherwise in a prompt, or drops the reasoning that its
        prompts open. Then the turn is what it is without earlier turns, or the rest of the response, which
        begins as the prompt ends.
        """
        turn = self._alone(sample)
        if turn is not None and text.endswith(turn):
            return before + turn
        response = sample.response.lstrip()
        for i in range(len(self.opening)):
            opened = self.opening[i:]
            tag, begun = opened.strip(), before.removesuffix(opened)
            if tag and response.startswith(tag) and begun != before and text.startswith(begun):
                rest = response.removeprefix(tag).removeprefix(opened[len(opened.rstrip()) :])
                if text.endswith(self._closing):
                    return before + rest + self._closing
        raise _inexact(
            len(sample.messages) - 1,
            f"it renders the turn differently after its generation prompt, {self.opening!r}",
        )

    def _alone(self, sample: Sample) -> str | None:
        """Return the last turn as it is after the prompt of a short conversation, if it is after one."""
        short = replace(sample, messages=(_QUESTION, sample.messages[-1]))
        try:
            before, text = self._prompt(short, 1), self._text(short, 2)
        except RefusalError:
            return None
        return text.removeprefix(before) if text.startswith(before) else None

    def _probe(self) -> None:
        """Render a short conversation, to fail early. Find the generation prompt, and the end of a turn."""
        probe = Sample("", (_QUESTION, Message("assistant", _PROBE)))
        try:
            prompt, alone = self._prompt(probe, 1), self._text(probe, 1)
            text, blocks = self.template.render(probe.messages, probe.tools)
        except RefusalError as refused:
            raise UserError(f"{self.template.place} {refused}") from refused
        self.opening = prompt[_common(prompt, alone) :]
        inside = len(prompt) - blocks[0][0] if blocks and text.startswith(prompt) else 0
        self._marked_opening = max(inside, 0)
        _, found, self._closing = text.rpartition(_PROBE)
        if not found:
            raise UserError(
                f"{self.template.place} does not show the assistant's text",
                remedy="set data.chat_template to a template that renders the assistant's turns",
            )


def _saying(sample: Sample, text: str) -> Sample:
    """Return the sample with another text as its response."""
    return replace(sample, messages=(*sample.prompt, replace(sample.messages[-1], content=text)))


def _common(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _assistant(sample: Sample) -> list[int]:
    return [k for k, message in enumerate(sample.messages) if message.role == "assistant"]


def _check_said(message: Message, k: int, region: str) -> None:
    squeezed = _squeeze(region)
    if _squeeze(message.content) not in squeezed:
        raise _inexact(k, "it changes its text")
    if "<think>" in message.content and region.count("<think>") > message.content.count("<think>"):
        raise RefusalError(f"writes another reasoning before that of assistant turn {k} (counted from 0)")
    if _squeeze(message.reasoning_content) not in squeezed:
        raise RefusalError(f"does not show the reasoning_content of assistant turn {k} (counted from 0)")


def _inexact(k: int, why: str) -> RefusalError:
    return RefusalError(f"does not show which tokens are assistant turn {k} (counted from 0): {why}")


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


def _belongs(text: str, offset: Span, spans: Sequence[Span]) -> bool:
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

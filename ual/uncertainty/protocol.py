"""The interface between estimators and backends: requests, replies, and the base class of estimators.

An estimator gets one sample and a function that sends requests. The reply may come from an endpoint, a model
on this machine, a batch file or the cache. A backend gets requests and knows nothing of samples.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty import thinking

Task = Literal["generate", "score", "entail"]

SHOWN = 2000  # characters of a model's text that a record keeps as evidence
NO_ANSWER: Final = "no answer within the token limit"
_CUT_OFF = {"length", "max_tokens", "model_length", "max_output_tokens"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a model: everything that determines the reply, except the model itself.

    Attributes:
        task: "generate" continues the conversation. "score" reads the probabilities of its last turn.
            "entail" asks whether the first message entails the second.
        top_logprobs: alternatives per token, 0 for none.
        draw: distinguishes several replies to one prompt, and is added to the seed.
        json_schema: requests structured output.
        retry: how often a reply to this request reached a lower limit before its answer.
    """

    messages: tuple[Message, ...]
    task: Task = "generate"
    max_tokens: int = 16
    temperature: float = 0.0
    top_logprobs: int = 0
    draw: int = 0
    json_schema: Mapping[str, Any] | None = None
    retry: int = 0

    @property
    def size(self) -> int:
        """Bytes of text: an upper bound on the tokens of a byte-level tokenizer."""
        return sum(len(message.content.encode("utf-8", "replace")) + 16 for message in self.messages)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, its log-probability if known, and the likeliest tokens in its place with theirs."""

    text: str
    log_prob: float | None
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A backend's answer to a request.

    Attributes:
        text: as generated; None for a refusal. The answer may follow reasoning in ``<think>`` tags.
        finish_reason: "length" if the text is truncated; other servers have other words.
        tokens: the generated tokens, if `top_logprobs` requested them.
        scores: for "score", see `estimators.white_box.summary`; for "entail", the probabilities of
            "entailment", "neutral" and "contradiction".
        reasoning: what the server returned apart from the text.
    """

    text: str | None
    finish_reason: str = "stop"
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scores: Mapping[str, float] | None = None
    reasoning: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason.lower() in _CUT_OFF

    @property
    def answer(self) -> str | None:
        """The text without reasoning; None for a refusal."""
        return None if self.text is None else thinking.split(self.text)[1]

    @property
    def answer_tokens(self) -> tuple[Token, ...]:
        """The tokens of the answer; none if only the reasoning was generated."""
        if self.reasoning and not (self.answer or "").strip():
            return ()
        return self.tokens[thinking.answer_begins([token.text for token in self.tokens]) :]

    @property
    def unanswered(self) -> bool:
        """Whether the token limit was reached before the answer began."""
        return self.truncated and self.answer is not None and not (self.answer.strip() or self.answer_tokens)

    @property
    def complete(self) -> str | None:
        """The answer without surrounding white space; None for a refused, empty or truncated reply."""
        return None if self.truncated else (self.answer or "").strip() or None

    @property
    def shown(self) -> str | None:
        """The answer as evidence keeps it."""
        return None if self.answer is None else self.answer[:SHOWN]

    @property
    def evidence(self) -> dict[str, Any]:
        """The answer and the reasoning, if any, as evidence keeps them."""
        reasoning = self.reasoning or thinking.split(self.text or "")[0]
        return {"reply": self.shown} | ({"reasoning": reasoning[:SHOWN]} if reasoning else {})

    def dump(self) -> str:
        """Return JSON from which `parse` restores an equal reply."""
        raw = asdict(self)
        if not self.reasoning:
            del raw["reasoning"]
        return json.dumps(raw, separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> "Reply":
        raw = json.loads(text)
        tokens = tuple(
            Token(t["text"], t["log_prob"], tuple((a, p) for a, p in t["alternatives"]))
            for t in raw.pop("tokens")
        )
        return cls(**raw, tokens=tokens)


class RequestError(Exception):
    """A request failed for good. The sample gets no value; the run continues.

    Args:
        problem: the reason.
        own: the request itself is at fault, such as one that is too long; others may succeed.
        body: a reply that the server sent and that cannot be read.
    """

    reason: ClassVar[str] = "request failed"

    def __init__(self, problem: str, *, own: bool = False, body: str | None = None) -> None:
        super().__init__(problem)
        self.own, self.body = own, body


class NotRecordedError(RequestError):
    """Nothing is sent, and the cache has no reply."""

    reason = "no reply in the cache"


Ask = Callable[[Request], Awaitable[Reply]]
"""Where an estimator sends its requests."""


class Backend(Protocol):
    """Answers requests.

    `identity` holds what, besides the request, determines a reply: model, address, precision. It is part of
    the cache's key and holds no secrets.
    """

    identity: Mapping[str, Any]
    tasks: frozenset[Task]

    async def __call__(self, request: Request) -> Reply: ...

    async def drain(self, seconds: float) -> None:
        """Send nothing more, and wait for the replies to requests that were sent."""

    async def close(self) -> None: ...


class Estimator(BaseModel):
    """Base class of estimators; the fields of a subclass are its options in the configuration.

    A subclass defines `name`, a Literal, and `estimate`. `label` names the results, and distinguishes two
    uses of one estimator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str = Field(default_factory=lambda data: data["name"])

    needs: ClassVar[frozenset[Task]] = frozenset({"generate"})
    """What the backends must be able to do."""
    rates: ClassVar[Literal["response", "question"]] = "response"
    """What must be there: samples need no response if all estimators rate the question."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Entries of the evidence that become columns of the samples; null where there is none."""

    @property
    def needs_logprobs(self) -> bool:
        """Whether there is no value without token log-probabilities."""
        return False

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        """Return the sample's record: a finite value or None, and evidence. Larger is more uncertain.

        Raises:
            RequestError: a request failed for good.
        """
        raise NotImplementedError

    def no_value(self, sample: Sample, reason: str | None, **evidence: Any) -> Elicited:
        """Return a record without a value, with the reason in the evidence."""
        return Elicited(sample.id, self.label, None, evidence | {"unparsed": reason})


def key(identity: Mapping[str, Any], request: Request) -> bytes:
    """Return the SHA-256 of everything that determines a reply."""
    raw = asdict(request)
    if not request.retry:
        del raw["retry"]
    text = json.dumps([identity, raw], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def conversation(messages: tuple[Message, ...]) -> str:
    """Return a conversation as text, to be quoted in a prompt; a single user turn has no role label."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)

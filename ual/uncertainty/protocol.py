"""What an estimator may ask, what it gets back, and who answers: the seam between estimators and backends.

An estimator sees one sample and an `Ask`; it does not know whether an endpoint, a model on this machine, a
batch file or the cache answers. A backend sees requests and knows nothing of samples.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from ual.records import Elicited, Message, Sample

Task = Literal["generate", "score", "entail"]

SHOWN = 2000  # characters of a model's text that a record keeps as evidence


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model, with everything that determines its answer but the model itself.

    `task` "generate" continues the conversation; "score" reads the probabilities of its last, given turn;
    "entail" asks whether the first message entails the second.
    `top_logprobs` asks for that many alternatives per token, 0 for none. `draw` tells several answers to one
    question apart, and moves the seed. `json_schema` asks the server for structured output.
    """

    messages: tuple[Message, ...]
    task: Task = "generate"
    max_tokens: int = 16
    temperature: float = 0.0
    top_logprobs: int = 0
    draw: int = 0
    json_schema: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of text, which no byte-level tokenizer turns into more tokens."""
        return sum(len(message.content.encode("utf-8", "replace")) + 16 for message in self.messages)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, its log-probability, and those of the likeliest alternatives, itself among them."""

    text: str
    log_prob: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the text (None for a refusal), why it ended, its tokens where asked, and its size.

    `scores` answers the tasks "score" (`estimators.white_box.summary`) and "entail" (the probabilities of
    "entailment", "neutral" and "contradiction").
    """

    text: str | None
    finish_reason: str = "stop"
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scores: Mapping[str, float] | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def complete(self) -> str | None:
        """The text without surrounding white space; None for a refused, empty or truncated reply."""
        return None if self.truncated else (self.text or "").strip() or None

    @property
    def shown(self) -> str | None:
        """The text as evidence keeps it."""
        return None if self.text is None else self.text[:SHOWN]

    def dump(self) -> str:
        """Return JSON that `parse` reads back to an equal reply."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> "Reply":
        raw = json.loads(text)
        tokens = tuple(
            Token(t["text"], t["log_prob"], tuple((a, p) for a, p in t["alternatives"]))
            for t in raw.pop("tokens")
        )
        return cls(**raw, tokens=tokens)


class RequestError(Exception):
    """One request failed for good; the sample gets no value, the run goes on."""


Ask = Callable[[Request], Awaitable[Reply]]
"""Where an estimator sends its requests."""


class Backend(Protocol):
    """Something that answers requests.

    `identity` holds what, besides the request, determines a reply: model, address, precision. It is part of
    the cache's key, and shows in reports: no secrets.
    """

    identity: Mapping[str, Any]
    tasks: frozenset[Task]

    async def __call__(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class Estimator(BaseModel):
    """Base of the estimators that ask: the fields of a subclass are its options in the configuration.

    A subclass has a `name` and `estimate`; `label` names its column where one estimator is used twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, options: Any) -> Any:
        return {"label": options.get("name"), **options} if isinstance(options, dict) else options

    @property
    def needs(self) -> frozenset[Task]:
        """What the backend must be able to do."""
        return frozenset({"generate"})

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        """Return the sample's record: a finite value, larger being more uncertain, or None; and evidence.

        Raises:
            RequestError: a request failed for good.
        """
        raise NotImplementedError

    def no_value(self, sample: Sample, reason: str | None, **evidence: Any) -> Elicited:
        """Return a record without a value, with the reason in the evidence."""
        return Elicited(sample.id, self.label, None, evidence | {"unparsed": reason})


def key(identity: Mapping[str, Any], request: Request) -> bytes:
    """Return the SHA-256 of everything that determines a reply."""
    text = json.dumps([identity, asdict(request)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def conversation(messages: tuple[Message, ...]) -> str:
    """Write a conversation as text, to be quoted in a prompt; a lone user turn stands by itself."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)

"""Records that all packages of `ual` share. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `tool_calls` are an assistant's calls: ``{"type": "function", "function": {"name", "arguments"}}`` with
    the arguments as a mapping. `name` and `tool_call_id` say which tool answers which call.
    `reasoning_content` is what the assistant thinks before its response.
    """

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the turn for a chat template, without empty fields."""
        extra = {
            "tool_calls": list(self.tool_calls),
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        return {"role": self.role, "content": self.content} | {k: v for k, v in extra.items() if v}


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample: a conversation that ends with the assistant's response.

    `uncertainty` is in the data set's units; `label_smoothing` in [0, 1] overrides the value derived from it;
    `sample_weight` >= 0 multiplies the sample's loss. `source` groups samples in tables; `place` is where the
    sample was read (``train.jsonl, line 7``); `tools` are JSON schemas of what the assistant may call.
    `options` are the texts that the response could be, each with its probability as a target. Without a label
    distribution, the response has probability 1 and the others 0. They are empty unless the run uses them.
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    uncertainty: float | None = None
    label_smoothing: float | None = None
    sample_weight: float = 1.0
    place: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the final response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the final assistant turn."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to the same question; `value` is None if it could not be parsed."""

    question_id: str
    text: str
    value: str | None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Elicited:
    """An estimator's result for one sample; `value` is None if there is none."""

    sample_id: str
    estimator: str
    value: float | None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with the loss's inputs: scaled uncertainty in [0, 1], smoothing and weight."""

    sample: Sample
    uncertainty: float | None
    scaled_uncertainty: float | None
    label_smoothing: float
    sample_weight: float

"""The values that every floor of `ual` speaks. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    An assistant's turn may call tools (each call a mapping as chat templates know it), a tool's turn may say
    who it is and which call it answers.
    """

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as a chat template takes it; what it does not have is left out."""
        extra = {"tool_calls": list(self.tool_calls), "name": self.name, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": self.content} | {k: v for k, v in extra.items() if v}


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row: a conversation that ends with the assistant's response.

    `uncertainty` is whatever the data set says, in its own units; `label_smoothing` in [0, 1] overrides
    what would be derived from the uncertainty; `sample_weight` >= 0 multiplies the sample's loss.
    `source` groups rows in tables; `place` says where the row came from (``train.jsonl, line 7``); `tools`
    are the JSON schemas of what the assistant may call, which the chat template shows it.
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    uncertainty: float | None = None
    label_smoothing: float | None = None
    sample_weight: float = 1.0
    place: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the final response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the final assistant turn."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to the same question; `value` is None where it could not be parsed."""

    question_id: str
    text: str
    value: str | None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Elicited:
    """An estimator's verdict on one sample; `value` is None where none could be obtained."""

    sample_id: str
    estimator: str
    value: float | None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with everything the loss needs: its scaled uncertainty in [0, 1], smoothing and weight."""

    sample: Sample
    uncertainty: float | None
    scaled_uncertainty: float | None
    label_smoothing: float
    sample_weight: float

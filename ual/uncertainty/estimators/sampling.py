"""Several answers of a model to one question, and what they come to: shared by the estimators that sample."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ual.methods import reliability
from ual.methods.answers import normalize
from ual.records import Elicited, Message
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import SHOWN, Ask, Estimator, Reply, Request

Extract = Literal["text", "last_line", "last_number"]

_KEPT = 200  # characters of each distinct answer that evidence keeps


class SamplingEstimator(Estimator):
    """Base of the estimators that draw answers; its fields are their shared options."""

    samples: Annotated[int, Field(ge=2, le=100)] = 10
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 512

    async def draw(self, prompt: tuple[Message, ...], ask: Ask) -> list[Reply]:
        """Ask `samples` times; equal requests of other estimators share the answers."""
        requests = [
            Request(prompt, max_tokens=self.max_tokens, temperature=self.temperature, draw=i)
            for i in range(self.samples)
        ]
        return list(await asyncio.gather(*map(ask, requests)))


def extract(reply: Reply, how: Extract) -> str | None:
    """Return the answer in a reply as it is compared; None for refusals, empty and cut-off replies."""
    if not reply.text or reply.truncated:
        return None
    if how == "last_number":
        return normalize(parsing.last_number(reply.text))
    return normalize(reply.text if how == "text" else reply.text.strip().rpartition("\n")[2])


def entropy_record(
    sample_id: str,
    name: str,
    answers: Sequence[str | None],
    unparsed: reliability.Unparsed,
    evidence: dict[str, Any],
) -> Elicited:
    """Return the record of the entropy of answers, in nats; without a value where none could be read.

    `unparsed` is METHODS' choice: all of them are one more class, or one of them leaves no value.
    """
    missing = sum(answer is None for answer in answers)
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer[:_KEPT]] = counts.get(answer[:_KEPT], 0) + 1
    evidence |= {"answers": counts, "unparsed_answers": missing}
    if missing == len(answers) or (missing and unparsed == "drop_question"):
        return Elicited(
            sample_id, name, None, evidence | {"unparsed": f"{missing} of {len(answers)} answers"}
        )
    return Elicited(sample_id, name, reliability.entropy(answers, unparsed=unparsed), evidence)


def first_unparsed(replies: Sequence[Reply], answers: Sequence[str | None]) -> dict[str, Any]:
    """Return the raw text of the first reply that could not be read, as evidence."""
    for reply, answer in zip(replies, answers, strict=True):
        if answer is None:
            return {"first_unparsed": None if reply.text is None else reply.text[:SHOWN]}
    return {}

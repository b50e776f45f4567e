"""The entropy of several answers to one question: shared by the estimators that sample or paraphrase."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ual.methods import reliability
from ual.methods.answers import normalize
from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import NO_ANSWER, Ask, Estimator, Reply, Request

Extract = Literal["text", "last_line", "last_number"]

_KEPT = 200  # characters of each distinct answer that evidence keeps


class EntropyEstimator(Estimator):
    """Base of the estimators whose value is the entropy of several answers to one question."""

    rates: ClassVar[Literal["response", "question"]] = "question"
    max_tokens: Annotated[int, Field(ge=1)] = 512
    unparsed: reliability.Unparsed = Field(
        "class", description="unreadable answers are one more class, or a question with one has no value"
    )

    def entropy(
        self, sample: Sample, replies: Sequence[Reply], answers: Sequence[str | None], **evidence: Any
    ) -> Elicited:
        """Return the entropy of the answers, in nats; no value if no answer could be read.

        Args:
            sample: the sample that the question is from.
            replies: [n], for the raw text of the first one that could not be read.
            answers: [n], as they are compared; None for a reply that could not be read.
            evidence: added to the answers' counts.
        """
        missing = answers.count(None)
        if missing:
            first = replies[answers.index(None)]
            evidence = first.evidence | {"first_unparsed": first.shown} | evidence
            evidence.pop("reply")
        counts = Counter(answer[:_KEPT] for answer in answers if answer is not None)
        evidence |= {"answers": dict(counts), "unparsed_answers": missing}
        if missing == len(answers) or (missing and self.unparsed == "drop_question"):
            unanswered = all(reply.unanswered for reply in replies)
            why = NO_ANSWER if unanswered else f"{missing} of {len(answers)} answers"
            return self.no_value(sample, why, **evidence)
        value = reliability.entropy(answers, unparsed=self.unparsed)
        return Elicited(sample.id, self.label, value, evidence)


class SamplingEstimator(EntropyEstimator):
    """Base of the estimators that sample answers to a prompt."""

    samples: Annotated[int, Field(ge=2, le=100)] = 10
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0

    async def draw(self, prompt: tuple[Message, ...], ask: Ask) -> list[Reply]:
        """Return `samples` replies; equal requests of other estimators share them."""
        requests = [
            Request(prompt, max_tokens=self.max_tokens, temperature=self.temperature, draw=i)
            for i in range(self.samples)
        ]
        return await asyncio.gather(*map(ask, requests))


def extract(reply: Reply, how: Extract) -> str | None:
    """Return the answer in a reply as it is compared; None for a refused, empty or truncated reply."""
    text = reply.complete
    if text is None:
        return None
    if how == "last_number":
        return normalize(parsing.last_number(text))
    return normalize(text if how == "text" else text.rpartition("\n")[2])

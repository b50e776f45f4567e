"""Entropy of several sampled answers, alike where equal after normalization (arXiv 2203.11171)."""

from typing import Literal

from pydantic import Field

from ual.methods import reliability
from ual.records import Elicited, Sample
from ual.uncertainty.estimators.sampling import (
    Extract,
    SamplingEstimator,
    entropy_record,
    extract,
    first_unparsed,
)
from ual.uncertainty.protocol import Ask


class SelfConsistency(SamplingEstimator):
    """u = -sum (n_c / M) ln(n_c / M) over the clusters of M answers, in nats: a property of the question.

    It asks the sample's prompt and does not look at its response; the evidence holds the answers.
    """

    name: Literal["self_consistency"] = "self_consistency"
    answer: Extract = Field("last_line", description="what is compared: text, last_line or last_number")
    unparsed: reliability.Unparsed = Field("class", description="what unreadable answers are")

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        replies = await self.draw(sample.prompt, ask)
        answers = [extract(reply, self.answer) for reply in replies]
        evidence = first_unparsed(replies, answers)
        return entropy_record(sample.id, self.label, answers, self.unparsed, evidence)

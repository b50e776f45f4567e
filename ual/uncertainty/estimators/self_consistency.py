"""Entropy of several sampled answers, compared after normalization (arXiv 2203.11171)."""

from typing import Literal

from pydantic import Field

from ual.records import Elicited, Sample
from ual.uncertainty.estimators.sampling import Extract, SamplingEstimator, extract
from ual.uncertainty.protocol import Ask


class SelfConsistency(SamplingEstimator):
    """u = -sum (n_c / M) ln(n_c / M) over the clusters of M answers, in nats.

    The value is a property of the question: the sample's response is not used. The evidence holds the
    answers.
    """

    name: Literal["self_consistency"] = "self_consistency"
    answer: Extract = Field("last_line", description="what is compared: text, last_line or last_number")

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        replies = await self.draw(sample.prompt, ask)
        return self.entropy(sample, replies, [extract(reply, self.answer) for reply in replies])

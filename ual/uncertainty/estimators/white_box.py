"""Uncertainty read off a model's own probabilities of the given response (METHOD A, estimator 6)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ual.records import Elicited, Sample
from ual.uncertainty.protocol import Ask, Estimator, Request, Task


class ResponseScores(Protocol):
    """Per-token scores of one response; see `ual.models.score.TokenScores`."""

    @property
    def sample_id(self) -> str: ...
    @property
    def log_prob(self) -> NDArray[np.float64]: ...
    @property
    def entropy(self) -> NDArray[np.float64]: ...
    @property
    def margin(self) -> NDArray[np.float64]: ...


def summary(scores: ResponseScores) -> dict[str, float]:
    """Return the response's mean NLL (the log of its perplexity), entropies and margin, in nats per token."""
    return {
        "nll": float(-scores.log_prob.mean()),
        "tokens": len(scores.log_prob),
        "mean_entropy": float(scores.entropy.mean()),
        "max_entropy": float(scores.entropy.max()),
        "mean_margin": float(scores.margin.mean()),
    }


def estimate(samples: Sequence[Sample], scores: Iterable[ResponseScores]) -> Iterator[Elicited]:
    """Yield each sample's mean negative log-likelihood (nats per token), for training.

    Token counts, entropies and margin are the evidence. A sample without scores gets None.
    """
    missing = {sample.id for sample in samples}
    for of_response in scores:
        if not len(of_response.log_prob):
            continue
        missing.discard(of_response.sample_id)
        evidence = summary(of_response)
        yield Elicited(of_response.sample_id, "white_box", evidence.pop("nll"), evidence)
    for sample_id in sorted(missing):
        yield Elicited(sample_id, "white_box", None)


class WhiteBox(Estimator):
    """u = one figure of a model's own probabilities of the response: `measure` says which.

    A large margin is certainty, so that u = -mean_margin.
    """

    name: Literal["white_box"] = "white_box"
    measure: Literal["nll", "mean_entropy", "max_entropy", "mean_margin"] = Field(
        "nll", description="nll is the log of the perplexity"
    )

    @property
    def needs(self) -> frozenset[Task]:
        return frozenset({"score"})

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        scores = (await ask(Request(sample.messages, task="score"))).scores
        if scores is None:
            return self.no_value(sample, "the response has no token to score")
        sign = -1 if self.measure == "mean_margin" else 1
        return Elicited(sample.id, self.label, sign * scores[self.measure], dict(scores))

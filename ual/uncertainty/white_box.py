"""Uncertainty read off a model's own probabilities of the given response (METHOD A, estimator 6)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ual.records import Elicited, Sample
from ual.uncertainty.asking import Ask, AskingEstimator, Request, Task


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


class WhiteBox:
    """Mean negative log-likelihood of the response's tokens, nats per token: the log of its perplexity.

    For `ual train`, which scores all rows with the model that it has loaded; `WhiteBoxAsked` is for `ual
    elicit`.

    Args:
        score: gives the per-token scores of responses under the base model; samples that it leaves out (too
            long, dropped) get None.
    """

    name = "white_box"

    def __init__(self, score: Callable[[Sequence[Sample]], Iterable[ResponseScores]]) -> None:
        self._score = score

    def estimate(self, samples: Sequence[Sample]) -> Iterator[Elicited]:
        """Yield one record per sample, with token counts, entropies and margin as evidence."""
        missing = {sample.id for sample in samples}
        for scores in self._score(samples):
            if not len(scores.log_prob):
                continue
            missing.discard(scores.sample_id)
            evidence = summary(scores)
            yield Elicited(scores.sample_id, self.name, evidence.pop("nll"), evidence)
        for sample_id in sorted(missing):
            yield Elicited(sample_id, self.name, None)


class WhiteBoxAsked(AskingEstimator):
    """The same from a backend that can score: `measure` says which of the summary's values is u.

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
            return Elicited(sample.id, self.label, None, {"unparsed": "the response has no token to score"})
        value = scores[self.measure]
        return Elicited(
            sample.id, self.label, -value if self.measure == "mean_margin" else value, dict(scores)
        )

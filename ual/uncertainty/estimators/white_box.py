"""Uncertainty from a model's probabilities of the given response (METHOD A, estimator 6)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ual.records import Elicited, Sample
from ual.uncertainty.protocol import Ask, Estimator, Request, Task

if TYPE_CHECKING:
    from ual.models.score import TokenScores


def summary(scores: "TokenScores") -> dict[str, float]:
    """Return the response's mean NLL (log perplexity), entropies and margin, in nats per token."""
    return {
        "nll": float(-scores.log_prob.mean()),
        "tokens": len(scores.log_prob),
        "mean_entropy": float(scores.entropy.mean()),
        "max_entropy": float(scores.entropy.max()),
        "mean_margin": float(scores.margin.mean()),
    }


def estimate(samples: Sequence[Sample], scores: "Iterable[TokenScores]") -> Iterator[Elicited]:
    """Yield each sample's mean negative log-likelihood (nats per token), for training.

    The evidence holds the token count, entropies and margin. A sample without scores gets None.
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
    """u = a statistic of a model's probabilities of the response, selected by `measure`.

    A large margin means certainty, so for "mean_margin" u = -mean_margin.
    """

    name: Literal["white_box"] = "white_box"
    measure: Literal["nll", "mean_entropy", "max_entropy", "mean_margin"] = Field(
        "nll", description="nll is the log of the perplexity"
    )

    needs: ClassVar[frozenset[Task]] = frozenset({"score"})

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        scores = (await ask(Request(sample.messages, task="score"))).scores
        if scores is None:
            return self.no_value(sample, "the response has no token to score")
        sign = -1 if self.measure == "mean_margin" else 1
        return Elicited(sample.id, self.label, sign * scores[self.measure], dict(scores))

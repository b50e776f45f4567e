"""Uncertainty read off a model's own probabilities of the given response (METHOD A, estimator 6)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ual.records import Elicited, Sample


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


class WhiteBox:
    """Mean negative log-likelihood of the response's tokens, nats per token: the log of its perplexity.

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
            yield Elicited(
                scores.sample_id,
                self.name,
                float(-scores.log_prob.mean()),
                {
                    "tokens": len(scores.log_prob),
                    "mean_entropy": float(scores.entropy.mean()),
                    "max_entropy": float(scores.entropy.max()),
                    "mean_margin": float(scores.margin.mean()),
                },
            )
        for sample_id in sorted(missing):
            yield Elicited(sample_id, self.name, None)

"""Measures of the loss tokens of samples, over the vocabulary, with intervals over samples.

Tokens of one sample are not independent, so the bootstrap draws samples, each with all its tokens. The bins
of calibration errors are those of all tokens. Each holds many tokens, so noise adds little to the errors,
and they are not debiased. `ual.evaluate.calibration` has the definitions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.evaluate.calibration import Equal, bin_indices
from ual.methods.statistics import Draws, draws

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The N loss tokens of n samples.

    Attributes:
        sample: [N], the sample of each token, from 0.
        nll: [N], -ln p(target), nats.
        confidence: [N], the top-1 probability.
        correct: [N], whether the top-1 token is the target.
    """

    sample: NDArray[np.intp]
    nll: Array
    confidence: Array
    correct: NDArray[np.bool_]

    @property
    def samples(self) -> int:
        return int(self.sample.max(initial=-1)) + 1


_CALIBRATION = ("ece", "ece_width", "rms_ce")
MEASURES = ("nll", "accuracy", "confidence", "brier", *_CALIBRATION)
"""``nll`` in nats; ``brier`` of the top-1 token."""


def measure(tokens: Tokens, *, bins: int = 15, resamples: int = 1000, seed: int = 0) -> Draws:
    """Return `MEASURES` per token, with resamples of the samples.

    Args:
        tokens: of two samples or more.
        bins: of calibration errors.
        resamples: of the bootstrap, at least 2.
        seed: of the draws.

    Raises:
        ValueError: fewer than two samples.
    """
    sums = _Sums(tokens, tokens.samples, bins)
    return draws(sums.figures, tokens.samples, resamples=resamples, seed=seed, centered=_CALIBRATION)


class _Sums:
    """Sums of each sample, of which every measure is a function."""

    def __init__(self, tokens: Tokens, n: int, bins: int) -> None:
        def by_sample(values: NDArray[Any]) -> Array:
            total: Array = np.bincount(tokens.sample, weights=values, minlength=n).astype(np.float64)
            return total

        self._tokens = by_sample(np.ones(tokens.sample.size))
        self._plain = {
            "nll": by_sample(tokens.nll),
            "accuracy": by_sample(tokens.correct),
            "confidence": by_sample(tokens.confidence),
            "brier": by_sample((tokens.confidence - tokens.correct) ** 2),
        }
        self._gaps = {equal: _gaps(tokens, n, bins, equal) for equal in ("mass", "width")}

    def figures(self, drawn: NDArray[np.intp]) -> dict[str, float]:
        """Return the figures of the samples that were drawn."""
        count = self._tokens[drawn].sum()
        found = {name: float(of[drawn].sum() / count) for name, of in self._plain.items()}
        for equal, name in (("mass", "ece"), ("width", "ece_width")):
            gap, size = (of[drawn].sum(0) for of in self._gaps[equal])
            found[name] = float(np.abs(gap).sum() / count)
            if equal == "mass":
                found["rms_ce"] = float(np.sqrt((gap**2 / np.maximum(size, 1)).sum() / count))
        return found


def _gaps(tokens: Tokens, n: int, bins: int, equal: Equal) -> tuple[Array, Array]:
    """Return, for each sample and bin [n, bins], the sum of correctness minus confidence, and the tokens."""
    cell = tokens.sample * bins + bin_indices(tokens.confidence, bins, equal=equal)
    sums = np.bincount(cell, tokens.correct - tokens.confidence, n * bins), np.bincount(cell, None, n * bins)
    gap, size = (total.reshape(n, bins).astype(np.float64) for total in sums)
    return gap, size

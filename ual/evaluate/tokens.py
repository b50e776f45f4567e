"""Measures of the loss tokens of samples, over the vocabulary, with intervals over samples.

Tokens of one sample are not independent, so the bootstrap draws samples, each with all its tokens. The bins
of calibration errors are those of all tokens. Each holds many tokens, so noise adds little to the errors,
and they are not debiased. `ual.evaluate.calibration` has the definitions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.evaluate.calibration import Equal, bin_indices
from ual.methods.statistics import Table

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The N loss tokens of n samples.

    Attributes:
        sample: [N], the sample of each token, from 0.
        nll: [N], -ln p(target), nats.
        confidence: [N], the top-1 probability.
        correct: [N], whether the top-1 token is the target.
        samples: n; a sample may have no loss token.
    """

    sample: NDArray[np.intp]
    nll: Array
    confidence: Array
    correct: NDArray[np.bool_]
    samples: int


_CALIBRATION = ("ece", "ece_width", "rms_ce")
MEASURES = ("nll", "accuracy", "confidence", "brier_top1", *_CALIBRATION)
"""``nll`` in nats; ``brier_top1`` is that of the most probable token alone."""


def table(tokens: Tokens, *, bins: int = 15) -> Table:
    """Return `MEASURES` per token, as figures of the samples.

    Args:
        tokens: of two samples or more.
        bins: of calibration errors.
    """
    n = tokens.samples

    def by_sample(values: NDArray[Any]) -> Array:
        total: Array = np.bincount(tokens.sample, weights=values, minlength=n).astype(np.float64)
        return total

    columns = {
        "tokens": by_sample(np.ones(tokens.sample.size)),
        "nll": by_sample(tokens.nll),
        "accuracy": by_sample(tokens.correct),
        "confidence": by_sample(tokens.confidence),
        "brier_top1": by_sample((tokens.confidence - tokens.correct) ** 2),
    }
    columns["gap"], columns["size"] = _gaps(tokens, n, bins, "mass")
    columns["gap by width"], _ = _gaps(tokens, n, bins, "width")
    return Table(columns, _figures, _CALIBRATION)


def _figures(columns: Mapping[str, Array]) -> dict[str, float]:
    """Return figures from the sums of samples."""
    total = {name: column.sum(0) for name, column in columns.items()}
    count = total["tokens"]
    found = {name: float(total[name] / count) for name in MEASURES[:4]}
    found["ece"] = float(np.abs(total["gap"]).sum() / count)
    found["ece_width"] = float(np.abs(total["gap by width"]).sum() / count)
    found["rms_ce"] = float(np.sqrt((total["gap"] ** 2 / np.maximum(total["size"], 1)).sum() / count))
    return found


def _gaps(tokens: Tokens, n: int, bins: int, equal: Equal) -> tuple[Array, Array]:
    """Return, for each sample and bin [n, bins], the sum of correctness minus confidence, and the tokens."""
    cell = tokens.sample * bins + bin_indices(tokens.confidence, bins, equal=equal)
    sums = np.bincount(cell, tokens.correct - tokens.confidence, n * bins), np.bincount(cell, None, n * bins)
    gap, size = (total.reshape(n, bins).astype(np.float64) for total in sums)
    return gap, size

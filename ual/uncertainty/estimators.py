"""What `ual train` takes uncertainties from: the interface, and a column that the data set brings.

`ual elicit` asks a model instead, sample by sample: see `ual.uncertainty.asking.AskingEstimator`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from ual.errors import UserError
from ual.records import Elicited, Sample


class Estimator(Protocol):
    """Samples in, one `Elicited` per sample out, in any order, each with its evidence.

    A value is a finite number, more uncertain being larger, in the estimator's own units (a scale makes
    them comparable later), or None where none could be obtained.
    """

    name: str

    def estimate(self, samples: Sequence[Sample]) -> Iterator[Elicited]: ...


class Column:
    """The data set's own `uncertainty` column: human disagreement, or an earlier judge's score."""

    name = "column"

    def estimate(self, samples: Sequence[Sample]) -> Iterator[Elicited]:
        """Yield each sample's own value.

        Raises:
            UserError: no sample has one.
        """
        if all(sample.uncertainty is None for sample in samples):
            raise UserError(
                'no row has an "uncertainty" value',
                place="configuration, uncertainty.estimator",
                remedy='add the column, or set uncertainty.estimator to "white_box" to ask the base model, '
                'or loss.kind to "sft" or "uniform" to train without',
            )
        for sample in samples:
            yield Elicited(sample.id, self.name, sample.uncertainty)

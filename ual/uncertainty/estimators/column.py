"""The uncertainty in the data: human disagreement, or an earlier judge's score."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from ual.errors import UserError
from ual.records import Elicited, Sample
from ual.uncertainty.protocol import Ask, Estimator, Task


class Column(Estimator):
    """u = the sample's own `uncertainty`, for comparison with other estimators. Sends no request."""

    name: Literal["column"] = "column"

    rates: ClassVar[Literal["response", "question"]] = "question"
    needs: ClassVar[frozenset[Task]] = frozenset()

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        if sample.uncertainty is None:
            return self.no_value(sample, "the sample has no uncertainty")
        return Elicited(sample.id, self.label, sample.uncertainty)


def own_uncertainties(samples: Sequence[Sample]) -> list[Elicited]:
    """Return each sample's own value, for training.

    Raises:
        UserError: no sample has one.
    """
    if all(sample.uncertainty is None for sample in samples):
        raise UserError(
            'no sample has an "uncertainty" value',
            place="configuration, uncertainty.estimator",
            remedy='add the column, or set uncertainty.estimator to "white_box", which uses the base model, '
            'or loss.kind to "sft" or "uniform" to train without',
        )
    return [Elicited(sample.id, "column", sample.uncertainty) for sample in samples]

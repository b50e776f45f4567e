"""A column that is in the data already: human disagreement, or an earlier judge's score."""

from typing import Literal

from ual.records import Elicited, Sample
from ual.uncertainty.asking import Ask, AskingEstimator, Task


class Given(AskingEstimator):
    """u = the row's own `uncertainty`, asked of nobody: to be compared with the other estimators."""

    name: Literal["column"] = "column"

    @property
    def needs(self) -> frozenset[Task]:
        return frozenset()

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        evidence = {} if sample.uncertainty is not None else {"unparsed": "the row has no uncertainty"}
        return Elicited(sample.id, self.label, sample.uncertainty, evidence)

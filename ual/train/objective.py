"""Token weights that a loss kind computes from the model's predictions (`ual_kernels.losses`).

The smoothing and weights of samples come with the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ual.config.run import LossConfig
from ual_kernels import TokenStatistics, losses


@dataclass(frozen=True)
class Objective:
    """A weight function of the tokens' statistics, and whether the loss is divided by the mean weight."""

    token_weight: Callable[[TokenStatistics], Tensor] | None = None
    over_its_mean: bool = False

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's inputs with the weight function in place of the samples' weights."""
        if self.token_weight is None:
            return inputs
        return inputs | {"sample_weight": self.token_weight, "return_statistics": self.over_its_mean}

    def finish(self, loss: Tensor, outputs: Any) -> Tensor:
        """Return the loss, divided by the mean weight of this process's micro-batch if the kind wants it.

        The loss then has the scale of plain cross entropy.
        """
        if not self.over_its_mean:
            return loss
        assert self.token_weight is not None
        statistics: TokenStatistics = outputs["statistics"]
        mean: Tensor = self.token_weight(statistics).nanmean()
        return loss / mean.nan_to_num(nan=1.0)  # without loss tokens the loss is 0


PLAIN = Objective()


def objective(config: LossConfig) -> Objective:
    """Return the objective of a `loss` section."""
    kind = config.about
    if kind.preset is None:
        return PLAIN
    made = getattr(losses, kind.preset)(**config.options)
    return Objective(made["sample_weight"], kind.over_mean_weight)

"""What `loss.kind` means for a batch: which weights the loss makes of the model's own predictions.

The smoothing and the weights of samples come with the rows; here are the losses whose weights depend on the
token's statistics, through the presets of `ual_kernels.losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ual.config.run import LossConfig
from ual_kernels import TokenStatistics, losses


@dataclass(frozen=True)
class Objective:
    """A weight for each token, and whether it is divided by its mean over the micro-batch."""

    token_weight: Callable[[TokenStatistics], Tensor] | None = None
    over_its_mean: bool = False

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the model, in which the rule stands for the weights of the samples."""
        if self.token_weight is None:
            return inputs
        return inputs | {"sample_weight": self.token_weight, "return_statistics": self.over_its_mean}

    def finish(self, loss: Tensor, outputs: Any) -> Tensor:
        """Return the loss in the scale of plain cross entropy.

        The mean is that of this process's micro-batch: tokens of weight 1 would have made the same loss.
        """
        if not self.over_its_mean:
            return loss
        assert self.token_weight is not None
        statistics: TokenStatistics = outputs["statistics"]
        mean: Tensor = self.token_weight(statistics).nanmean()
        return loss / mean.nan_to_num(nan=1.0)  # no live token: the loss is 0 whatever divides it


PLAIN = Objective()


def objective(config: LossConfig) -> Objective:
    """Return the objective of a `loss` section."""
    kind = config.about
    if kind.preset is None:
        return PLAIN
    made = getattr(losses, kind.preset)(**config.options)
    return Objective(made["sample_weight"], kind.over_mean_weight)

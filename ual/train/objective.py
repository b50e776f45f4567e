"""What a loss kind computes from the model's predictions: token weights, and a share of the targets.

The smoothing, weights and label distributions of samples are columns of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ual.config.run import LossConfig
from ual_kernels import TokenStatistics, confidence, losses


@dataclass(frozen=True)
class Objective:
    """What the trainer adds to the model's inputs, and how it scales the loss.

    Args:
        token_weight: a weight function of the tokens' statistics.
        over_its_mean: whether the loss is divided by the mean weight.
        own_share: the model's `own_share` at some progress of training, in [0, 1].
        balance_own: the model's `balance_own`.
    """

    token_weight: Callable[[TokenStatistics], Tensor] | None = None
    over_its_mean: bool = False
    own_share: Callable[[float], float] | None = None
    balance_own: bool = False

    def prepare(self, inputs: dict[str, Any], progress: float) -> dict[str, Any]:
        """Return the model's inputs with the weight function in place of the samples' weights, and own_share.

        Args:
            inputs: without `option_ids` if no sample of the micro-batch has a decision token.
            progress: the share of training steps that are done.
        """
        if self.token_weight is not None:
            inputs = inputs | {"sample_weight": self.token_weight, "return_statistics": self.over_its_mean}
        if self.own_share is not None and "option_ids" in inputs:
            # torch.compile would compile each number again; the tensor is filled on the device
            share = inputs["label_smoothing"].new_full((), self.own_share(progress))
            inputs = inputs | {"own_share": share, "balance_own": self.balance_own}
        return inputs

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
    if kind.own_predictions:
        chosen = config.options
        share = partial(confidence.warm_up, coefficient=chosen["coefficient"], share=chosen["warm_up"])
        return Objective(own_share=share, balance_own=chosen["balance"])
    if kind.preset is None:
        return PLAIN
    made = getattr(losses, kind.preset)(**config.options)
    return Objective(made["sample_weight"], kind.over_mean_weight)

"""The loss kinds, as data. A new kind is one record here: no other file asks for a kind by its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ual.config.base import Fraction


@dataclass(frozen=True, slots=True)
class LossKind:
    """What `loss.kind` means for samples, tokens and messages."""

    sentence: str
    """What the loss does, for reports and progress messages."""
    smoothing: Literal["own", "uniform", "none"] = "none"
    """own: each sample's, from its uncertainty. uniform: one for all samples."""
    weights: Literal["optional", "required", "made"] = "optional"
    """Whether samples may bring `sample_weight`, must bring it, or the loss makes a weight for each token."""
    distribution: bool = False
    """Whether samples must bring `label_distribution`, which is then the target of their decision token."""
    own_predictions: bool = False
    """Whether a growing share of that target is the model's own prediction (`ual_kernels.confidence`)."""
    preset: str | None = None
    """The function of `ual_kernels.losses` that makes the tokens' weights."""
    options: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Arguments of the preset, or of own predictions: name -> (annotation, default).

    They are keys of the `loss` section.
    """
    over_mean_weight: bool = False
    """Whether the loss is divided by the mean weight of a process's micro-batch."""

    @property
    def needs_uncertainty(self) -> bool:
        return self.smoothing == "own"

    @property
    def makes_weights(self) -> bool:
        return self.weights == "made"


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_BALANCE = (
    "each option is predicted as often as in the labels; needs one order of options in all samples, such as "
    "yes and no, and many samples in each micro-batch"
)

LOSS_KINDS: dict[str, LossKind] = {
    "ual": LossKind(
        "Uncertainty-aware fine-tuning: each sample has its own label smoothing", smoothing="own"
    ),
    "sft": LossKind("Plain fine-tuning, without label smoothing"),
    "uniform": LossKind("Fine-tuning with the same label smoothing for every sample", smoothing="uniform"),
    "soft_labels": LossKind(
        "Fine-tuning on each sample's label distribution at the token where its options differ",
        distribution=True,
    ),
    "confidence": LossKind(
        "Weak-to-strong fine-tuning: as soft_labels, with a growing share of the model's own predictions",
        distribution=True,
        own_predictions=True,
        options={
            "coefficient": (Annotated[Fraction, Field(description="own share after the warm-up")], 0.5),
            "warm_up": (Annotated[Fraction, Field(description="of the steps; the share grows from 0")], 0.1),
            "balance": (Annotated[bool, Field(description=_BALANCE)], False),
        },
    ),
    "weighted": LossKind("Fine-tuning with the samples' own weights", weights="required"),
    "dft": LossKind(
        "Dynamic fine-tuning: each token is weighted by its probability", weights="made", preset="dft"
    ),
    "power": LossKind(
        "Probability-based fine-tuning: each token is weighted by a power of its probability",
        weights="made",
        preset="power",
        options={"k": (Annotated[_Finite, Field(ge=0, description="the exponent; 1 is dft")], 1.0)},
    ),
    "reverse": LossKind(
        "Reverse cross entropy: each token is weighted by A times its probability",
        weights="made",
        preset="reverse",
        options={
            "A": (Annotated[_Finite, Field(gt=0, description="-A stands for the logarithm of 0")], 4.0),
            "cross_entropy": (Annotated[_Finite, Field(ge=0, description="its factor")], 0.0),
        },
    ),
    "eaft": LossKind(
        "Entropy-adaptive fine-tuning: each token is weighted by the prediction's entropy",
        weights="made",
        preset="eaft",
        options={
            "top_k": (Annotated[int, Field(ge=2, description="weight 1 is the entropy of so many")], 20),
            "alpha": (Annotated[_Finite, Field(ge=0, description="the exponent")], 1.0),
        },
    ),
    "mile": LossKind(
        "MiLe: each token is weighted by a power of the prediction's entropy",
        weights="made",
        preset="mile",
        options={
            "gamma": (Annotated[_Finite, Field(description="the exponent")], 1.0),
            "sigma": (Annotated[_Finite, Field(gt=0, description="added to entropy")], 1.0),
        },
        over_mean_weight=True,
    ),
}

"""Training: `UALTrainer` on transformers.Trainer, its arguments, its run folder."""

from ual.train.arguments import training_arguments as training_arguments
from ual.train.folder import RunFolder as RunFolder
from ual.train.publish import publish as publish
from ual.train.trainer import UALTrainer as UALTrainer

__all__ = ["RunFolder", "UALTrainer", "publish", "training_arguments"]

"""Training: `UALTrainer` on transformers.Trainer, its arguments, callbacks and checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ual.train.trainer import UALTrainer

__all__ = ["UALTrainer"]


def __getattr__(name: str) -> Any:
    if name == "UALTrainer":
        from ual.train.trainer import UALTrainer

        return UALTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

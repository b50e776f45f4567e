"""Training: `UALTrainer` on transformers.Trainer, its arguments, its run folder.

Importing this imports no torch, so that `python -m ual.train` can settle the environment first.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ual.train.arguments import training_arguments
    from ual.train.folder import RunFolder
    from ual.train.trainer import UALTrainer

__all__ = ["RunFolder", "UALTrainer", "training_arguments"]

_HOMES = {
    "RunFolder": "ual.train.folder",
    "UALTrainer": "ual.train.trainer",
    "training_arguments": "ual.train.arguments",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

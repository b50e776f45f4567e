"""A model that answers questions: as it was downloaded, or as a run has trained it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from ual.config.run import RunConfig
from ual.data import Renderer
from ual.errors import UserError
from ual.files import sha256
from ual.models import fuse
from ual.models.load import attach_lora, load_model
from ual.pipelines import samples
from ual.runs.folder import RunFolder
from ual.train.checkpoint import load_weights

_LENGTH = 2048  # the default limit of `data.max_length`


@dataclass(frozen=True, slots=True)
class Learner:
    """A fused model in evaluation mode, and the renderer that poses questions to it."""

    model: Any
    renderer: Renderer

    @classmethod
    def load(cls, config: RunConfig, *, trained: bool, trust_remote_code: bool = False) -> "Learner":
        """Load the model of a run, on the GPU if there is one.

        Args:
            config: of the run.
            trained: with the weights in its folder, or without them.
            trust_remote_code: run code from the model's repository.

        Raises:
            UserError: the model cannot be loaded, or the run has no weights.
        """
        model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
        if not config.model.quantization:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        if trained:
            if config.lora:
                model = attach_lora(model, config.lora)
            load_weights(model, weights(config))
        fuse(model, verify=False).eval()
        made_by = renderer(config, fitting=False, overlong="refuse", trust_remote_code=trust_remote_code)
        return cls(model, made_by)


def weights(config: RunConfig) -> Path:
    """Return the folder of a run's trained weights.

    Raises:
        UserError: there is none.
    """
    found = RunFolder(config.output_dir).weights
    if found is None:
        raise UserError(
            "no trained weights", place=config.output_dir, remedy="train the run to its end first"
        )
    return found


def weights_digest(config: RunConfig) -> dict[str, str]:
    """Return the hashes of a run's trained weights, without what depends on the time of day beside them."""
    return {
        path.name: _sha256(path, path.stat().st_mtime_ns)
        for path in sorted(weights(config).glob("*.safetensors"))
    }


@cache
def _sha256(path: Path, changed: int) -> str:
    """Return the hash of a file of weights, which may have gigabytes, once for each time of its change."""
    return sha256(path)


def renderer(
    config: RunConfig,
    *,
    fitting: bool,
    overlong: Literal["drop", "refuse"] = "drop",
    trust_remote_code: bool = False,
) -> Renderer:
    """Return the renderer of a run; wrong samples are dropped.

    Args:
        config: of the run.
        fitting: samples beyond `data.max_length` are overlong, as training could not use them; else the
            model's context is the limit, since the options of another wording may have a few tokens more.
        overlong: what happens to them.
        trust_remote_code: run code from the model's repository.
    """
    limit = config.data.max_length if fitting or (config.data.max_length or 0) > _LENGTH else None
    changes = {"invalid": "drop", "overlong": overlong, "max_length": limit}
    data = config.data.model_copy(update=changes)
    return samples.renderer(config.model_copy(update={"data": data}), trust_remote_code=trust_remote_code)[1]

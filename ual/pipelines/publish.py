"""Upload the weights of a finished run with their model card, when it ends or at any later time."""

from pathlib import Path

from ual.errors import UserError
from ual.report.publish import publish as upload
from ual.runs import read


def publish(run: Path, *, repo_id: str | None = None, private: bool | None = None) -> str:
    """Upload a run's adapter or model, and return the address of its repository.

    A failed upload can be repeated: the hub stores each file once.

    Args:
        run: the run's folder.
        repo_id: ``owner/name``, or a name that belongs to the user who is logged in. None is
            `training.hub_model_id` of the run, or else its name.
        private: whether a new repository is private; None is `training.hub_private_repo` of the run.

    Raises:
        UserError: the folder holds no finished run, or the hub cannot be reached or refuses.
    """
    found = read.read(run)
    config = found.config
    if config is None:
        raise UserError("the run's config.yaml cannot be read", place=str(run))
    weights = run / ("adapter" if config.lora else "model")
    if found.status == "completed" and not any(weights.glob("*.safetensors")):
        raise UserError(
            "the trained weights are missing",
            place=str(weights),
            remedy=f"restore them from a checkpoint: ual train {run / 'config.yaml'} --resume",
        )
    if found.status != "completed" or not (weights / "README.md").is_file():
        raise UserError(
            f"the run is not finished (status: {found.status}), so there is nothing to upload",
            place=str(run),
            remedy=f"finish it: ual train {run / 'config.yaml'} --resume",
        )
    name = repo_id or config.training.get("hub_model_id") or config.label
    return upload(weights, name, config.training.get("hub_private_repo") if private is None else private)

"""Upload what was trained to the Hugging Face hub, with its model card, in one commit."""

from pathlib import Path

import huggingface_hub

from ual.errors import UserError


def publish(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Create the repository if need be, and upload the folder.

    The token is the hub's own affair: `hf auth login`, or HF_TOKEN in the environment.

    Args:
        folder: adapter or model, whole.
        repo_id: ``owner/name``, or a name of the user who is logged in.
        private: whether a new repository is; None is the owner's default.

    Returns:
        Where it can be seen.

    Raises:
        UserError: the hub cannot be reached, or refuses. The run is complete and `folder` as it was.
    """
    try:
        repo = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Trained with ual"
        )
    except (OSError, ValueError) as error:  # the hub client's own are of these
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the hub did not take it: {said}",
            place="configuration, training.push_to_hub",
            remedy=f"the run is complete; `hf auth login`, then: hf upload {repo_id} {folder}",
        ) from error
    return str(repo)

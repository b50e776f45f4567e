"""Upload a trained adapter or model to the Hugging Face hub, with its model card, in one commit."""

from pathlib import Path

import huggingface_hub

from ual.errors import UserError


def publish(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Create the repository if it does not exist, upload the folder, and return the repository's address.

    The hub's client finds the token: `hf auth login`, or HF_TOKEN in the environment.

    Args:
        folder: the complete adapter or model.
        repo_id: ``owner/name``, or a name that belongs to the user who is logged in.
        private: whether a new repository is private; None is the owner's default.

    Raises:
        UserError: the hub cannot be reached, or refuses. The run is complete and `folder` unchanged.
    """
    try:
        repo = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Trained with ual"
        )
    except (OSError, ValueError) as error:  # the base classes of the client's errors
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the hub refused the upload: {said}",
            place="configuration, training.push_to_hub",
            remedy=f"the run is complete; `hf auth login`, then: hf upload {repo_id} {folder}",
        ) from error
    return str(repo)

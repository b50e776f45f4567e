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
    except Exception as error:  # the client's errors, and those of its HTTP library, have no common base
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"the upload of {repo_id} to the hub failed: {said}",
            place=str(folder),
            remedy="the run is complete. Check the network and the login (`hf auth login`), then: "
            f"ual publish {folder.parent}",
        ) from error
    return str(repo)

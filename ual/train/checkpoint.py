"""A checkpoint is whole or absent: sealed with hashes, renamed into place, verified before use."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ual.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Bring every file of a finished checkpoint to the disk and write down its size and SHA-256.

    Args:
        folder: complete, still under its scratch name.
        facts: kept beside the hashes: the step, the world size, the rows of a step.

    Raises:
        OSError: the disk refuses.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        _sync_folder(inner)


def publish(scratch: Path, target: Path) -> None:
    """Give a sealed folder its final name; after a crash of the machine it has the one or the other."""
    if target.exists():
        shutil.rmtree(target)
    scratch.rename(target)
    _sync_folder(target.parent)


def facts(folder: Path) -> dict[str, Any]:
    """Return what `seal` was given, and `files`.

    Raises:
        OSError, ValueError: there is no manifest that can be read.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("not a manifest")
    return manifest


def damage(folder: Path) -> str | None:
    """Return what differs from the manifest, in words, or None for a whole checkpoint.

    A file that the manifest does not name is damage too: DeepSpeed unpickles what it finds by name.
    """
    try:
        files = facts(folder)["files"]
    except (OSError, ValueError) as error:
        return f"no {MANIFEST} that can be read ({error})"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(files):
        missing, added = sorted(set(files) - present), sorted(present - set(files))
        return f"{missing[0]} is missing" if missing else f"{added[0]} is not in the manifest"
    for name, recorded in files.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
                return f"{name} does not have the recorded hash"
    return None


def newest_whole(checkpoints: Path) -> Path | None:
    """Return the newest `checkpoint-N` that is whole; those passed over are named in the log."""
    numbered = [
        (int(number), path)
        for path in checkpoints.glob("checkpoint-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
    ]
    for _, path in sorted(numbered, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("passed over the damaged checkpoint %s: %s", path, problem)
    return None


def copy_model(source: Path, target: Path) -> None:
    """Copy weights, configuration and tokenizer of a checkpoint, and leave the state of its training."""
    state = ("*.pt", "*.pth", "*.bin", "global_step*", "latest", "zero_to_fp32.py", "trainer_state.json")
    names = shutil.ignore_patterns(*state, MANIFEST, "adapter_state.safetensors")
    shutil.copytree(source, target, ignore=names, dirs_exist_ok=True)


def require_room(folder: Path, size: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: exists, on the disk in question.
        size: bytes about to be written.

    Raises:
        UserError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"a checkpoint needs about {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
            place=str(folder),
            remedy="free some space or lower training.save_total_limit, then pass --resume to go on from "
            "the last whole checkpoint",
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

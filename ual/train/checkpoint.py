"""A checkpoint is complete or absent: sealed with hashes, renamed into place, verified before use."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ual.errors import UserError
from ual.files import sha256

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint's manifest says of it.

    `samples_per_step` counts the samples (or packed sequences) of one optimizer step over micro-batches and
    processes; `zero_stage` is 0 without DeepSpeed; `size` is in bytes.
    """

    path: Path
    step: int
    world_size: int
    samples_per_step: int
    zero_stage: int
    size: int = 0

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Return the record of a folder.

        Raises:
            OSError, ValueError: there is no readable manifest.
        """
        manifest = _manifest(path)
        values = {name: manifest[name] for name in ("step", "world_size", "samples_per_step", "zero_stage")}
        return cls(path, **values, size=sum(file["bytes"] for file in manifest["files"].values()))


def seal(checkpoint: Checkpoint) -> None:
    """Write every file of a checkpoint through to the disk, and record its size and SHA-256 in the manifest.

    Args:
        checkpoint: complete, still in a scratch folder.

    Raises:
        OSError: the disk refuses.
    """
    folder = checkpoint.path
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        about = {k: v for k, v in asdict(checkpoint).items() if k not in ("path", "size")}
        json.dump(about | {"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        _sync_folder(inner)


def publish(scratch: Path, target: Path) -> None:
    """Rename a sealed folder to its final name, in one step even if the machine crashes."""
    if target.exists():
        shutil.rmtree(target)
    scratch.rename(target)
    _sync_folder(target.parent)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not (
        isinstance(manifest, dict)
        and isinstance(manifest.get("files"), dict)
        and "samples_per_step" in manifest
    ):
        raise ValueError("not a manifest of this version")
    return manifest


def damage(folder: Path) -> str | None:
    """Return what differs from the manifest, in words, or None for a complete checkpoint.

    A file that the manifest does not name is damage too: DeepSpeed unpickles what it finds by name.
    """
    try:
        files = _manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return f"no {MANIFEST} that can be read ({error})"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(files):
        missing, added = sorted(set(files) - present), sorted(present - set(files))
        return f"{missing[0]} is missing" if missing else f"{added[0]} is not in the manifest"
    for name, recorded in files.items():
        if sha256(folder / name) != recorded["sha256"]:
            return f"{name} does not have the recorded hash"
    return None


def newest_complete(checkpoints: Path) -> Checkpoint | None:
    """Return the newest `checkpoint-N` that is complete. The log names those that were passed over."""
    numbered = [
        (int(number), path)
        for path in checkpoints.glob("checkpoint-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
    ]
    for _, path in sorted(numbered, reverse=True):
        problem = damage(path)
        if problem is None:
            return Checkpoint.read(path)
        log.warning("passed over the damaged checkpoint %s: %s", path, problem)
    return None


def copy_model(source: Path, target: Path) -> None:
    """Copy weights, configuration and tokenizer of a checkpoint, without the state of its training."""
    state = ("*.pt", "*.pth", "*.bin", "global_step*", "latest", "zero_to_fp32.py", "trainer_state.json")
    names = shutil.ignore_patterns(*state, MANIFEST, "adapter_state.safetensors")
    shutil.copytree(source, target, ignore=names, dirs_exist_ok=True)


def require_room(folder: Path, size: int) -> None:
    """Refuse a write for which the disk has too little space.

    Args:
        folder: an existing folder on that disk.
        size: bytes to be written.

    Raises:
        UserError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"a checkpoint needs about {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
            place=str(folder),
            remedy="free some space or lower training.save_total_limit, then pass --resume to continue "
            "from the last complete checkpoint",
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A checkpoint is complete or absent: sealed with hashes, renamed into place, verified before use."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers.trainer import SCHEDULER_NAME

from ual.errors import UserError
from ual.files import sha256
from ual.train import adapter_state

MANIFEST = "manifest.json"
_COUNTS = ("step", "world_size", "samples_per_step", "zero_stage")
_LOADED = (
    "*.pt", "*.pth", "*.bin", "*.pkl", "*.safetensors", "*.index.json", "latest", "trainer_state.json",
    "config.json", "adapter_config.json",
)  # fmt: skip
"""Names of files that DeepSpeed, transformers and PEFT load if they are in a checkpoint."""


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
        counts = {name: manifest[name] for name in _COUNTS}
        return cls(path, **counts, size=sum(file["bytes"] for file in manifest["files"].values()))


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
    try:
        files = {name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])}
                 for name, file in manifest["files"].items()}  # fmt: skip
        counts = {name: int(manifest[name]) for name in _COUNTS}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError("not a manifest of this version") from error
    return counts | {"files": files}


def damage(folder: Path) -> str | None:
    """Return what differs from the manifest, in words, or None for a complete checkpoint.

    Files that another program has added (a file manager, an editor, NFS) are ignored, unless DeepSpeed,
    transformers or PEFT would load them by name: DeepSpeed unpickles what it finds.
    """
    try:
        files = _manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return f"no {MANIFEST} that can be read ({error})"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if missing := sorted(set(files) - present):
        return f"{missing[0]} is missing"
    if loaded := sorted(name for name in present - set(files) if _is_loaded_by_name(name)):
        return f"{loaded[0]} is not in the manifest, and would be loaded"
    for name, recorded in files.items():
        try:
            if sha256(folder / name) != recorded["sha256"]:
                return f"{name} does not have the recorded hash"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _is_loaded_by_name(name: str) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(last, pattern) for pattern in _LOADED)


@dataclass(frozen=True, slots=True)
class Found:
    """The newest complete checkpoint of a run, and what is wrong with each newer one, by its path."""

    newest: Checkpoint | None
    damaged: Mapping[Path, str]


def numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return the folders `checkpoint-N` with their numbers, the newest first."""
    return sorted(
        (
            (int(number), path)
            for path in checkpoints.glob("checkpoint-*")
            if (number := path.name.rpartition("-")[2]).isdecimal() and path.is_dir()
        ),
        reverse=True,
    )


def find(checkpoints: Path) -> Found:
    """Look for the newest `checkpoint-N` that is complete."""
    damaged: dict[Path, str] = {}
    for _, path in numbered(checkpoints):
        problem = damage(path)
        if problem is None:
            return Found(Checkpoint.read(path), damaged)
        damaged[path] = problem
    return Found(None, damaged)


def newest_complete(checkpoints: Path) -> Checkpoint | None:
    """Return the newest `checkpoint-N` that is complete."""
    return find(checkpoints).newest


def rotate(
    checkpoints: Path, *, limit: int | None, until: int, complete: Collection[Path], best: Path | None
) -> None:
    """Remove the checkpoints that are older than the newest `limit` complete ones.

    A damaged checkpoint does not count, so it never displaces a complete one.

    Args:
        checkpoints: the folder of `checkpoint-N`.
        limit: None, 0 or less removes nothing, as in transformers.
        until: the step whose checkpoint has just been written. Later ones, which were passed over when the
            run was resumed, neither count nor are they removed.
        complete: checkpoints that are known to be complete; others are verified before they count.
        best: counts, and is not removed.
    """
    if not limit or limit < 0:
        return
    kept = {checkpoints / f"checkpoint-{until}", *([best] if best else [])}
    for step, path in numbered(checkpoints):
        if step > until or path in kept:
            continue
        if len(kept) >= limit:
            shutil.rmtree(path, ignore_errors=True)
        elif path in complete or damage(path) is None:
            kept.add(path)


def resumable(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds optimizer and schedule, which `save_only_model` omits."""
    files = _manifest(checkpoint.path)["files"]
    return SCHEDULER_NAME in files or any(name.endswith("_optim_states.pt") for name in files)


def check_fit(saved: Checkpoint, *, samples_per_step: int, world_size: int, zero_stage: int) -> None:
    """Check that training can resume from a checkpoint in this many processes.

    Raises:
        UserError: the checkpoint has another number of samples in a step or, if partitions were saved,
            another number of processes.
    """
    if saved.samples_per_step != samples_per_step:
        raise UserError(
            f"the checkpoint has {saved.samples_per_step} samples per step, this run has "
            f"{samples_per_step} (samples per device x accumulation x processes)",
            place=str(saved.path),
            remedy="choose training.per_device_train_batch_size and gradient_accumulation_steps so that "
            "the product is the same",
        )
    same = (saved.world_size, saved.zero_stage) == (world_size, zero_stage)
    gathered = (saved.path / adapter_state.FILE).is_file() and zero_stage
    if not same and not gathered and (saved.zero_stage or zero_stage):
        raise UserError(
            f"the checkpoint has partitions of ZeRO-{saved.zero_stage} in {saved.world_size} processes; "
            f"this run uses ZeRO-{zero_stage} in {world_size}",
            place=str(saved.path),
            remedy="resume with the same number of processes and the same stage; only an adapter's ZeRO "
            "checkpoints fit any number and stage",
        )


def copy_model(source: Path, target: Path) -> None:
    """Copy weights, configuration and tokenizer of a checkpoint, without the state of its training."""
    state = ("*.pt", "*.pth", "*.bin", "latest", "zero_to_fp32.py", "trainer_state.json", adapter_state.FILE)
    for name in _manifest(source)["files"]:
        last = name.rpartition("/")[2]
        if not any(fnmatchcase(last, pattern) for pattern in state):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def load_weights(model: Any, folder: Path) -> None:
    """Load trained weights, an adapter's or a whole model's, into the base model that they were trained from.

    Weights in ZeRO-3 partitions are gathered one by one; every process must call this.
    """
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if name in parameters:
                    with _gathered(parameters[name]):
                        parameters[name].copy_(file.get_tensor(name))


def _gathered(parameter: Any) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return cast(AbstractContextManager[Any], deepspeed.zero.GatheredParameters([parameter], modifier_rank=0))


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
            remedy="free some space or lower training.save_total_limit, then pass --resume auto, which "
            "continues from the last complete checkpoint or, without one, begins again",
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The origin of a run: machine, versions, code and data, for environment.json."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ual.config.run import RunConfig
from ual.data import expand
from ual.errors import UserError
from ual.files import sha256
from ual.runs.folder import now

_PACKAGES = (
    "ual-kernels", "torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "datasets", "numpy",
)  # fmt: skip

_PIECE, _PIECES = 64 << 10, 64


def environment(
    config: RunConfig,
    command: Sequence[str],
    data: Mapping[str, str],
    *,
    earlier: Mapping[str, Any],
    step: int,
    **further: Any,
) -> dict[str, Any]:
    """Return the machine, versions, commit and data hashes of a run, with `further` values.

    Args:
        config: of the run.
        command: the words of the command line.
        data: the hash of each file.
        earlier: the environment that the resumed run has recorded. Its `legs` are continued: one record for
            each time that training began.
        step: after which training begins.
        **further: are added as they are.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    leg = {
        "step": step,
        "created": now(),
        "command": list(command),
        "git_commit": _git_commit(),
        "data_sha256": dict(data),
    }
    return {
        "command": list(command),
        "created": leg["created"],
        "versions": versions,
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "git_commit": leg["git_commit"],
        "seed": config.training.get("seed", 42),
        "data_sha256": dict(data),
        **further,
        "legs": [*earlier.get("legs", []), leg],
    }


def files(config: RunConfig) -> dict[str, str]:
    """Return the paths that decide which samples and tokens a run trains on, by their keys.

    The files of a list or a pattern have the keys ``data.train[0]``, ``data.train[1]`` and so on.
    """
    data = config.data
    found: dict[str, str] = {}
    for key, named in {"data.train": data.train, "data.eval": data.eval}.items():
        try:
            paths = [] if named is None else expand(named)
        except UserError:  # a pattern of a run whose files have moved
            paths = [named] if isinstance(named, str) else list(named or ())
        if isinstance(named, str) and paths == [named]:
            found[key] = named
        else:
            found |= {f"{key}[{i}]": path for i, path in enumerate(paths)}
    if data.chat_template is not None:
        found["data.chat_template"] = data.chat_template
    return found


def digest(path: str | Path) -> str | None:
    """Return the SHA-256 of a file, or of a folder's names and contents; None for anything else."""
    path = Path(path).expanduser()
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return None
    found = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path)):
        found.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return found.hexdigest()


def fingerprint(model: str) -> str | None:
    """Return a hash of a model's folder that is computed without reading all of it; None for a hub name.

    It covers config.json, and of each file of weights the size and 64 pieces of 64 KiB.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        if not path.is_file():
            continue
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_PIECES if size > _PIECES * _PIECE else -(-size // _PIECE)):
                file.seek(i * max(_PIECE, (size - _PIECE) // (_PIECES - 1)))
                found.update(file.read(_PIECE))
    return found.hexdigest()


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit of this package's checkout; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(here), "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None

"""The origin of a run: machine, versions, code and data, for environment.json."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ual.config.run import RunConfig
from ual.files import sha256

_PACKAGES = (
    "ual-kernels", "torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "datasets", "numpy",
)  # fmt: skip


def environment(
    config: RunConfig, command: Sequence[str], data_files: Sequence[Path], **facts: Any
) -> dict[str, Any]:
    """Return the machine, versions, commit and data hashes of a run, with further `facts`."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": list(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "git_commit": _git_commit(),
        "seed": config.training.get("seed", 42),
        "data_sha256": {str(path): sha256(path) for path in data_files},
        **facts,
    }


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

"""Helpers that start real runs: a small configuration on real weights and samples, and `ual` as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "100",
}
ENVIRONMENT.pop("TRITON_INTERPRET", None)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(shared: Path, count: int) -> list[dict[str, Any]]:
    with (shared / "data" / "gsm8k" / "train.jsonl").open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def configure(folder: Path, stories: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    """Write samples and a configuration that trains stories260K on them for a few steps."""
    values: dict[str, Any] = {
        "model": str(stories),
        "data": {
            "train": str(write_rows(folder / "rows.jsonl", rows)),
            "chat_template": "plain",
            "overlong": "truncate",
            "max_length": 192,
        },
        "uncertainty": "white_box",
        "output_dir": str(folder / "run"),
        "lora": {"r": 4, "dropout": 0.0},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": "none",
        },
    }
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] = values[name] | value
        else:
            values[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def ual(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "ual", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def start(*words: object) -> "subprocess.Popen[str]":
    """Start the command line and leave it running."""
    command = [sys.executable, "-m", "ual", *map(str, words)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # a shell's background jobs, and their children, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged steps; `legs` are the lines between them."""
    return [row for row in _history(folder) if "event" not in row]


def legs(folder: Path) -> list[tuple[str, int]]:
    return [(row["event"], row["step"]) for row in _history(folder) if "event" in row]


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

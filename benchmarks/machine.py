"""The machine, versions, commit and date of a measurement, without the host name; and Markdown tables."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "flash-attn", "trl", "peft", "ual-kernels",
)  # fmt: skip
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Return what is needed to interpret a result later."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.date().isoformat(),
        "time": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": name(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "threads": torch.get_num_threads(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def name() -> str:
    """Return a folder name made from the GPU's name, or from the CPU's model."""
    label = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()["model"]
    label = re.sub(r"\((R|TM|C)\)", " ", label, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def headline(found: dict[str, Any]) -> str:
    """Return `describe()` as one line of text."""
    versions = ", ".join(f"{p} {v}" for p, v in found["versions"].items() if v)
    where = f"{found['cpu']['model']}, {found['cpu']['cores']} cores, {found['threads']} threads"
    if found["gpu"]:
        where = f"{found['gpu']['name']}, driver {found['gpu']['driver']}; {where}"
    load = f"load before {found['load_before'][0]}; " if found["load_before"] else ""
    return f"{where}; {load}{found['date']}; commit {found['commit']}; {versions}"


def stem(about: dict[str, Any], study: str) -> Path:
    """Return the path of a study's files in benchmarks/results/, without suffix."""
    return RESULTS / about["machine"] / study / f"{about['date']}-{about['commit']}"


def save(
    found: dict[str, Any],
    text: str,
    study: str,
    json_path: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Write both files, by default to benchmarks/results/<machine>/<study>/, and print their paths."""
    default = stem(found["machine"], study)
    for path, content in (
        (json_path or default.with_suffix(".json"), json.dumps(found, indent=1) + "\n"),
        (markdown or default.with_suffix(".md"), text + "\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table, padded so that its source is readable."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, tuple("-" * w for w in widths), *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cpu() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "cores": cores}
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "model": facts.get("model name", platform.machine()),
        "family_model_stepping": "/".join(facts.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "cores": cores,
        "features": [f for f in _FEATURES if f in facts.get("flags", "").split()],
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    names = ("driver_version", "clocks.current.sm", "clocks.max.sm", "clocks.current.memory", "power.limit")
    output = _output(("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")).partition(
        "\n"
    )[0]
    driver, *clocks = [part.strip() for part in output.split(",")] if output else ["unknown"]
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "l2_mib": facts.L2_cache_size / 2**20,
        "driver": driver,
        "clocks": dict(zip(names[1:], clocks, strict=False)),
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    """Return COMMIT from the environment (a copied tree has no history), else git's description."""
    output = _output(("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match=-"))
    return os.environ.get("COMMIT") or output or "unknown"


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

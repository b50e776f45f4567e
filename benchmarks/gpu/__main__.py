"""Run stages on a GPU. Each stage runs in a process of its own, with a time limit of its own.

    python -m benchmarks.gpu prove --out OUT             # correctness, and the fastest launch config
    python -m benchmarks.gpu record --out OUT            # the figures to publish
    python -m benchmarks.gpu extras --out OUT            # unsloth-zoo, and calls outside the main path
    python -m benchmarks.gpu sweep steps --out OUT       # any stages, in this order
    python -m benchmarks.gpu prove --out OUT --dry-run   # on any machine: tiny shapes, Triton's interpreter

Each result is written at once, as a line of OUT/results.jsonl, so a killed stage keeps its results. If a
stage fails or exceeds its limit, the run reports it and starts the next stage. The run ends with a table.
The exit status is 1 if a stage failed, and 2 for invalid arguments.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.runs import LIMIT, RUNS, STAGES, ZOO_FILE, ZOO_INSTALL

# the kernels of a dry run are interpreted, which takes longer than on a GPU
_DRY_LIMIT = 300.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages",
        nargs="+",
        metavar="STAGE",
        help=f"a run ({', '.join(RUNS)}) or a stage ({', '.join(STAGES)})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, empty or new")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument(
        "--states", type=Path, help="hidden states from `python -m benchmarks.studies.accuracy --export`"
    )
    parser.add_argument(
        "--unsloth-zoo", type=Path, metavar="DIR", help=f"folder with unsloth-zoo (AGPL-3.0); {ZOO_INSTALL}"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="S",
        help=f"seconds for the run (default: {LIMIT:g}); more gives each stage more time",
    )
    given = parser.parse_args(arguments)
    names = [name for stage in given.stages for name in RUNS.get(stage, (stage,))]
    for name in names:
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}; available: {', '.join([*RUNS, *STAGES])}")
    if given.states is not None and not given.states.is_file():
        parser.error(
            f"--states: {given.states} is not a file; "
            "make it with python -m benchmarks.studies.accuracy --export"
        )
    if given.unsloth_zoo is not None and not (given.unsloth_zoo / ZOO_FILE).is_file():
        parser.error(f"--unsloth-zoo: {given.unsloth_zoo} lacks {ZOO_FILE}; {ZOO_INSTALL}")
    for option, value, stage in (
        ("--states", given.states, "accuracy"), ("--unsloth-zoo", given.unsloth_zoo, "unsloth"),
    ):  # fmt: skip
        if value is not None and stage not in names:
            parser.error(
                f"{option} applies to stage {stage}, which this run lacks; add the stage, or drop {option}"
            )
    if (given.out / "results.jsonl").exists():
        parser.error(f"--out: {given.out} holds the results of another run; give another folder")
    if not given.dry_run and not _gpu():
        parser.error("no CUDA device; pass --dry-run to run the stages on a CPU")
    given.out.mkdir(parents=True, exist_ok=True)

    started, failed = time.monotonic(), []
    deadline = started + (given.limit if not given.dry_run else _DRY_LIMIT * len(names))
    for name in names:
        limit = _DRY_LIMIT if given.dry_run else STAGES[name].seconds * max(1.0, given.limit / LIMIT)
        verdict = run(name, given, min(limit, deadline - time.monotonic()))
        passed = round(time.monotonic() - started, 1)
        _note(given.out, stage=name, what="the stage", verdict=verdict, ended_at_seconds=passed)
        print(f"{name}: {verdict}, {passed:.0f} s since the start", flush=True)
        if verdict != "passed":
            failed.append(name)
    print(table(given.out, names))
    return int(bool(failed))


def run(name: str, given: argparse.Namespace, limit: float) -> str:
    """Run one stage. Return "passed", or why it failed."""
    if limit <= 1:
        return "not started: the time limit of the run is used up"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if given.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    else:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.stages", name, str(given.out)]
    command += ["--dry-run"] * given.dry_run + ["--seconds", str(limit)]
    for option, path in (("--states", given.states), ("--unsloth-zoo", given.unsloth_zoo)):
        command += [option, str(path)] * (path is not None)
    with (given.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"# {name}\n")
        log.flush()
        # in a process group of its own, which is killed completely if a kernel hangs
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"exceeded its limit of {limit:.0f} s"
        finally:
            _kill(process)
    return "passed" if code == 0 else f"failed with status {code}, see log.txt"


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _note(out: Path, **record: Any) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def table(out: Path, names: list[str]) -> str:
    """Return the results, one per line."""
    lines = []
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        stage, what = record.pop("stage"), record.pop("what")
        record.pop("machine", None)
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        if stage in names:
            lines.append(f"{stage:10} {what:44} {'  '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

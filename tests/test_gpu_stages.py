"""`python -m benchmarks.gpu` runs end to end without a GPU."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.runs import LIMIT, RUNS, STAGES, Stage
from tests.conftest import GPU, ROOT


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # the stages' pytest is their own: neither a worker of this one nor measured for coverage with it
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given = inherited | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=550, check=False
    )


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_dry_run_of_every_stage(tmp_path: Path) -> None:
    stages = list(dict.fromkeys(name for run in RUNS.values() for name in run))
    zoo = os.environ.get("UAL_UNSLOTH_ZOO")
    more = ["--unsloth-zoo", zoo] if zoo else []
    done = started(*stages, "--out", str(tmp_path), "--dry-run", *more)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    found = results(tmp_path)
    verdicts = {r["stage"]: r["verdict"] for r in found if r["what"] == "the stage"}
    assert verdicts == dict.fromkeys(stages, "passed")
    measured = {r["stage"] for r in found if r["what"] != "the stage"}
    assert measured == {*stages}
    assert next(r for r in found if r["what"] == "machine")["machine"]["versions"]["torch"]
    skipped = {r["stage"] for r in found if isinstance(r.get("skipped"), str)}
    # the tools of a GPU, and a package that nothing installs unless it is asked for
    assert skipped == {"ncu", "sanitizer"} | ({"unsloth"} if not zoo else set())
    if zoo:
        peer = [r for r in found if r["what"].startswith("tiny frozen: unsloth-zoo")]
        assert [r["solves"] for r in peer] == ["s = 0", "one s = 0.1"], peer
        assert {(r["version"], r["license"]) for r in peer} == {("2026.10.9", "AGPL-3.0")}
    assert len(list(tmp_path.iterdir())) <= 8  # which is all that a rented machine may send back
    # the table ends the output
    assert done.stdout.splitlines()[-1].startswith(f"{stages[-1]} ")


def test_each_stage_is_known_and_each_run_fits() -> None:
    from benchmarks.gpu import stages

    assert {*stages.STAGES} == {*STAGES}
    assert {name for run in RUNS.values() for name in run} == {*STAGES}
    assert LIMIT <= 340
    for run in RUNS.values():
        assert sum(STAGES[name].seconds for name in run) <= LIMIT


def given(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, dry_run=True, states=None, unsloth_zoo=None)


def ended(process: int) -> bool:
    """Wait a tenth of a second, since a busy machine takes a moment to kill; tell whether it is dead."""
    time.sleep(0.1)
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_stage_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nsleep 600 & echo $! >child\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(hanging))
    before = time.monotonic()
    assert gpu.run("sweep", given(tmp_path), 2.0) == "exceeded its limit of 2 s"
    assert time.monotonic() - before < 20
    child = int((tmp_path / "child").read_text())
    assert any(ended(child) for _ in range(100))


@pytest.mark.kills("benchmarks/gpu/__main__.py", "    return int(bool(failed))", "    return 0")
def test_a_stage_that_fails_is_named_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu.main(["sweep", "steps", "--out", str(tmp_path), "--dry-run"]) == 1
    verdicts = {r["stage"]: r["verdict"] for r in results(tmp_path)}
    assert verdicts == dict.fromkeys(("sweep", "steps"), "failed with status 1, see log.txt")
    assert "steps: failed with status 1" in capsys.readouterr().out


@pytest.mark.kills("benchmarks/gpu/__main__.py", "min(limit, deadline - time.monotonic())", "limit")
def test_a_run_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rental does not cover is not started, and says so."""
    monkeypatch.setattr(gpu, "STAGES", dict.fromkeys(STAGES, Stage(100, "")))
    monkeypatch.setattr(gpu, "_gpu", lambda: True)
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert gpu.main(["sweep", "steps", "--out", str(tmp_path), "--limit", "0.5"]) == 1
    assert {r["verdict"] for r in results(tmp_path)} == {"not started: the time limit of the run is used up"}


@pytest.mark.kills("benchmarks/gpu/stages.py", " or _sleep[0] >= _LONGEST_SLEEP", " or _sleep[0] >= 2**40")
def test_a_step_that_waits_for_the_device_does_not_lengthen_the_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a step is never queued in time. Its rounds must not use up the time of the run."""
    from benchmarks.gpu import stages

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True  # the sleep has ended: the step waited

        def elapsed_time(self, end: "Event") -> float:
            return 5.0

    slept: list[int] = []
    monkeypatch.setattr(stages, "CUDA", True)
    monkeypatch.setattr(stages, "_sleep", [4_000_000])
    for name, value in (("Event", Event), ("synchronize", lambda: None), ("_sleep", slept.append)):
        monkeypatch.setattr(stages.torch.cuda, name, value)
    assert [stages._alone(lambda: None) for _ in range(5)] == [5e-3] * 5
    assert max(slept) == stages._LONGEST_SLEEP
    assert len(slept) == 4 + 4  # the first round doubles it three times; the others sleep once


def test_results_of_another_run_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["sweep", "--out", str(tmp_path), "--dry-run"])
    assert "holds the results of another run; give another folder" in capsys.readouterr().err


@pytest.mark.kills("benchmarks/gpu/__main__.py", "value is not None and stage not in names", "False")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prove"], "the following arguments are required: --out"),
        (["proove", "--out", "{}"], "unknown stage 'proove'; available: prove, record, extras, canary"),
        (["prove", "--out", "{}", "--dry-run", "--states", "{}/none"], "none is not a file; make it with"),
        (
            ["prove", "--out", "{}", "--dry-run", "--unsloth-zoo", "{}"],
            "lacks unsloth_zoo/fused_losses/fused_linear.py; make one with pip install --no-deps --target",
        ),
        (
            ["unsloth", "--out", "{}", "--dry-run", "--states", __file__],
            "--states applies to stage accuracy, which this run lacks; add the stage, or drop --states",
        ),
        pytest.param(
            ["prove", "--out", "{}"],
            "no CUDA device; pass --dry-run",
            marks=pytest.mark.skipif(GPU, reason="there is one"),
        ),
    ],
)
def test_refuses(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = started(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr

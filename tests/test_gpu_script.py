"""`benchmarks/gpu.sh` runs end to end without a GPU, so that its hour on one is not lost to a slip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GPU, ROOT

FILES = {
    "summary.md", "part1.log", "part1.xml", "part2.log", "part2.xml",
    "part3.json", "part4.json", "part5.json",
}  # fmt: skip


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # the script's pytest is its own: neither a worker of this one nor measured for coverage with it
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given = inherited | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=550, check=False)


@pytest.mark.slow
def test_a_dry_run_writes_every_file_and_says_what_it_replaced(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--dry-run", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name: path for path in tmp_path.iterdir()}
    assert written.keys() == FILES  # eight, which is all that one call may bring back
    assert all(0 < path.stat().st_size < 2**24 for path in written.values())
    for name in ("part3.json", "part4.json", "part5.json"):
        assert json.loads(written[name].read_text())["machine"]["commit"]
    said = written["summary.md"].read_text()
    for part in range(1, 6):
        assert f"part {part} passed" in said
        assert f"dry run: part {part}: " in said
    assert "needs a CUDA device" in written["part2.log"].read_text()


def test_a_part_that_fails_fails_the_script_and_not_the_other_parts(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--dry-run", PYTHON="false")
    assert done.returncode == 1
    said = (tmp_path / "summary.md").read_text()
    assert [f"part {part} FAILED with status 1" in said for part in range(1, 6)] == [True] * 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "OUT_DIR is missing"),
        (["{}", "--part", "6"], "--part: wanted 1 to 5, got 6"),
        (["{}", "--part"], "--part: wanted 1 to 5, got nothing"),
        (["{}", "--quick"], "--quick goes with --dry-run"),
        (["{}", "--dry"], "unknown option --dry"),
        pytest.param(["{}"], "no CUDA device", marks=pytest.mark.skipif(GPU, reason="there is one")),
    ],
)
def test_refuses(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = script(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr

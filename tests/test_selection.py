"""`make test` and `make proofs` together run every test once; --parts selects files of the proofs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import ROOT, turn

FILES = ("tests/kernels/test_linear_triton.py", "tests/kernels/test_sparse_targets.py")


def collected(*words: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:benchmark", *FILES, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.kills("tests/conftest.py", "cases[function] % spare > 0", "True")
@pytest.mark.kills("tests/conftest.py", 'only == "fast" or item.path in due', "True")
@pytest.mark.slow
def test_every_test_is_fast_or_slow() -> None:
    everything, fast, slow = collected(), collected("--only", "fast"), collected("--only", "slow")
    assert sorted(fast + slow) == sorted(everything)
    flag = f"{FILES[0]}::test_every_flag["
    assert [name for name in fast if name.startswith(flag)] == [n for n in everything if n.startswith(flag)][
        ::8
    ]
    due, part = sorted(FILES)[turn(2)], collected("--only", "slow", "--parts", "2")
    assert part == [name for name in slow if Path(name.partition("::")[0]) == Path(due)]
    assert part

"""Mutation tests: break the code one line at a time and check that the tests notice.

    python tests/mutants.py            every mutant
    python tests/mutants.py _torch     the mutants of files whose path contains a word
    python tests/mutants.py --parts 3  a third of them; each commit selects another third

A mutant stands beside the test that kills it:

    @pytest.mark.kills("ual_kernels/losses.py", "good text", "bad text")
    def test_...

`good` must occur exactly once in the file. `only="bf16"` runs the test with that parameter alone. `slow=True`
marks a mutant that takes minutes; it is tried only when all mutants are.

The unbroken code must pass first. Each mutant is then tried in a copy of the tree. Its tests must fail, or
crash the interpreter, as an address out of bounds does. Tests that cannot run do not count.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2


class Mutant(NamedTuple):
    file: str
    good: str
    bad: str
    slow: bool = False
    tests: tuple[str, ...] = ()


class Collector:
    """A pytest plugin that reads the `kills` marks of the collected tests."""

    def __init__(self) -> None:
        self.tests: dict[Mutant, list[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("kills"):
                self.add(item, *mark.args, **mark.kwargs)

    def add(
        self, item: pytest.Item, file: str, good: str, bad: str, *, only: str = "", slow: bool = False
    ) -> None:
        function, _, parameters = item.nodeid.partition("[")
        if only and parameters.removesuffix("]") != only:
            return
        tests = self.tests.setdefault(Mutant(file, good, bad, slow), [])
        test = item.nodeid if only else function
        if test not in tests:
            tests.append(test)

    def mutants(self) -> list[Mutant]:
        return [mutant._replace(tests=tuple(tests)) for mutant, tests in self.tests.items()]


def collect() -> list[Mutant]:
    """Return all mutants.

    Collection runs in a fork: it imports the code, and the processes that try mutants must not inherit that.
    """
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_collect, args=(sender,))
    process.start()
    sender.close()
    with suppress(EOFError):
        mutants: list[Mutant] = receiver.recv()
        process.join()
        return mutants
    sys.exit("the tests cannot be collected: run `pytest --collect-only` to see why")


def _collect(sender: connection.Connection) -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    _silence()
    collector = Collector()
    if pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"], plugins=[collector]) == 0:
        sender.send(collector.mutants())
    os._exit(0)


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def copy_of_the_tree(tree: Path) -> Path:
    for name in ("ual", "ual_kernels", "benchmarks", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.svg", "*.png")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    data = ROOT.parent / "shared"
    if data.is_dir() and not (tree.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(data)
    return tree


def run(tree: Path, mutant: Mutant) -> None:
    """Break the copy, run the tests there, and exit with their exit code; called in a process of its own."""
    code = 99
    try:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        _silence()
        source = tree / mutant.file
        source.write_text(source.read_text().replace(mutant.good, mutant.bad))
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *mutant.tests])
    finally:
        os._exit(code)


def attempts(chosen: list[Mutant], folder: Path) -> Iterator[tuple[Mutant, int]]:
    """Yield each mutant with the exit code of its tests, in the order in which they end."""
    fork = get_context("fork")
    waiting, running = deque(enumerate(chosen)), {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            number, mutant = waiting.popleft()
            process = fork.Process(target=run, args=(copy_of_the_tree(folder / str(number)), mutant))
            process.start()
            running[process.sentinel] = process, mutant
        for sentinel in connection.wait(list(running)):
            process, mutant = running.pop(sentinel)
            process.join()
            yield mutant, process.exitcode


def verdict(code: int) -> str:
    """Name a pytest exit code: 1 means that tests failed, a negative code is a signal."""
    return {0: "survived", 1: "killed"}.get(code, "killed" if code < 0 else f"ran no test (exit code {code})")


def prepare() -> None:
    """Import what every fork needs, on the CPU: an access out of bounds then ends no GPU driver."""
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for module in ("torch._dynamo", "triton"):
        importlib.import_module(module)


def turn(parts: int) -> int:
    """Return which of `parts` parts this commit tries."""
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(said.stdout.strip() or "0", 16) % parts


def ambiguous(mutants: list[Mutant]) -> list[str]:
    """Describe the mutants whose good text does not occur exactly once in its file."""
    return [
        f"{mutant.file}: the good text must occur once, got {count} times: {mutant.good!r}"
        for mutant in mutants
        if (count := (ROOT / mutant.file).read_text().count(mutant.good)) != 1
    ]


def main(word: str, parts: int) -> int:
    prepare()
    everything = collect()
    among = everything if parts == 1 else [mutant for mutant in everything if not mutant.slow]
    chosen = [mutant for mutant in among if word in mutant.file][turn(parts) :: parts]
    problems = ambiguous(everything)
    start, killed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        needed = sorted({test for mutant in chosen for test in mutant.tests})
        shares = [tuple(needed[i::WORKERS]) for i in range(WORKERS)]
        unbroken = [Mutant("pyproject.toml", "", "", tests=share) for share in shares if share]
        codes = [code for _, code in attempts(unbroken, Path(folder, "unbroken"))]
        if any(codes):
            print("the unbroken code fails its tests, so no mutant was tried")
            return 1
        for mutant, code in attempts(chosen, Path(folder, "broken")):
            print(f"{verdict(code):9} {mutant.file}: {mutant.good.splitlines()[-1].strip()}", flush=True)
            killed += verdict(code) == "killed"
            if verdict(code) != "killed":
                problems.append(f"{mutant.file}: {verdict(code)}: {mutant.good!r} -> {mutant.bad!r}")
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s")
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "tests/mutants.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="only files whose path contains it")
    parser.add_argument("--parts", type=int, default=1, help="try one of so many parts, by the commit")
    given = parser.parse_args()
    sys.exit(main(given.word, given.parts))

"""Right first, fast second, and how much memory: what every suite measures with.

    python -m benchmarks.measure --memory naive 1024:576:49152 2048:576:49152     # N:D:V

A round of whoever is measured comes right after a round of the bare products and a round of ours, so that a
machine that slows down does so for all three; ratios are medians of the ratios within rounds.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import benchmarks.interpreted  # noqa: F401  before anything that imports Triton

# isort: split
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.problems import FROZEN, IGNORED, Case, Problem, Setting, exact
from benchmarks.providers import PROVIDERS, Loss, Provider, chosen

Step = Callable[[], Any]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# far above what 16-bit logits and accumulators cost (4e-2 at worst), far below what a mistake costs
GRADIENT_BUDGET, LOSS_BUDGET = 0.06, 0.02
_SLICE_ROWS, _SLICE_VOCAB = 64, 4_096
_COPY_BYTES = 1 << 31 if CUDA else 1 << 26
_SHORT = 1e-3  # seconds: below, launches would be what is measured
_REPLAYS = 20
_LONG = 5.0  # seconds: above, a first run tells enough; torch imports its compiler in ours, which takes 2


class WrongError(Exception):
    """A loss or a gradient is further from float64 than any rounding explains."""


# ---- right first ----


def errors(loss: Loss, case: Case) -> dict[str, float]:
    """Relative errors of the loss and of each gradient against float64, in the Frobenius norm.

    Raises:
        WrongError: one of them is not a rounding error.
    """
    truth = exact(case)
    wanted = case.wanted()
    # whoever overwrites its input gets a computed one
    value = loss(case._replace(hidden=case.hidden * 1.0) if case.head is None else case)
    gradients = torch.autograd.grad(value, list(wanted.values()), case.upstream)
    goal = truth.rows if case.reduction == "none" else truth.loss
    found = {"loss": _relative(value.detach(), goal)}
    for name, gradient in zip(wanted, gradients, strict=True):
        found[name] = _relative(gradient, truth.gradients[name])
    for name, error in found.items():
        budget = LOSS_BUDGET if name == "loss" else GRADIENT_BUDGET
        if not error <= budget:  # NaN is wrong
            raise WrongError(f"{name} is off by {error:.1e} of its norm, {budget} is allowed")
    return found


def _relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def slice_of(problem: Problem) -> Problem:
    """A part of it that float64 can afford."""
    rows, vocab = min(problem.rows, _SLICE_ROWS), min(problem.vocab, _SLICE_VOCAB)
    return replace(problem, rows=rows, vocab=vocab)


def telling(case: Case) -> Case:
    """The same with four times the smoothing: up to 0.8, so that whoever forgets it is far off."""
    return case._replace(smoothing=case.smoothing * 4)


# ---- fast second ----


def training_step(loss: Loss, case: Case) -> Step:
    """Forward and backward."""
    wanted = list(case.wanted().values())
    if case.head is not None:
        return lambda: torch.autograd.grad(loss(case), wanted, case.upstream)
    anchor = torch.zeros((), device=case.hidden.device, requires_grad=True)
    buffer = case.hidden.detach()
    # what is overwritten is read again next round: the time does not depend on what the numbers are
    return lambda: loss(case._replace(hidden=_Computed.apply(anchor, buffer))).backward()


class _Computed(torch.autograd.Function):
    """A buffer as if it had been computed: a loss may overwrite it, and its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def products(case: Case, setting: Setting) -> Step:
    """The bare products of the rows that count, in the same dtype, into memory that is there."""
    assert case.head is not None
    e, c = case.hidden.detach()[case.target != IGNORED], case.head.detach()
    x, de, dc = e.new_empty(len(e), len(c)), torch.empty_like(e), torch.empty_like(c)

    def step() -> None:
        torch.mm(e, c.T, out=x)
        torch.mm(x, c, out=de)
        if setting.trainable:
            torch.mm(x.T, e, out=dc)
        # an adapter's gradients need X^T (E A^T) and (X B) only, which is next to nothing

    return step


def copy() -> Step:
    """A plain copy of memory, larger than any cache."""
    source = torch.empty(_COPY_BYTES, dtype=torch.int8, device=DEVICE).fill_(1)
    sink = torch.empty_like(source)
    return lambda: sink.copy_(source)


COPIED = 2 * _COPY_BYTES  # read and written


def seconds(step: Step) -> float:
    """One run, by the device's clock."""
    if not CUDA:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Clock:
    """A clock for pytest-benchmark that passes only while `run` runs a step, by the device's own time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, step: Step, runs: int = 1) -> None:
        self.now += seconds(step) / runs


CLOCK = Clock()


def settled(step: Step) -> tuple[Step, int, float]:
    """Warm it up. Returns what to time, how many runs of the step that is, and the seconds of one run.

    On a GPU a step of less than a millisecond is captured in a CUDA graph and replayed, where it lets itself
    be captured, so that launches from Python are not what is measured.
    """
    taken = seconds(step)
    if taken < _LONG:
        taken = seconds(step)
    if not CUDA or taken >= _SHORT:
        return step, 1, taken
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_REPLAYS):
                step()
    except Exception:  # it synchronises, or allocates where it may not; then the launches count
        torch.cuda.synchronize()
        return step, 1, taken
    graph.replay()
    return graph.replay, _REPLAYS, seconds(graph.replay) / _REPLAYS


def race(
    benchmark: Any, step: Step, beside: dict[str, Step], rounds: int, patience: float
) -> dict[str, list[float]]:
    """Seconds of `step` ("it") and of those beside it, round by round.

    Args:
        benchmark: pytest-benchmark's fixture, on `CLOCK`.
        beside: run, in this order, right before each round.
        rounds: at most; fewer, but at least 3, where they would take more than `patience` seconds; one, where
            a single round takes longer than that.
    """
    steps = {name: settled(other) for name, other in (beside | {"it": step}).items()}
    one_round = sum(runs * taken for _, runs, taken in steps.values())
    _, runs, taken = steps["it"]
    if CUDA and runs == 1 and taken < _SHORT:
        benchmark.extra_info["note"] = "no CUDA graph takes it: launches from Python are in its time"
    rounds = min(rounds, 1 if one_round > patience else max(3, int(patience / one_round)))
    found: dict[str, list[float]] = {name: [] for name in steps}

    def before() -> None:
        for name in beside:
            other, runs, _ = steps[name]
            found[name].append(seconds(other) / runs)

    def it() -> None:
        start = CLOCK.now
        CLOCK.run(*steps["it"][:2])
        found["it"].append(CLOCK.now - start)

    gc.collect()
    benchmark.pedantic(it, setup=before, rounds=rounds)
    return found


def ratio(over: list[float], under: list[float]) -> float:
    return median(a / b for a, b in zip(over, under, strict=True))


# ---- memory ----


def peak_bytes(step: Step) -> int:
    """What a step takes on top of what is there, by the allocator of a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fits(problem: Problem, provider: Provider) -> str:
    """Why a problem would not fit into memory, or nothing. On a CPU there is no error to catch."""
    if CUDA or provider.ours:
        return ""
    # 16-bit logits, float32 copies for the softmax, its backward, and their gradient
    needed = 18 * problem.rows * problem.vocab
    free = int(re.findall(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)[0]) * 1024
    return f"needs about {needed >> 30} GiB, {free >> 30} are free" if needed > 0.9 * free else ""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)[0]) * 1024


def extra_memory(provider: Provider, problems: list[Problem], dtype: torch.dtype) -> list[int]:
    """Bytes at the highest, beyond what was resident before, for each; for a process of its own."""
    loss, found = provider.load(), []
    for problem in [replace(problems[0], rows=8, vocab=64), *problems]:  # the first brings code and threads
        case = provider.ask(problem.case(FROZEN, DEVICE, dtype))
        step = training_step(loss, case)
        gc.collect()
        found.append(above_resident(step))
        del case, step
    return found[1:]


def above_resident(step: Step) -> int:
    """Bytes that are resident at the highest during a step, beyond those before it; of this process."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before
    try:
        # the high-water mark starts again from here; ru_maxrss would remember this process's parent
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def elsewhere(module: str, *arguments: str) -> Any:
    """What a module of ours prints in a fresh process, as JSON.

    Raises:
        RuntimeError: with that process's last words.
    """
    # what is freed is given back at once, else the high-water mark is the allocator's
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"a process for its memory ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def extra_memory_elsewhere(provider: Provider, problems: list[Problem], dtype: str) -> list[int]:
    """`extra_memory` in a fresh process."""
    sizes = [f"{p.rows}:{p.features}:{p.vocab}" for p in problems]
    return list(elsewhere("benchmarks.measure", "--memory", provider.name, *sizes, "--dtype", dtype))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.measure", description=__doc__)
    parser.add_argument("--memory", nargs="+", required=True, metavar=("PROVIDER", "N:D:V"))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    given = parser.parse_args()
    (provider,) = chosen(PROVIDERS, given.memory[:1])
    problems = [Problem("", *map(int, size.split(":"))) for size in given.memory[1:]]
    print(json.dumps(extra_memory(provider, problems, DTYPES[given.dtype])))


if __name__ == "__main__":
    main()

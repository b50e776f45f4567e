"""Checks and measurements that every suite uses: errors, times, and memory.

    python -m benchmarks.measure --memory naive 1024:576:49152 2048:576:49152     # N:D:V

Each round runs the bare products, ours, and the measured implementation, one right after another. A machine
that slows down slows all three. Ratios are medians of the ratios within rounds.
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
# above what 16-bit logits and accumulators cause (4e-2 at most), and below what a wrong formula causes
GRADIENT_BUDGET, LOSS_BUDGET = 0.06, 0.02
_SLICE_ROWS, _SLICE_VOCAB = 64, 4_096
_COPY_BYTES = 1 << 31 if CUDA else 1 << 26
_SHORT = 1e-3  # seconds; for shorter steps, launches would dominate
_REPLAYS = 20
_LONG = 5.0  # seconds; longer steps are not warmed up twice (in ours, importing torch's compiler takes 2 s)


class WrongError(Exception):
    """The error of a loss or a gradient exceeds what rounding explains."""


# ---- errors ----


def errors(loss: Loss, case: Case) -> dict[str, float]:
    """Return the relative errors of the loss and of each gradient against float64, in the Frobenius norm.

    Raises:
        WrongError: an error exceeds what rounding explains.
    """
    truth = exact(case)
    wanted = case.differentiable()
    # a loss may overwrite its input, which must not be a leaf then
    value = loss(case._replace(hidden=case.hidden * 1.0) if case.head is None else case)
    gradients = torch.autograd.grad(value, list(wanted.values()), case.upstream)
    goal = truth.token_losses if case.reduction == "none" else truth.loss
    found = {"loss": _relative(value.detach(), goal)}
    for name, gradient in zip(wanted, gradients, strict=True):
        found[name] = _relative(gradient, truth.gradients[name])
    for name, error in found.items():
        budget = LOSS_BUDGET if name == "loss" else GRADIENT_BUDGET
        if not error <= budget:  # also for NaN
            raise WrongError(f"relative error of {name} is {error:.1e}; at most {budget} is allowed")
    return found


def _relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def slice_of(problem: Problem) -> Problem:
    """Return a part of the problem that is small enough for float64."""
    rows, vocab = min(problem.rows, _SLICE_ROWS), min(problem.vocab, _SLICE_VOCAB)
    return replace(problem, rows=rows, vocab=vocab)


def telling(case: Case) -> Case:
    """Return the case with four times the smoothing, up to 0.8: a loss that ignores it fails `errors`."""
    return case._replace(smoothing=case.smoothing * 4)


# ---- time ----


def training_step(loss: Loss, case: Case) -> Step:
    """Return a step of forward and backward."""
    wanted = list(case.differentiable().values())
    if case.head is not None:
        return lambda: torch.autograd.grad(loss(case), wanted, case.upstream)
    leaf = torch.zeros((), device=case.hidden.device, requires_grad=True)
    buffer = case.hidden.detach()
    # the next round reads overwritten numbers, which does not change the time
    return lambda: loss(case._replace(hidden=_Computed.apply(leaf, buffer))).backward()


class _Computed(torch.autograd.Function):
    """Returns a buffer as a non-leaf, which a loss may overwrite; its gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def products(case: Case, setting: Setting) -> Step:
    """Return a step of the bare products of the loss tokens, written into allocated memory."""
    assert case.head is not None
    e, c = case.hidden.detach()[case.target != IGNORED], case.head.detach()
    x, de, dc = e.new_empty(len(e), len(c)), torch.empty_like(e), torch.empty_like(c)

    def step() -> None:
        torch.mm(e, c.T, out=x)
        torch.mm(x, c, out=de)
        if setting.trainable:
            torch.mm(x.T, e, out=dc)
        # an adapter's gradients need only X^T (E A^T) and X B, whose cost is negligible

    return step


def faster_dtype(problem: Problem) -> str:
    """Return the dtype in which the bare products of a part of the problem are faster, a key of `DTYPES`."""

    def best(dtype: str) -> float:
        step = products(slice_of(problem).case(FROZEN, DEVICE, DTYPES[dtype]), FROZEN)
        return min(seconds(step) for _ in range(3))

    return min(DTYPES, key=best)


def copy() -> Step:
    """Return a step that copies memory, more than any cache holds."""
    source = torch.empty(_COPY_BYTES, dtype=torch.int8, device=DEVICE).fill_(1)
    sink = torch.empty_like(source)
    return lambda: sink.copy_(source)


COPIED = 2 * _COPY_BYTES  # read and written


def seconds(step: Step) -> float:
    """Return the seconds of one run, by the device's clock."""
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
    """A clock for pytest-benchmark that advances only in `run`, by the device's time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, step: Step, runs: int = 1) -> None:
        self.now += seconds(step) / runs


CLOCK = Clock()


def settled(step: Step) -> tuple[Step, int, float]:
    """Warm a step up.

    On a GPU, a step shorter than a millisecond is captured in a CUDA graph if possible. Replaying the graph
    avoids measuring launches from Python.

    Returns:
        The step to time, how many runs of `step` it contains, and the seconds of one run.
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
    except Exception:  # the step synchronizes, or allocates during capture
        torch.cuda.synchronize()
        return step, 1, taken
    graph.replay()
    return graph.replay, _REPLAYS, seconds(graph.replay) / _REPLAYS


def race(
    benchmark: Any, step: Step, beside: dict[str, Step], rounds: int, patience: float
) -> dict[str, list[float]]:
    """Return the seconds of `step` (key "it") and of the steps beside it, for each round.

    Args:
        benchmark: pytest-benchmark's fixture, with `CLOCK` as its timer.
        step: The measured step.
        beside: Steps that run in this order right before `step` in each round.
        rounds: Upper bound on the number of rounds.
        patience: Seconds for all rounds. Reduces their number to 3 at least, or to 1 if a round takes longer.
    """
    steps = {name: settled(other) for name, other in (beside | {"it": step}).items()}
    one_round = sum(runs * taken for _, runs, taken in steps.values())
    _, runs, taken = steps["it"]
    if CUDA and runs == 1 and taken < _SHORT:
        benchmark.extra_info["note"] = "not captured in a CUDA graph: the time includes launches from Python"
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
    """Return the peak memory of a step beyond what was allocated before, from the GPU's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fits(problem: Problem, provider: Provider) -> str:
    """Return why a problem does not fit into a CPU's memory, or "". Running out of it cannot be caught."""
    if CUDA or provider.ours:
        return ""
    # 16-bit logits, float32 copies for the softmax, its backward, and their gradient
    needed = 18 * problem.rows * problem.vocab
    free = int(re.findall(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)[0]) * 1024
    return (
        f"needs about {needed >> 30} GiB of memory; {free >> 30} GiB are free" if needed > 0.9 * free else ""
    )


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)[0]) * 1024


def extra_memory(provider: Provider, problems: list[Problem], dtype: torch.dtype) -> list[int]:
    """Return the extra peak memory in bytes for each problem. Must run in a process of its own."""
    loss, found = provider.load(), []
    for problem in [
        replace(problems[0], rows=8, vocab=64),
        *problems,
    ]:  # the first run loads code and starts threads
        case = provider.adapt(problem.case(FROZEN, DEVICE, dtype))
        step = training_step(loss, case)
        gc.collect()
        found.append(above_resident(step))
        del case, step
    return found[1:]


def above_resident(step: Step) -> int:
    """Return this process's peak resident memory during a step beyond that before it, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory
    try:
        # resets the high-water mark; ru_maxrss would include the parent process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def elsewhere(module: str, *arguments: str) -> Any:
    """Run a module in a new process and return the JSON of its last line of output.

    Raises:
        RuntimeError: the process failed; with its last line of standard error.
    """
    # freed memory is returned at once; otherwise the high-water mark includes what the allocator keeps
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"{module} exited with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def extra_memory_elsewhere(provider: Provider, problems: list[Problem], dtype: str) -> list[int]:
    """Return `extra_memory`, measured in a new process."""
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

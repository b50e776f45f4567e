"""TFLOP/s of the GEMM that makes x, E C^T with its epilogue, for several launch configs and for cuBLAS.

    python -m benchmarks.gpu.launch_configs                   # on a GPU: D 4096, N 8192, V 128256 and V 32000
    python -m benchmarks.gpu.launch_configs --problem gemma2 --rounds 20
    python -m benchmarks.gpu.launch_configs --problem tiny    # on any machine: tests the program

Each launch config runs in a complete training step (frozen head, smoothing per token). CUDA events around
the launches that make x measure their time; the time of the step is reported as well. A launch config is
incorrect if the loss or the gradient of the step differs from the "exact" variant by more than rounding the
exponentials to 16 bits explains. cuBLAS multiplies the same matrices into bfloat16, in one call.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.interpreted import INTERPRETED, repair  # before anything that imports Triton

# isort: split
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.gpu.launches import watching
from benchmarks.measure import CUDA, DEVICE, seconds
from benchmarks.problems import FROZEN, PROBLEMS, Case, Problem
from benchmarks.report import failure
from ual_kernels import linear_cross_entropy
from ual_kernels._triton import linear_cross_entropy as kernels
from ual_kernels._triton.linear_cross_entropy import GemmLaunchConfig, Platform

# two results whose errors are at most the rounding of bfloat16, 2.3e-3 each
_APART = 5e-3
# variant, block_m, block_n, block_k, group, num_warps, num_stages, flatten
SWEEP: tuple[tuple[str, GemmLaunchConfig], ...] = (
    ("tma", GemmLaunchConfig(128, 256, 64, 8, 8, 4, True)),
    ("tma", GemmLaunchConfig(128, 256, 64, 16, 8, 4, True)),
    ("tma", GemmLaunchConfig(128, 256, 64, 32, 8, 4, True)),
    ("tma", GemmLaunchConfig(128, 256, 64, 8, 8, 4, False)),
    ("tma", GemmLaunchConfig(128, 256, 64, 16, 8, 4, False)),
    ("tma", GemmLaunchConfig(256, 128, 64, 8, 8, 4, True)),
    ("tma", GemmLaunchConfig(128, 256, 128, 8, 8, 2, True)),
    ("tma", GemmLaunchConfig(128, 128, 64, 8, 4, 3, True)),
    ("pointer", GemmLaunchConfig(128, 256, 64, 8, 8, 3)),
    ("pointer", GemmLaunchConfig(128, 128, 64, 8, 8, 3)),
)
TINY_SWEEP: tuple[tuple[str, GemmLaunchConfig], ...] = (
    ("tma", GemmLaunchConfig(16, 64, 32, 2, 4, 1, True)),
    ("pointer", GemmLaunchConfig(16, 128, 32, 2, 4, 1)),
)


@contextmanager
def launched_with(plan: GemmLaunchConfig) -> Iterator[None]:
    """Within this context, every GEMM that makes x is launched with `plan`."""
    choose = Platform.launch_config
    Platform.launch_config = lambda *_: plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        Platform.launch_config = choose  # type: ignore[method-assign]


class _Stopwatch:
    """Sums the seconds between entering and leaving `around`."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def around(self, _: dict[str, Any]) -> Iterator[None]:
        start = self._now()
        yield
        self.pairs.append((start, self._now()))

    @staticmethod
    def _now() -> Any:
        if not CUDA:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total(self) -> float:
        if not CUDA:
            return sum(end - start for start, end in self.pairs)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.pairs) / 1e3


def step(case: Case, variant: str) -> tuple[Tensor, Tensor]:
    kernels.VARIANT = variant
    loss = linear_cross_entropy(
        case.hidden, case.head, case.target, label_smoothing=case.smoothing, backend="triton"
    )
    return loss.detach(), torch.autograd.grad(loss, case.hidden)[0]


def _cublas(case: Case, rounds: int) -> float:
    e, c = case.hidden.detach(), case.head.detach()
    x = e.new_empty(len(e), len(c))
    torch.mm(e, c.T, out=x)
    return median(seconds(lambda: torch.mm(e, c.T, out=x)) for _ in range(rounds))


def sweep(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a record for cuBLAS, then one for each launch config when it is measured."""
    case = problem.case(FROZEN, DEVICE, torch.bfloat16)
    flop = 2 * problem.rows * problem.vocab * problem.features
    taken = _cublas(case, rounds)
    cublas = flop / taken / 1e12
    yield {
        "launch_config": "cuBLAS",
        "gemm_seconds": taken,
        "tflops": cublas,
        "of_cublas": 1.0,
        "step_seconds": None,
    }
    loss, gradient = step(case, "exact")
    platform = Platform.of(case.hidden)
    now = "tma" if platform.tma else "pointer"
    given = now, platform.launch_config(now)._replace(source=GemmLaunchConfig._field_defaults["source"])
    configs = [given, *(p for p in (SWEEP if CUDA else TINY_SWEEP) if p != given)]
    for variant, plan in configs:
        shape = " ".join(f"{k}={v}" for k, v in plan._asdict().items() if k != "source")
        record: dict[str, Any] = {"launch_config": f"{variant} {shape}", "ours_now": (variant, plan) == given}
        try:
            record |= _measured(case, variant, plan, rounds, loss, gradient)
        except Exception as error:  # for example, too much shared memory for this GPU
            record["raised"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if "gemm_seconds" in record:
            record["tflops"] = flop / record["gemm_seconds"] / 1e12
            record["of_cublas"] = record["tflops"] / cublas
        yield record


def _measured(
    case: Case, variant: str, plan: GemmLaunchConfig, rounds: int, loss: Tensor, gradient: Tensor
) -> dict[str, Any]:
    """Return the seconds of the GEMM and of the step, if the results of the step are correct."""
    with launched_with(plan):
        mine, mine_gradient = step(case, variant)  # compiles
        apart = ((mine_gradient - gradient).norm() / gradient.norm()).item()
        if not (apart <= _APART and abs(mine - loss) <= 1e-4 * abs(loss)):
            message = f"loss is {mine.item()}, expected {loss.item()}; gradients differ by {apart:.1e}"
            return {"wrong": message}
        gemm, steps = [], []
        for _ in range(rounds):
            watch = _Stopwatch()
            with watching(kernels, f"_{variant}_kernel", watch.around):
                steps.append(seconds(partial(step, case, variant)))
            gemm.append(watch.total())
    return {"apart": apart, "gemm_seconds": median(gemm), "step_seconds": median(steps)}


def report(found: dict[str, Any]) -> str:
    """Return Markdown tables, one for each problem."""
    text = [f"# Launch configs of the GEMM that makes x, {found['rounds']} rounds"]
    if INTERPRETED:
        text.append("Interpreted on a CPU: the times are meaningless.")
    for name, records in found["problems"].items():
        p = PROBLEMS[name]
        text.append(f"## {name}: V {p.vocab}, D {p.features}, N {p.rows}")
        rows = []
        for r in records:
            reason = failure(r)
            if reason:
                rows.append((r["launch_config"], *("-",) * 4, reason))
                continue
            step_ms = "-" if r["step_seconds"] is None else f"{r['step_seconds'] * 1e3:.3g}"
            rows.append((
                r["launch_config"], f"{r['gemm_seconds'] * 1e3:.3g}", f"{r['tflops']:.3g}",
                f"{r['of_cublas']:.2f}", step_ms, "ours now" if r.get("ours_now") else "",
            ))  # fmt: skip
        text.append(machine.table(("launch config", "GEMM ms", "TFLOP/s", "of cuBLAS", "step ms", ""), rows))
    return "\n\n".join([*text, machine.headline(found["machine"])])


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return 1 if a launch config is incorrect."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.launch_configs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ["llama3", "llama2"] if CUDA else ["tiny"]
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=default)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/<machine>/...")
    parser.add_argument("--markdown", type=Path, metavar="F", help="default: beside it")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    repair()
    found: dict[str, Any] = {"machine": machine.describe(), "rounds": given.rounds}
    found["problems"] = {name: list(sweep(PROBLEMS[name], given.rounds)) for name in given.problem}
    text = report(found)
    print(text)
    machine.save(found, text, "launch_configs", given.json, given.markdown)
    return int(any("wrong" in r for records in found["problems"].values() for r in records))


if __name__ == "__main__":
    sys.exit(main())

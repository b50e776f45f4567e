"""The time and the memory of every provider, forward and backward, in rounds that take turns.

    python -m benchmarks.timing                                  # this machine's problems
    python -m benchmarks.timing --problem smollm2 gemma3 --dtype fp32 --rounds 7
    python -m benchmarks.timing --problem smollm2 --precision fast --providers naive 'torch*'
    python -m benchmarks.timing --problem tiny --setting all --logits --rounds 1    # does it run

Random hidden states and head, a smoothing of its own for each row. Each round runs everybody once, in an
order that rotates; a ratio is the median over rounds of ours / theirs within the round, so that a machine
that slows down does so for all. Providers that solve an easier problem are timed on that, and the table names
it. Before the clock starts each provider's loss and gradients are compared with float64 on a slice of the
problem, and whoever is wrong, or raises, is reported and not timed.

"GEMMs" are the bare products in the same dtype, into memory that was there before: E C^T and X C, and X^T E
for a trainable head. On a GPU times are CUDA events' and memory is the allocator's peak. On a CPU the extra
memory of a call is the resident set's high-water mark over what was resident before, in a fresh process for
each provider at 2048 rows. --budget ends the work early, in order: what was not run is said.
"""

import argparse
import gc
import json
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.interpreted import INTERPRETED, repair  # before anything that imports Triton

# isort: split
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.problems import (
    CPU_PROBLEMS,
    FROZEN,
    GPU_PROBLEMS,
    IGNORED,
    PROBLEMS,
    SETTINGS,
    Case,
    Problem,
    Setting,
    exact,
)
from benchmarks.providers import (
    LOGITS_PROVIDERS,
    PROVIDERS,
    Loss,
    MissingError,
    Provider,
    chosen,
)

Step = Callable[[], Any]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ON_CPU = ["naive", "torch chunked"]
MEMORY_ROWS = 2_048
GEMMS, COPY = "GEMMs", "copy"
# far above what 16-bit logits and accumulators cost (4e-2 at worst), far below what a mistake costs
GRADIENT_BUDGET, LOSS_BUDGET = 0.1, 0.02
_SLICE_ROWS, _SLICE_VOCAB = 64, 4_096
_COPY_BYTES = 1 << 31 if CUDA else 1 << 26


# ---- right first ----


def wrong(loss: Loss, case: Case) -> tuple[dict[str, float], str]:
    """Relative errors against float64, and what is wrong with them, if anything is."""
    truth = exact(case)
    wanted = [case.hidden, *([case.head] if case.head.requires_grad else [])]
    value = loss(case)
    gradients = torch.autograd.grad(value, wanted, case.upstream)
    goal = truth.rows if case.reduction == "none" else truth.loss
    errors = {"loss": ((value.detach().double() - goal).norm() / goal.norm()).item()}
    for name, gradient in zip(("dE", "dC"), gradients, strict=False):
        true = truth.hidden if name == "dE" else truth.head
        errors[name] = ((gradient.double() - true).norm() / true.norm()).item()
    for name, error in errors.items():
        budget = LOSS_BUDGET if name == "loss" else GRADIENT_BUDGET
        if not error <= budget:  # NaN is wrong
            return errors, f"{name} is off by {error:.1e} of its norm, {budget} is allowed"
    return errors, ""


# ---- fast second ----


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


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; who comes first in a round moves on by one."""
    names, found = list(steps), {name: [] for name in steps}
    gc.collect()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(seconds(steps[name]))
    return found


def training_step(loss: Loss, case: Case) -> Step:
    wanted = [case.hidden, *([case.head] if case.head.requires_grad else [])]
    return lambda: torch.autograd.grad(loss(case), wanted, case.upstream)


def gemms(case: Case) -> Step:
    """The products that nobody can do without, of the rows that count, and nothing else."""
    e, c = case.hidden.detach()[case.target != IGNORED], case.head.detach()
    x, de = e.new_empty(len(e), len(c)), torch.empty_like(e)
    dc = torch.empty_like(c) if case.head.requires_grad else None

    def step() -> None:
        torch.mm(e, c.T, out=x)
        torch.mm(x, c, out=de)
        if dc is not None:
            torch.mm(x.T, e, out=dc)

    return step


def peak_bytes(step: Step) -> int | None:
    """What a step takes on top of what is there, on a GPU."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- one problem ----


def linear(
    problem: Problem,
    setting: Setting,
    providers: list[Provider],
    reference: str,
    dtype: torch.dtype,
    rounds: int,
) -> list[dict[str, Any]]:
    """Records of everybody on one problem in one setting."""
    case = problem.case(setting, DEVICE, dtype)
    small = replace(
        problem, rows=min(problem.rows, _SLICE_ROWS), vocab=min(problem.vocab, _SLICE_VOCAB)
    ).case(setting, DEVICE, dtype)
    steps: dict[str, Step] = {GEMMS: gemms(case)}
    records: dict[str, dict[str, Any]] = {GEMMS: {"provider": GEMMS, "solves": "products alone", "how": ""}}

    def prepare(provider: Provider) -> tuple[Step, dict[str, float], str]:
        loss = provider.load()
        errors, mistake = wrong(loss, provider.ask(small))
        return training_step(loss, provider.ask(case)), errors, mistake

    _admit(providers, prepare, steps, records)
    live = int((case.target != IGNORED).sum())
    flop = (6 if setting.trainable else 4) * live * problem.vocab * problem.features
    _time(steps, records, reference, rounds, lambda r: r.update(tflops=flop / r["median"] / 1e12))
    where = {"kind": "linear", "problem": problem.name, "setting": setting.name}
    return [where | record for record in records.values()]


def logits(problem: Problem, providers: list[Provider], rounds: int) -> list[dict[str, Any]]:
    """The loss of given logits, forward and backward, beside a plain copy of memory."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
        values = torch.empty((rows, vocab), device=DEVICE, dtype=torch.bfloat16)
        values.normal_(std=3, generator=generator)
        target = torch.randint(vocab, (rows,), device=DEVICE, generator=generator)
        return values, target, torch.rand(rows, device=DEVICE, generator=generator) * 0.2

    buffer, target, smoothing = drawn(problem.rows, problem.vocab)
    small = drawn(min(problem.rows, _SLICE_ROWS), min(problem.vocab, _SLICE_VOCAB))
    source = torch.empty(_COPY_BYTES, dtype=torch.int8, device=DEVICE).fill_(1)
    sink = torch.empty_like(source)
    steps: dict[str, Step] = {COPY: lambda: sink.copy_(source)}
    records: dict[str, dict[str, Any]] = {
        COPY: {"provider": COPY, "solves": "2 bytes moved for 1", "how": ""}
    }

    def prepare(provider: Provider) -> tuple[Step, dict[str, float], str]:
        loss = provider.load()
        s = provider.solves.smoothing(smoothing)
        errors, mistake = _wrong_of_logits(loss, provider, *small)

        def step() -> None:
            # what it overwrites is read again next round: time does not depend on what the numbers are
            loss(
                _Computed.apply(torch.zeros((), device=DEVICE, requires_grad=True), buffer), target, s
            ).backward()

        return step, errors, mistake

    _admit(providers, prepare, steps, records)
    least = 2 * buffer.numel() * buffer.element_size()  # read once, written once

    def rate(record: dict[str, Any]) -> None:
        moved = 2 * _COPY_BYTES if record["provider"] == COPY else least
        record["gb_per_s"] = moved / record["median"] / 1e9

    _time(steps, records, "ours, in place", rounds, rate)
    where = {"kind": "logits", "problem": problem.name, "setting": "4NV bytes"}
    return [where | record for record in records.values()]


class _Computed(torch.autograd.Function):
    """A buffer as if it had been computed: the loss may overwrite it, and its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _wrong_of_logits(
    loss: Any, provider: Provider, values: Tensor, target: Tensor, smoothing: Tensor
) -> tuple[dict[str, float], str]:
    """As `wrong`: logits are the product of themselves and the identity."""
    eye = torch.eye(values.shape[1], device=values.device, dtype=values.dtype)

    def of_case(c: Case) -> Tensor:
        return loss(c.hidden * 1.0, c.target, c.smoothing)

    case = Case(values.clone().requires_grad_(), eye, target, smoothing)
    return wrong(of_case, provider.ask(case))


def _admit(
    providers: list[Provider],
    prepare: Callable[[Provider], tuple[Step, dict[str, float], str]],
    steps: dict[str, Step],
    records: dict[str, dict[str, Any]],
) -> None:
    """Check everybody, run everybody once at full size; who fails gets a record and no step."""
    for provider in providers:
        record: dict[str, Any] = {
            "provider": provider.name,
            "solves": provider.solves.value,
            "how": provider.how,
        }
        records[provider.name] = record
        try:
            step, record["errors"], mistake = prepare(provider)
            if mistake:
                record["wrong"] = mistake
                continue
            step()
            steps[provider.name] = step
        except MissingError as error:
            record["skipped"] = str(error)
        except Exception as error:  # a peer's failure is a finding, and no reason to stop
            record["raised"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            traceback.print_exc()
        if CUDA:
            torch.cuda.empty_cache()


def _time(
    steps: dict[str, Step],
    records: dict[str, dict[str, Any]],
    reference: str,
    rounds: int,
    rate: Callable[[dict[str, Any]], None],
) -> None:
    for name, taken in interleaved(steps, rounds).items():
        records[name] |= {"seconds": taken, "median": median(taken), "peak_bytes": peak_bytes(steps[name])}
        rate(records[name])
    ours = records.get(reference, {}).get("seconds")
    for name in steps if ours else ():
        records[name]["ratio"] = median(a / b for a, b in zip(ours, records[name]["seconds"], strict=True))


# ---- memory on a CPU ----


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)[0]) * 1024


def extra_memory(problem: Problem, provider: Provider, dtype: torch.dtype) -> int:
    """Bytes at the highest, beyond what was resident before; for a process of its own."""
    loss = provider.load()
    warm = replace(problem, rows=8, vocab=64).case(FROZEN, DEVICE, dtype)
    training_step(loss, provider.ask(warm))()  # code and thread pools are not the call's
    case = replace(problem, rows=MEMORY_ROWS).case(FROZEN, DEVICE, dtype)
    step = training_step(loss, provider.ask(case))
    gc.collect()
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


def memory(problem: Problem, providers: list[Provider], dtype: str) -> list[dict[str, Any]]:
    records = []
    for provider in providers:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.timing", "--memory-of", provider.name]
        command += ["--problem", problem.name, "--dtype", dtype]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
        record = {"kind": "memory", "problem": problem.name, "setting": FROZEN.name}
        record |= {"provider": provider.name, "solves": provider.solves.value, "how": provider.how}
        if done.returncode:
            record["raised"] = done.stderr.strip().rpartition("\n")[2]
        else:
            record["peak_bytes"] = int(done.stdout)
        records.append(record)
    return records


# ---- report ----


def report(found: dict[str, Any]) -> str:
    """Tables in Markdown, one for each problem and setting."""
    text = [f"# Time and memory, {found['dtype']}, {found['rounds']} rounds"]
    if INTERPRETED and any(r.get("how") for r in found["records"]):
        text.append("Triton's kernels were interpreted on a CPU: their times mean nothing.")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in found["records"]:
        groups.setdefault((record["kind"], record["problem"], record["setting"]), []).append(record)
    header = ("provider", "solves", "ms", "ours / it", "rate", "extra MiB", "dE error", "")
    for (kind, problem, setting), records in groups.items():
        p = PROBLEMS[problem]
        rows = MEMORY_ROWS if kind == "memory" else p.rows
        text.append(f"## {kind}: {problem}, V {p.vocab}, D {p.features}, N {rows}, {setting}")
        text.append(machine.table(header, [_line(r) for r in records]))
    text += [f"NOT RUN: {line}" for line in found["not_run"]]
    return "\n\n".join([*text, machine.headline(found["machine"])])


def _line(r: dict[str, Any]) -> tuple[str, ...]:
    def cell(name: str, form: str, scale: float = 1.0) -> str:
        return "-" if r.get(name) is None else format(r[name] * scale, form)

    told = next((f"{word}: {r[word]}" for word in ("skipped", "wrong", "raised") if word in r), r["how"])
    rate = (
        f"{r['tflops']:.3g} TFLOP/s"
        if "tflops" in r
        else f"{r['gb_per_s']:.0f} GB/s"
        if "gb_per_s" in r
        else "-"
    )
    error = r.get("errors", {}).get("dE")
    return (
        r["provider"],
        r["solves"],
        cell("median", ".3g" if r.get("median", 1) < 1 else ".0f", 1e3),
        cell("ratio", ".2f"),
        rate,
        cell("peak_bytes", ".0f", 2**-20),
        "-" if error is None else f"{error:.0e}",
        told,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.timing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = [p.name for p in (GPU_PROBLEMS if CUDA else CPU_PROBLEMS)]
    every = {s.name: s for s in SETTINGS}
    parser.add_argument(
        "--problem", nargs="+", choices=[*PROBLEMS, "all"], default=["all"], help=f"all: {own}"
    )
    parser.add_argument(
        "--setting", nargs="+", choices=[*every, "all"], default=["all" if CUDA else FROZEN.name],
        help="default: all on a GPU, frozen on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", default=[] if CUDA else ON_CPU, metavar="NAME",
        help="beside ours; default: all on a GPU, %(default)s on a CPU; 'name*' is all that start so",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=["high", "fast"], default="high", help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--logits", action="store_true", help="also the loss of given logits, and a copy")
    parser.add_argument("--no-memory", action="store_true", help="on a CPU: no processes for memory")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="seconds")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/<machine>/...")
    parser.add_argument("--markdown", type=Path, metavar="F", help="likewise")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    problems = [PROBLEMS[name] for name in (own if "all" in given.problem else given.problem)]
    settings = list(SETTINGS) if "all" in given.setting else [every[name] for name in given.setting]
    dtype = DTYPES[given.dtype]
    if given.memory_of:
        (provider,) = chosen(PROVIDERS, [given.memory_of])
        print(extra_memory(problems[0], provider, dtype))
        return 0
    ours = "ours, triton fused" if CUDA else "ours" if given.precision == "high" else "ours, fast"
    try:
        providers = chosen(PROVIDERS, [ours, *given.providers] if given.providers else [])
    except ValueError as error:
        parser.error(str(error))

    repair()
    deadline = time.monotonic() + given.budget
    found: dict[str, Any] = {"machine": machine.describe(), "interpreted": INTERPRETED, "reference": ours}
    found |= {"dtype": given.dtype, "rounds": given.rounds, "records": [], "not_run": []}
    work: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for setting in settings:
        for p in problems:
            step = partial(linear, p, setting, providers, ours, dtype, given.rounds)
            work.append((f"linear {p.name} {setting.name}", step))
        if given.logits and setting is settings[0]:  # cheap, so before the other settings
            everybody = list(LOGITS_PROVIDERS)
            work += [(f"logits {p.name}", partial(logits, p, everybody, given.rounds)) for p in problems]
    if not (CUDA or given.no_memory):
        compared = [p for p in providers if p.name in (ours, "naive")]
        work += [(f"memory {p.name}", partial(memory, p, compared, given.dtype)) for p in problems]
    for name, measured in work:
        if time.monotonic() > deadline:
            found["not_run"].append(f"{name}: the budget of {given.budget:.0f} s was spent")
            continue
        sys.stderr.write(f"{name}\n")
        found["records"] += measured()
        if given.json:  # what a time limit leaves
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if CUDA:
            torch.cuda.empty_cache()
    text = report(found)
    print(text)
    kind = f"timing-{given.dtype}" + ("" if given.precision == "high" else f"-{given.precision}")
    machine.save(found, text, kind, given.json, given.markdown)
    bad = [
        r for r in found["records"] if r["provider"].startswith("ours") and ("wrong" in r or "raised" in r)
    ]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

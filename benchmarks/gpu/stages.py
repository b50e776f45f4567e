"""The stages that `benchmarks.gpu.runs` lists. A process runs one stage."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.interpreted import INTERPRETED, repair  # before anything that imports Triton

# isort: split
import torch
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.gpu import launch_configs
from benchmarks.gpu.runs import ZOO_FILE, ZOO_INSTALL
from benchmarks.measure import CUDA, DEVICE, seconds
from benchmarks.problems import FROZEN, IGNORED, PROBLEMS, SETTINGS, TINY, Case, Problem, Setting
from benchmarks.providers import LOGITS_PROVIDERS, PROVIDERS, Loss, MissingError, Provider, Solves, chosen
from benchmarks.studies import accuracy
from ual_kernels import (
    CrossEntropyOptions,
    LinearCrossEntropyOptions,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
)
from ual_kernels._operands import ALL_TOKENS, LinearInputs, LinearSpec
from ual_kernels._triton import cross_entropy as of_logits
from ual_kernels._triton import linear_cross_entropy as of_states
from ual_kernels._triton.gemm import add_product, product

BY_NAME = {setting.name: setting for setting in SETTINGS}
VARIANTS = ("tma", "pointer", "cublas", "exact")
ROUNDS = 7
# cycles that the device sleeps before a timed step, so that launches from Python are not measured
_sleep = [4_000_000]
_LONGEST_SLEEP = 32_000_000  # some 20 ms
STAGES: dict[str, Callable[["Run"], None]] = {}


class Run:
    """The options of a stage, and its results."""

    def __init__(
        self,
        name: str,
        out: Path,
        dry: bool,
        states: Path | None,
        unsloth_zoo: Path | None,
        seconds: float | None,
    ) -> None:
        self.name, self.out, self.dry, self.states, self.unsloth_zoo = name, out, dry, states, unsloth_zoo
        self.seconds = seconds  # time limit of this stage

    def emit(self, what: str, **values: Any) -> None:
        """Append one result to the results file."""
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, "what": what, **values}) + "\n")
        print(what, values, flush=True)

    def problems(self, *names: str) -> list[Problem]:
        return [TINY] if self.dry else [PROBLEMS[name] for name in names]

    def settings(self, *names: str) -> tuple[str, ...]:
        return names[:1] if self.dry else names

    @property
    def rounds(self) -> int:
        return 1 if self.dry else ROUNDS

    def passed(self, variants: tuple[str, ...] = VARIANTS) -> list[str]:
        """Return the variants that no canary of this run found incorrect."""
        bad = {what.partition(" ")[0] for what in self.failed_canaries()}
        return [variant for variant in variants if variant not in bad]

    @property
    def main_variant(self) -> str:
        """The fastest variant that passed its canaries, or "auto"."""
        return next(iter(self.passed()), "auto")

    def failed_canaries(self) -> list[str]:
        """Return the names of this run's canaries that failed."""
        path = self.out / "results.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = [record for record in map(json.loads, lines) if record["stage"] == "canary"]
        return [r["what"] for r in found if r["what"] in CANARIES and r["verdict"] != "correct"]


def stage(function: Callable[[Run], None]) -> Callable[[Run], None]:
    STAGES[function.__name__.strip("_")] = function
    return function


# ---- do the kernels run ----


CANARIES = {
    **{
        f"{variant} {kind}": (variant, kind)
        for variant in VARIANTS
        for kind in ("frozen", "statistics", "trainable", "lora", "soft-targets", "soft-targets-trainable")
    },
    "logits kept": ("", "kept"),
    "logits inplace": ("", "inplace"),
}


@stage
def canary(run: Run) -> None:
    """Run each kernel once on a tiny input, in a process that may hang or crash."""
    run.emit("machine", machine=machine.describe())
    # two canaries suffice to test this stage
    names = [name for name in CANARIES if not run.dry or name in ("tma frozen", "logits inplace")]

    def try_one(name: str) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.stages", "one-canary", str(run.out)]
        try:
            done = subprocess.run(
                [*command, "--canary", name], capture_output=True, text=True, check=False,
                timeout=240 if run.dry else 25,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "hangs"
        return "correct" if done.returncode == 0 else (done.stderr.strip() or "crashed").splitlines()[-1]

    # in parallel: most of their time is imports and compilation
    with ThreadPoolExecutor(1 if run.dry else max(1, min(14, (os.cpu_count() or 1) - 2))) as pool:
        waiting = {pool.submit(try_one, name): name for name in names}
        for future in as_completed(waiting):
            run.emit(waiting[future], verdict=future.result())
    if run.failed_canaries():
        sys.exit("some kernels are incorrect; later stages skip them")


def _one_canary(name: str) -> None:
    variant, kind = CANARIES[name]
    # Triton compiles for the divisibility of sizes and for blocks of D and V up to a limit: with these sizes,
    # later stages find most kernels compiled
    problem = Problem("canary", 64, 64, 328) if INTERPRETED else Problem("canary", 304, 1_024, 4_112)
    if variant:
        of_states.VARIANT = variant  # type: ignore[assignment]
        setting = BY_NAME.get(kind, FROZEN)
        loss = _with_statistics if kind == "statistics" else _ours
        case = problem.case(setting, DEVICE, torch.bfloat16)
        measure.errors(loss, measure.telling(case))
        taken = _variant(case)
        if taken != variant:
            sys.exit(f"this GPU selects {taken} instead")
    else:
        measure.errors(
            _given_logits(kind == "inplace"), measure.telling(problem.logits(DEVICE, torch.bfloat16))
        )


def _variant(c: Case) -> str:
    """Return the variant that a call selects."""
    assert c.head is not None
    n = c.smoothing if isinstance(c.smoothing, Tensor) else torch.zeros(len(c.target), device=DEVICE)
    inputs = LinearInputs(c.hidden, c.head, None, None, None, c.target, n, n, None)
    flags = (IGNORED, 0.0, 1.0, 1.0, 0.0, 0.0, False, True, c.head.requires_grad, False, False, False, False)
    return of_states.choose_variant(inputs, LinearSpec(*flags, ALL_TOKENS, 0, "high", "triton"), c.head)


def _ours(c: Case) -> Tensor:
    return _linear(c, None)


def _linear(c: Case, max_loss_tokens: int | None) -> Tensor:
    """Call ours as `ual` does, whose collator counts the loss tokens."""
    return linear_cross_entropy(
        c.hidden, c.head, c.soft or c.target, linear_lora=c.lora, label_smoothing=c.smoothing,
        sample_weight=c.weight, reduction=c.reduction, backend="triton",
        options=LinearCrossEntropyOptions(max_loss_tokens=max_loss_tokens),
    )  # fmt: skip


def _with_statistics(c: Case) -> Tensor:
    return _linear_with_statistics(c, None)


def _linear_with_statistics(c: Case, max_loss_tokens: int | None) -> Tensor:
    return linear_cross_entropy_with_statistics(
        c.hidden, c.head, c.target, label_smoothing=c.smoothing, sample_weight=c.weight,
        reduction=c.reduction, backend="triton",
        options=LinearCrossEntropyOptions(max_loss_tokens=max_loss_tokens),
    )[0]  # fmt: skip


def _given_logits(inplace: bool) -> Callable[[Case], Tensor]:
    options = CrossEntropyOptions(inplace_backward=inplace)
    return lambda c: cross_entropy(
        c.hidden, c.target, label_smoothing=c.smoothing, options=options, backend="triton"
    )


# ---- lower bounds ----


@stage
def ceilings(run: Run) -> None:
    """Time memory copies, bare products, and products as the losses call them."""
    with suppress(FileNotFoundError):
        done = subprocess.run(
            ["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True, check=False
        )
        run.emit("nvidia-smi", clocks=re.findall(r"(?:Graphics|Memory|Max Limit)\s+: (.*)", done.stdout)[:4])
    taken = _best(measure.copy(), run)
    run.emit("copy", ms=taken * 1e3, gb_s=measure.COPIED / taken / 1e9)
    for problem in run.problems("llama3", "qwen2.5", "gemma2", "llama2"):
        n, d, v = problem.rows, problem.features, problem.vocab
        e, c = (torch.randn(r, d, device=DEVICE).to(torch.bfloat16) for r in (n, v))
        x = torch.randn(n, v, device=DEVICE, dtype=torch.bfloat16)
        o = torch.empty(n, d, device=DEVICE, dtype=torch.float32)
        bare = {
            "E C^T": _best(lambda e=e, c=c: torch.mm(e, c.T), run),
            "X C": _best(lambda x=x, c=c: torch.mm(x, c), run),
            "X^T E": _best(lambda x=x, e=e: torch.mm(x.T, e), run),
        }
        for name, taken in bare.items():
            run.emit(f"{problem.name} {name}", ms=taken * 1e3, tflops=2 * n * d * v / taken / 1e12)
        wide = _best(lambda x=x, c=c, o=o: product(x, c, out=o), run)
        run.emit(f"{problem.name} X C, float32 out", ms=wide * 1e3, of_bare=wide / bare["X C"])
        width = min(v, 66 * 256)
        part, rows = x[:, :width].contiguous(), c[:width]
        once = _best(lambda part=part, rows=rows, o=o: product(part, rows, out=o), run)
        added = _best(lambda part=part, rows=rows, o=o: add_product(o, part, rows), run)
        run.emit(f"{problem.name} O += X C of a slice", ms=added * 1e3, of_once=added / once)
        for m in (1_024, 2_048):
            if m < n:
                short = _best(lambda x=x, c=c, o=o, m=m: product(x[:m], c, out=o[:m]), run)
                run.emit(f"{problem.name} X C, {m} tokens", per_flop_of_all=short / m * n / wide)
        dhead = torch.empty(v, d, device=DEVICE, dtype=torch.float32)
        first = _best(lambda x=x, e=e, h=dhead: product(x.T, e, out=h), run)
        more = _best(lambda x=x, e=e, h=dhead: add_product(h, x.T, e), run)
        run.emit(f"{problem.name} dC, float32 out", ms=first * 1e3, of_bare=first / bare["X^T E"])
        run.emit(f"{problem.name} dC += ", ms=more * 1e3, of_once=more / first)
        del e, c, x, o, dhead, part, rows


def _copied(problem: Problem, run: Run) -> float:
    """Return the seconds that a memory copy needs to read and write 16-bit logits once."""
    return 4 * problem.rows * problem.vocab * _best(measure.copy(), run) / measure.COPIED


def _best(step: Callable[[], Any], run: Run) -> float:
    """Return the seconds of the fastest round, without launches from Python."""
    step()
    return min(_alone(step) for _ in range(run.rounds))


# ---- tests ----


@stage
def tests(run: Run) -> None:
    """Run the kernels' tests, without the project's options: another pytest or torch may be installed."""
    report = run.out / "tests.xml"
    # first what only a GPU can show; the limit may cut the end
    selection = ["tests/kernels/test_gpu.py", "tests/kernels/test_tokens.py",
                 "tests/kernels/test_cross_entropy.py", "tests/kernels/test_linear_triton.py",
                 "-k", "triton or gpu or tokens"]  # fmt: skip
    if run.dry:
        selection = ["tests/kernels/test_linear_triton.py", "-k", "same_bits"]
    options = ["-o", "addopts=--strict-markers", "-o", "filterwarnings=default", "-o", "minversion=0",
               "-p", "no:cacheprovider", "-p", "no:benchmark", "-q", "--maxfail", "25"]  # fmt: skip
    if not run.dry and _importable("xdist"):
        options += ["-n", "12"]
    if _importable("pytest_timeout"):
        options += ["--timeout", "60" if CUDA else "240", "--timeout-method", "thread"]
    # the settings of an enclosing pytest do not apply
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, f"--junitxml={report}", *selection]
    # after SIGINT, pytest still writes its report
    process = subprocess.Popen(command, cwd=machine.ROOT, env=environment)
    try:
        status = process.wait(None if run.dry or run.seconds is None else max(1, run.seconds - 8))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    run.emit("pytest", status=status, **counts)
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            run.emit("failed", test=f"{case.get('classname')}::{case.get('name')}")
    if status:
        sys.exit("tests failed")


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


# ---- launch configs ----


@stage
def sweep(run: Run) -> None:
    """Time launch configs of the GEMM that makes x."""
    for problem in run.problems("llama3", "llama2"):
        for record in launch_configs.sweep(problem, 1 if run.dry else 5):
            run.emit(f"{problem.name} {record.pop('launch_config')}", **record)


@stage
def logits(run: Run) -> None:
    """Time launch configs of the kernel of given logits, which overwrites them with their gradient."""
    choose = of_logits.launch_config
    shapes = (
        (32_768, 32, 4),
        (16_384, 32, 2),
        (16_384, 32, 1),
        (16_384, 16, 4),
        (8_192, 32, 1),
        (8_192, 8, 4),
    )
    middle = Problem("smollm2, N 8192", 8_192, 576, 49_152)
    for problem in run.problems("llama3", "llama2") + [middle] * (not run.dry):
        case, copied = problem.logits(DEVICE, torch.bfloat16), _copied(problem, run)
        for shape in [(256, 4, 1)] if run.dry else shapes:
            of_logits.launch_config = lambda *_, shape=shape, **__: of_logits.LaunchConfig(*shape)
            label = "{} block {}, {} warps, fold {}".format(problem.name, *shape)
            try:
                taken = _best(measure.training_step(_given_logits(True), case), run)
                run.emit(label, ms=taken * 1e3, of_copy=copied / taken)
            except Exception as error:  # for example, too many registers for this GPU
                run.emit(label, raised=f"{type(error).__name__}: {error}"[:200])
            finally:
                of_logits.launch_config = choose


# ---- complete steps ----


@stage
def steps(run: Run) -> None:
    """Time every variant on the two hardest shapes, and profile one step."""
    for problem in run.problems("llama3", "gemma2"):
        for setting in run.settings("frozen", "trainable", "half-ignored", "none+weights", "lora"):
            frozen = setting == "frozen" and not run.dry  # interpreted, a step takes seconds
            for variant in run.passed(("tma", "pointer", "cublas")) if frozen else [run.main_variant]:
                _race(run, problem, BY_NAME[setting], variant)
        if not run.dry:  # minutes in the interpreter
            _race(run, problem, FROZEN, run.main_variant, statistics=True)
    for name in run.settings("frozen", "trainable", "lora"):
        _profile(run, run.problems("llama3")[0], BY_NAME[name])


def _profile(run: Run, problem: Problem, setting: Setting) -> None:
    """Report the kernels of one step."""
    case = problem.case(setting, DEVICE, torch.bfloat16)
    of_states.VARIANT = run.main_variant  # type: ignore[assignment]
    step = measure.training_step(lambda c: _linear(c, problem.rows), case)
    step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU]) as profile:
        step()
        if CUDA:
            torch.cuda.synchronize()
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    for event in events[:16]:
        run.emit(f"{setting.name}: {event.key[:60]}", count=event.count, ms=getattr(event, key) / 1e3)


def _race(run: Run, problem: Problem, setting: Setting, variant: str, *, statistics: bool = False) -> None:
    of_states.VARIANT = variant  # type: ignore[assignment]
    case = problem.case(setting, DEVICE, torch.bfloat16)
    loss_tokens = int((case.target != IGNORED).sum())
    call = _linear_with_statistics if statistics else _linear
    label = f"{problem.name} {setting.name}{', statistics' if statistics else ''}, {variant}"
    found = _timed(run, lambda c: call(c, loss_tokens), case, setting)
    run.emit(label, **found)


def _timed(
    run: Run, loss: Callable[[Case], Tensor], case: Case, setting: Setting, rounds: int | None = None
) -> dict[str, float]:
    """Time a step relative to the bare products of the same round, as called and by the device alone."""
    step, bare = measure.training_step(loss, case), measure.products(case, setting)
    bare()
    for _ in range(1 if run.dry else 2):
        step()
    # both are timed in the same way: a GPU that has rested has a higher clock
    timed = [
        [time(of) for time in (_alone, seconds) for of in (bare, step)] for _ in range(rounds or run.rounds)
    ]
    products, alone, products_called, called = (list(column) for column in zip(*timed, strict=True))
    return {
        "ms": median(alone) * 1e3,
        "of_products": measure.ratio(alone, products),
        "of_products_as_called": measure.ratio(called, products_called),
        "products_ms": median(products) * 1e3,
        **({"peak_mb": measure.peak_bytes(step) / 1e6} if CUDA else {}),
    }


def _alone(step: Callable[[], Any]) -> float:
    """Return the seconds of the device alone: a GPU sleeps until the step's launches are queued."""
    if not CUDA:
        return seconds(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(_sleep[0])
        start.record()
        step()
        queued_in_time = not start.query()
        end.record()
        end.synchronize()
        # a step that waits for the device is never queued in time
        if queued_in_time or _sleep[0] >= _LONGEST_SLEEP:
            return start.elapsed_time(end) / 1e3
        _sleep[0] *= 2


@stage
def ncu(run: Run) -> None:
    """Profile one slice with NVIDIA's profiler, if it is installed."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        run.emit("ncu", skipped="not installed" if CUDA else "no GPU")
        return
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats")
    for kernel, what in (("_forward_kernel", "one-logits"), ("_tma_kernel", "one-slice")):
        command = [tool, "--clock-control", "none", "--launch-count", "1", "-k", f"regex:{kernel}"]
        for section in sections:
            command += ["--section", section]
        command += [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.stages", what, str(run.out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
        except subprocess.TimeoutExpired:
            run.emit(f"ncu {kernel}", raised="exceeded its limit of 40 s")
            continue
        if done.returncode:
            output = (done.stdout + done.stderr).strip().splitlines()
            run.emit(
                f"ncu {kernel}", raised=" ".join([line for line in output if "ERR" in line] or output[-1:])
            )
            continue
        (run.out / f"ncu-{what}.txt").write_text(done.stdout[-60_000:], encoding="utf-8")
        wanted = "|".join(("Compute .SM. Throughput", "DRAM Throughput", "L2 Hit Rate", "Duration"))
        figures = dict(re.findall(rf"({wanted})\s+\S+\s+([\d.]+)", done.stdout))
        run.emit(f"ncu {kernel}", **figures)


def _one_slice() -> None:
    case = PROBLEMS["llama3"].case(FROZEN, DEVICE, torch.bfloat16)
    measure.training_step(lambda c: _linear(c, len(c.target)), case)()


def _one_logits() -> None:
    measure.training_step(_given_logits(True), PROBLEMS["llama3"].logits(DEVICE, torch.bfloat16))()


CHECKED = {
    "memcheck": (
        "linear/tma/frozen", "linear/tma/lora", "linear/pointer/frozen", "logits/torch.bfloat16/all",
    ),
    "racecheck": (
        "linear/tma/frozen", "linear/tma/all", "linear/tma/trainable", "linear/tma/far",
        "linear/cublas/frozen", "logits/torch.bfloat16/in place",
    ),
}  # fmt: skip


@stage
def sanitizer(run: Run) -> None:
    """Check a few paths for races in shared memory and accesses out of bounds; checkers are slow."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        run.emit("sanitizer", skipped="not installed" if CUDA else "no GPU")
        return
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    inner = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.sanitized"]
    planted = ("memcheck", "a planted error")

    def check(checked: tuple[str, str]) -> int:
        checker, path = checked
        command = [tool, "--tool", checker, "--error-exitcode", "9", *inner]
        command += ["--planted"] if checked == planted else ["--only", path]
        return subprocess.run(command, check=False).returncode

    wrong = False
    checks = [planted, *((checker, path) for checker, paths in CHECKED.items() for path in paths)]
    # each path in a process of its own, so that a time limit loses only what has not ended
    with ThreadPoolExecutor(len(checks)) as pool:
        waiting = {pool.submit(check, checked): checked for checked in checks}
        for future in as_completed(waiting):
            checked, status = waiting[future], future.result()
            run.emit(" ".join(checked), status=status)
            wrong |= status != (9 if checked == planted else 0)  # a signal's status is negative
    if wrong:
        sys.exit("a checker reported an error, or missed the planted one")


# ---- figures to publish ----


@stage
def ours(run: Run) -> None:
    """Time every shape and setting, and given logits."""
    for problem in run.problems("llama3", "gemma2", "qwen2.5", "llama2"):
        for setting in run.settings("frozen", "none+weights", "trainable", "half-ignored", "lora"):
            _race(run, problem, BY_NAME[setting], run.main_variant)
        if not run.dry:  # minutes in the interpreter
            _race(run, problem, FROZEN, run.main_variant, statistics=True)
        case, copied = problem.logits(DEVICE, torch.bfloat16), _copied(problem, run)
        for inplace in (False, True):
            taken = _best(measure.training_step(_given_logits(inplace), case), run)
            name = f"{problem.name} logits{', in place' if inplace else ''}"
            run.emit(name, ms=taken * 1e3, of_copy=copied / taken)


def _peer(run: Run, problem: Problem, setting: Setting, provider: Provider, **more: str) -> None:
    """Time a step of another implementation, if it is correct."""
    label = f"{problem.name} {setting.name}: {provider.name}"
    try:
        if run.dry and provider.compiles:
            raise MissingError("compiling it takes longer than a dry run")
        loss = provider.load()
        small = measure.slice_of(problem).case(setting, DEVICE, torch.bfloat16)
        measure.errors(loss, provider.adapt(measure.telling(small)))
        case = provider.adapt(problem.case(setting, DEVICE, torch.bfloat16))
        found = _timed(run, loss, case, setting, rounds=min(run.rounds, 3))
        run.emit(label, solves=provider.solves.value, **found, **more)
    except (MissingError, measure.WrongError) as error:
        run.emit(label, left_out=str(error), **more)
    except Exception as error:  # an exception in one provider must not end the stage
        run.emit(label, raised=f"{type(error).__name__}: {error}"[:300], **more)
    if CUDA:
        torch.cuda.empty_cache()


@stage
def peers(run: Run) -> None:
    """Time other implementations, after a check against float64, on the problem that each of them solves."""
    names = ("naive", "naive, torch.compile", "F.cross_entropy of 16-bit logits", "liger + rank one",
             "liger fused linear", "cut-cross-entropy", "cut-cross-entropy, no filter", "trl chunked",
             "torch chunked")  # fmt: skip
    repair()
    # compiling takes longest, so it is last
    for compiles in (False, True):
        for problem in run.problems("llama3", "gemma2"):
            for setting in run.settings("frozen", "trainable"):
                for provider in chosen(PROVIDERS, list(names)):
                    if provider.compiles == compiles:
                        _peer(run, problem, BY_NAME[setting], provider)
            if not compiles:
                _logits_peers(run, problem)


def _logits_peers(run: Run, problem: Problem) -> None:
    case, copied = problem.logits(DEVICE, torch.bfloat16), _copied(problem, run)
    for provider in chosen(LOGITS_PROVIDERS, ["naive", "F.cross_entropy", "liger, in place"]):
        label = f"{problem.name} logits: {provider.name}"
        try:
            loss = provider.load()
            small = measure.telling(measure.slice_of(problem).logits(DEVICE, torch.bfloat16))
            measure.errors(loss, provider.adapt(small))
            taken = _best(measure.training_step(loss, provider.adapt(case)), run)
            run.emit(label, solves=provider.solves.value, ms=taken * 1e3, of_copy=copied / taken)
        except (MissingError, measure.WrongError) as error:
            run.emit(label, left_out=str(error))
        except Exception as error:  # an exception in one provider must not end the stage
            run.emit(label, raised=f"{type(error).__name__}: {error}"[:300])


@stage
def unsloth(run: Run) -> None:
    """Time unsloth-zoo's fused head, frozen, without smoothing and with one smoothing for all tokens.

    The package is incompatible with the versions that this project installs. The stage loads its file
    `fused_linear.py` by its path instead.
    """
    folder = run.unsloth_zoo
    if folder is None:
        run.emit("unsloth-zoo", skipped=f"no --unsloth-zoo was given; {ZOO_INSTALL}")
        return

    def load() -> Loss:
        name = "unsloth_zoo_fused_linear"
        spec = importlib.util.spec_from_file_location(name, folder / ZOO_FILE)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return lambda c: module.fused_linear_cross_entropy(
            c.hidden, c.head, None, c.target, divisor=(c.target != IGNORED).sum(), ignore_index=IGNORED,
            label_smoothing=c.smoothing,
        )  # fmt: skip

    found = next(importlib.metadata.distributions(name="unsloth_zoo", path=[str(folder)]), None)
    about = {"version": found.version if found else "unknown", "license": "AGPL-3.0"}
    for problem in run.problems("llama3", "gemma2"):
        for solves in (Solves.NONE, Solves.ONE):
            provider = Provider(f"unsloth-zoo, {solves.value}", solves, load, "unsloth_zoo", per_token=False)
            _peer(run, problem, FROZEN, provider, **about)


@stage
def training(run: Run) -> None:
    """Time a LoRA step of a random Llama, with transformers' loss and with the fused loss."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from ual.models import fuse, unfuse
    except ImportError as error:
        run.emit("training", skipped=str(error))
        return
    sizes: dict[str, Any] = {
        "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    if run.dry:
        sizes |= {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    batch, length = (2, 16) if run.dry else (4, 2_048)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).train()
    ids = torch.randint(sizes["vocab_size"], (batch, length), device=DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients: dict[str, list[Tensor]] = {}
    of_states.VARIANT = run.main_variant  # type: ignore[assignment]
    for name in ("transformers", "fused"):
        given: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if name == "fused":
            fuse(model, backend="triton")
            given |= {"max_loss_tokens": batch * (length - 1)}
        losses: list[Tensor] = []

        def step(given: dict[str, Any] = given, losses: list[Tensor] = losses) -> None:
            model.zero_grad()
            loss = model(**given).loss
            loss.backward()
            losses.append(loss.detach())

        step()
        # as called: a step of a model launches more than fits into the queue
        taken = min(seconds(step) for _ in range(run.rounds))
        peak = {"peak_mb": measure.peak_bytes(step) / 1e6} if CUDA else {}
        gradients[name] = [p.grad.detach().float().clone() for p in trained if p.grad is not None]
        run.emit(f"LoRA step, {name}", ms=taken * 1e3, loss=losses[-1].item(), **peak)
    unfuse(model)
    off = sum(((a - b) ** 2).sum() for a, b in zip(*gradients.values(), strict=True))
    norm = sum((a**2).sum() for a in gradients["transformers"])
    run.emit("LoRA gradients apart", relative=float(off / norm) ** 0.5)


@stage
def accuracy_(run: Run) -> None:
    """Measure errors of dE and dC on hidden states of a real model."""
    if run.states is not None:
        states = accuracy.stored(run.states, 1_024)
    elif run.dry:
        states = accuracy.random_states(16)
    else:
        run.emit("accuracy", skipped="no --states were given")
        return
    case = accuracy.problem(states)
    truth = measure.exact(case)
    for variant in (*run.passed(), ""):
        if variant:
            of_states.VARIANT = variant  # type: ignore[assignment]
        name = variant or "naive"
        provider = next(p for p in PROVIDERS if p.name == ("ours, triton fused" if variant else "naive"))
        loss = _ours if variant else provider.load()
        run.emit(f"accuracy, {name}", **accuracy.measure(provider, loss, case, truth))


@stage
def scaling(run: Run) -> None:
    """Measure time and peak memory from one token to many."""
    of_states.VARIANT = run.main_variant  # type: ignore[assignment]
    for rows in (16, 48) if run.dry else (1, 256, 4_096, 65_536):
        problem = Problem("scaling", rows, *((64, 320) if run.dry else (4_096, 128_256)))
        case = problem.case(FROZEN, DEVICE, torch.bfloat16)
        found = _timed(run, lambda c, rows=rows: _linear(c, rows), case, FROZEN, rounds=min(run.rounds, 3))
        run.emit(f"{rows} tokens", **found)


_CAPPED, _FAST = {"softcap": 30.0}, {"options": LinearCrossEntropyOptions(precision="fast")}


def _capped(chunk_tokens: int) -> dict[str, Any]:
    return {**_CAPPED, "options": LinearCrossEntropyOptions(chunk_tokens=chunk_tokens)}


OUTSIDE_MAIN_PATH: dict[str, tuple[str, str, torch.dtype, dict[str, Any], tuple[str, ...]]] = {
    "softcap": ("gemma2", "frozen", torch.bfloat16, _CAPPED, ("triton", "torch")),
    "softcap, 1024 tokens at a time": ("gemma2", "frozen", torch.bfloat16, _capped(1_024), ("triton",)),
    "softcap, 2048 tokens at a time": ("gemma2", "frozen", torch.bfloat16, _capped(2_048), ("triton",)),
    "softcap, trained head": ("gemma2", "trainable", torch.bfloat16, _CAPPED, ("triton", "torch")),
    "softcap, trained head, 1024 tokens at a time": (
        "gemma2", "trainable", torch.bfloat16, _capped(1_024), ("triton",)
    ),
    "softcap, LoRA head": ("gemma2", "lora", torch.bfloat16, _CAPPED, ("triton", "torch")),
    "fast": ("llama3", "frozen", torch.bfloat16, _FAST, ("triton", "torch")),
    "fast, trained head": ("llama3", "trainable", torch.bfloat16, _FAST, ("triton", "torch")),
    "float16": ("llama3", "frozen", torch.float16, {}, ("triton", "torch")),
    "float16, trained head": ("llama2", "trainable", torch.float16, {}, ("triton", "torch")),
    "float16, LoRA head": ("llama2", "lora", torch.float16, {}, ("triton", "torch")),
    "float32": ("llama2", "frozen", torch.float32, {}, ("triton", "torch")),
    "float32, trained head": ("llama2", "trainable", torch.float32, {}, ("triton", "torch")),
}  # fmt: skip
"""Calls outside Triton's main path, checked by tests: problem, setting, dtype, arguments, what is timed."""


@stage
def backends(run: Run) -> None:
    """Time Triton and the PyTorch backend on calls outside Triton's main path."""
    of_states.VARIANT = "auto"  # type: ignore[assignment]
    for label, (name, kind, dtype, arguments, timed) in list(OUTSIDE_MAIN_PATH.items())[
        : 1 if run.dry else None
    ]:
        (problem,), setting = run.problems(name), BY_NAME[kind]
        case = problem.case(setting, DEVICE, dtype)
        for backend in timed:

            def loss(c: Case, backend: Any = backend, arguments: Any = arguments) -> Tensor:
                return linear_cross_entropy(
                    c.hidden, c.head, c.target, linear_lora=c.lora, label_smoothing=c.smoothing,
                    backend=backend, **arguments,
                )  # fmt: skip

            found = _timed(run, loss, case, setting, rounds=min(run.rounds, 3))
            run.emit(f"{problem.name} {label}: {backend}", **found)


@stage
def soft(run: Run) -> None:
    """Time targets of 20 classes relative to class indices, in the same rounds."""
    of_states.VARIANT = run.main_variant  # type: ignore[assignment]
    for problem in run.problems("llama3"):
        for name in run.settings("soft-targets", "soft-targets-trainable"):
            case = problem.case(BY_NAME[name], DEVICE, torch.bfloat16)
            steps = [
                measure.training_step(lambda c, rows=problem.rows: _linear(c, rows), given)
                for given in (case._replace(soft=None), case)
            ]
            for step in steps:
                step()
            rounds = [[_alone(step) for step in steps] for _ in range(run.rounds)]
            one_class, taken = (list(column) for column in zip(*rounds, strict=True))
            ms = {"ms": median(taken) * 1e3, "one_class_ms": median(one_class) * 1e3}
            run.emit(f"{problem.name} {name}", of_one_class=measure.ratio(taken, one_class), **ms)


def main() -> None:
    """Run one stage, for `benchmarks.gpu`."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.stages")
    inner = {"one-canary": None, "one-slice": _one_slice, "one-logits": _one_logits}
    parser.add_argument("stage", choices=[*STAGES, *inner])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--states", type=Path)
    parser.add_argument("--unsloth-zoo", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--canary", choices=CANARIES)
    given = parser.parse_args()
    repair()
    if given.stage == "one-canary":
        _one_canary(given.canary)
    elif given.stage in inner:
        inner[given.stage]()  # type: ignore[misc]
    else:
        run = Run(given.stage, given.out, given.dry_run, given.states, given.unsloth_zoo, given.seconds)
        STAGES[given.stage](run)


if __name__ == "__main__":
    main()

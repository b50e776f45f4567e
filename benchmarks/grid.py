"""The options of `pytest benchmarks/suites`, and the problems, settings and providers that they select."""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest

from benchmarks.measure import CUDA, DTYPES
from benchmarks.problems import (
    CPU_PROBLEMS,
    FROZEN,
    GPU_PROBLEMS,
    PROBLEMS,
    SETTINGS,
    TINY,
    Case,
    Problem,
    Setting,
)
from benchmarks.providers import LOGITS_PROVIDERS, PROVIDERS, Loss, MissingError, Provider, chosen


@dataclass(frozen=True)
class Form:
    """How much a run measures."""

    name: str
    rounds: int
    patience: float  # seconds for the rounds of one test
    problems: tuple[Problem, ...]
    settings: tuple[Setting, ...]
    dtypes: tuple[str, ...]


_HERE = GPU_PROBLEMS if CUDA else CPU_PROBLEMS
FULL = Form("full", 15, 20.0, (*CPU_PROBLEMS, *GPU_PROBLEMS) if CUDA else _HERE, SETTINGS, ("bf16", "fp32"))
SHORT = Form("short", 7, 6.0, _HERE, SETTINGS[:3], ("bf16",))
SMOKE = Form("smoke", 3, 0.2, (TINY,), SETTINGS, ("bf16",))


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the losses")
    group.addoption(
        "--full", action="store_const", dest="form", const=FULL, default=FULL, help="everything (default)"
    )
    group.addoption("--short", action="store_const", dest="form", const=SHORT, help="takes minutes")
    group.addoption(
        "--smoke", action="store_const", dest="form", const=SMOKE, help="tiny shapes, and the gate"
    )
    group.addoption(
        "--problem", action="append", default=[], metavar="NAME", help=f"one of {', '.join(PROBLEMS)}"
    )
    names = ", ".join(s.name for s in SETTINGS)
    group.addoption("--setting", action="append", default=[], metavar="NAME", help=f"one of {names}")
    group.addoption(
        "--provider", action="append", default=[], metavar="NAME",
        help="a name from `python -m benchmarks list`; 'name*' selects all names with this prefix",
    )  # fmt: skip
    group.addoption("--dtype", action="append", default=[], choices=DTYPES)
    group.addoption("--rows", type=int, metavar="N", help="tokens, instead of the problem's N")
    group.addoption("--rounds", type=int, metavar="N", help="upper bound on the rounds of a test")
    group.addoption("--budget", type=float, metavar="S", help="start no test after S seconds")
    group.addoption(
        "--results", metavar="F",
        help="a file, or a folder for <machine>/<date>-<commit>.json (default: .benchmarks/results.json)",
    )  # fmt: skip
    group.addoption("--update", action="store_true", help="keep the other measurements of the results file")
    group.addoption(
        "--states", metavar="F", help="hidden states from `python -m benchmarks.studies.accuracy --export`"
    )


# options of pytest-benchmark for tests whose rounds it chooses itself
_WITHOUT_EFFECT = (
    "min-time",
    "max-time",
    "min-rounds",
    "timer",
    "calibration-precision",
    "warmup",
    "warmup-iterations",
)


def is_recorded(config: pytest.Config) -> bool:
    """Return whether the run writes results. With --benchmark-disable every step runs once, untimed."""
    off: bool = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    return not off


def check(config: pytest.Config) -> None:
    """Check the options before any test runs.

    Raises:
        pytest.UsageError: an option is out of range or names something unknown.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks run one after another; run them without -n")
    for option, known in (("problem", set(PROBLEMS)), ("setting", {s.name for s in SETTINGS})):
        for name in config.getoption(option):
            if name not in known:
                raise pytest.UsageError(
                    f"--{option}: unknown name {name!r}; available: {', '.join(sorted(known))}"
                )
    given = {word.partition("=")[0] for word in map(str, config.invocation_params.args)}
    for name in _WITHOUT_EFFECT:
        if f"--benchmark-{name}" in given:
            raise pytest.UsageError(
                f"--benchmark-{name} has no effect: the form sets clock, warm-up and rounds; use --rounds to "
                "measure fewer rounds, or --short or --smoke"
            )
    for option in ("rows", "rounds"):
        number = config.getoption(option)
        if number is not None and number < 1:
            raise pytest.UsageError(f"--{option} must be at least 1, got {number}")
    all_providers = {p.name: p for p in (*PROVIDERS, *LOGITS_PROVIDERS)}
    try:
        chosen(tuple(all_providers.values()), config.getoption("provider"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def form(config: pytest.Config) -> Form:
    """Return the requested form, as modified by the other options."""
    given, ask = config.getoption("form"), config.getoption
    problems = tuple(PROBLEMS[name] for name in ask("problem")) or given.problems
    if ask("rows"):
        problems = tuple(replace(p, rows=ask("rows")) for p in problems)
    return replace(
        given,
        problems=problems,
        settings=tuple(s for s in SETTINGS if s.name in ask("setting")) or given.settings,
        dtypes=tuple(ask("dtype")) or given.dtypes,
        rounds=ask("rounds") or given.rounds,
    )


def gate(config: pytest.Config) -> tuple[Problem, int]:
    """Return the gate's problem and the upper bound on its rounds. `--rows` and `--rounds` apply."""
    problem, rows = CPU_PROBLEMS[0], config.getoption("rows")
    return replace(problem, rows=rows) if rows else problem, config.getoption("rounds") or 24


def providers(config: pytest.Config, of: tuple[Provider, ...]) -> list[Provider]:
    """Return the providers of a suite that `--provider` selects; all of them without `--provider`."""
    wanted = [name for name in config.getoption("provider") if _known(of, name)]
    return [] if config.getoption("provider") and not wanted else chosen(of, wanted)


def _known(of: tuple[Provider, ...], name: str) -> bool:
    try:
        return bool(chosen(of, [name]))
    except ValueError:
        return False


def settings_of(given: Form, dtype: str) -> tuple[Setting, ...]:
    """Return all settings for the first dtype, and the frozen head alone for further dtypes."""
    return given.settings if dtype == given.dtypes[0] else tuple(s for s in given.settings if s == FROZEN)


def loaded(provider: Provider, given: Form) -> Loss:
    """Return a provider's loss, for a suite that measures time.

    Raises:
        pytest.skip.Exception: the provider is not installed, or would be interpreted.
    """
    if provider.how:
        pytest.skip("its kernels need a GPU; on a CPU only their accuracy is measured")
    if provider.compiles and given.name == SMOKE.name:
        pytest.skip("compiling it takes longer than a smoke run")
    try:
        return provider.load()
    except MissingError as error:
        pytest.skip(str(error))


class Deadline:
    """The time after which no test starts."""

    def __init__(self, budget: float | None) -> None:
        self.budget, self.end = budget, time.monotonic() + (budget or float("inf"))

    def check(self) -> None:
        if time.monotonic() > self.end:
            pytest.skip(f"not started: the budget of {self.budget:.0f} s is used up")


def described(**parts: Any) -> dict[str, Any]:
    """Return the fields that identify a measurement."""
    provider: Provider = parts["provider"]
    row: dict[str, Any] = {
        "provider": provider.name,
        "solves": provider.solves.value,
        "ours": bool(provider.ours),
    }
    if "problem" in parts:
        p = parts["problem"]
        row |= {"problem": p.name, "rows": p.rows, "features": p.features, "vocab": p.vocab}
    if "setting" in parts:
        row["setting"] = parts["setting"].name
        if parts["setting"].weighted and not provider.weights:
            row["solves"] += ", no weights"
    return row | ({"dtype": parts["dtype"]} if "dtype" in parts else {})


def supported(provider: Provider, case: Case) -> Case:
    """Return the case that a provider supports and that is closest to `case`.

    Raises:
        pytest.skip.Exception: there is none.
    """
    try:
        return provider.adapt(case)
    except MissingError as error:
        pytest.skip(str(error))

"""What is measured: the options of `pytest benchmarks/`, and the combinations that they choose."""

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
    """How much of everything."""

    name: str
    rounds: int
    patience: float  # seconds for the rounds of one row
    problems: tuple[Problem, ...]
    settings: tuple[Setting, ...]
    dtypes: tuple[str, ...]


_HERE = GPU_PROBLEMS if CUDA else CPU_PROBLEMS
FULL = Form("full", 15, 20.0, (*CPU_PROBLEMS, *GPU_PROBLEMS) if CUDA else _HERE, SETTINGS, ("bf16", "fp32"))
SHORT = Form("short", 7, 6.0, _HERE, SETTINGS[:3], ("bf16",))
SMOKE = Form("smoke", 3, 0.2, (TINY,), SETTINGS, ("bf16",))


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the losses")
    group.addoption("--full", action="store_const", dest="form", const=FULL, help="all of it (default)")
    group.addoption("--short", action="store_const", dest="form", const=SHORT, default=FULL, help="minutes")
    group.addoption(
        "--smoke", action="store_const", dest="form", const=SMOKE, help="tiny: does it run, and the gate"
    )
    group.addoption(
        "--problem", action="append", default=[], metavar="NAME", help=f"of {', '.join(PROBLEMS)}"
    )
    names = ", ".join(s.name for s in SETTINGS)
    group.addoption("--setting", action="append", default=[], metavar="NAME", help=f"of {names}")
    group.addoption(
        "--provider", action="append", default=[], metavar="NAME",
        help="of those that `ual-bench list` names; 'name*' is all that start so",
    )  # fmt: skip
    group.addoption("--dtype", action="append", default=[], choices=DTYPES)
    group.addoption("--rows", type=int, metavar="N", help="instead of the problem's own")
    group.addoption("--rounds", type=int, metavar="N", help="at most, for each row of the tables")
    group.addoption("--budget", type=float, metavar="S", help="begin nothing after so many seconds")
    group.addoption(
        "--results", metavar="F",
        help="default: .benchmarks/results.json; in a folder: <machine>/<date>-<commit>.json",
    )  # fmt: skip
    group.addoption("--update", action="store_true", help="keep the other rows of that file")
    group.addoption("--states", metavar="F", help="hidden states that `benchmarks.accuracy --export` wrote")


def check(config: pytest.Config) -> None:
    """Refuse what nobody is called, before anything runs.

    Raises:
        pytest.UsageError: names the option, what came, and what there is.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks take turns on one machine: run them without -n")
    for option, known in (("problem", set(PROBLEMS)), ("setting", {s.name for s in SETTINGS})):
        for name in config.getoption(option):
            if name not in known:
                raise pytest.UsageError(
                    f"--{option}: there is no {name!r}; wanted one of {', '.join(sorted(known))}"
                )
    for option in ("rows", "rounds"):
        given = config.getoption(option)
        if given is not None and given < 1:
            raise pytest.UsageError(f"--{option} must be at least 1, got {given}")
    everybody = {p.name: p for p in (*PROVIDERS, *LOGITS_PROVIDERS)}
    try:
        chosen(tuple(everybody.values()), config.getoption("provider"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def form(config: pytest.Config) -> Form:
    """The form asked for, with what the other options change."""
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


def providers(config: pytest.Config, of: tuple[Provider, ...]) -> list[Provider]:
    """Those of a suite that were asked for; none where others were."""
    wanted = [name for name in config.getoption("provider") if _known(of, name)]
    return [] if config.getoption("provider") and not wanted else chosen(of, wanted)


def _known(of: tuple[Provider, ...], name: str) -> bool:
    try:
        return bool(chosen(of, [name]))
    except ValueError:
        return False


def settings_of(given: Form, dtype: str) -> tuple[Setting, ...]:
    """All of the form in its first dtype; a further dtype changes products, not what surrounds them."""
    return given.settings if dtype == given.dtypes[0] else tuple(s for s in given.settings if s == FROZEN)


def loaded(provider: Provider, given: Form) -> Loss:
    """Its loss, for a suite that takes times.

    Raises:
        pytest.skip.Exception: it is not here, or would be interpreted.
    """
    if provider.how:
        pytest.skip("its kernels need a GPU; here only their accuracy is measured")
    if provider.compiles and given.name == SMOKE.name:
        pytest.skip("it compiles longer than a smoke run lasts")
    try:
        return provider.load()
    except MissingError as error:
        pytest.skip(str(error))


class Deadline:
    """When the budget is spent."""

    def __init__(self, budget: float | None) -> None:
        self.budget, self.end = budget, time.monotonic() + (budget or float("inf"))

    def check(self) -> None:
        if time.monotonic() > self.end:
            pytest.skip(f"not begun: the budget of {self.budget:.0f} s was spent")


def described(**parts: Any) -> dict[str, Any]:
    """The columns that say what a row is about."""
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


def asked(provider: Provider, case: Case) -> Case:
    """The question that it can answer.

    Raises:
        pytest.skip.Exception: it has no answer.
    """
    try:
        return provider.ask(case)
    except MissingError as error:
        pytest.skip(str(error))

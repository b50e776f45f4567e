"""Each test adds one measurement to the results file, whether it passes, fails or is skipped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmarks.interpreted  # noqa: F401  before anything that imports Triton

# isort: split
import pytest
import torch

from benchmarks import grid, machine
from benchmarks.measure import WrongError

_FOUND = pytest.StashKey[dict[str, Any]]()
_DEADLINE = pytest.StashKey[grid.Deadline]()
_MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)


def pytest_addoption(parser: pytest.Parser) -> None:
    grid.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    grid.check(config)
    about = {"form": grid.form(config).name, "machine": machine.describe()}
    config.stash[_FOUND] = about | {"rows": []}
    if config.getoption("update"):
        config.stash[_FOUND]["rows"] = _kept(config)
    config.stash[_DEADLINE] = grid.Deadline(config.getoption("budget"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Write problems, settings and providers by their names; pytest-benchmark would write their memory."""
    for test in output_json["benchmarks"]:
        for one in benchmarks:
            if one.fullname == test["fullname"]:
                test["params"] = {name: getattr(value, "name", value) for name, value in one.params.items()}
        test["options"].pop("timer", None)  # an object


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # a warning of another implementation is not a failure
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    request.config.stash[_DEADLINE].check()


@pytest.fixture
def form(request: pytest.FixtureRequest) -> grid.Form:
    return grid.form(request.config)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The measurement that a test fills in. Suites that measure time use it as `benchmark.extra_info`."""
    return {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report = yield
    if call.when == "call" or (call.when == "setup" and call.excinfo):
        arguments = getattr(item, "funcargs", {})
        row = arguments.get("row")
        if row is None:
            row = getattr(arguments.get("benchmark"), "extra_info", {})
        module = item.module.__name__.rpartition("bench_")[2] if isinstance(item, pytest.Function) else ""
        parts = getattr(item, "callspec", None)
        about = grid.described(**parts.params) if parts and "provider" in parts.params else {}
        found = item.config.stash[_FOUND]
        new = {"suite": module, "test": item.name} | about | row | _outcome(call)
        found["rows"] = [r for r in found["rows"] if (r["suite"], r["test"]) != (module, item.name)] + [new]
        if grid.is_recorded(item.config):
            _write(item.config)
    return report


def _outcome(call: pytest.CallInfo[Any]) -> dict[str, str]:
    """Return why a measurement has no numbers, or nothing if it has."""
    if call.excinfo is None:
        return {}
    error = call.excinfo.value
    if isinstance(error, pytest.skip.Exception):
        return {"skipped": str(error.msg)}
    message = str(error).partition("\n")[0]
    if isinstance(error, WrongError):
        return {"wrong": message}
    if isinstance(error, _MEMORY_ERRORS):
        return {"raised": f"out of memory: {message}"}
    return {"raised": f"{type(error).__name__}: {message}"}


def _results(config: pytest.Config) -> Path:
    given = Path(config.getoption("results") or config.rootpath / ".benchmarks" / "results.json")
    if given.suffix == ".json":
        return given
    about = config.stash[_FOUND]["machine"]
    return given / about["machine"] / f"{about['date']}-{about['commit']}.json"


def _kept(config: pytest.Config) -> list[dict[str, Any]]:
    """Return the measurements that the results file already holds.

    Raises:
        pytest.UsageError: they are from another commit or another number of threads.
    """
    path = _results(config)
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    for what in ("commit", "threads"):
        there, here = found["machine"][what], config.stash[_FOUND]["machine"][what]
        if there != here:
            raise pytest.UsageError(
                f"--update: {path} has {what} {there}, this run has {here}; write to another file"
            )
    return list(found["rows"])


def _write(config: pytest.Config) -> None:
    """Write after every measurement, because running out of memory may kill the process."""
    path = _results(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(config.stash[_FOUND], indent=1, default=str) + "\n", encoding="utf-8")
    aside.replace(path)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_FOUND]["rows"]
    if not rows:
        return
    bad = [r for r in rows if "wrong" in r or "raised" in r]
    path = _results(config)
    terminalreporter.section("measurements")
    for r in bad:
        name = " ".join(str(r[k]) for k in ("suite", "problem", "setting", "provider") if k in r)
        terminalreporter.line(f"{name}: {'incorrect: ' + r['wrong'] if 'wrong' in r else r['raised']}")
    skipped = sum("skipped" in r for r in rows)
    counts = f"{len(rows) - skipped - len(bad)} measured, {skipped} skipped, {len(bad)} failed"
    if not grid.is_recorded(config):
        terminalreporter.line(
            f"{counts}; --benchmark-disable: nothing was recorded".replace("measured", "run")
        )
        return
    terminalreporter.line(f"{counts}: {path}")
    terminalreporter.line(f"tables and plots: python -m benchmarks report {path}")

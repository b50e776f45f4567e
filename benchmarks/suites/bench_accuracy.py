"""Errors against float64, on random numbers and on hidden states of a real model."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import grid
from benchmarks.problems import Case, Exact, exact
from benchmarks.providers import HIGH, PROVIDERS, MissingError, Provider, Solves
from benchmarks.studies.accuracy import (
    TOKENS,
    NothingToMeasureError,
    States,
    floor,
    measure,
    missed,
    problem,
    random_states,
    real_states,
    stored,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = grid.form(metafunc.config).name == "smoke"
    sources = ["random"] if smoke else ["random", "real"]
    if "provider" not in metafunc.fixturenames:
        metafunc.parametrize("source", sources)
        return
    metafunc.parametrize(
        ("source", "provider"),
        [
            pytest.param(source, who, id=f"{source}-{who.name}")
            for source in sources
            for who in grid.providers(metafunc.config, PROVIDERS)
        ],
    )


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    """Disable torch.compile, which would start a C++ compiler for kernels that are interpreted anyway."""
    if torch.cuda.is_available():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def states(request: pytest.FixtureRequest, source: str, row: dict[str, Any]) -> States:
    found = _states(source, request.config.getoption("states"))
    row |= {"problem": source, "source": found.source, "rows": len(found.target)}
    row |= {"vocab": found.head.shape[0], "features": found.head.shape[1], "dtype": "bf16"}
    return found


@lru_cache(maxsize=1)
def _states(source: str, path: str | None) -> States:
    if source == "random":
        return random_states(16)
    try:
        return stored(Path(path), TOKENS) if path else real_states(TOKENS)
    except NothingToMeasureError as error:
        pytest.skip(str(error))


@lru_cache(maxsize=1)  # a head's gradient in float64 is large
def _truth(states: States, solves: Solves) -> tuple[Case, Exact]:
    complete = problem(states)
    case = complete._replace(smoothing=solves.smoothing(complete.smoothing))
    return case, exact(case)


def test_the_floor(states: States, row: dict[str, Any]) -> None:
    row |= {"provider": "exact, rounded once", "solves": Solves.PER_TOKEN.value} | {
        "accuracy": floor(problem(states))
    }


@pytest.mark.timeout(1800)  # an interpreted kernel takes minutes at V 49152
def test_accuracy(states: States, row: dict[str, Any], provider: Provider) -> None:
    row["how"] = provider.how
    try:
        loss = provider.load()
    except MissingError as error:
        pytest.skip(str(error))
    row["accuracy"] = found = measure(provider, loss, *_truth(states, provider.solves))
    if provider.ours == HIGH and row["problem"] == "real":  # the random inputs are few, and no model's
        assert not missed(found), "; ".join(missed(found))

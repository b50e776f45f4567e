"""Loss and gradient of given logits, relative to a plain memory copy."""

from functools import lru_cache
from typing import Any

import pytest

from benchmarks import grid
from benchmarks.measure import (
    CLOCK,
    COPIED,
    CUDA,
    DEVICE,
    DTYPES,
    Step,
    copy,
    errors,
    fits,
    peak_bytes,
    race,
    ratio,
    slice_of,
    telling,
    training_step,
)
from benchmarks.problems import Case, Problem
from benchmarks.providers import LOGITS_PROVIDERS, Provider

OURS = next(p for p in LOGITS_PROVIDERS if p.name == "ours, in place")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = grid.form(metafunc.config)
    metafunc.parametrize(
        ("problem", "dtype", "provider"),
        [
            pytest.param(p, dtype, who, id=f"{p.name}-{dtype}-{who.name}")
            for p in given.problems
            for dtype in given.dtypes
            for who in grid.providers(metafunc.config, LOGITS_PROVIDERS)
        ],
    )


@lru_cache(maxsize=1)
def arena(problem: Problem, dtype: str) -> tuple[Case, Step, Step]:
    """Return the logits that all providers share, a step that copies memory, and a step of ours."""
    case = problem.logits(DEVICE, DTYPES[dtype])
    return case, copy(), training_step(OURS.load(), case)


@pytest.mark.benchmark(timer=CLOCK)
def test_cross_entropy(
    benchmark: Any,
    row: dict[str, Any],
    form: grid.Form,
    problem: Problem,
    dtype: str,
    provider: Provider,
) -> None:
    benchmark.group, benchmark.extra_info = f"{problem.name} logits {dtype}", row
    row["setting"] = "logits"
    loss = grid.loaded(provider, form)
    sample = telling(slice_of(problem).logits(DEVICE, DTYPES[dtype]))
    row["errors"] = errors(loss, grid.supported(provider, sample))
    if reason := fits(problem, provider):
        raise MemoryError(reason)
    case, plain, ours = arena(problem, dtype)
    step = training_step(loss, provider.adapt(case))
    beside = {"copy": plain} | ({} if provider is OURS else {"ours": ours})
    row["seconds"] = found = race(benchmark, step, beside, form.rounds, form.patience)
    # the lower bound of memory traffic: each logit is read once, and its gradient written once
    least = 2 * case.hidden.numel() * case.hidden.element_size()
    row["least_bytes"] = least
    row["of_copy"] = ratio(found["it"], found["copy"]) * COPIED / least
    row["of_ours"] = ratio(found["it"], found.get("ours", found["it"]))
    if CUDA:
        row["peak_bytes"] = peak_bytes(step)

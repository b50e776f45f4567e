"""Time and memory as N, V or D grows; the report fits the slopes."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import grid
from benchmarks.measure import (
    CLOCK,
    CUDA,
    DEVICE,
    DTYPES,
    extra_memory_elsewhere,
    fits,
    peak_bytes,
    products,
    race,
    ratio,
    training_step,
)
from benchmarks.problems import FROZEN, Problem
from benchmarks.providers import PROVIDERS, Provider

COMPARED = tuple(
    p
    for p in PROVIDERS
    if p.name in (("ours, triton fused", "naive", "liger fused linear") if CUDA else ("ours", "naive"))
)
BASE = Problem("scaling", 4_096, 2_048, 32_768) if CUDA else Problem("scaling", 512, 512, 32_768)
SIZES = {
    "rows": (1, 16, 256, 1_024, 4_096, 16_384, 65_536) if CUDA else (1, 16, 128, 512, 2_048, 4_096),
    "vocab": (8_192, 32_768, 131_072, 262_144) if CUDA else (8_192, 32_768, 131_072),
    "features": (512, 1_024, 2_048, 4_096) if CUDA else (128, 512, 2_048),
}
SMOKE_SIZES = dict.fromkeys(SIZES, (16, 32, 64))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SMOKE_SIZES if grid.form(metafunc.config).name == "smoke" else SIZES
    metafunc.parametrize(
        ("axis", "problem", "provider"),
        [
            pytest.param(axis, replace(BASE, **{axis: size}), who, id=f"{axis}-{size}-{who.name}")
            for axis in sizes
            for who in grid.providers(metafunc.config, COMPARED)
            for size in sizes[axis]
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def test_scaling(
    benchmark: Any, row: dict[str, Any], form: grid.Form, axis: str, problem: Problem, provider: Provider
) -> None:
    benchmark.group, benchmark.extra_info = f"scaling {axis} {provider.name}", row
    row |= {"setting": axis, "dtype": "bf16"}
    loss = grid.loaded(provider, form)
    if reason := fits(problem, provider):
        raise MemoryError(reason)
    case = problem.case(FROZEN, DEVICE, DTYPES["bf16"])
    step = training_step(loss, provider.adapt(case))
    row["seconds"] = found = race(
        benchmark, step, {"products": products(case, FROZEN)}, form.rounds, form.patience / 4
    )
    row["of_products"] = ratio(found["it"], found["products"])
    if CUDA:
        row["peak_bytes"] = peak_bytes(step)
    elif form.name != "smoke":
        (row["peak_bytes"],) = extra_memory_elsewhere(provider, [problem], "bf16")

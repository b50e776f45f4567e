"""Cost of `ual elicit` per sample without a model: throughput, peak memory, size of the cache.

    python -m benchmarks.studies.elicitation_scale FOLDER [--rows 20000 200000]

The backend answers at once and in this process. What is measured is the rest: reading, hashing, the cache,
the evidence, and writing samples. A second run in the same folder reads the cache.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ual.pipelines.elicit as elicitation
from ual.config.elicit import ElicitConfig
from ual.uncertainty.budget import Budget, Spent
from ual.uncertainty.protocol import Reply, Request


class Instant:
    """Answers at once, and charges the budget as an endpoint does."""

    tasks = frozenset({"generate"})
    identity: Mapping[str, Any] = {"instant": 1}

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    async def __call__(self, request: Request) -> Reply:
        most, used = Spent(1, request.size, request.max_tokens), Spent(1, request.size // 4, 3)
        await self._budget.reserve(most)
        await self._budget.settle(most, used)
        return Reply("0.25", prompt_tokens=used.prompt_tokens, completion_tokens=3)

    async def drain(self, seconds: float) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


def measure(folder: Path, count: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        with rows.open("w") as file:
            for i in range(count):
                answer = " ".join(f"step {j}: {i} + {j} = {i + j}." for j in range(8))
                file.write(json.dumps({"id": f"r{i}", "prompt": f"Sum {i}.", "completion": answer}) + "\n")
    config = ElicitConfig.model_validate(
        {
            "data": str(rows),
            "backend": {"kind": "endpoint", "model": "instant", "concurrency": 64},
            "estimators": ["verbalised"],
            "output_dir": str(folder / "run"),
        }
    )
    elicitation.backends = lambda job, budget, *_, **__: [Instant(budget)]
    started = time.monotonic()
    summary = elicitation.run(config, environment={})
    seconds = time.monotonic() - started
    estimate = summary["estimators"]["verbalised"]
    return {
        "samples": summary["rows"],
        "values": estimate["values"],
        "cached": summary["requests"]["cached"],
        "seconds": round(seconds, 1),
        "samples_per_second": round(count / seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "cache_bytes_per_sample": round((folder / "run" / "replies.sqlite").stat().st_size / count),
    }


def scale_table(found: dict[str, Any]) -> str:
    """Throughput, memory and cache by the number of samples."""
    from benchmarks import machine

    header = ("samples", "samples/s", "peak memory", "cache per sample")
    rows = [
        (
            f"{r['samples']:,}",
            f"{r['samples_per_second']:,}",
            f"{r['peak_mib']:.1f} MiB",
            f"{r['cache_bytes_per_sample']} bytes",
        )
        for r in found["runs"]
    ]
    return machine.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.elicitation_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--json", type=Path, help="default: in benchmarks/results/")
    parser.add_argument("--markdown", type=Path, help="default: in benchmarks/results/")
    given = parser.parse_args()
    runs = []
    for count in given.rows:  # a process each: the peak of memory is that of the process
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(measure, (given.folder / str(count), count)))
    # torch, which this imports, would count in the peak of the processes started later
    from benchmarks import machine

    about = machine.describe()
    found = {"machine": about, "runs": runs}
    text = f"# Scale of `ual elicit`\n\n{machine.headline(about)}\n\n{scale_table(found)}"
    machine.save(found, text, "elicitation_scale", given.json, given.markdown)


if __name__ == "__main__":
    main()

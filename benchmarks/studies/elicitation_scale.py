"""Cost of `ual elicit` per sample without a model: throughput, peak memory, size of the cache.

    python -m benchmarks.studies.elicitation_scale FOLDER [--rows 1000000]

The backend answers at once and in this process. What is measured is the rest: reading, hashing, the cache,
the evidence, and writing samples. Prints one line of JSON. A second run in the same folder reads the cache.
"""

import argparse
import json
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
        "rows": summary["rows"],
        "values": estimate["values"],
        "cached": summary["requests"]["cached"],
        "seconds": round(seconds, 1),
        "rows_per_second": round(count / seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "cache_bytes_per_row": round((folder / "run" / "replies.sqlite").stat().st_size / count),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    print(json.dumps(measure(given.folder, given.rows)))

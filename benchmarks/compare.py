"""Compare two results files of one machine: time with a confidence interval, memory, and error."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import Row

RESAMPLES = 2_000
_KEYS = ("suite", "problem", "setting", "dtype", "rows", "features", "vocab", "provider")
_LIMITS = ("products", "copy")
MEMORY_MARGIN, MEMORY_LEAST = 1.10, 4 << 20  # resident memory is counted in pages
ERROR_MARGIN = 1.5


@dataclass(frozen=True)
class Change:
    """A ratio B / A, with the bounds `low` and `high` of its 95 % bootstrap interval."""

    row: str
    what: str  # time, memory, or the name of a gradient
    ratio: float
    low: float
    high: float
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_a: list[str]
    only_b: list[str]
    failed: list[str]  # measured in A; incorrect or raised in B


def _named(found: dict[str, Any]) -> dict[str, Row]:
    rows = [r for r in found["rows"] if "provider" in r]
    return {" ".join(str(r[k]) for k in _KEYS if k in r): r for r in rows}


def _measured(row: Row) -> bool:
    return "seconds" in row or "accuracy" in row


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.05) -> Comparison:
    """Compare the measurements that both files have.

    Time is compared as its ratio to the bare products (or to a memory copy) of the same round, so the
    clock rate of the machine cancels. Time has regressed if the complete interval is above 1 + tolerance.
    """
    first, second = _named(a), _named(b)
    rng = np.random.default_rng(0)
    changes: list[Change] = []
    failed = []
    for name in first.keys() & second.keys():
        old, new = first[name], second[name]
        if _measured(old) and ("wrong" in new or "raised" in new):
            failed.append(f"{name}: {new.get('wrong') or new.get('raised')}")
            continue
        changes += _time(name, old, new, tolerance, rng)
        if "peak_bytes" in old and "peak_bytes" in new:
            ratio = new["peak_bytes"] / max(old["peak_bytes"], 1)
            grown = new["peak_bytes"] - old["peak_bytes"] > MEMORY_LEAST
            changes.append(Change(name, "memory", ratio, ratio, ratio, grown and ratio > MEMORY_MARGIN))
        for gradient, error in old.get("errors", {}).items():
            if gradient in new.get("errors", {}) and error > 0:
                ratio = new["errors"][gradient] / error
                bad = gradient != "loss" and not ratio <= ERROR_MARGIN
                changes.append(Change(name, f"error of {gradient}", ratio, ratio, ratio, bad))
    return Comparison(
        sorted(changes, key=lambda c: (not c.regressed, -c.ratio)),
        sorted(name for name in first.keys() - second.keys() if _measured(first[name])),
        sorted(name for name in second.keys() - first.keys() if _measured(second[name])),
        sorted(failed),
    )


def _time(name: str, old: Row, new: Row, tolerance: float, rng: np.random.Generator) -> list[Change]:
    before, after = old.get("seconds"), new.get("seconds")
    limit = next((x for x in _LIMITS if before and after and x in before and x in after), None)
    if limit is None:
        return []
    samples = [np.asarray(s["it"]) / np.asarray(s[limit]) for s in (before, after)]
    drawn = [np.median(rng.choice(s, (RESAMPLES, len(s))), axis=1) for s in samples]
    low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975))
    ratio = float(np.median(samples[1]) / np.median(samples[0]))
    return [Change(name, "time", ratio, float(low), float(high), bool(low > 1 + tolerance))]

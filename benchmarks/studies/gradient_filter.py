"""Measure what `gradient_filter` saves and costs on real text: time, gradient error and dropped mass.

OMP_NUM_THREADS=1 python -m benchmarks.studies.gradient_filter    # writes benchmarks/results/<machine>/
"""

import argparse
import time
from statistics import median
from typing import Any

import torch

from benchmarks import machine
from benchmarks.studies.accuracy import NothingToMeasureError, States, real_states
from ual_kernels import (
    LinearCrossEntropyOptions,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
)

THRESHOLDS = (0.0, 1e-5, 1e-3, 1e-2)
CHUNKS = (None, 64)
ROUNDS = 5
SMOOTHING = 0.1


def measure(states: States) -> list[dict[str, Any]]:
    """Return one record for each number of tokens per chunk and threshold."""
    wide = states.hidden.double().requires_grad_()
    linear_cross_entropy(wide, states.head.double(), states.target, label_smoothing=SMOOTHING).backward()
    assert wide.grad is not None
    truth, hidden = wide.grad, states.hidden.requires_grad_()

    def step(threshold: float, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        options = LinearCrossEntropyOptions(gradient_filter=threshold, chunk_tokens=chunk)
        value, statistics = linear_cross_entropy_with_statistics(
            hidden, states.head, states.target, label_smoothing=SMOOTHING, options=options
        )
        return torch.autograd.grad(value, hidden)[0], statistics.dropped_mass

    records = []
    for chunk in CHUNKS:
        seconds: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
        results = {threshold: step(threshold, chunk) for threshold in THRESHOLDS}
        for _ in range(ROUNDS):
            for threshold in THRESHOLDS:
                start = time.process_time()
                step(threshold, chunk)
                seconds[threshold].append(time.process_time() - start)
        for threshold, (gradient, dropped) in results.items():
            ratios = (a / b for a, b in zip(seconds[threshold], seconds[0.0], strict=True))
            records.append({
                "chunk_tokens": chunk,
                "threshold": threshold,
                "seconds": seconds[threshold],
                "of_unfiltered": median(ratios),
                "dropped_mass": dropped.mean().item(),
                "error": ((gradient.double() - truth).norm() / truth.norm()).item(),
            })  # fmt: skip
    return records


def table(found: dict[str, Any]) -> str:
    """Return the records as a Markdown table."""
    header = ("tokens per chunk", "threshold", "CPU ms", "time / off", "mean dropped mass", "dE error")
    lines = [
        (str(r["chunk_tokens"] or "default"), f"{r['threshold']:g}" if r["threshold"] else "off",
         f"{median(r['seconds']) * 1e3:.0f}", f"{r['of_unfiltered']:.2f}", f"{r['dropped_mass']:.1e}",
         f"{r['error']:.1e}")
        for r in found["records"]
    ]  # fmt: skip
    return machine.table(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.gradient_filter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=1_024, help="number of loss tokens (default: 1024)")
    given = parser.parse_args()
    try:
        states = real_states(given.tokens)
    except NothingToMeasureError as error:
        parser.exit(1, f"{error}\n")
    about = machine.describe()
    found = {"machine": about, "source": states.source, "tokens": given.tokens, "smoothing": SMOOTHING}
    found["records"] = measure(states)
    title = f"# gradient_filter: {states.source}, {given.tokens} tokens, smoothing {SMOOTHING}"
    text = "\n\n".join([title, table(found), machine.headline(about)])
    print(text)
    machine.save(found, text, "gradient_filter")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

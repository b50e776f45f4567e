"""Does `gradient_filter` pay on real text? Time, error and dropped mass for a few thresholds.

python -m benchmarks.gradient_filter [--tokens 1024]
"""

import argparse
import time
from statistics import median

import torch

from benchmarks import machine
from benchmarks.accuracy import NothingToMeasureError, real_states
from ual_kernels import (
    LinearCrossEntropyOptions,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
)

THRESHOLDS = (0.0, 1e-5, 1e-3, 1e-2)
CHUNKS = (None, 64)
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gradient_filter", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_024, help="tokens of the loss (default: 1024)")
    given = parser.parse_args()
    try:
        states = real_states(given.tokens)
    except NothingToMeasureError as error:
        parser.exit(1, f"{error}\n")
    wide = states.hidden.double().requires_grad_()
    linear_cross_entropy(wide, states.head.double(), states.target, label_smoothing=0.1).backward()
    assert wide.grad is not None
    truth, hidden = wide.grad, states.hidden.requires_grad_()

    def loss(tau: float, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        options = LinearCrossEntropyOptions(gradient_filter=tau, chunk_tokens=chunk)
        value, statistics = linear_cross_entropy_with_statistics(
            hidden, states.head, states.target, label_smoothing=0.1, options=options
        )
        return torch.autograd.grad(value, hidden)[0], statistics.dropped_mass

    lines: list[tuple[str, ...]] = []
    for chunk in CHUNKS:
        seconds: dict[float, list[float]] = {tau: [] for tau in THRESHOLDS}
        found = {tau: loss(tau, chunk) for tau in THRESHOLDS}
        for _ in range(ROUNDS):
            for tau in THRESHOLDS:
                start = time.perf_counter()
                loss(tau, chunk)
                seconds[tau].append(time.perf_counter() - start)
        for tau, (gradient, dropped) in found.items():
            error = ((gradient.double() - truth).norm() / truth.norm()).item()
            ratio = median(a / b for a, b in zip(seconds[tau], seconds[0.0], strict=True))
            lines.append(
                (str(chunk or "default"), f"{tau:g}" if tau else "off", f"{median(seconds[tau]) * 1e3:.0f}",
                 f"{ratio:.2f}", f"{dropped.mean():.1e}", f"{error:.1e}")
            )  # fmt: skip
    header = ("tokens of a chunk", "threshold", "ms", "time / off", "mean dropped mass", "dE error")
    print(f"# gradient_filter: {states.source}, {given.tokens} tokens\n")
    print(machine.table(header, lines), machine.headline(machine.describe()), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

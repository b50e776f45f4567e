"""Every ZeRO stage and FSDP2 give the losses and weights of training in one process.

Two processes, started once by DeepSpeed's launcher, train every case of tests/invariants/sharded.py over
gloo. The expected values are computed here, in one process, by a plain loop over the same samples.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.sharded import CASES, EPSILON, RATE, STEPS, Case, build, sum_of_step
from tests.ual.runs import ENVIRONMENT, ROOT, free_port

pytestmark = pytest.mark.slow

SECONDS = 400


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2",
        "--master_port", str(free_port()), "--module", "tests.invariants.sharded", str(folder),
    ]  # fmt: skip
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    loaded: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return loaded


@cache
def alone(head: str, accumulation: int, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process without DeepSpeed: weights in `dtype`, masters and moments in float32 or more."""
    exact = dtype == torch.float64
    model = build(head, dtype, **({"backend": "reference"} if exact else {}))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    source = dict(build(head, torch.float32).named_parameters())
    wide = torch.float64 if exact else torch.float32
    masters = [source[name].detach().to(wide).requires_grad_() for name, _ in named]
    optimizer = torch.optim.AdamW(masters, lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []

    def backward(batch: dict[str, Any], total: torch.Tensor) -> torch.Tensor:
        loss = model(**batch, num_items_in_batch=total).loss
        loss.backward()
        return loss.detach()

    for k in range(STEPS):
        losses.append(sum_of_step(accumulation, k, backward).item())
        for master, (_, p) in zip(masters, named, strict=True):
            master.grad, p.grad = p.grad.to(wide), None
        optimizer.step()
        with torch.no_grad():
            for master, (_, p) in zip(masters, named, strict=True):
                p.copy_(master)
    return losses, {name: m.detach() for m, (name, _) in zip(masters, named, strict=True)}


def error(weights: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], start: dict[str, Any]) -> float:
    """Return the error of the weights' update, relative to the norm of the exact update."""
    off = sum((weights[n].double() - exact[n]).square().sum() for n in exact)
    length = sum((exact[n] - start[n].detach().double()).square().sum() for n in exact)
    return (off / length).sqrt().item()


@cache
def own_error(dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest errors of one process over all cases: of its weights, and of a loss.

    The largest, because the rounding error of one short run is a single draw.
    """
    weights, losses = [], []
    for head, accumulation in sorted({(case.head, case.accumulation) for case in CASES}):
        exact_losses, exact = alone(head, accumulation, torch.float64)
        own_losses, own = alone(head, accumulation, dtype)
        weights.append(error(own, exact, dict(build(head, torch.float32).named_parameters())))
        losses += [abs(a - b) for a, b in zip(own_losses, exact_losses, strict=True)]
    return max(weights), max(losses)


@pytest.mark.kills(
    "ual/train/trainer.py", '"sample_weight", "option_probabilities")', '"sample_weight")', slow=True
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sharded_training_equals_one_process(results: dict[str, Any], case: Case) -> None:
    """The error against float64 is at most twice the error of one process in the same dtype.

    The factor allows for sums in another order, over ranks and micro-batches, and for gradients that are
    communicated in the dtype of the weights; the floor of a loss is 8 roundings in float32.
    """
    got = results[str(case)]
    losses, exact = alone(case.head, case.accumulation, torch.float64)
    weight_error, loss_error = own_error(case.dtype)
    start = dict(build(case.head, torch.float32).named_parameters())
    assert got["weights"].keys() == exact.keys()
    assert error(got["weights"], exact, start) <= 2 * weight_error
    floor = 8 * torch.finfo(torch.float32).eps * max(losses)
    assert got["losses"] == pytest.approx(losses, rel=0, abs=2 * loss_error + floor)


def test_a_frozen_head_is_gathered_once_a_micro_batch(results: dict[str, Any]) -> None:
    """In forward; a trained head is also gathered in backward."""
    for case in CASES:
        if case.sharding == "zero3" and case.head != "tied":
            passes = STEPS * case.accumulation
            back = passes if case.head == "trainable" else 0
            assert results[str(case)]["gathers"] == {"forward": passes, "backward": back}, case


def test_fsdp2_resumes_from_a_distributed_checkpoint(results: dict[str, Any]) -> None:
    assert all(results[str(case)]["replayed"] for case in CASES if case.sharding == "fsdp2")

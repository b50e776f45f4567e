"""Without smoothing, training is transformers' own; a resumed run equals an uninterrupted one."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from tests.ual.runs import configure, gsm8k, history, start
from ual.config.run import load
from ual.data import Collator, Renderer
from ual.data import load as load_rows
from ual.errors import UserError
from ual.models import fuse
from ual.models.score import TokenScores, score
from ual.pipelines.train import run
from ual.train import UALTrainer

pytestmark = [
    # from the trainer's import of tensorboard and torch.distributed on a CPU
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def features(shared: Path, stories: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    renderer = Renderer(
        tokenizer, chat_template="plain", max_length=192, context_length=512, overlong="truncate"
    )
    rows = [renderer.render(s) for s in load_rows(str(shared / "data" / "gsm8k" / "train.jsonl"))[:120]]
    return [
        {
            "id": r.id,
            "input_ids": r.input_ids.tolist(),
            "labels": r.labels.tolist(),
            "label_smoothing": 0.0,
            "sample_weight": 1.0,
        }
        for r in rows
        if r is not None
    ]


def trajectory(
    features: list[dict[str, Any]],
    stories: Path,
    folder: Path,
    *,
    fused: bool,
    nudge: float = 0.0,
    smoothing: float = 0.0,
    **arguments: Any,
) -> list[float]:
    """Train LoRA for thirty steps on real samples; return the logged losses."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(stories)
    if fused:
        fuse(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.mul_(1 + nudge)
    options = {
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
    } | arguments
    args = TrainingArguments(
        output_dir=str(folder), logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, lr_scheduler_type="constant", label_names=["labels"],
        logging_nan_inf_filter=False, **options,
    )  # fmt: skip
    collate = Collator(0)

    def plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    rows = [row | {"label_smoothing": smoothing} for row in features]
    kind = UALTrainer if fused else Trainer
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=collate if fused else plain)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow(spare=2)
def test_without_smoothing_it_is_transformers_own_training(
    features: list[dict[str, Any]], stories: Path, tmp_path: Path, accumulation: int
) -> None:
    """Every step is within four times the effect of one ulp on the initial adapter, in transformers' own run.

    Two correct fp32 computations of one gradient differ by roundings, and training amplifies differences. The
    twin run measures by how much.
    """
    options = {"gradient_accumulation_steps": accumulation}
    theirs = trajectory(features, stories, tmp_path, fused=False, **options)
    twin = trajectory(features, stories, tmp_path, fused=False, nudge=2**-23, **options)
    ours = trajectory(features, stories, tmp_path, fused=True, **options)
    assert len(ours) == 30
    assert sum(ours[-5:]) < 0.9 * sum(ours[:5]), "the loss does not fall"
    spread = max(abs(a - b) for a, b in zip(theirs, twin, strict=True))
    rounding = 8 * torch.finfo(torch.float32).eps * max(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 4 * spread + rounding, f"step {step}: {a} against {b}, twin spread {spread}"


def test_a_smoothed_run_differs(features: list[dict[str, Any]], stories: Path, tmp_path: Path) -> None:
    """The test above can fail: a smoothing of 1e-3 is far outside its bound."""
    theirs = trajectory(features, stories, tmp_path, fused=False, max_steps=3)
    ours = trajectory(features, stories, tmp_path, fused=True, smoothing=1e-3, max_steps=3)
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 1e-3


def test_micro_batches_do_not_change_the_loss(
    features: list[dict[str, Any]], stories: Path, tmp_path: Path
) -> None:
    """Four samples at once or one by one: one mean over all loss tokens of the step."""
    curves = [
        trajectory(
            features, stories, tmp_path, fused=True, smoothing=0.1, max_steps=4,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )
        for size in (4, 2, 1)
    ]  # fmt: skip
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("average", ["weights", "tokens", "samples"])
def test_averages(features: list[dict[str, Any]], stories: Path, tmp_path: Path, average: str) -> None:
    """The first logged loss, against its definition on the unfused model's logits."""
    rows = [f | {"sample_weight": w} for f, w in zip(features[:4], (0.5, 1.0, 2.0, 0.0), strict=True)]
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    sums, counts = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        counts.append(int((labels[:, 1:] != -100).sum()))
        sums.append(model(input_ids=ids, labels=labels).loss.item() * counts[-1])
    weights = [row["sample_weight"] for row in rows]
    weighted = sum(w * s for w, s in zip(weights, sums, strict=True))
    expected = {
        "weights": weighted / sum(w * n for w, n in zip(weights, counts, strict=True)),
        "tokens": weighted / sum(counts),
        "samples": sum(w * s / n for w, s, n in zip(weights, sums, counts, strict=True)) / sum(weights),
    }[average]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    trainer = UALTrainer(
        model=fuse(model), args=args, train_dataset=rows, average=average,
        data_collator=Collator(0, average=average),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.kills("ual/train/trainer.py", 'if "labels" not in inputs:', "if False:")
def test_batches_of_sequence_parallelism_are_refused(
    features: list[dict[str, Any]], stories: Path, tmp_path: Path
) -> None:
    """It replaces `labels` by `shift_labels` before a trainer computes the loss."""

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = Collator(0)(rows)
        return batch | {"shift_labels": batch.pop("labels")}

    trainer = UALTrainer(
        model=fuse(AutoModelForCausalLM.from_pretrained(stories)),
        args=TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to="none"),
        train_dataset=features,
        data_collator=collate,
    )
    with pytest.raises(UserError, match=r"no labels.*\n.*set sp_size and cp_size to 1"):
        trainer.compute_loss(trainer.model.train(), collate(features[:2]))


@pytest.mark.slow
def test_thirty_steps_of_a_run_on_real_samples(shared: Path, stories: Path, tmp_path: Path) -> None:
    config = configure(
        tmp_path, stories, gsm8k(shared, 60), training={"max_steps": 30}, data={"eval_fraction": 0.2}
    )
    result = run(load(config, ["data.eval_fraction=0.2"]))
    losses = [row["loss"] for row in history(result.folder)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.metrics["eval"]["nll"] < result.metrics["eval_before"]["nll"]
    assert result.metrics["status"] == "completed"
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    ordered = sorted(samples, key=lambda s: s["uncertainty"])
    smoothings = [s["label_smoothing"] for s in ordered]
    assert smoothings == sorted(smoothings)
    assert (smoothings[0], smoothings[-1]) == (0.0, pytest.approx(0.2))
    assert result.report.is_file()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: the bits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    shared: Path, stories: Path, tmp_path: Path
) -> None:
    """Stop a process, resume in others: adapter and history are bit-identical."""
    rows = gsm8k(shared, 40)
    folders = [tmp_path / "uninterrupted", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    training = {"max_steps": 24, "save_steps": 50, "gradient_accumulation_steps": 2}
    uninterrupted, stopped = (configure(folder, stories, rows, training=training) for folder in folders)
    assert run(load(uninterrupted)).metrics["status"] == "completed"

    run_folder = folders[1] / "run"
    for number, after, words in ((signal.SIGINT, 5, []), (signal.SIGTERM, 13, ["--resume"])):
        process = start("train", stopped, *words)
        deadline = time.monotonic() + 90
        while not (run_folder / "history.jsonl").exists() or len(history(run_folder)) < after:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert "--resume" in errors
        steps = json.loads((run_folder / "metrics.json").read_text())["steps"]
        assert after <= steps < 24
        assert (run_folder / "checkpoints" / f"checkpoint-{steps}").is_dir()

    assert run(load(stopped), resume=True).metrics["status"] == "completed"
    adapters = [load_file(folder / "run" / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name
    curves = [[(row["step"], row["loss"]) for row in history(folder / "run")] for folder in folders]
    assert curves[0] == curves[1]


def test_resuming_a_finished_run_trains_no_further(shared: Path, stories: Path, tmp_path: Path) -> None:
    training = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    config = load(configure(tmp_path, stories, gsm8k(shared, 10), training=training))
    first = run(config)
    weights = load_file(first.folder / "adapter" / "adapter_model.safetensors")
    again = run(config, resume=True)
    assert again.metrics["steps"] == first.metrics["steps"]
    for name, tensor in load_file(first.folder / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_the_best_checkpoint_is_found_again(
    shared: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are renamed when complete; transformers must look for the best one under its final name.

    Evaluation makes no logits, which take more memory than the training step.
    """
    logits = []

    def watched(model: Any, *args: Any, **kwargs: Any) -> Iterator[TokenScores]:
        hook = model.register_forward_hook(lambda _, __, outputs: logits.append(outputs.logits))
        yield from score(model, *args, **kwargs)
        hook.remove()

    monkeypatch.setattr("ual.train.trainer.score", watched)
    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 5e-2,
    }
    data = {"eval_fraction": 0.3}
    config = configure(tmp_path, stories, gsm8k(shared, 16), training=training, data=data)
    result = run(load(config, ["data.eval_fraction=0.3"]))
    states = [
        json.loads((folder / "trainer_state.json").read_text())
        for folder in (result.folder / "checkpoints").glob("checkpoint-*")
    ]
    best = Path(max(states, key=lambda s: s["global_step"])["best_model_checkpoint"])
    losses = {row["step"]: row["eval_loss"] for row in history(result.folder) if "eval_loss" in row}
    assert logits
    assert not [tensor for tensor in logits if tensor is not None]
    assert best.is_dir()
    assert int(best.name.rsplit("-", 1)[1]) == min(losses, key=losses.__getitem__)
    saved = load_file(best / "adapter_model.safetensors")
    for name, tensor in load_file(result.folder / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, saved[name]), name

"""What a checkpoint survives, and what stops a run before it does harm."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.faults.test_bad_input import ROWS, refuse
from tests.ual.runs import ENVIRONMENT, ROOT, configure, free_port, history
from ual.cli.main import app
from ual.errors import UserError
from ual.train import checkpoint
from ual.train.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def sealed(folder: Path, step: int) -> Path:
    target = folder / f"checkpoint-{step}"
    scratch = folder / ".partial" / target.name
    (scratch / "inner").mkdir(parents=True)
    (scratch / "weights").write_bytes(bytes(range(100)))
    (scratch / "inner" / "state").write_bytes(b"moments")
    checkpoint.seal(Checkpoint(scratch, step, world_size=1, samples_per_step=4, zero_stage=0))
    checkpoint.publish(scratch, target)
    return target


def flip(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[50] ^= 1
    (folder / "weights").write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip, "weights does not have the recorded hash"),
    "cut short": (lambda f: (f / "weights").write_bytes(b"abc"), "weights does not have the recorded hash"),
    "a file gone": (lambda f: (f / "inner" / "state").unlink(), "inner/state is missing"),
    "a file more": (
        lambda f: (f / "inner" / "evil.pt").write_bytes(b""),
        "inner/evil.pt is not in the manifest",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"files":'), "no manifest.json"),
    "another manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
}


@pytest.mark.kills("ual/train/checkpoint.py", "if missing := sorted(", "if False and sorted(")
@pytest.mark.kills("ual/train/checkpoint.py", "if _is_loaded_by_name(name)):", "if False):")
@pytest.mark.kills(
    "ual/train/checkpoint.py", '!= recorded["sha256"]:', '!= recorded["sha256"] and not recorded["bytes"]:'
)
@pytest.mark.kills("ual/train/checkpoint.py", "            (int(number), path)", "            (number, path)")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, kind: str) -> None:
    older, newer = sealed(tmp_path, 9), sealed(tmp_path, 10)
    newest = checkpoint.newest_complete(tmp_path)
    assert newest is not None
    assert (newest.path, newest.step, newest.samples_per_step) == (newer, 10, 4)
    harm, words = DAMAGE[kind]
    harm(newer)
    assert words in (checkpoint.damage(newer) or "")
    found = checkpoint.find(tmp_path)
    assert found.newest is not None
    assert found.newest.path == older
    assert words in found.damaged[newer]


def test_what_a_kill_leaves_aside_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".partial" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.newest_complete(tmp_path) is None


@pytest.mark.kills("ual/train/checkpoint.py", "if free < size:", "if free < 0:")
def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    checkpoint.require_room(tmp_path, 1)
    with pytest.raises(UserError, match=r"needs about [\d,]+ MB, and [\d,]+ MB are free"):
        checkpoint.require_room(tmp_path, 2 * free)


def test_a_run_passes_over_its_damaged_checkpoint(tmp_path: Path, tiny: Path) -> None:
    """The run resumes from the checkpoint before, and ends with the same weights."""
    config = configure(tmp_path, tiny, ROWS, uncertainty="column")
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    run = tmp_path / "run"
    expected = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    assert not list(run.rglob("*.bin")), "a pickle that is never read"
    victim = run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    result = CliRunner().invoke(app, ["train", str(config), "--resume"])
    assert result.exit_code == 0, result.output
    log = (run / "train.log").read_text()
    assert "passed over the damaged checkpoint" in log
    assert re.search(r"starting from .*checkpoint-4", log)
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert [row["step"] for row in history(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


_ONE_LEAVES = """
import os, sys
import torch.distributed as dist
from ual.train import distributed

dist.init_process_group("gloo")
distributed.wait()
if distributed.rank() == 1:
    os._exit(1)
try:
    distributed.wait()
except RuntimeError as error:
    full = RuntimeError("disk quota exceeded")
    os._exit(0 if distributed.is_lost(error) and not distributed.is_lost(full) else 3)
"""


@pytest.mark.kills("ual/train/distributed.py", 'or "gloo/transport" in str(error)', "")
def test_a_process_that_is_gone_is_not_taken_for_a_full_disk() -> None:
    at = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, "-c", _ONE_LEAVES], env=ENVIRONMENT | at | {"RANK": rank}, cwd=ROOT)
        for rank in "01"
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 1]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.kills("ual/train/resume.py", "if resume is True:", "if resume:")
def test_nothing_to_go_on_with(tmp_path: Path, tiny: Path) -> None:
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 2})
    assert "--resume auto" in refuse(config, "--resume")
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(app, ["train", str(config), "--resume", "auto"])
    assert result.exit_code == 0, result.output


@pytest.mark.kills(
    "ual/train/callbacks.py", "if not distributed.highest(mine):", "if mine or not distributed.highest(mine):"
)
def test_a_gradient_that_is_not_finite_names_the_samples(tmp_path: Path, tiny: Path) -> None:
    """A weight near the largest float overflows one sample's gradient; the step before has been saved."""
    rows = [row | {"id": f"sample {i}", "sample_weight": 1.0} for i, row in enumerate(ROWS)]
    rows[6]["sample_weight"] = 3e38
    training = {"max_steps": 8, "save_steps": 1, "per_device_train_batch_size": 1, "seed": 3}
    config = configure(tmp_path, tiny, rows, uncertainty="column", training=training)
    said = refuse(config, "loss.average=tokens")
    assert "not finite" in said
    assert re.search(r"Samples: sample 6 ", said), said
    run = tmp_path / "run"
    newest = checkpoint.newest_complete(run / "checkpoints")
    steps = [row["step"] for row in history(run) if "loss" in row]
    assert (newest.step if newest else 0) == len(steps)
    assert f"step {len(steps) + 1} is not finite" in said


SECRET = "hf_planted0123456789secret"


def test_secrets_are_not_written_down(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 2})
    result = CliRunner().invoke(app, ["train", str(config), "training.report_to=tensorboard"])
    assert result.exit_code == 0, result.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert SECRET not in result.output
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert "HF_TOKEN" in refuse(config, f"training.hub_token={SECRET}", f"output_dir={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        ({"deepspeed": "zero4"}, ["zero4", "did you mean"]),
        ({"deepspeed": "none.json"}, ["none.json", "zero3-offload"]),
        ({"training": {"deepspeed": "zero3"}}, ["deepspeed", "at the top"]),
        ({"training": {"fsdp": "full_shard"}}, ["FSDP", "CPU", "zero3"]),
        ({"loss": {"kind": "dft", "average": "samples"}}, ["dft", "samples"]),
        ({"loss": {"kind": "sft", "gamma": 2.0}}, ["sft", "gamma"]),
        ({"loss": "weighted"}, ["weighted", "sample_weight"]),
        ({"lora": {"target_modules": ["lm_head"], "dropout": 0.1}}, ["lm_head", "dropout"]),
        (
            {"lora": {"target_modules": ["lm_head"], "dropout": 0.0, "use_dora": True}},
            ["lm_head", "plain LoRA"],
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, tiny: Path, sections: dict[str, Any], messages: list[str]
) -> None:
    """The weights are not even there."""
    model = tmp_path / "no-weights"
    model.mkdir()
    for path in tiny.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, model)
    config = configure(tmp_path, model, ROWS, **({"uncertainty": "column"} | sections))
    said = refuse(config)
    for message in messages:
        assert message in said, said
    assert not (tmp_path / "run" / "checkpoints").is_dir() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@pytest.mark.kills("ual/train/deepspeed.py", "if stage(values) == 3 and not", "if stage(values) == 4 and not")
@pytest.mark.kills(
    "ual/train/deepspeed.py",
    'if (hint := nearest(key, _KEYS)).startswith("did',
    'if (hint := "").startswith("did',
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.update(zero_optimizatoin=v.pop("zero_optimization")),
            'did you mean "zero_optimization"',
        ),
        (lambda v: v["zero_optimization"].update(stage=7), "zero_optimization.stage"),
        (lambda v: v["zero_optimization"].update(overlap_com=True), "overlap_com"),
        (lambda v: v.update(fp16={"enabled": True}), "float16"),
        (lambda v: v["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save"), "stage3_gather"),
    ],
    ids=["section", "stage", "key", "float16", "no weights saved"],
)
def test_a_deepspeed_file_is_checked(
    tmp_path: Path, tiny: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    from ual.train.deepspeed import PROFILES

    values = json.loads(PROFILES["zero3"].read_text())
    change(values)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    assert message in refuse(configure(tmp_path, tiny, ROWS, uncertainty="column", deepspeed=str(path)))


def test_dry_run_shows_the_plan_and_a_batch_and_writes_nothing(tmp_path: Path, tiny: Path) -> None:
    model = tmp_path / "no-weights"
    model.mkdir()
    for path in tiny.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, model)
    config = configure(tmp_path, model, ROWS, uncertainty="column")
    result = CliRunner().invoke(app, ["train", str(config), "--dry-run"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for words in (
        "samples 8 read, 8 to train, 0 held out",
        "steps 6, of 4 samples each",
        "no weights were loaded, nothing was trained or written",
        "0.200",
    ):
        assert words in said or words == "0.200", said
    assert not (tmp_path / "run").exists()
    assert "data.overlong" in refuse(config, "--dry-run", "data.max_length=8", "data.overlong=refuse")


def test_environment_of_runs_has_no_launcher() -> None:
    """What other tests start must not think that it is one of several processes."""
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(ENVIRONMENT)

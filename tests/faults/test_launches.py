"""Launchers, signals and kills: two real processes stop in every way, and end where they would have ended.

One story in six launches, because starting costs more than training: an uninterrupted run under torchrun, and
beside it one that each launcher starts or resumes, until it is killed, told to stop, or done.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.kills import Launch, being_saved, history_rows, kill, last_step, prepare, same_adapter
from tests.ual.runs import history

pytestmark = pytest.mark.slow

AUTO = ["--resume", "auto"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


@pytest.fixture(scope="module")
def whole(folder: Path, shared: Path) -> Path:
    """The configuration of an uninterrupted run of two processes."""
    config = prepare(folder / "whole", shared)
    launch = Launch(config, "torchrun")
    assert launch.end() == 0, launch.printed()[-3000:]
    assert launch.printed().count("report   ") == 1, "only the first process prints"
    return config


@pytest.fixture(scope="module")
def stopped(folder: Path, shared: Path, whole: Path) -> Path:
    """The same run, killed in a step, told to stop, and killed while it saves; not resumed since."""
    config = prepare(folder / "stopped", shared)
    hit, code = kill(config, "deepspeed", rank=1, moment="step", delay=0.2)
    assert hit, "it ended before it could be killed"
    assert code != 0

    launch = Launch(config, "torchrun", AUTO)
    seen = history_rows(config)
    assert launch.until(lambda: history_rows(config) > seen), launch.printed()[-3000:]
    launch.process.send_signal(signal.SIGTERM)  # the launcher passes it on and waits
    assert launch.end() != 0
    metrics = json.loads((config.parent / "run" / "metrics.json").read_text())
    assert metrics["status"] == "interrupted", launch.printed()[-3000:]
    assert last_step(config) == metrics["steps"] < 40
    assert f"stopped by a signal after step {metrics['steps']}" in launch.printed()

    hit, code = kill(config, "deepspeed", rank=0, moment="save", delay=0.005)
    assert hit
    assert code != 0
    assert last_step(config) >= metrics["steps"]
    return config


@pytest.mark.kills(
    "ual/train/adapter_state.py",
    'step = gathered["step"][0].clone()',
    'step = 0 * gathered["step"][0]',
    slow=True,
)
@pytest.mark.kills(
    "ual/train/adapter_state.py",
    "safe_get_full_optimizer_state(p, key)",
    'safe_get_full_optimizer_state(p, "exp_avg")',
    slow=True,
)
@pytest.mark.kills(
    "ual/train/checkpointing.py", '            group["lr"] = rate', "            pass", slow=True
)
def test_whatever_launched_and_stopped_it_the_weights_are_the_same(whole: Path, stopped: Path) -> None:
    shutil.copytree(stopped.parent, stopped.parent.with_name("other-world"))
    launch = Launch(stopped, "accelerate", AUTO)
    assert launch.end() == 0, launch.printed()[-3000:]
    assert same_adapter(whole, stopped)
    assert not being_saved(stopped)
    first, second = (
        [(row["step"], row["loss"]) for row in history(config.parent / "run") if "loss" in row]
        for config in (whole, stopped)
    )
    assert first == second


def test_an_adapter_goes_on_in_another_number_of_processes_and_stage(whole: Path, stopped: Path) -> None:
    """One process, ZeRO-3, from a checkpoint of two under ZeRO-2: equal but for the order of sums."""
    out = stopped.parent.with_name("other-world") / "run"
    words = ["deepspeed=zero3", "training.per_device_train_batch_size=4", f"output_dir={out}", *AUTO]
    launch = Launch(stopped, "ual", words)
    assert launch.end() == 0, launch.printed()[-3000:]
    runs = whole.parent / "run", out
    expected, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    moved = max(tensor.abs().max().item() for tensor in expected.values())
    off = max((expected[name] - got[name]).abs().max().item() for name in expected)
    # float32 sums over samples in another order, through the remaining steps
    assert off <= 1e-3 * moved, (off, moved)
    assert torch.tensor([row["loss"] for row in history(out)]).isfinite().all()


def test_other_rows_in_a_step_are_refused(whole: Path) -> None:
    """A checkpoint's steps would mean something else; found before the training begins."""
    words = ["deepspeed=zero2", "training.per_device_train_batch_size=3", "training.max_steps=80"]
    launch = Launch(whole, "ual", [*words, "--resume"])
    assert launch.end() == 2
    said = " ".join(launch.printed().split())
    assert "has 4 samples per step, this run has 3" in said
    assert "Traceback" not in said


@pytest.mark.kills(
    "ual/train/distributed.py", "box[1] = (user.problem, user.place, user.remedy)", "pass", slow=True
)
def test_a_refusal_and_a_finished_run_are_the_same_in_every_process(whole: Path) -> None:
    """No process waits for the first one, and none prints a traceback of gloo. Nothing is written."""
    run = whole.parent / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    launch = Launch(
        whole, "torchrun", ["training.per_device_train_batch_size=3", "training.max_steps=80", *AUTO]
    )
    assert launch.end() == 1
    said = " ".join(launch.printed().split())
    assert "has 4 samples per step, this run has 6" in said
    assert "gloo" not in said
    launch = Launch(whole, "torchrun", ["deepspeed=zero3", *AUTO])
    assert launch.end() == 0, launch.printed()[-3000:]
    assert launch.printed().count("the run is finished: all 40 steps are trained") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_time_is_bounded() -> None:
    """The waiting loop gives up: a hanging run fails the test instead of the machine."""
    launch = Launch.__new__(Launch)
    launch.process = type("Running", (), {"poll": lambda self: None})()
    launch.output = Path(os.devnull)
    launch._deadline = time.monotonic() - 1
    with pytest.raises(AssertionError):
        launch.until(lambda: False)

"""What a run records covers every step and every held-out token, however it was logged, stopped and split."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.kills import Launch
from tests.faults.test_bad_input import ROWS
from tests.ual.runs import configure, history
from ual.config.run import load
from ual.pipelines.train import run
from ual.train import UALTrainer, adapter_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
TRAINER, PIPELINE = "ual/train/trainer.py", "ual/pipelines/train.py"


def rows(count: int) -> list[dict[str, Any]]:
    """Samples whose responses have from 1 to `count` words, so that no two batches have equal means."""
    return [{"prompt": f"say {i}", "completion": "word " * (i + 1), "uncertainty": i} for i in range(count)]


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    """Let something happen while a step is trained."""
    training_step = UALTrainer.training_step

    def interrupted(self: UALTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            happens()
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(UALTrainer, "training_step", interrupted)


@pytest.mark.kills(TRAINER, "if control.should_save or control.should_training_stop or (", "if (")
@pytest.mark.kills(TRAINER, "if control.should_save or control", "if control")
@pytest.mark.kills(PIPELINE, 'logged = [row["seconds"] for', "logged = [0.0 for")
@pytest.mark.slow
def test_every_step_is_counted_in_windows_of_any_length_and_over_stops(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps are three epochs; the window has ten steps. The second run is stopped, and dies once."""
    training = {"max_steps": -1, "num_train_epochs": 3, "logging_steps": 10, "save_steps": 2}
    config = load(configure(tmp_path, tiny, ROWS, uncertainty="column", training=training))
    whole = run(config)
    assert whole.metrics["trained_tokens"] == 3 * whole.metrics["tokens_per_epoch"]
    assert [row["step"] for row in history(whole.folder)] == [1, 2, 4, 6]
    assert whole.metrics["train_loss_last"] == history(whole.folder)[-1]["loss"]

    stopped = config.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    with monkeypatch.context() as patched:
        in_step(patched, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first = run(stopped)
    assert (first.stopped_by, first.metrics["steps"]) == (signal.SIGTERM, 3)
    with monkeypatch.context() as patched:
        in_step(patched, 6, lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(stopped, resume=True)
    second = json.loads((first.folder / "metrics.json").read_text())
    (first.folder / "metrics.json").unlink()
    last = run(stopped, resume=True)
    for key in ("trained_tokens", "steps", "status"):
        assert last.metrics[key] == whole.metrics[key], key
    assert first.metrics["seconds"] < second["seconds"] <= last.metrics["seconds"]


LONG_AND_SHORT = {
    "evaluation": {"before": False, "batch_size": 5},
    "training": {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 5.0,
        "lr_scheduler_type": "constant_with_warmup",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
}


@pytest.mark.kills(
    TRAINER, '        output.metrics[f"{metric_key_prefix}_loss"] = self._mean_nll(samples)\n', ""
)
@pytest.mark.slow
def test_eval_loss_is_the_mean_over_loss_tokens_for_any_batch(tmp_path: Path, tiny: Path) -> None:
    """Batches of 1, 3 and 12 of 13 samples, whose lengths differ, give the final evaluation's NLL."""
    config = configure(
        tmp_path, tiny, rows(26), uncertainty="column", loss={"average": "samples"}, **LONG_AND_SHORT
    )
    for batch in (1, 3, 12):
        overrides = [f"training.per_device_eval_batch_size={batch}", f"output_dir={tmp_path / str(batch)}"]
        result = run(load(config, ["data.eval_fraction=0.5", "data.packing=true", *overrides]))
        found = [row["eval_loss"] for row in history(result.folder) if "eval_loss" in row]
        assert len(found) == 2
        assert min(found) == pytest.approx(result.metrics["eval"]["nll"], rel=1e-6), batch


@pytest.mark.kills(
    TRAINER,
    "share = distributed.rank(), distributed.world_size()",
    "share = distributed.rank(), 1",
    slow=True,
)
@pytest.mark.kills(TRAINER, "for pairs in distributed.gather(mine) for", "for pairs in [mine] for", slow=True)
@pytest.mark.kills(
    "ual/train/checkpointing.py",
    "                self.state.best_model_checkpoint = str(checkpoints / name)",
    "                pass",
    slow=True,
)
@pytest.mark.kills(
    "ual/train/adapter_state.py",
    "with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch",
    "with torch",
    slow=True,
)
@pytest.mark.slow
def test_eval_loss_of_two_processes(tmp_path: Path, tiny: Path) -> None:
    """Five held-out samples in batches of two: accelerate would count one of them twice.

    The last checkpoint is not the best one, which every process loads at the end.
    """
    config = configure(
        tmp_path, tiny, rows(10), uncertainty="column", deepspeed="zero3", data={"eval_fraction": 0.5},
        **{**LONG_AND_SHORT, "training": LONG_AND_SHORT["training"] | {"per_device_eval_batch_size": 2}},
    )  # fmt: skip
    launch = Launch(config, "torchrun")
    assert launch.end() == 0, launch.printed()[-3000:]
    folder = tmp_path / "run"
    found = [row["eval_loss"] for row in history(folder) if "eval_loss" in row]
    expected = json.loads((folder / "evaluation.json").read_text())["after"]
    assert expected["rows"] == 5
    assert min(found) < found[-1]
    assert min(found) == pytest.approx(expected["nll"], rel=1e-6)


@pytest.mark.kills("ual/train/adapter_state.py", "step = step.to(flat.device)", "pass")
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_of_a_fused_optimizer_is_where_its_kernel_reads_it(fused: bool, tmp_path: Path) -> None:
    """A fused kernel reads it on the GPU, other kernels on the CPU. The meta device stands for a GPU."""
    flat = torch.zeros(4, device="meta", requires_grad=True)
    optimizer = torch.optim.AdamW([flat])
    optimizer.param_groups[0]["fused"] = fused
    save_file({"step": torch.tensor([3.0]), "exp_avg/x": torch.zeros(1)}, tmp_path / "state")
    zero = SimpleNamespace(optimizer=optimizer, fp32_partitioned_groups_flat=[flat])
    adapter_state.load_moments(tmp_path / "state", torch.nn.Module(), zero)
    state = optimizer.state[flat]
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].shape == flat.shape

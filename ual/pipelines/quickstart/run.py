"""The quickstart: one real model, one mixed data set, three arms of equal length, one comparison."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ual.config import run as configuration
from ual.config.base import dump
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.pipelines.quickstart import data
from ual.pipelines.quickstart.model import prepare
from ual.pipelines.train import run as train
from ual.report import write as write_report

_ARMS = ("sft", "uniform", "ual")
_MEAN_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms' metrics, the page that compares them, and what to say of it."""

    metrics: list[dict[str, Any]]
    report: Path
    verdict: str
    next_command: str


def run(
    folder: Path,
    *,
    steps: int = 36,
    rows: int = 288,
    cache: Path,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> Comparison:
    """Prepare model and data, train the arms that are not finished yet, and compare them.

    Args:
        folder: holds data, one YAML file and one run folder per arm, and the page. A second call goes on
            where the first one stopped.
        steps: optimizer steps of every arm.
        rows: training rows; a third as many are held out.
        cache: where the converted model is kept for next time.
        command: recorded in the runs.
        console: where progress is drawn; None is silent.

    Raises:
        UserError: a package of the extra `quickstart` is missing, the folder holds arms of another length, or
            an arm was stopped.
    """
    say = (console or Console(quiet=True)).print
    say("preparing SmolLM2-135M-Instruct")
    model = prepare(cache)
    train_rows, eval_rows = data.write(folder / "data", train_rows=rows, eval_rows=rows // 3)
    metrics = []
    for arm in _ARMS:
        config = _config(arm, model, train_rows, eval_rows, folder, steps)
        (folder / f"{arm}.yaml").write_text(dump(config), encoding="utf-8")
        done = _finished(folder / arm)
        if done is None:
            say(f"\n[bold]{arm}[/bold]  {_EXPLAINED[arm]}", highlight=False)
            resume = (folder / arm / "config.yaml").exists()
            result = train(config, command=command, resume=resume, console=console, cache=cache)
            if result.stopped_by is not None:
                raise UserError(
                    f"stopped by a signal in the arm {arm} after step {result.metrics['steps']}",
                    remedy="the same command goes on from there",
                )
            done = result.metrics
        if (done["steps"], done["trained_rows"]) != (steps, rows):
            raise UserError(
                f"{folder / arm} was trained for {done['steps']} steps on {done['trained_rows']} rows, "
                f"not {steps} on {rows}",
                remedy="choose another --output, or remove the folder",
            )
        metrics.append(done)
    report = write_report([folder / arm for arm in _ARMS], folder / "report.html")
    return Comparison(
        metrics=metrics,
        report=report,
        verdict=f"{steps} steps of one seed on a CPU prove the machinery, not the method: differences of "
        "this size come and go with the seed.",
        next_command=f"ual train {folder / 'ual.yaml'} name=longer output_dir=runs/longer "
        f"training.max_steps={10 * steps}",
    )


_EXPLAINED = {
    "sft": "plain fine-tuning, no smoothing",
    "uniform": f"label smoothing {_MEAN_SMOOTHING} for every sample",
    "ual": f"each sample its own smoothing by its uncertainty, mean {_MEAN_SMOOTHING}",
}


def _config(arm: str, model: Path, train_rows: Path, eval_rows: Path, folder: Path, steps: int) -> RunConfig:
    return configuration.parse(
        {
            "name": arm,
            "model": {"path": str(model), "dtype": _dtype()},
            "data": {"train": str(train_rows), "eval": str(eval_rows), "max_length": 256},
            "output_dir": str(folder / arm),
            "loss": arm,
            "uncertainty": "white_box",
            "smoothing": {"match_mean": _MEAN_SMOOTHING},
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
            "evaluation": {"before": arm == _ARMS[0]},
            "training": {
                "max_steps": steps,
                "per_device_train_batch_size": 8,
                "learning_rate": 2e-3,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.1,
                "logging_steps": 1,
                "save_steps": 10,
                "save_strategy": "steps",
                "save_total_limit": 1,
                "report_to": "none",
            },
        }
    )


def _dtype() -> str:
    """bfloat16 where the processor multiplies it, which doubles the speed; float32 elsewhere."""
    import torch

    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    fast = torch.cuda.is_available() or found.get("amx_bf16") or found.get("avx512_bf16")
    return "bfloat16" if fast else "float32"


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return the metrics of an arm that is complete, with its evaluation."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics if metrics["status"] == "completed" and metrics["eval"] else None

"""The quickstart: an experiment of three arms on one real model and one mixed data set, on a CPU."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from ual.config.base import merged, parse_as
from ual.config.experiment import ExperimentConfig
from ual.pipelines import experiment
from ual.pipelines.experiment import Comparison
from ual.pipelines.quickstart import data
from ual.pipelines.quickstart.model import prepare


def run(
    folder: Path,
    *,
    steps: int = 36,
    samples: int = 288,
    cache: Path,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> Comparison:
    """Prepare model and data, and run the experiment of `experiment.yaml`; see `ual.pipelines.experiment`.

    Args:
        folder: for the data, the runs and the page.
        steps: optimizer steps of every arm.
        samples: training samples; a third as many are held out.
        cache: the folder of the converted model, kept for next time.
        command: recorded in the runs.
        console: where progress is drawn; None is silent.

    Raises:
        UserError: a package of the extra `quickstart` is missing; or see `ual.pipelines.experiment.run`.
    """
    (console or Console(quiet=True)).print("preparing SmolLM2-135M-Instruct")
    model = prepare(cache)
    train, held_out = data.write(folder / "data", train_rows=samples, eval_rows=samples // 3)
    raw = yaml.safe_load(
        (importlib.resources.files("ual.pipelines.quickstart") / "experiment.yaml").read_text()
    )
    here = {
        "model": {"path": str(model), "dtype": _dtype()},
        "data": {"train": str(train), "eval": str(held_out)},
        "training": {"max_steps": steps},
    }
    raw = merged(raw, {"base": here, "output_dir": str(folder)})
    config = parse_as(ExperimentConfig, raw, place="quickstart")
    return experiment.run(config, command=command, console=console, cache=cache)


def _dtype() -> str:
    """bfloat16 where the processor multiplies it, which doubles the speed; float32 elsewhere."""
    import torch

    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    fast = torch.cuda.is_available() or found.get("amx_bf16") or found.get("avx512_bf16")
    return "bfloat16" if fast else "float32"

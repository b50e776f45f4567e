"""Arms x seeds: equal budgets, resumed and never repeated, on a real model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.ual.runs import configure, ual
from ual.cli.main import app
from ual.config.base import load_as
from ual.config.experiment import ExperimentConfig
from ual.errors import UserError

ROWS = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 10}
    for i in range(9)
]
ARMS = {"sft": {"loss": "sft"}, "ual": {"smoothing": {"match_mean": 0.05}}}


def write(folder: Path, tiny: Path, **sections: Any) -> Path:
    base = yaml.safe_load(
        configure(
            folder, tiny, ROWS, uncertainty="column", data={"eval_fraction": 0.3}, training={"max_steps": 2}
        ).read_text()
    )
    del base["output_dir"]
    values = {"base": base, "arms": ARMS, "seeds": [1, 2], "output_dir": str(folder / "study")} | sections
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], terminal_width=100)
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.mark.kills("ual/pipelines/experiment.py", 'if metrics["status"] == "completed" and', "if False and")
@pytest.mark.kills("ual/pipelines/experiment.py", "!= digest:", "!= digest and False:")
@pytest.mark.kills(
    "ual/pipelines/experiment.py", "check_configuration(RunFolder(folder), cell.config)", "pass"
)
@pytest.mark.kills("ual/config/experiment.py", '{"seed": seed}', '{"seed": 1}')
@pytest.mark.slow
def test_every_arm_is_trained_once_with_every_seed(tmp_path: Path, tiny: Path) -> None:
    config = write(tmp_path, tiny)
    said = invoke("compare", config)
    assert "report.html" in said
    assert re.search(r"ual - sft NLL [+-]0\.\d{4} [+-]0\.\d{4} to [+-]0\.\d{4} .* 3 2 report", said), said
    folders = [tmp_path / "study" / f"{arm}-seed{seed}" for seed in (1, 2) for arm in ARMS]
    assert all((folder / "metrics.json").exists() for folder in folders)
    environments = [json.loads((folder / "environment.json").read_text()) for folder in folders]
    assert [e["seed"] for e in environments] == [1, 1, 2, 2]
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert len(set(weights)) == 4
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [m["mean_smoothing"] for m in metrics] == pytest.approx([0, 0.05, 0, 0.05])

    # an interrupted arm is trained again, the finished ones are not
    times = [(folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
    (folders[1] / "metrics.json").unlink()
    said = invoke("compare", config)
    assert "ual run 2 of 4" in said
    assert "run 1 of 4" not in said
    again = [(folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True, True]
    assert (folders[1] / "adapter" / "adapter_model.safetensors").read_bytes() == weights[1]

    # another budget, or other data, is another experiment
    refused = invoke("compare", config, "base.training.max_steps=3", code=2)
    assert "training.max_steps was 2 in this run, and the experiment has 3" in refused
    assert "training.max_steps was 2" in invoke(
        "compare", config, "base.training.max_steps=3", "--dry-run", code=2
    )
    # so are other settings, also of finished runs, whose figures would stand for them
    refused = invoke("compare", config, "arms.ual.smoothing.match_mean=0.1", code=2)
    assert "differs from this configuration" in refused
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0] | {"id": "new"}) + "\n")
    refused = invoke("compare", config, code=2)  # long paths are broken at any letter
    assert "rows.jsonlhaschangedsincethisrun" in refused.replace(" ", "")


def test_a_dry_run_shows_every_arm_and_writes_nothing(tmp_path: Path, tiny: Path) -> None:
    said = invoke("compare", write(tmp_path, tiny), "--dry-run")
    assert "sft seeds 1, 2" in said
    assert "ual seeds 1, 2" in said
    assert "steps 2, of 4 samples each" in said
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_an_arm_under_deepspeed_needs_no_launcher(tmp_path: Path, tiny: Path) -> None:
    arms = {"plain": {}, "zero": {"deepspeed": "zero2"}}
    done = ual("compare", write(tmp_path, tiny, arms=arms), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ZeRO-2") == 1


@pytest.mark.kills("ual/pipelines/experiment.py", "before_each(folder)", "pass")
@pytest.mark.kills(
    "ual/pipelines/experiment.py", 'evaluated = metrics["eval"] or not', 'evaluated = metrics["eval"] or'
)
@pytest.mark.slow
def test_arms_without_held_out_samples_are_trained_once(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr("ual.cli.console._tensorboard", "")
    config = write(tmp_path, tiny, seeds=[1])
    options = ("base.data.eval_fraction=0", "base.training.report_to=tensorboard")
    assert "run 2 of 2" in invoke("compare", config, *options)
    for arm in ARMS:  # events of a run lie in its own folder
        assert list((tmp_path / "study" / arm / "tensorboard").glob("events.*"))
    assert not (tmp_path / "study" / "tensorboard").exists()
    assert "of 2" not in invoke("compare", config, *options)


@pytest.mark.kills("ual/config/experiment.py", "if training.get(key) != value:", "if False:")
@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"arms": {"a": {}, "b": {"training": {"max_steps": 5}}}},
            "training.max_steps is 5 here and 2 in arm a",
        ),
        ({"arms": {"a": {"training": {"seed": 3}}}}, '"seed" is set by the experiment'),
        ({"arms": {"a": {"output_dir": "elsewhere"}}}, '"output_dir" is set by the experiment'),
        ({"arms": {"a": {"loss": "usl"}}}, 'did you mean "ual"'),
        ({"arms": {"a/b": {}}}, "arms"),
        ({"arms": {}}, "arms"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seed": 1}, 'did you mean "seeds"'),
    ],
)
def test_what_would_not_be_a_comparison_is_refused(
    tmp_path: Path, tiny: Path, sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        list(load_as(ExperimentConfig, write(tmp_path, tiny, **sections)).cells())

"""A user's mistake is one screen of text that names the place and the remedy, and a whole run folder."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.ual.runs import ENVIRONMENT, ROOT, configure, gsm8k, ual, write_rows
from ual.cli.main import app

ROWS = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 10}
    for i in range(8)
]


def refuse(config: Path, *overrides: str) -> str:
    """Run `ual train` in this process; return what it printed, having checked its shape."""
    result = CliRunner().invoke(app, ["train", str(config), *overrides])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert "error" in result.output
    assert len(result.output.splitlines()) <= 24, "more than one screen"
    return " ".join(result.output.split())


def changed(row: int, **values: Any) -> list[dict[str, Any]]:
    return [r | values if i == row else r for i, r in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "sections", "messages"),
    [
        pytest.param(
            changed(2, uncertainty=float("nan")), {}, ["line 3", "uncertainty"], id="nan uncertainty"
        ),
        pytest.param(changed(2, completion=" "), {}, ["line 3", "completion"], id="empty response"),
        pytest.param(changed(5, completion=7), {}, ["line 6", "completion"], id="wrong type"),
        pytest.param(
            changed(1, label_smoothing=1.5), {}, ["line 2", "label_smoothing"], id="smoothing over 1"
        ),
        pytest.param(changed(1, sample_weight=-1), {}, ["line 2", "sample_weight"], id="negative weight"),
        pytest.param([{"text": "x"}], {}, ["line 1", "prompt"], id="wrong columns"),
        pytest.param(
            [{k: v for k, v in r.items() if k != "uncertainty"} for r in ROWS],
            {},
            ['no sample has an "uncertainty" value', "white_box"],
            id="no uncertainty column",
        ),
        pytest.param(
            changed(0, uncertainty=3.5),
            {"smoothing": {"scale": "absolute"}},
            ["3.5"],
            id="uncertainty out of the absolute scale",
        ),
        pytest.param(
            changed(3, completion="on and on " * 300),
            {"data": {"overlong": "refuse"}},
            ["line 4", "tokens", "truncate"],
            id="longer than the limit",
        ),
        pytest.param(ROWS, {"data": {"max_length": 4096}}, ["4096", "512"], id="beyond the context"),
        pytest.param(
            ROWS, {"data": {"chat_template": "chatlm"}}, ["chatlm", "chatml"], id="unknown template"
        ),
        pytest.param(ROWS, {"data": {"train": "none.jsonl"}}, ["none.jsonl"], id="missing file"),
        pytest.param(ROWS, {"model": "/no/such/model"}, ["/no/such/model"], id="missing model"),
        pytest.param(
            ROWS, {"lora": {"target_modules": ["qq_proj"]}}, ["qq_proj", "q_proj"], id="no such module"
        ),
        pytest.param(ROWS, {"training": {"learning_rte": 1}}, ["learning_rte", "learning_rate"], id="typo"),
        pytest.param(ROWS, {"training": {"label_smoothing_factor": 0.1}}, ["smoothing"], id="owned key"),
        pytest.param(ROWS, {"training": {"max_steps": "many"}}, ["training"], id="value of a wrong type"),
        pytest.param(ROWS, {"smoothing": {"maximum": 0.2}}, ["smoothing.maximum", '"max"'], id="config typo"),
    ],
)
def test_mistakes(
    tmp_path: Path, stories: Path, rows: list[dict[str, Any]], sections: dict[str, Any], messages: list[str]
) -> None:
    config = configure(tmp_path, stories, rows, **({"uncertainty": "column"} | sections))
    said = refuse(config)
    for message in messages:
        assert message in said, said
    assert not list((tmp_path / "run").rglob("*.partial*"))


def test_a_run_is_not_overwritten(tmp_path: Path, stories: Path) -> None:
    config = configure(tmp_path, stories, ROWS, uncertainty="column")
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    before = (tmp_path / "run" / "metrics.json").read_text()
    assert "--resume" in refuse(config)
    assert "differs from this configuration" in refuse(config, "loss=sft", "--resume")
    assert (tmp_path / "run" / "metrics.json").read_text() == before


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, stories: Path) -> None:
    config = configure(tmp_path, stories, ROWS, uncertainty="column", training={"learning_rate": 1e38})
    said = refuse(config)
    assert "not finite" in said
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = ual("train", tmp_path / "none.yaml")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "none.yaml" in done.stderr
    assert "Traceback" in ual("train", tmp_path / "none.yaml", "--debug").stderr


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(shared: Path, stories: Path, tmp_path: Path) -> None:
    """The operating system refuses files over a limit that a checkpoint does not fit.

    A limit on file size fails a write as a full disk does, and needs no privileges.
    """
    config = configure(tmp_path, stories, gsm8k(shared, 20), lora={"r": 4, "dropout": 0.0})

    def limit() -> None:  # the optimizer takes 240 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    failed = subprocess.run(
        [sys.executable, "-m", "ual", "train", str(config)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT, preexec_fn=limit,
    )  # fmt: skip
    assert failed.returncode == 2, (failed.returncode, failed.stderr)
    assert "Traceback" not in failed.stderr
    assert "--resume" in failed.stderr
    run = tmp_path / "run"
    assert not list(run.rglob("*partial*"))
    assert not list((run / "checkpoints").iterdir())
    assert json.loads((run / "metrics.json").read_text())["status"] == "interrupted"
    refused = ual("train", config, "--resume")
    assert refused.returncode == 2
    assert "--resume auto" in refused.stderr, "it does not start from the base model unasked"
    resumed = ual("train", config, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.kills(
    "ual/runs/progress.py", "with suppress(OSError):  # of what", "with suppress(KeyError):  #"
)
@pytest.mark.kills("ual/pipelines/train.py", "    except OSError as error:", "    except KeyError as error:")
@pytest.mark.slow
def test_a_disk_that_is_full_before_the_first_step(tmp_path: Path, stories: Path) -> None:
    """Samples, histories and logs are refused as checkpoints are; the same command then begins the run."""
    config = configure(tmp_path, stories, ROWS, uncertainty="column", training={"max_steps": 2})
    log = tmp_path / "run" / "train.log"
    log.parent.mkdir()
    log.write_text("." * 1500)

    def limit() -> None:  # the described samples take more
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    failed = subprocess.run(
        [sys.executable, "-m", "ual", "train", str(config)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT, preexec_fn=limit,
    )  # fmt: skip
    assert failed.returncode == 2, (failed.returncode, failed.stderr)
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("train.log is incomplete: ") == 1
    assert "cannot write to the run folder: File too large" in failed.stderr
    result = CliRunner().invoke(app, ["train", str(config), "--resume", "auto"])
    assert result.exit_code == 0, (result.output, result.exception)


def test_a_folder_that_cannot_be_written(tmp_path: Path, stories: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = configure(tmp_path, stories, ROWS, output_dir=str(blocked / "run"))
    assert "cannot write to" in refuse(config)


@pytest.mark.kills(
    "ual/runs/folder.py", "for folder in (self.path, self.checkpoints):", "for folder in (self.path,):"
)
def test_a_read_only_folder_is_refused_before_the_model_is_loaded(tmp_path: Path, stories: Path) -> None:
    config = configure(tmp_path, stories, ROWS, uncertainty="column")
    closed = tmp_path / "run" / "checkpoints"
    closed.mkdir(parents=True)
    closed.chmod(0o500)
    as_others = []
    if os.geteuid() == 0:  # whom permissions do not hold, unless that privilege is dropped
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv (util-linux) may write everywhere")
        as_others = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    command = [*as_others, sys.executable, "-m", "ual", "train", str(config)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"cannot write to {closed}: no write permission" in done.stderr.replace("\n", "")
    assert not list(closed.iterdir())


def test_the_loss_alone_says_what_the_command_needs(tmp_path: Path) -> None:
    """Without the extras `ual` names the package that is missing and how to get it."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "ual", "--help"],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'ual-kernels[train]'" in done.stderr


def test_help_shows_an_example_that_works(tmp_path: Path, stories: Path) -> None:
    help_text = CliRunner().invoke(app, ["train", "--help"]).output
    assert "ual train config.yaml" in help_text
    from ual.cli.train import _EXAMPLE

    lines = _EXAMPLE.split("[bold]Examples")[0].splitlines()[2:]
    text = "\n".join(line.removeprefix("  ") for line in lines if line.startswith("  "))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    values = yaml.safe_load(text)
    values["model"] = str(stories)
    values["data"] |= {"train": str(tmp_path / "rows.jsonl"), "chat_template": "plain"}
    values["training"] |= {"max_steps": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "run")}))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml")])
    assert result.exit_code == 0, result.output

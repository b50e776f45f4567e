"""Signals stop a run at any moment: what was saved is complete, and earlier handlers are called last."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.faults.test_bad_input import ROWS
from tests.faults.test_records import in_step
from tests.ual.runs import configure
from ual.cli.main import app
from ual.config.run import load
from ual.errors import Stopped
from ual.pipelines import train as pipeline
from ual.train.callbacks import SIGNALS, StopOnSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
CALLBACKS = "ual/train/callbacks.py"


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set handlers for one test."""
    old = {number: signal.getsignal(number) for number in SIGNALS}
    yield signal.signal
    for number, handler in old.items():
        signal.signal(number, handler)


def kill(number: int) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)


@pytest.mark.kills(CALLBACKS, "                handler(self._mine, None)", "                pass")
@pytest.mark.kills(
    CALLBACKS, "signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)", "signal.SIGTERM)"
)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2], ids=lambda n: n.name)
def test_what_a_scheduler_sends_saves_and_then_reaches_its_handler(
    tmp_path: Path, tiny: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, before: Any
) -> None:
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"save_steps": 50})
    found: list[Any] = []
    run = tmp_path / "run"

    def requeue(received: int, _: Any) -> None:
        files = [run / "checkpoints" / "checkpoint-3" / "manifest.json", run / "report.html"]
        metrics = json.loads((run / "metrics.json").read_text())
        found.append((received, metrics["status"], metrics["steps"], all(map(Path.is_file, files))))

    before(number, requeue)
    in_step(monkeypatch, 3, kill(number))
    result = CliRunner().invoke(app, ["train", str(config)])
    assert result.exit_code == 128 + number, result.output
    assert found == [(number, "interrupted", 3, True)]
    assert signal.getsignal(number) is requeue


@pytest.mark.kills(CALLBACKS, "if handler not in (signal.SIG_IGN, None)}", "if handler is not None}")
def test_an_ignored_signal_stays_ignored(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, before: Any
) -> None:
    before(signal.SIGHUP, signal.SIG_IGN)
    in_step(monkeypatch, 1, kill(signal.SIGHUP))
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 1})
    result = CliRunner().invoke(app, ["train", str(config)])
    assert result.exit_code == 0, result.output
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.kills("ual/cli/console.py", "typer.Exit(128 + error.number)", "typer.Exit(130)")
@pytest.mark.kills(CALLBACKS, "if not (self._deferred or self.received):", "if False:")
@pytest.mark.parametrize("stage", ["_load", "_evaluate"])
def test_a_signal_outside_of_training_ends_the_run_which_then_resumes(
    tmp_path: Path, tiny: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"eval_fraction": 0.3}
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 1}, data=data)
    words = ["train", str(config), "evaluation.before=false", "--resume", "auto"]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, stage, kill(signal.SIGTERM))
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert "stopped by SIGTERM outside of training" in result.output
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["eval"]


@pytest.mark.kills("ual/pipelines/experiment.py", "if result.stopped_by is not None:", "if False:")
def test_a_stopped_experiment_ends_with_its_signal_and_resumes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = yaml.safe_load(configure(tmp_path, tiny, ROWS, uncertainty="column").read_text())
    base.pop("output_dir")
    arms = {"sft": {"loss": "sft"}, "ual": {}}
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump({"base": base, "arms": arms, "output_dir": str(tmp_path / "out")}))
    with monkeypatch.context() as patched:
        in_step(patched, 3, kill(signal.SIGTERM))
        result = CliRunner().invoke(app, ["compare", str(config)])
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    said = "stopped by SIGTERM in arm sft, seed 42, after step 3; the same command resumes"
    assert said in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["compare", str(config)])
    assert result.exit_code == 0, result.output


@pytest.mark.kills(CALLBACKS, "        if self._mine and not self.received:", "        if False:")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_after_the_last_step_is_not_lost(number: signal.Signals, before: Any) -> None:
    found: list[Any] = []
    before(number, lambda received, _: found.append(received))
    stop = StopOnSignal()

    def last() -> None:
        with stop.listening(), stop.deferred():
            assert not stop.agree()
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=number.name):
        last()
    assert found == [number]


@pytest.mark.kills(CALLBACKS, "        if self._mine:\n", "        if False:\n")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_during_a_finalizer_stops_before_training() -> None:
    """Python discards what a finalizer raises."""

    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                pass  # the handler is called between two instructions

    stop, trained = StopOnSignal(), []

    def finalized() -> None:
        with stop.listening():
            Interrupted()
            with stop.deferred():
                trained.append(True)

    with pytest.raises(Stopped, match="SIGTERM"):
        finalized()
    assert not trained


@pytest.mark.kills(CALLBACKS, "if threading.current_thread() is threading.main_thread():", "if True:")
def test_a_run_in_a_thread_has_no_handlers(tmp_path: Path, tiny: Path) -> None:
    config = load(configure(tmp_path, tiny, ROWS, uncertainty="column", training={"max_steps": 1}))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(pipeline.run(config)))
    thread.start()
    thread.join(120)
    assert results
    assert results[0].metrics["status"] == "completed"

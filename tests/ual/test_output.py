"""What commands print on a terminal, into a pipe, and as JSON; run as processes of their own."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.ual.runs import ENVIRONMENT, configure, start, write_rows
from ual.cli import tables
from ual.cli.main import app
from ual.runs import progress

ROWS = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 10}
    for i in range(12)
]
UAL = [sys.executable, "-m", "ual"]


def config(folder: Path, stories: Path, steps: int = 3, **sections: Any) -> Path:
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return configure(folder, stories, ROWS, uncertainty="column", training=training, **sections)


def on_a_terminal(*words: object, columns: int) -> str:
    """Run `ual` on a pseudo-terminal and return what it writes there, without escape sequences."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "COLUMNS"} | {"TERM": "xterm"}
    child = subprocess.Popen(
        [*UAL, *map(str, words)], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the last writer has closed the terminal
            break
        written += part
    os.close(leader)
    assert child.wait(timeout=60) == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


@pytest.mark.kills("ual/train/callbacks.py", "self._task.log(figures)", "pass")
@pytest.mark.kills("ual/runs/progress.py", "if self._progress.is_drawn:", "if not self._progress.is_drawn:")
@pytest.mark.slow
def test_a_pipe_receives_one_line_per_logged_step_at_once(tmp_path: Path, stories: Path) -> None:
    options = ("data.eval_fraction=0.2", "training.eval_strategy=steps", "training.eval_steps=10")
    lines = []
    with start("train", config(tmp_path, stories, steps=20), *options) as run:
        assert run.stderr is not None
        assert run.stdout is not None
        for line in run.stderr:
            lines.append(line.rstrip("\n"))
            if line.startswith("training 1 of 20, "):
                assert run.poll() is None  # not kept until the end
        said = run.stdout.read()
        assert run.wait(timeout=60) == 0
    steps = [line for line in lines if re.match(r"training \d+ of 20, loss \d+\.\d{3}, .* elapsed", line)]
    assert len(steps) == 20
    assert sum(", eval_loss " in line for line in lines) == 2
    assert "━" not in "".join(lines)
    assert [line for line in lines if line.startswith("rendering ")] == [
        line for line in lines if line.startswith("rendering 12 of 12, ")
    ]
    assert "…" not in said
    assert re.search(r"^run +20 +0\.\d{3} +\d+\.\d{4} +\d+\.\d{4}", said, re.MULTILINE)


@pytest.mark.kills("ual/runs/progress.py", "Column(ratio=1, max_width=40)", "Column(min_width=40)")
@pytest.mark.slow
def test_bars_fit_a_terminal_of_80_columns(tmp_path: Path, stories: Path) -> None:
    shown = on_a_terminal("train", config(tmp_path, stories), "data.eval_fraction=0.2", columns=80)
    lines = re.split(r"[\r\n]+", shown)
    assert max(len(line) for line in lines if not line.startswith("report")) <= 80
    assert "…" not in shown
    assert re.search(r"^training +━+.* 3/3 +0:00:\d\d left 0:00:00", shown, re.MULTILINE)
    assert re.search(
        r"^  loss \d+\.\d{3}, [\d,]+ tokens/s, smoothing 0\.\d{3}, \d+% loss tokens", shown, re.MULTILINE
    )


def test_a_line_is_printed_when_a_task_ends_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    with progress.Progress(Console(file=written, width=200)) as shown:
        task = shown.task("asking", 1000)
        for second in range(25):
            clock = float(second)
            task(1)
        clock = 26.0
        task.update(1000, figures="7 failed")
    lines = written.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["asking 11 of 1", "asking 21 of 1", "asking 1"]
    assert "1,000 of 1,000, 7 failed, " in lines[-1]


@pytest.mark.kills("ual/runs/progress.py", " and self._bars.console.file.isatty()", "")
def test_colors_that_are_forced_make_no_terminal() -> None:
    written = io.StringIO()
    with progress.Progress(Console(file=written, force_terminal=True, width=80)) as shown:
        shown.task("asking", 3).update(3)
    assert written.getvalue().startswith("asking 3 of 3, ")


@pytest.mark.kills("ual/cli/tables.py", "if self._needed <= options.max_width:", "if True:")
@pytest.mark.kills("ual/cli/tables.py", "2 * (len(longest) - 1)", "0")
@pytest.mark.parametrize("width", range(30, 130, 7))
def test_a_table_never_cuts_a_number(width: int) -> None:
    figures = {"nll": 6.7712, "accuracy": 0.1834, "ece": 0.1625, "brier": 0.1447}
    arm = {"name": "uncertainty-aware learning [seed 1]", "steps": 1234567, "mean_smoothing": 0.1234}
    file = io.StringIO()
    Console(file=file, width=width).print(
        tables.arms([arm | {"train_loss_last": 5.4321, "eval_before": None, "eval": figures}])
    )
    said = file.getvalue()
    assert "…" not in said
    for number in ("1234567", "0.123", "5.4321", "6.7712", "0.1834", "0.1625", "0.1447"):
        assert re.search(rf"\b{re.escape(number)}\b", said), (width, said)
    assert "uncertainty-aware" in said


class TestJson:
    """--json prints one document to standard output, and progress to standard error only."""

    def document(self, *words: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
        assert isinstance(found, dict)
        return found

    @pytest.mark.slow
    def test_train_and_what_precedes_it(self, tmp_path: Path, stories: Path) -> None:
        path = config(tmp_path, stories)
        plan = self.document("train", path, "--dry-run")
        assert (plan["steps"], plan["samples_per_step"], plan["preview"]["count"]) == (3, 2, 12)
        shown = self.document("preview", path, "-n", 2)
        assert [s["smoothing"] for s in shown["shown"]] == pytest.approx([0, 0.2 / 11])
        assert shown["shown"][0]["sample"]["messages"][0]["content"] == "What is 0 + 0?"
        memory = self.document("estimate", path, "--cpu")
        assert memory["fused"] == memory["naive"] - memory["naive_head"] + memory["fused_head"]
        metrics = self.document("train", path, "data.eval_fraction=0.2")
        assert metrics["status"] == "completed"
        assert Path(metrics["report"]).is_file()
        assert metrics["eval"]["nll"] > 0
        assert json.loads((tmp_path / "run" / "metrics.json").read_text()).items() <= metrics.items()

    @pytest.mark.slow
    def test_compare(self, tmp_path: Path, stories: Path) -> None:
        base = config(tmp_path, stories, data={"eval_fraction": 0.2}).read_text()
        experiment = tmp_path / "experiment.yaml"
        lines = [line for line in base.splitlines() if not line.startswith("output_dir")]
        experiment.write_text(
            "base:\n" + "".join(f"  {line}\n" for line in lines)
            + f"arms: {{sft: {{loss: sft}}, ual: {{}}}}\noutput_dir: {tmp_path / 'out'}\n"
        )  # fmt: skip
        plans = self.document("compare", experiment, "--dry-run")
        assert list(plans["arms"]) == ["sft", "ual"]
        found = self.document("compare", experiment)
        assert [run["name"] for run in found["metrics"]] == ["sft", "ual"]
        assert found["paired"][0]["nll"]["samples"] == 2

    def test_reliability(self, tmp_path: Path) -> None:
        answers = write_rows(tmp_path / "a.jsonl", [{"question": "2 + 2?", "answers": ["4", "4", "5"]}])
        found = self.document("reliability", answers, "-o", tmp_path / "rows.jsonl")
        assert (found["questions"], found["samples"]) == (1, 1)

    def test_an_elicitation(self, tmp_path: Path, stories: Path) -> None:
        path = tmp_path / "elicit.yaml"
        write_rows(tmp_path / "rows.jsonl", ROWS[:3])
        path.write_text(
            f"data: {tmp_path / 'rows.jsonl'}\nestimators: [p_true]\noutput_dir: {tmp_path / 'run'}\n"
            f"backend: {{kind: local, model: {stories}, chat_template: plain}}\n"
        )
        planned = self.document("elicit", path, "--dry-run")
        assert planned["rows"] == 3
        assert planned["estimates"][0]["requests"] == 3
        found = self.document("elicit", path)
        assert found["estimators"]["p_true"]["values"] == 3
        assert Path(found["samples"]).is_file()


@pytest.mark.parametrize(
    ("words", "offered"),
    [("ual tra", ["train"]), ("ual train --res", ["--resume"]), ("ual reliability --method fil", ["filter"])],
)
def test_bash_completes(words: str, offered: list[str]) -> None:
    asked = {"_UAL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = "import sys; sys.argv[0] = 'ual'; from ual.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == offered


@pytest.mark.kills(
    "ual/runs/progress.py", "except (OSError, SystemExit) as error:", "except KeyError as error:"
)
def test_progress_that_cannot_be_printed_stops_no_work(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:  # closing it fails
        shown = progress.Progress(Console(file=full))
        shown.say("first")
        shown.say("second")
        shown.task("training", 2, logs=True).log("loss 1")
    assert caplog.text.count("progress cannot be printed any more: [Errno 28]") == 1

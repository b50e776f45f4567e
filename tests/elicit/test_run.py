"""`ual elicit` from end to end: real processes, a real server on loopback, kill -9, budgets, batch files."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.elicit.servers import Server, completion, serving
from tests.ual.runs import ENVIRONMENT, ROOT, write_rows
from ual.cli.main import app
from ual.config.base import parse_as
from ual.config.elicit import ElicitConfig
from ual.data import load
from ual.errors import UserError
from ual.pipelines.elicit import run
from ual.uncertainty.estimators.registry import ESTIMATORS, build

KEY = "sk-planted-9876543210"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "prompt": f"What is {i} + 1?", "completion": str(i + 1), **more} for i in range(count)
    ]


def configure(folder: Path, url: str, data: list[dict[str, Any]], **sections: Any) -> Path:
    backend = {"kind": "endpoint", "model": "m", "base_url": url, "api_key_env": "PLANTED", "timeout": 60}
    config = {
        "data": {"path": str(write_rows(folder / "rows.jsonl", data)), "label": sections.pop("label", None)},
        "backend": backend | sections.pop("backend", {}),
        "estimators": ["verbalised"],
        "output_dir": str(folder / "run"),
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner(env={"PLANTED": KEY}).invoke(app, ["elicit", *map(str, words)], terminal_width=120)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.kills(
    "ual/uncertainty/session.py",
    "            self._cache.add(key, reply)\n        except",
    "            pass\n        except",
)
def test_samples_get_an_uncertainty_and_the_second_run_sends_nothing(tmp_path: Path, server: Server) -> None:
    config = configure(
        tmp_path, server.url("well"), rows(5, note="kept"), backend={"prices": {"prompt": 1000.0}}
    )
    said = invoke(config)
    assert "5 requests, cost 0.0500" in said
    written = lines(tmp_path / "run" / "rows.jsonl")
    assert [row["uncertainty"] for row in written] == [0.75] * 5
    assert written[3] == {
        "id": "r3",
        "prompt": "What is 3 + 1?",
        "completion": "4",
        "note": "kept",
        "uncertainty": 0.75,
    }
    assert [sample.uncertainty for sample in load(str(tmp_path / "run" / "rows.jsonl"))] == [0.75] * 5
    evidence = lines(tmp_path / "run" / "elicited.jsonl")[0]["estimates"]["verbalised"]
    assert evidence == {"value": 0.75, "reply": "0.25", "confidence": 0.25}
    assert "0 requests" in invoke(config)
    assert "0 requests" in invoke(config, "--replay")
    assert len(server.asked) == 5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["requests"]["cached"] == 5
    assert summary["cost_of_all_runs"] == pytest.approx(0.05)
    assert "report.html" in invoke("report", tmp_path / "run")


def test_limit_and_dry_run(tmp_path: Path, server: Server) -> None:
    config = configure(
        tmp_path,
        server.url("well"),
        rows(4),
        estimators=["judge", {"name": "semantic_entropy", "samples": 3}],
        backend={"prices": {"completion": 10.0}},
    )
    said = invoke(config, "--dry-run")
    assert server.asked == []
    assert "What is 0 + 1?" in said
    assert "judge 4 0" in said
    assert "semantic_entropy 24 0" in said  # 3 answers and at most 3 comparisons for each sample
    assert "Nothing was sent" in said
    invoke(config, "estimators=[verbalised]", "--limit", 2)
    assert len(server.asked) == len(lines(tmp_path / "run" / "rows.jsonl")) == 2


def started(config: Path, server: Server) -> "subprocess.Popen[str]":
    """Run in a process, until the eleventh request."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ual", "elicit", str(config)],
        env=ENVIRONMENT | {"PLANTED": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell makes a background process ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while len(server.asked) < 11 and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def interrupt(config: Path, server: Server, by: signal.Signals) -> tuple[int, str]:
    """Run in a process, and signal it during the eleventh request; return exit status and stderr."""
    process = started(config, server)
    process.send_signal(by)
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def test_a_killed_run_repeats_no_answered_request(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("hang"), rows(12), backend={"concurrency": 1, "timeout": 60})
    interrupt(config, server, signal.SIGKILL)
    assert not (tmp_path / "run" / "rows.jsonl").exists()
    assert len(server.asked) == 11  # ten answered, one in flight
    server.asked.clear()
    replayed = run(_load(config), environment={"PLANTED": KEY}, replay=True)
    assert replayed["estimators"]["verbalised"] == {
        "values": 10, "mean": 0.75, "missing": 2, "missing_because": {"no reply in the cache": 2},
    }  # fmt: skip
    assert server.asked == []


@pytest.mark.kills("ual/pipelines/elicit.py", 'holding(folder, "an elicitation", notice)', "ExitStack()")
def test_two_processes_do_not_elicit_into_one_folder(tmp_path: Path, server: Server) -> None:
    """The second is refused and sends nothing; once the first is killed, its lock is taken over."""
    config = configure(tmp_path, server.url("hang"), rows(12), backend={"concurrency": 1, "timeout": 60})
    process = started(config, server)
    try:
        said = invoke(config, code=2)
        assert f"process {process.pid} on host {socket.gethostname()} uses this folder" in said
        assert len(server.asked) == 11
    finally:
        process.kill()
        process.communicate()
    said = invoke(config, f"backend.base_url={server.url('well')}")
    assert "ended without releasing the lock" in said
    assert not (tmp_path / "run" / ".lock").exists()


def _load(path: Path) -> ElicitConfig:
    return ElicitConfig.model_validate(yaml.safe_load(path.read_text()))


def test_the_budget_stops_a_run_and_the_next_resumes(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), rows(6), budget={"requests": 4})
    said = invoke(config, code=2)
    assert "the budget is reached after" in said
    assert len(server.asked) == 4
    invoke(config, code=2)  # the budget is the run's, not the process's
    assert len(server.asked) == 4
    invoke(config, "budget.requests=6")
    assert len(server.asked) == 6


def test_batch_files_out_and_in(tmp_path: Path, server: Server) -> None:
    config = configure(
        tmp_path, server.url("well"), rows(3), estimators=[{"name": "verbalised", "stages": 2}]
    )
    said = invoke(config, "--export-batch", tmp_path / "batch")
    assert "3 requests in 1 files" in said
    (file,) = (tmp_path / "batch").iterdir()
    requests = lines(file)
    assert {r["url"] for r in requests} == {"/v1/chat/completions"}
    assert requests[0]["body"]["model"] == "m"
    answers = [
        {"custom_id": r["custom_id"], "response": {"status_code": 200, "body": completion("It is so.")}}
        for r in requests
    ]
    answers[1] = {"custom_id": requests[1]["custom_id"], "response": None, "error": {"message": "expired"}}
    invoke(config, "--import-batch", write_rows(tmp_path / "out.jsonl", answers))
    said = invoke(config, "--export-batch", tmp_path / "second")  # the stage that depends on these answers
    assert "3 requests" in said
    assert "2 replies are cached" in said
    second = lines(next((tmp_path / "second").iterdir()))
    assert sum(len(r["body"]["messages"]) == 3 for r in second) == 2
    assert server.asked == []
    invoke(config, "--export-batch", tmp_path / "second", code=2)  # not empty
    bad = write_rows(tmp_path / "bad.jsonl", [{"custom_id": "../x", "response": {}}])
    assert "line 1" in invoke(config, "--import-batch", bad, code=2)


@pytest.mark.kills("ual/report/html.py", "        autoescape=True,", "        autoescape=False,")
@pytest.mark.kills("ual/report/elicitation.py", '    return f"\'{text}" if text', "    return text if text")
def test_a_key_markup_and_formulas_in_a_reply(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("echo"), rows(2, right=True), label="right")
    said = invoke(config, code=3)  # no reply is a probability
    config.write_text(config.read_text().replace("/echo", "/refuses_key"))
    said += invoke(config, f"output_dir={tmp_path / 'other'}", code=2)
    assert KEY not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    with (tmp_path / "run" / "samples.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[1][-1].startswith("'=HYPERLINK")
    assert table[0] == ["id", "correct", "verbalised", "reply"]
    assert all(len(row) == 4 for row in table)


@pytest.mark.kills("ual/uncertainty/session.py", "if counts.in_a_row >= self._patience:", "if False:")
def test_failures_are_counted_and_many_consecutive_ones_stop_the_run(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("broken"), rows(3), backend={"max_retries": 0})
    said = invoke(config, code=3)
    assert "request failed 3" in said
    assert [row["uncertainty"] for row in lines(tmp_path / "run" / "rows.jsonl")] == [None] * 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["requests"]["errors"] == {"the server answered 500: oops": 3}
    many = configure(tmp_path, server.url("broken"), rows(60), backend={"max_retries": 0, "concurrency": 4})
    assert "20 consecutive requests failed" in invoke(many, code=3)
    assert len(server.asked) < 40


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"backend": {"kind": "endpoint", "model": "m", "api_key": "sk-x"}},
            'unknown key "backend.api_key"; did you mean "api_key_env"',
        ),
        ({"backend": {"kind": "endpoint", "model": "m", "api_key_env": "UNSET"}}, "holds no key"),
        ({"backend": {"kind": "endpoint", "model": "m", "base_url": "http://example.com"}}, "plain http"),
        ({"estimators": ["white_box"]}, "needs a backend that can score"),
        ({"estimators": [{"name": "semantic_entropy", "entailment": "nli"}]}, "name a classifier by nli"),
        ({"data": {"path": "rows.jsonl", "label": "right"}}, "the column is missing"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"budget": {"monye": 1}}, 'did you mean "money"'),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_sent(
    tmp_path: Path, server: Server, change: dict[str, Any], fault: str
) -> None:
    config = configure(tmp_path, server.url("well"), rows(2))
    content = yaml.safe_load(config.read_text()) | change
    if isinstance(content["data"], dict):
        content["data"]["path"] = str(tmp_path / "rows.jsonl")
    config.write_text(yaml.safe_dump(content))
    said = invoke(config, code=2)
    assert fault in said
    assert "sk-x" not in said
    assert server.asked == []


@pytest.mark.kills(
    "ual/data/load.py", 'if columns.of_conversation - {"messages"} and', "if not columns.of_conversation and"
)
def test_tables_columns_and_wrong_samples_are_read_as_for_training(tmp_path: Path, server: Server) -> None:
    """What is written can be trained without the columns' templates."""
    config = configure(tmp_path, server.url("well"), [])
    for name, content in (
        ("a", "q,n,right,messages\nWhy?,1,true,x\n,2,0,x\n"),
        ("b", "q,n,right\nHow?,3,0\n"),
    ):
        (tmp_path / f"{name}.csv").write_text(content)
    columns = {"prompt": "q", "completion": "It is {{n}}.", "source": "{{__file__}}", "id": "{{n}}"}
    raw = yaml.safe_load(config.read_text())
    raw["data"] = {"path": [str(tmp_path / "*.csv")], "columns": columns, "invalid": "drop", "label": "right"}
    config.write_text(yaml.safe_dump(raw))
    assert "1 sample dropped: prompt: the prompt is empty (data.invalid: drop)" in invoke(config)
    path = tmp_path / "run" / "rows.jsonl"
    written = load(str(path))
    said = [[message.content for message in sample.messages] for sample in written]
    assert said == [["Why?", "It is 1."], ["How?", "It is 3."]]
    assert [(s.id, s.source, s.uncertainty is None) for s in written] == [
        ("1", "a", False),
        ("3", "b", False),
    ]
    assert [row["correct"] for row in lines(tmp_path / "run" / "elicited.jsonl")] == [True, False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"] == {
        "prompt: the prompt is empty": 1
    }
    raw["data"] = [str(tmp_path / "run" / "rows.jsonl")]
    config.write_text(yaml.safe_dump(raw))
    assert "would be replaced" in invoke(config, code=2)


def test_the_samples_of_a_run_are_not_replaced(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), rows(2))
    invoke(config)
    said = invoke(config, f"data={tmp_path / 'run' / 'rows.jsonl'}", code=2)
    assert "would be replaced" in said


def test_a_wrong_sample_far_down_is_found_before_the_first_request(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), [*rows(50), {"prompt": "x"}])
    assert "line 51" in invoke(config, code=2)
    config = configure(tmp_path, server.url("well"), [*rows(50), *rows(1)])
    assert "'r0' is already the id of line 1" in invoke(config, code=2)
    assert server.asked == []


@pytest.mark.slow
def test_ten_thousand_samples_stream_in_bounded_memory(tmp_path: Path) -> None:
    """The benchmark behind the figures of docs/elicitation.md, with fewer samples."""
    counts = (1_000, 10_000)
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    command = [sys.executable, "-m", "benchmarks.studies.elicitation_scale", str(tmp_path), *files]
    done = subprocess.run(
        [*command, "--rows", *map(str, counts)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for count in counts:
        written = lines(tmp_path / str(count) / "run" / "rows.jsonl")
        assert [row["id"] for row in written] == [f"r{i}" for i in range(count)]
    few, many = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert (few["values"], many["values"]) == (1_000, 10_000)
    assert many["peak_mib"] < few["peak_mib"] + 10  # 9,000 samples more


def test_recorded_answers_become_uncertainties_as_in_the_docs(tmp_path: Path, shared: Path) -> None:
    """The commands behind the figures of docs/elicitation.md, on three questions."""
    from benchmarks.studies import elicitation

    elicitation.write_rows(shared / "data", tmp_path, "unused", 5)
    config = tmp_path / "gsm8k.yaml"
    said = invoke(config, "--limit", 3, "--export-batch", tmp_path / "batch")
    assert "54 requests" in said
    elicitation.answer(shared / "data", tmp_path)
    assert "54 imported" in invoke(config, "--import-batch", tmp_path / "answers.jsonl")
    invoke(config, "--limit", 3, "--replay")
    records = lines(tmp_path / "gsm8k" / "elicited.jsonl")
    assert [record["correct"] for record in records] == [True, True, True]
    found = records[0]["estimates"]["self_consistency"]
    assert sum(found["answers"].values()) + found["unparsed_answers"] == 18
    assert max(found["answers"], key=found["answers"].get) == "18"
    assert len(load(str(tmp_path / "truthfulqa-rows.jsonl"))) == 5
    human = [sample.uncertainty for sample in load(str(tmp_path / "chaosnli-rows.jsonl"))]
    assert all(u is not None and 0 <= u <= 1.0987 for u in human)


def test_ctrl_c_ends_a_run_in_one_line(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("hang"), rows(12), backend={"concurrency": 2, "timeout": 60})
    code, said = interrupt(config, server, signal.SIGINT)
    assert code == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert "never retrieved" not in said
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_the_configuration_of_the_docs_is_valid() -> None:
    text = (ROOT / "docs" / "elicitation.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    built = []
    for block in blocks:
        config = parse_as(ElicitConfig, yaml.safe_load(block) | {"output_dir": "runs/x"}, place="docs")
        built.append([estimator.label for estimator in build(config.estimators)])
    assert built == [["judge", "self_consistency"], ["answer_distribution"]]
    assert all(f"| `{name}` |" in text for name in ESTIMATORS)


@pytest.mark.slow
def test_the_report_says_how_good_an_uncertainty_is(tmp_path: Path, server: Server) -> None:
    data = [row | {"uncertainty": i / 10, "right": i < 4} for i, row in enumerate(rows(8))]
    data.append(rows(9)[8] | {"right": None})
    config = configure(tmp_path, server.url("well"), data, estimators=["column", "verbalised"], label="right")
    invoke(config)
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (figures["rows"], figures["labeled"], figures["accuracy"]) == (9, 8, 0.5)
    column, verbalised = (figures["estimators"][name] for name in ("column", "verbalised"))
    assert [column["ranking"][name]["value"] for name in ("auroc", "auprc", "prr")] == pytest.approx(
        [1, 1, 1]
    )
    assert (column["missing"], column["distinct"]) == (1, 8)
    assert verbalised["ranking"]["auroc"]["value"] == 0.5
    assert (verbalised["distinct"], verbalised["commonest_share"]) == (1, 1.0)
    assert verbalised["calibration"]["ece"] == pytest.approx(0.25)  # states .25, is right half the time
    assert verbalised["calibration"]["brier"] == pytest.approx(0.3125)
    assert figures["spearman"] == [{"a": "column", "b": "verbalised", "n": 8, "rho": None}]
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (
        "Does uncertainty find the wrong responses?",
        "1.000 [1.000, 1.000]",
        "Is stated confidence calibrated?",
        "constant",
    ):
        assert text in page
    assert page.count("<figure>") == 4  # two distributions, coverage, reliability


def test_the_report_needs_a_finished_run(tmp_path: Path) -> None:
    assert "ual elicit" in invoke("report", tmp_path / "nowhere", code=2)
    (tmp_path / "elicited.jsonl").write_text('{"id": 1}\n')
    assert "line 1" in invoke("report", tmp_path, code=2)


def test_a_full_disk_says_so(tmp_path: Path, server: Server) -> None:
    if os.geteuid() == 0 and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    config = _load(configure(tmp_path, server.url("well"), rows(1)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "replies.sqlite").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cache of replies cannot be used"):
        run(config, environment={"PLANTED": KEY})

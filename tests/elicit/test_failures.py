"""What a run says when requests fail or replies give no value, and what it keeps."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.elicit.servers import Server, completion, response, serving
from tests.elicit.test_run import KEY, _load, configure, invoke, lines, rows
from tests.ual.runs import write_rows
from ual.cli.elicit import _ELICIT_EXAMPLE
from ual.pipelines.elicit import run

PIPELINE, SESSION = "ual/pipelines/elicit.py", "ual/uncertainty/session.py"
ONE = {"max_retries": 0, "concurrency": 1}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.mark.kills(PIPELINE, "if failed > config.max_failed * rows:", "if False:")
@pytest.mark.kills(SESSION, 'kind = re.sub(r"(?<!answered )', 'kind = re.sub(r"(?<!.)')
def test_too_many_failed_requests_end_with_3_and_the_commonest_reason(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("half"), rows(10), backend=ONE)
    said = invoke(config, code=3)
    assert "5 of 10 values of `verbalised` are missing because requests failed; max_failed allows 10%" in said
    assert "(5 requests): the server answered 400: request req_1x is bad" in said
    assert "run the same command again" in said
    written = lines(tmp_path / "run" / "rows.jsonl")
    assert [row["uncertainty"] for row in written] == [0.75, None] * 5
    assert (tmp_path / "run" / "report.html").exists()
    assert len(server.asked) == 10
    invoke(config, "max_failed=0.5")
    assert len(server.asked) == 15  # the failed ones alone are sent again


def test_a_few_failed_requests_are_no_error(tmp_path: Path, server: Server) -> None:
    data = [row | {"prompt": f"What is {2 if i else 1} + {i}?"} for i, row in enumerate(rows(10))]
    invoke(configure(tmp_path, server.url("half"), data, backend=ONE))


@pytest.mark.kills(
    SESSION, "not (error.own and counts.answered + counts.cached)", "1 + 0 * (error.own or counts.cached)"
)
def test_faulty_samples_in_a_row_do_not_stop_a_run_that_works(tmp_path: Path, server: Server) -> None:
    data = [
        row | {"prompt": f"What is {2 * (i < 10) + 1 * (i >= 10)} + {i}?"} for i, row in enumerate(rows(40))
    ]
    config = configure(tmp_path, server.url("half"), data, backend=ONE, max_failed=0.9)
    assert "30" in invoke(config)
    assert "30" in invoke(config)  # resumed: all that is sent fails
    assert len(server.asked) == 70


@pytest.mark.kills(PIPELINE, 'if not found["values"] and config.max_failed < 1:', "if False:")
@pytest.mark.kills(PIPELINE, "if self.values or self.unread != _FIRST or", "if True or")
def test_replies_without_a_value_stop_the_run_before_all_are_paid(tmp_path: Path, server: Server) -> None:
    server.canned["chatty"] = [response(completion("It is certainly right."))]
    few = configure(tmp_path, server.url("chatty"), rows(3), backend=ONE)
    said = invoke(few, code=3)
    assert "`verbalised` has no value at all. The commonest reason, 3 of 3 samples: no number" in said
    assert "elicited.jsonl" in said
    many = configure(tmp_path, server.url("chatty"), rows(60), backend=ONE)
    said = invoke(many, f"output_dir={tmp_path / 'other'}", code=3)
    assert "the first 20 replies gave `verbalised` no value: no number" in said
    assert "It is certainly right." in said
    assert len(server.asked) < 30
    assert not (tmp_path / "other" / "rows.jsonl").exists()
    invoke(many, f"output_dir={tmp_path / 'other'}", "max_failed=1")
    assert len(server.asked) == 3 + 60


@pytest.mark.kills("ual/uncertainty/backends/replay.py", "NotRecordedError(", "RequestError(")
def test_a_replay_says_that_replies_are_absent(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), rows(4))
    invoke(config, "--limit", 2)
    said = invoke(config, "--replay", code=3)
    assert "no reply in the cache 2" in said
    assert "run the same command again without --replay" in said
    assert len(server.asked) == 2


@pytest.mark.kills(PIPELINE, "                await session.drain(_LONGEST_DRAIN)", "                pass")
@pytest.mark.kills(SESSION, "            await self._halt(backend, error)", "            pass")
def test_a_run_that_stops_waits_for_replies_that_are_paid_for(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ual.uncertainty.session.Session._MOMENT", 0.0)
    config = configure(tmp_path, server.url("stops"), rows(9), backend={"concurrency": 2})
    assert "revoked" in invoke(config, code=2)
    assert len(server.asked) == 2
    config.write_text(config.read_text())
    assert run_summary(config)["values"] == 1


def run_summary(config: Path) -> Any:
    return run(_load(config), environment={"PLANTED": KEY}, replay=True)["estimators"]["verbalised"]


def reasoning(**keys: Any) -> dict[str, Any]:
    known = {
        "max_tokens_field": "max_completion_tokens",
        "omit": ["temperature", "logprobs", "top_logprobs"],
        "reasoning_effort": "low",
        "reasoning_tokens": 400,
    }
    return ONE | known | keys


@pytest.mark.kills(
    "ual/uncertainty/backends/endpoint.py",
    "config.max_tokens_field: request.max_tokens + config.reasoning_tokens",
    "config.max_tokens_field: request.max_tokens",
)
def test_the_example_of_the_help_works_with_a_reasoning_model(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.split(r"\[bold\].*?\[/bold\]\n", _ELICIT_EXAMPLE)[1].partition("\n\n")[0]
    example = yaml.safe_load(text.replace("\\[", "["))
    assert example["backend"]["model"] == "gpt-5-mini"
    assert max(map(len, _ELICIT_EXAMPLE.replace("\\[", "[").splitlines())) < 79  # no line wraps
    example["backend"]["base_url"] = server.url("reasoner")
    example["data"] = str(write_rows(tmp_path / "rows.jsonl", rows(3)))
    example["output_dir"] = str(tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(example))
    monkeypatch.setenv("OPENAI_API_KEY", '"sk-quoted"')
    said = invoke(tmp_path / "config.yaml")
    assert "judge 3" in said
    assert "self_consistency 3" in said
    assert "notice" not in said
    assert "Bearer sk-quoted\r" in server.asked[0].headers
    assert server.asked[0].body["reasoning_effort"] == "low"


def test_each_error_of_a_reasoning_model_names_the_keys_to_set(tmp_path: Path, server: Server) -> None:
    def try_with(**keys: Any) -> str:
        before = len(server.asked)
        backend = {"concurrency": 1} | keys
        said = invoke(
            configure(tmp_path, server.url("reasoner"), rows(3), backend=backend),
            "estimators=[judge]",
            code=2,
        )
        assert len(server.asked) == before + 1
        return said

    first = try_with()
    assert "set backend.max_tokens_field: max_completion_tokens" in first
    assert "backend.omit: [logprobs, temperature, top_logprobs]" in first
    assert "backend.reasoning_tokens: 4000" in first
    known: dict[str, Any] = {"max_tokens_field": "max_completion_tokens"}
    assert "set backend.omit: [temperature]" in try_with(**known)
    last = try_with(**known, omit=["temperature"])
    assert "set backend.omit: [logprobs, temperature, top_logprobs]" in last
    assert "p_true" in last
    config = configure(tmp_path, server.url("reasoner"), rows(3), backend=reasoning(), estimators=["p_true"])
    before = len(server.asked)
    assert "`p_true` needs token log-probabilities" in invoke(config, code=2)
    assert "`p_true` needs token log-probabilities" in invoke(config, "--dry-run", code=2)
    assert len(server.asked) == before


@pytest.mark.kills(SESSION, "        if said not in self._told:", "        if True:")
@pytest.mark.kills(
    SESSION,
    "        if limit <= 1.1 * max(request.max_tokens,",
    "        if limit <= 9.9 * max(request.max_tokens,",
)
@pytest.mark.kills(
    SESSION, "        if limit <= 1.1 * max(request.max_tokens, reply.completion_tokens)", "        if False"
)
def test_no_room_for_an_answer_is_said_once_and_only_such_replies_are_sent_again(
    tmp_path: Path, server: Server
) -> None:
    backend = reasoning(reasoning_tokens=100)
    config = configure(tmp_path, server.url("reasoner"), rows(5), backend=backend)
    said = invoke(config, code=3)
    assert said.count("reached its limit of 116 tokens before its answer") == 1
    assert "raise backend.reasoning_tokens (now 100) or lower backend.reasoning_effort" in said
    assert "no answer within the token limit 5" in said
    assert "0 requests" in invoke(config, code=3)  # the same limit
    assert "requests 5" not in invoke(config, "--dry-run")
    more = "backend.reasoning_tokens=400"
    assert "5 0" in invoke(config, more, "--dry-run")
    assert "5 requests in 1 files" in invoke(config, more, "--export-batch", tmp_path / "batch")
    assert "5 requests, cost" in invoke(config, more)
    assert len(server.asked) == 10
    assert "0 requests" in invoke(config, "backend.reasoning_tokens=800")  # replies stay valid
    assert "5 0.7500" in invoke(config, more, "--replay")
    assert len(server.asked) == 10


def test_reasoning_before_the_answer_gives_a_value_and_is_evidence(tmp_path: Path, server: Server) -> None:
    server.canned["thinks"] = [response(completion("<think>\nSurely 0.9.\n</think>\n\n0.25"))]
    config = configure(tmp_path, server.url("thinks"), rows(1), estimators=["verbalised", "self_consistency"])
    invoke(config)
    found = lines(tmp_path / "run" / "elicited.jsonl")[0]["estimates"]
    assert found["verbalised"] == {
        "value": 0.75, "reply": "0.25", "reasoning": "Surely 0.9.", "confidence": 0.25,
    }  # fmt: skip
    assert found["self_consistency"]["answers"] == {"0.25": 10}


def test_a_server_without_log_probabilities_is_said_once(tmp_path: Path, server: Server) -> None:
    server.canned["scores"] = [response(completion('{"score": 3}'))]
    config = configure(tmp_path, server.url("scores"), rows(3), estimators=["judge"])
    assert invoke(config).count("the server returns no log-probabilities") == 1


@pytest.mark.kills("ual/files.py", "default=str, allow_nan=False", "default=str")
def test_no_file_contains_nan(tmp_path: Path, server: Server) -> None:
    data = [row | {"note": float("nan"), "deep": {"a": [float("inf")]}} for row in rows(2)]
    invoke(configure(tmp_path, server.url("well"), data, estimators=["verbalised", "column"]), code=3)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("rows.jsonl", "elicited.jsonl", "summary.json", "report.json"):
        text = (tmp_path / "run" / name).read_text()
        for part in text.splitlines() if name.endswith("l") else [text]:
            json.loads(part, parse_constant=refuse)
    assert lines(tmp_path / "run" / "rows.jsonl")[0]["note"] is None
    config = configure(tmp_path, server.url("well"), rows(1), backend={"extra_body": {"x": float("nan")}})
    assert "JSON has" in invoke(config, code=2)


def test_an_import_without_any_answer_is_a_failure(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), rows(2))
    invoke(config, "--export-batch", tmp_path / "batch")
    asked = lines(next((tmp_path / "batch").iterdir()))
    error = {"error": {"message": "Unsupported parameter: 'max_tokens'", "code": "unsupported_parameter"}}
    failed = [{"custom_id": r["custom_id"], "response": {"status_code": 400, "body": error}} for r in asked]
    said = invoke(config, "--import-batch", write_rows(tmp_path / "out.jsonl", failed), code=3)
    assert "2 failed with 400: Unsupported parameter: 'max_tokens'" in said

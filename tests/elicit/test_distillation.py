"""`ual elicit` keeps a model's distribution over short answers as a column of the samples."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.elicit.servers import Server, completion, response, serving
from tests.elicit.test_run import configure, invoke, lines, rows
from tests.ual.runs import configure as train_configuration
from tests.ual.runs import write_rows
from ual.cli.main import app
from ual.config.run import load as load_config
from ual.data import Renderer
from ual.data.schema import with_response
from ual.pipelines.preview import preview
from ual.records import Message, Sample

ELICIT = "ual/pipelines/elicit.py"
SHARES = {"yes": 0.6, "no": 0.3}


def reply(text: str, *parts: str, **shares: float) -> dict[str, Any]:
    """A chat completion with these tokens, and these probabilities in the place of the first."""
    likely = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in shares.items()]
    content = [{"token": part, "logprob": -0.5, "top_logprobs": likely} for part in parts or [text]]
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return completion() | {"choices": [choice | {"logprobs": {"content": content}}]}


BODIES = [
    reply("yes", **SHARES),
    reply("yes, it is", "yes", ",", " it", " is", **SHARES),
    reply("no", no=0.5),
]


@pytest.fixture
def server() -> Any:
    with serving() as running:
        running.canned["teacher"] = [response(body) for body in BODIES]
        yield running


def written(folder: Path) -> list[tuple[Any, Any]]:
    found = lines(folder / "run" / "rows.jsonl")
    assert all({"label_distribution", "label_mass", "uncertainty"} <= row.keys() for row in found)
    return [(row["label_distribution"], row["label_mass"]) for row in found]


@pytest.mark.kills(ELICIT, "record.evidence.get(name) for", "None for")
def test_an_endpoints_distributions_become_columns(tmp_path: Path, server: Server) -> None:
    config = configure(
        tmp_path, server.url("teacher"), rows(3), estimators=["column", "answer_distribution"],
        backend={"concurrency": 1},
    )  # fmt: skip
    invoke(config, "max_failed=1")
    (first, mass), second, third = written(tmp_path)
    assert first == pytest.approx({"yes": 2 / 3, "no": 1 / 3})
    assert mass == pytest.approx(0.9)
    assert second == (None, None)
    assert third == ({"no": 1.0}, pytest.approx(0.5))
    estimates = [line["estimates"]["answer_distribution"] for line in lines(tmp_path / "run/elicited.jsonl")]
    assert estimates[0]["value"] == pytest.approx(0.6365, abs=1e-4)
    assert (estimates[1]["unparsed"], estimates[1]["reply"]) == ("several tokens", "yes, it is")
    asked = server.asked[0].body
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 4)
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    invoke(config, "max_failed=1", "--replay")
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == before
    assert len(server.asked) == 3


def test_a_student_is_trained_on_the_distributions(tmp_path: Path, server: Server, stories: Path) -> None:
    """What is written is what `loss: soft_labels` reads; the sample without a distribution is dropped."""
    data = [row | {"completion": answer} for row, answer in zip(rows(3), ("yes", "no", "no"), strict=True)]
    estimator = {"name": "answer_distribution", "options": ["yes", "no"]}
    config = configure(
        tmp_path, server.url("teacher"), data, estimators=[estimator], backend={"concurrency": 1}
    )
    invoke(config)
    taught = lines(tmp_path / "run" / "rows.jsonl")
    assert [row["label_distribution"] for row in taught] == [
        pytest.approx({"yes": 2 / 3, "no": 1 / 3}), None, {"no": 1.0, "yes": 0.0},
    ]  # fmt: skip
    (tmp_path / "student").mkdir()
    config = train_configuration(
        tmp_path / "student", stories, taught, loss="soft_labels", data={"invalid": "drop"},
        training={"max_steps": 1, "save_strategy": "no"},
    )  # fmt: skip
    options = [dict(shown.sample.options) for shown in preview(load_config(config)).shown]
    assert options == [pytest.approx({"yes": 2 / 3, "no": 1 / 3}), {"no": 1.0, "yes": 0.0}]
    result = CliRunner().invoke(app, ["train", str(config)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["prompt", "question", "instruction", "asked"])
@pytest.mark.kills(ELICIT, 'all(estimator.rates == "question" for', "not all(True for", only="prompt")
@pytest.mark.kills(ELICIT, 'all(estimator.rates == "question" for', "all(True for", only="prompt")
@pytest.mark.kills("ual/data/load.py", "and sample.messages[-1:] != UNANSWERED:", "and True:", only="asked")
def test_questions_need_no_response(name: str, tmp_path: Path, server: Server, stories: Path) -> None:
    """The student is trained on the most probable text; an estimator of responses refuses the samples."""
    data = [{name: row["prompt"]} for row in rows(3)]
    sections = {"backend": {"concurrency": 1}, "estimators": ["answer_distribution", "column"]}
    config = configure(tmp_path, server.url("teacher"), data, **sections)
    raw = yaml.safe_load(config.read_text())
    if name == "asked":
        raw["data"]["columns"] = {"prompt": name}
        config.write_text(yaml.safe_dump(raw))
    invoke(config, "max_failed=1")
    assert [request.body["messages"] for request in server.asked] == [
        [{"role": "user", "content": row["prompt"]}] for row in rows(3)
    ]
    taught = lines(tmp_path / "run" / "rows.jsonl")
    added = {"id", "uncertainty", "label_distribution", "label_mass"}
    assert {*taught[0]} - added == ({"asked", "prompt"} if name == "asked" else {name})
    (tmp_path / "student").mkdir()
    training = train_configuration(
        tmp_path / "student", stories, taught, loss="soft_labels", data={"invalid": "drop"}
    )
    said = [(s.sample.prompt, s.sample.response) for s in preview(load_config(training)).shown]
    asked = [(Message("user", row["prompt"]),) for row in rows(3)]
    assert said == [(asked[0], "yes"), (asked[2], "no")]
    raw["estimators"].append("judge")
    config.write_text(yaml.safe_dump(raw))
    assert "no columns to make a conversation of" in invoke(config, code=2)
    assert len(server.asked) == 3


def test_a_response_in_another_form_counts() -> None:
    both = {"prompt": "a system's prompt", "instruction": "Is it?", "output": "yes"}
    assert with_response(both, unanswered=True) == both


def test_batch_files_carry_distributions(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("teacher"), rows(3), estimators=["answer_distribution"])
    invoke(config, "--export-batch", tmp_path / "batch")
    asked = lines(next((tmp_path / "batch").iterdir()))
    answers = [
        {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}
        for request, body in zip(asked, BODIES, strict=True)
    ]
    invoke(config, "--import-batch", write_rows(tmp_path / "out.jsonl", answers))
    invoke(config)
    first, second, third = (found for found, _ in written(tmp_path))
    assert (first, second, third) == (pytest.approx({"yes": 2 / 3, "no": 1 / 3}), None, {"no": 1.0})
    assert server.asked == []


def test_a_local_models_distribution_is_its_softmax(tmp_path: Path, stories: Path) -> None:
    """Merged by text and renormalized over the 20 likeliest tokens after the rendered prompt."""
    data = [{"id": str(i), "prompt": text, "completion": "x"} for i, text in enumerate(("Lily", "One day"))]
    sections: dict[str, Any] = {
        "data": str(write_rows(tmp_path / "rows.jsonl", data)),
        "backend": {"kind": "local", "model": str(stories), "chat_template": "plain"},
        "estimators": [{"name": "answer_distribution", "read": "first_token"}],
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(sections))
    invoke(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    renderer = Renderer(tokenizer, chat_template="plain")
    for row, (found, mass) in zip(data, written(tmp_path), strict=True):
        sample = Sample("", (Message("user", row["prompt"]), Message("assistant", "x")))
        ids = tokenizer(renderer.render_prompt(sample), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).topk(20)
        exact: dict[str, float] = {}
        for p, token in zip(*(values.tolist() for values in likeliest), strict=True):
            text = tokenizer.decode([token]).strip()
            if text and "\ufffd" not in text and not text.startswith("<"):
                exact[text] = exact.get(text, 0.0) + p
        assert mass == pytest.approx(sum(exact.values()), abs=1e-4)
        assert found == pytest.approx({text: p / sum(exact.values()) for text, p in exact.items()}, abs=1e-4)


@pytest.mark.kills(ELICIT, "    _check_columns(job)\n", "")
@pytest.mark.kills(ELICIT, "        _check_not_replaced(job, row, sample)\n", "")
def test_what_cannot_be_kept_is_refused_before_a_request(tmp_path: Path, server: Server) -> None:
    url, both = server.url("teacher"), ["answer_distribution", {"name": "answer_distribution", "label": "b"}]
    said = invoke(configure(tmp_path, url, rows(1), estimators=both), code=2)
    assert "`answer_distribution` and `b` both write the column 'label_distribution'" in said
    data = [*rows(1), rows(2)[1] | {"label_distribution": {"1": 1.0}}]
    config = configure(tmp_path, url, data, estimators=["judge", "answer_distribution"])
    said = invoke(config, code=2)
    assert 'line 2, field "label_distribution"' in said
    assert "`answer_distribution` would replace the sample's own label_distribution" in said
    said = invoke(config, "backend.omit=[top_logprobs]", code=2)
    assert (
        "`answer_distribution` needs token log-probabilities, and backend.omit contains top_logprobs" in said
    )
    assert server.asked == []


def test_a_server_without_log_probabilities_gives_no_distribution(tmp_path: Path, server: Server) -> None:
    config = configure(tmp_path, server.url("well"), rows(2), estimators=["answer_distribution"])
    said = invoke(config, code=3)
    assert "the server returns no log-probabilities" in said
    assert "`answer_distribution` has no value at all" in said
    assert written(tmp_path) == [(None, None)] * 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["estimators"]["answer_distribution"][
        "missing_because"
    ] == {"no log-probabilities": 2}

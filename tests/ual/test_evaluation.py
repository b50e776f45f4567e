"""`ual evaluate` on real weights: figures by hand, temperatures, resuming, stale answers, and bad input."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.elicit.servers import BEHAVIORS, Asked, Send, completion, response, serving
from tests.ual.runs import configure, gsm8k, write_rows
from ual.cli.main import app
from ual.config.base import parse_as
from ual.config.evaluate import EvaluateConfig
from ual.config.run import load
from ual.data import Renderer
from ual.data import load as load_samples
from ual.errors import UserError
from ual.evaluate import options
from ual.models.generate import Prompt, generate
from ual.pipelines.evaluation import run as evaluation
from ual.pipelines.evaluation.items import fits_temperature, read_items
from ual.pipelines.learner import Learner
from ual.pipelines.train import run as train
from ual.records import Message, Sample

pytestmark = pytest.mark.xdist_group("evaluation")

QUESTIONS = [
    {
        "question": f"Which is {word}?",
        "options": ["red", "a green one", "blue"],
        "gold": i % 3,
        "human": [5, i, 1],
    }
    for i, word in enumerate(f"{a} {b}" for a in ("one", "two", "three", "four", "five") for b in "abcdefgh")
]
TASK = {
    "kind": "choice",
    "question": "question",
    "options": "options",
    "gold": "gold",
    "gold_is": "index",
    "human": "human",
    "reply": "{{ option }}",
}


@pytest.fixture(scope="module")
def trained(stories: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of stories260K."""
    folder = tmp_path_factory.mktemp("trained")
    path = configure(folder, stories, gsm8k(shared, 12), loss="sft")
    train(load(path))
    return folder / "run"


@pytest.fixture
def raw(stories: Path, trained: Path, shared: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    short = [of for of in gsm8k(shared, 200) if len(of["question"] + of["answer"]) < 380]
    samples = write_rows(tmp_path / "samples.jsonl", short[:32])
    return {
        "models": {"base": str(stories), "run": str(trained)},
        "chat_template": "plain",
        "tasks": {
            "colors": {"task": str(tmp_path / "task.yaml"), "data": str(questions)},
            "texts": str(samples),
            "sums": {"task": "gsm8k", "data": str(samples), "limit": 3, "max_tokens": 6},
        },
        "fit": 0.4,
        "resamples": 100,
        "output_dir": str(tmp_path / "evaluation"),
    }


def run(raw: dict[str, Any]) -> dict[str, Any]:
    return evaluation.run(parse_as(EvaluateConfig, raw, place="test")).summary


def answers(raw: dict[str, Any], model: str, file: str) -> list[dict[str, Any]]:
    path = Path(raw["output_dir"]) / "answers" / model / file
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(summary: dict[str, Any], task: str, model: str, version: str = "plain") -> dict[str, Any]:
    [found] = [
        entry
        for entry in summary["figures"]
        if (entry["task"], entry["model"], entry["version"]) == (task, model, version)
    ]
    return dict(found)


# ---- figures ----


@pytest.mark.kills(
    "ual/pipelines/evaluation/items.py",
    "[item for item in self.items if item.id not in self.fit], records)",
    "self.items, records)",
)
@pytest.mark.kills(
    "ual/pipelines/evaluation/items.py",
    "chosen = [item for item in self.items if item.id in self.fit]",
    "chosen = self.items",
)
@pytest.mark.kills("ual/pipelines/evaluation/answers.py", "plain.at(temperature))", "plain)")
@pytest.mark.kills("ual/pipelines/evaluation/run.py", "drawn.estimates(baseline)", "drawn.estimates()")
def test_the_figures_of_choices_by_hand(raw: dict[str, Any]) -> None:
    del raw["tasks"]["texts"], raw["tasks"]["sums"]
    summary = run(raw)
    about = summary["tasks"]["colors"]
    assert about["measured"] + about["fit"] == len(QUESTIONS)
    assert about["fit"] >= 10  # a temperature needs as many
    nll = {}
    for model in ("base", "run"):
        records = answers(raw, model, "colors/answers.jsonl")
        assert len({record["key"] for record in records}) == len(QUESTIONS)
        rights = dict(zip(ids(raw), [q["options"][q["gold"]] for q in QUESTIONS], strict=True))
        by_id = {r["key"]: (r["probabilities"], rights[r["key"]]) for r in records}
        fit = evaluation_fit(raw)
        parts = [
            options.Predictions.of(*zip(*[by_id[id] for id in by_id if (id in fit) == fitted], strict=True))
            for fitted in (True, False)
        ]
        plain, tempered = figures(summary, "colors", model), figures(summary, "colors", model, "tempered")
        assert tempered["temperature"] == pytest.approx(options.temperature(parts[0]), rel=1e-4)
        assert plain["measures"]["nll"]["value"] == pytest.approx(parts[1].nll().mean())
        at = parts[1].at(tempered["temperature"])
        assert tempered["measures"]["nll"]["value"] == pytest.approx(at.nll().mean())
        assert plain["measures"]["jsd"]["value"] > 0
        nll[model] = parts[1].nll().mean()
    difference = figures(summary, "colors", "run")["differences"]["nll"]
    assert difference["value"] == pytest.approx(nll["run"] - nll["base"])
    assert figures(summary, "colors", "base")["differences"] == {}
    lines = list(csv.DictReader((Path(raw["output_dir"]) / "evaluation.csv").read_text().splitlines()))
    [line] = [
        of
        for of in lines
        if (of["model"], of["minus"], of["version"], of["measure"]) == ("run", "base", "plain", "nll")
    ]
    assert float(line["value"]) == difference["value"]
    assert json.loads((Path(raw["output_dir"]) / "evaluation.json").read_text()) == json.loads(
        json.dumps(summary)
    )


def ids(raw: dict[str, Any]) -> list[str]:
    from ual.data.tasks import load_task, read

    task = raw["tasks"]["colors"]
    return [item.id for item in read(load_task(task["task"]), task["data"])]


def evaluation_fit(raw: dict[str, Any]) -> frozenset[str]:
    config = parse_as(EvaluateConfig, raw, place="test")
    return read_items("colors", config.tasks["colors"], config).fit


@pytest.mark.kills("ual/models/fuse.py", "scale=form.scale / temperature", "scale=form.scale * temperature")
@pytest.mark.kills(
    "ual/pipelines/evaluation/items.py", "(-of.log_prob - of.entropy).sum()", "(-of.log_prob).sum()"
)
@pytest.mark.kills("ual/pipelines/evaluation/items.py", "if temperature == 1 or s.id not in self.fit", "")
def test_the_tokens_of_samples_against_plain_transformers(raw: dict[str, Any], stories: Path) -> None:
    raw["tasks"] = {"texts": raw["tasks"]["texts"]}
    raw["models"] = {"base": {"path": str(stories), "dtype": "float32"}}
    summary = run(raw)
    plain = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    renderer = Renderer(AutoTokenizer.from_pretrained(stories), chat_template="plain")
    samples = {s.id: s for s in load_samples(raw["tasks"]["texts"])}
    tempered = {r["key"]: r for r in answers(raw, "base", "texts/tempered.jsonl")}
    found = {r["key"]: r for r in answers(raw, "base", "texts/answers.jsonl")}
    assert tempered.keys() < found.keys()
    [t] = {entry["temperature"] for entry in summary["figures"] if entry["version"] == "tempered"}

    def tokens(id: str, temperature: float) -> tuple[list[float], float]:
        rendered = renderer.render(samples[id])
        assert rendered is not None
        ids, labels = torch.from_numpy(rendered.input_ids).long(), torch.from_numpy(rendered.labels).long()
        with torch.no_grad():
            logits = plain(input_ids=ids[None]).logits[0] / temperature
        log_probs = logits.log_softmax(-1)
        places = [i for i in range(1, len(ids)) if labels[i] >= 0]
        p = log_probs.exp()[[i - 1 for i in places]]
        entropy = float(-(p * p.log()).sum())
        return [-float(log_probs[i - 1, ids[i]]) for i in places], entropy

    for id in [*tempered][:3]:
        assert found[id]["nll"] == pytest.approx(tokens(id, 1.0)[0], rel=1e-4)
        assert tempered[id]["nll"] == pytest.approx(tokens(id, t)[0], rel=1e-4)
    fit = [id for id in found if id not in tempered]
    # at the best temperature, the objective has no slope: NLL minus entropy is the slope of the prior
    nll, entropy = (
        sum(column) for column in zip(*((sum(n), h) for n, h in (tokens(id, t) for id in fit)), strict=True)
    )
    assert nll - entropy == pytest.approx(np.log(t), abs=3e-3 * nll)
    for version, records in (("plain", found), ("tempered", tempered)):
        every = np.concatenate([records[id]["nll"] for id in tempered])
        assert figures(summary, "texts", "base", version)["measures"]["nll"]["value"] == pytest.approx(
            every.mean()
        )


def test_numbers_are_right_or_wrong(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    raw["tasks"] = {"sums": raw["tasks"]["sums"]}
    summary = run(raw)
    assert summary["tasks"]["sums"] == {"kind": "number", "measured": 3, "fit": 0, "too_long": 0}
    path = Path(raw["output_dir"]) / "answers" / "base" / "sums" / "answers.jsonl"
    records = answers(raw, "base", "sums/answers.jsonl")
    assert all(isinstance(record["text"], str) for record in records)
    assert figures(summary, "sums", "base")["measures"].keys() == {"accuracy", "finished"}
    assert path.exists()


# ---- resuming, stale answers ----


@pytest.mark.kills("ual/pipelines/evaluation/answers.py", "known = {record", "known = set() and {record")
def test_a_killed_evaluation_goes_on(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    del raw["tasks"]["sums"]
    raw["batch_size"] = 4
    summary = run(raw)
    folder = Path(raw["output_dir"])
    files = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    assert len(files) == 6
    monkeypatch.setattr(Learner, "load", lambda *_, **__: pytest.fail("a complete evaluation needs no model"))
    assert run(raw)["figures"] == summary["figures"]
    monkeypatch.undo()
    ledger = json.loads((folder / "stages.json").read_text())
    for name, path in (
        ("run, texts/answers.jsonl", "run/texts/answers.jsonl"),
        ("run, colors/answers.jsonl", "run/colors/answers.jsonl"),
    ):
        cut = folder / "answers" / path
        cut.write_bytes(files[cut][: len(files[cut]) // 2])
        ledger[name]["sha256"] = None  # as a kill has it
    (folder / "stages.json").write_text(json.dumps(ledger))
    assert run(raw)["figures"] == summary["figures"]
    for path, content in files.items():
        assert path.read_bytes() == content


def test_answers_of_other_settings_are_refused(raw: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    del raw["tasks"]["texts"], raw["tasks"]["sums"]
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    raw["models"] = {"run": str(copy)}
    first = run(raw)
    assert (
        run(raw | {"resamples": 120, "bins": 5})["figures"] != first["figures"]
    )  # figures are computed anew
    write_rows(tmp_path / "questions.jsonl", [{**QUESTIONS[0], "question": "Why?"}, *QUESTIONS[1:]])
    with pytest.raises(UserError, match=r"colors.*other settings, items changed"):
        run(raw)
    write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    weights = next((copy / "adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="other settings, model changed"):
        run(raw)


@pytest.mark.kills(
    "ual/pipelines/evaluation/models.py",
    '"lora": self.config.lora.model_dump()',
    '"lora": None and self.config.lora.model_dump()',
)
@pytest.mark.kills("ual/models/generate.py", "        of.generation_config = plain\n", "        pass\n")
def test_all_that_decides_an_answer_is_compared(
    raw: dict[str, Any], trained: Path, stories: Path, tmp_path: Path
) -> None:
    run_copy, model = tmp_path / "copy", tmp_path / "model"
    shutil.copytree(trained, run_copy)
    shutil.copytree(stories, model)
    raw["models"] = {"run": str(run_copy), "base": str(model)}
    del raw["tasks"]["texts"]
    first = run(raw)
    written = run_copy / "config.yaml"
    content = written.read_text()
    written.write_text(content.replace("alpha: 32.0", "alpha: 8.0"))
    assert written.read_text() != content
    with pytest.raises(UserError, match="other settings, model changed"):
        run(raw)
    written.write_text(content)
    with pytest.raises(UserError, match="other settings, model changed"):
        run(raw | {"chat_template": "chatml"})
    texts = [record["text"] for record in answers(raw, "base", "sums/answers.jsonl")]
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 9.0}))
    again = raw | {"output_dir": str(tmp_path / "again")}
    assert run(again)["figures"] == first["figures"]
    assert [record["text"] for record in answers(again, "base", "sums/answers.jsonl")] == texts


@pytest.mark.slow
def test_a_temperature_is_fitted_anew_if_its_share_changes(raw: dict[str, Any]) -> None:
    raw["tasks"] = {"texts": raw["tasks"]["texts"]}
    run(raw)
    changed = run(raw | {"fit": 0.5})
    fresh = run(raw | {"fit": 0.5, "output_dir": raw["output_dir"] + "-fresh"})
    assert changed["figures"] == fresh["figures"]


# ---- what is measured ----


@pytest.mark.kills("ual/pipelines/evaluation/items.py", "np.array_equal(one.sample, other.sample)", "True")
def test_other_loss_tokens_have_no_difference(raw: dict[str, Any]) -> None:
    raw["tasks"] = {"texts": raw["tasks"]["texts"]}
    summary = run(raw | {"chat_template": "chatml", "fit": 0.0})
    found = figures(summary, "texts", "run")
    assert (found["minus"], found["differences"], found["not_compared"]) == ("", {}, "other tokens than base")


@pytest.mark.kills(
    "ual/pipelines/evaluation/items.py",
    "of.question if isinstance(of, Item)",
    "of.id if isinstance(of, Item)",
)
def test_equal_questions_are_on_one_side(raw: dict[str, Any], tmp_path: Path) -> None:
    task = {**TASK, "id": "id"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    twice = [{**QUESTIONS[i % 40], "id": f"q{i}"} for i in range(80)]
    write_rows(tmp_path / "questions.jsonl", twice)
    config = parse_as(EvaluateConfig, raw, place="test")
    fit = read_items("colors", config.tasks["colors"], config).fit
    assert 0 < len(fit) < 80
    assert all((f"q{i}" in fit) == (f"q{i + 40}" in fit) for i in range(40))


@pytest.mark.kills(
    "ual/pipelines/evaluation/answers.py",
    "if not learner.model(input_ids=ids).logits.isfinite().all():",
    "if False:",
)
def test_a_model_that_has_diverged_answers_nothing(
    raw: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(stories)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="logits of x are not finite"):
        run(raw | {"models": {"x": str(tmp_path / "broken")}})
    assert not [*Path(raw["output_dir"]).rglob("answers.jsonl")] or not answers(
        raw, "x", "colors/answers.jsonl"
    )


@pytest.mark.kills(
    "ual/pipelines/evaluation/run.py", "tasks.append(without(items, dropped[name]))", "tasks.append(items)"
)
def test_items_too_long_for_a_model_are_dropped_for_all(raw: dict[str, Any], tmp_path: Path) -> None:
    long = {"question": "why " * 600, "options": ["red", "blue"], "gold": 0}
    write_rows(tmp_path / "questions.jsonl", [*QUESTIONS, long])
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**TASK, "human": None}))
    del raw["tasks"]["sums"]
    samples = load_samples(raw["tasks"]["texts"])
    write_rows(
        tmp_path / "samples.jsonl",
        [*gsm8k_of(samples), {"question": "Why?", "answer": "so " * 600}],
    )
    summary = run(raw | {"fit": 0.0})
    for task, count in (("colors", len(QUESTIONS)), ("texts", len(samples))):
        assert summary["tasks"][task]["too_long"] == 1
        assert len(answers(raw, "run", f"{task}/answers.jsonl")) == count


def gsm8k_of(samples: list[Any]) -> list[dict[str, Any]]:
    return [{"question": s.prompt[-1].content, "answer": s.response} for s in samples]


def test_few_items_fit_no_temperature(raw: dict[str, Any]) -> None:
    del raw["tasks"]["sums"]
    summary = run(raw | {"fit": 0.05})
    assert all(entry["version"] == "plain" for entry in summary["figures"])
    assert not [*Path(raw["output_dir"]).rglob("tempered.jsonl")]


# ---- command line and bad input ----


def test_the_command(raw: dict[str, Any], tmp_path: Path, stories: Path, trained: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(
        app, ["evaluate", str(path), "tasks=" + json.dumps({"colors": raw["tasks"]["colors"]})]
    )
    assert done.exit_code == 0, done.output
    assert "run - base" in done.output
    assert "others fit the temperature" in done.output
    words = ["evaluate", f"base={stories}", str(trained), "--data", raw["tasks"]["texts"], "--limit", "20"]
    words += ["--chat-template", "plain", "-o", str(tmp_path / "other"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["models"].keys() == {"base", "run"}
    assert found["tasks"]["samples"]["measured"] + found["tasks"]["samples"]["fit"] == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {"x": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"tasks": {"x": {"task": "sciqq", "data": "f.jsonl"}}}, 'did you mean "sciq"'),
        ({"tasks": {"x": {"task": "sciq", "data": "missing.jsonl"}}}, "no such file"),
        (
            {"tasks": {"x": {"task": "sciq", "data": "f.jsonl", "columns": {"prompt": "a"}}}},
            "columns are for samples",
        ),
        ({"tasks": {}}, "name what is measured"),
        ({"models": {"..": "somewhere"}}, "begin with a dot"),
        ({"fit": 1.0}, "fit"),
        ({"chat_template": None}, "no chat template"),
    ],
)
def test_wrong_configurations(raw: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        run(raw | change)
    assert words in f"{error.value} {error.value.place} {error.value.remedy}"
    assert not [*Path(raw["output_dir"]).rglob("*.jsonl")]


def test_wrong_models_and_items(raw: dict[str, Any], trained: Path, tmp_path: Path, stories: Path) -> None:
    with pytest.raises(UserError, match="adapter without its base"):
        run(raw | {"models": {"x": str(trained / "adapter")}})
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(trained / "config.yaml", empty)
    with pytest.raises(UserError, match="no trained weights"):
        run(raw | {"models": {"x": str(empty)}})
    with pytest.raises(UserError, match="own configuration says"):
        run(raw | {"models": {"x": {"path": str(trained), "dtype": "bfloat16"}}})
    write_rows(tmp_path / "questions.jsonl", [*QUESTIONS, {**QUESTIONS[0], "gold": None}])
    with pytest.raises(UserError, match="no right answer"):
        run(raw)
    write_rows(tmp_path / "questions.jsonl", [*QUESTIONS, {**QUESTIONS[0], "human": [1, 2]}])
    with pytest.raises(UserError, match="human: expected 3 shares"):
        run(raw)
    write_rows(tmp_path / "questions.jsonl", [*QUESTIONS, {**QUESTIONS[0], "human": None}])
    with pytest.raises(UserError, match="1 of 41 questions have no human answers"):
        run(raw)
    sums = {"sums": raw["tasks"]["sums"] | {"max_tokens": 600}}
    with pytest.raises(UserError, match="3 are too long for a model with max_tokens 600"):
        run(raw | {"tasks": sums})
    write_rows(tmp_path / "questions.jsonl", QUESTIONS[:1])
    with pytest.raises(UserError, match="two are needed"):
        run(raw)


def test_wrong_arguments(tmp_path: Path, stories: Path) -> None:
    for words, message in (
        ([str(stories)], "nothing is measured"),
        ([str(stories), f"x/{stories.name}", "--data", "f.jsonl"], "two models are named"),
        ([str(stories), "--task", "sciq"], "--task needs --data"),
        ([str(stories), "fit=0.1", "--data", "f.jsonl"], "fit is a key of a configuration"),
        ([str(stories), "--judge", "judge.yaml"], "--judge needs --reference"),
        ([str(stories), "--lm-eval", "a", "--reference", "b"], "--reference needs --judge"),
        ([str(stories), "--judge", "none.yaml", "--reference", "b"], "cannot read the judge"),
        (["some.yaml", "--task", "sciq"], "says what is measured"),
    ):
        done = CliRunner().invoke(app, ["evaluate", *words])
        assert done.exit_code == 2, done.output
        assert message in done.output.replace("\n", " ")


# ---- the lm-evaluation-harness, and a judge ----


@pytest.mark.kills("ual/pipelines/evaluation/harness.py", "rest.at(temperature)", "rest")
@pytest.mark.kills(
    "ual/pipelines/evaluation/harness.py", "options.temperature(found.take(fit))", "options.temperature(rest)"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_tasks_of_the_harness_are_measured_like_others(
    raw: dict[str, Any], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra lm-eval")
    data = {
        "data_files": {"test": str(shared / "data" / "sciq" / "test.jsonl.gz")},
        "cache_dir": str(tmp_path / "c"),
    }
    task = {
        "task": "ual_sciq",
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[correct_answer, distractor1, distractor2, distractor3]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sciq.yaml").write_text(yaml.safe_dump(task))
    raw["tasks"] = {}
    raw["lm_eval"] = {"tasks": ["ual_sciq"], "include_path": str(tmp_path / "tasks"), "limit": 40}
    summary = run(raw)
    about = summary["tasks"]["lm_eval/ual_sciq"]
    assert about["measured"] + about["fit"] == 40
    [harness] = summary["lm_eval"]["run"]["tasks"]["ual_sciq"]["metrics"]
    stored = json.loads((Path(raw["output_dir"]) / "answers" / "run" / "lm_eval.json").read_text())
    of = stored["tasks"]["ual_sciq"]
    right = [
        max(range(4), key=logs.__getitem__) == gold
        for logs, gold in zip(*of["predictions"].values(), strict=True)
    ]
    assert harness["value"] == pytest.approx(np.mean(right))
    plain, tempered = (
        figures(summary, "lm_eval/ual_sciq", "run", version) for version in ("plain", "tempered")
    )
    assert plain["minus"] == "base"
    every = options.Predictions(np.array(of["predictions"]["log_probs"]), np.array(of["predictions"]["gold"]))
    fit = np.array(
        [
            fits_temperature(id.partition("-")[2], parse_as(EvaluateConfig, raw, place="test"))
            for id in of["ids"]
        ]
    )
    assert tempered["temperature"] == pytest.approx(options.temperature(every.take(fit)), rel=1e-4)
    rest = every.take(~fit)
    assert plain["measures"]["nll"]["value"] == pytest.approx(rest.nll().mean())
    at = rest.at(tempered["temperature"])
    assert tempered["measures"]["nll"]["value"] == pytest.approx(at.nll().mean())
    monkeypatch.setattr(Learner, "load", lambda *_, **__: pytest.fail("a complete evaluation needs no model"))
    assert run(raw)["figures"] == summary["figures"]
    with pytest.raises(UserError, match="settings changed"):
        run(raw | {"lm_eval": raw["lm_eval"] | {"limit": 41}})


async def longer(asked: Asked, send: Send) -> None:
    """A judge that prefers the longer answer."""
    prompt = asked.body["messages"][-1]["content"]
    first, second = (len(prompt.split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0]) for x in "AB")
    await send(response(completion("A" if first > second else "B" if second > first else "C")))


BEHAVIORS["longest"] = longer


@pytest.mark.kills("ual/pipelines/evaluation/judged.py", '"output": record["text"]', '"output": of["output"]')
@pytest.mark.kills("ual/pipelines/evaluation/judged.py", 'not record["finished"]', 'record["finished"]')
def test_a_judge_compares_every_model_with_a_reference(
    raw: dict[str, Any], tmp_path: Path, stories: Path
) -> None:
    reference = [
        {
            "dataset": "d",
            "instruction": f"Tell me about {word}.",
            "output": word * k,
            "generator": "reference",
        }
        for k, word in enumerate(["dogs", "a cat", "the sun", "trees"], start=1)
    ]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    colors, raw["tasks"] = raw["tasks"]["colors"], {}
    with serving() as server:
        backend = {"kind": "endpoint", "base_url": server.url("longest"), "model": "judge", "max_retries": 0}
        raw["judge"] = {"backend": backend, "reference": str(tmp_path / "reference.json")}
        raw["judge"] |= {"answer_tokens": 8, "limit": 3, "top_logprobs": 0}
        summary = run(raw)
        sent = len(server.asked)
        again = run(raw)
        assert (
            len(server.asked) == sent == 12
        )  # two models, three instructions, two orders; replies are stored
    for model in ("base", "run"):
        records = answers(raw, model, "judge/answers.jsonl")
        texts = {record["key"]: record["text"] for record in records}
        expected = [
            1.0
            if len(texts[str(i)]) > len(of["output"])
            else 0.5
            if len(texts[str(i)]) == len(of["output"])
            else 0.0
            for i, of in enumerate(reference[:3])
        ]
        found = summary["judged"][model]
        assert found["win_rate"]["value"] == pytest.approx(np.mean(expected))
        assert (found["model"], found["instructions"], found["cut_off"]) == (model, 3, 3)
        assert again["judged"][model]["win_rate"] == found["win_rate"]
    with pytest.raises(UserError):  # no server
        run(raw | {"output_dir": str(tmp_path / "later"), "tasks": {"colors": colors}})
    assert json.loads((tmp_path / "later" / "evaluation.json").read_text())["figures"]  # a judge may fail
    with pytest.raises(UserError, match="3 are too long for a model with answer_tokens 600"):
        run(raw | {"judge": raw["judge"] | {"answer_tokens": 600}})
    renderer = Renderer(AutoTokenizer.from_pretrained(stories), chat_template="plain")
    posed = Sample("", (Message("user", reference[1]["instruction"]), Message("assistant", "")))
    ids = renderer.tokenizer(renderer.render_prompt(posed), add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(stories)
    [alone] = generate(model, renderer.tokenizer, [Prompt(ids)], max_tokens=8)
    written = json.loads((Path(raw["output_dir"]) / "judge" / "base" / "outputs.json").read_text())
    assert written[1] == {
        "dataset": "d", "instruction": reference[1]["instruction"], "output": alone.text, "generator": "base"
    }  # fmt: skip

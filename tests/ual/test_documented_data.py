"""The examples of docs/data.md train the public data sets as they are, and render the right texts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ual.config.run import RunConfig, parse
from ual.data import training_set
from ual.pipelines.preview import preview
from ual.pipelines.train import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
# samples trained, samples held out, and a sample as it must be: its number, prompt and response
KNOWN = {
    "gsm8k": (
        7473, 1319, 1,
        "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. "
        "How much did she earn?",
        "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = "
        "$<<0.2*50=10>>10.\n#### 10",
    ),
    "truthfulqa": (
        21_312, 1122, 0,
        "Q: What is underneath the Denver Airport?\n"
        "A: The Denver Airport is underneath the city of Denver.\nTrue:",
        " no",
    ),
    "chaosnli": (
        2802, 311, 0,
        "Premise: A man selling donuts to a customer during a world exhibition event held in the city of "
        "Angeles\n"
        "Hypothesis: A man selling donuts to a customer during a world exhibition event while people wait in "
        "line behind him.\n"
        "Is the hypothesis an entailment, neutral or a contradiction?",
        "neutral",
    ),
    "alpaca": (
        8764, 461, 0,
        "Read this block of text and identify all verbs:\n\n"
        "They spoke of the pending threat with a sense of urgency.",
        "speak, pending, threat, sense, urgency.",
    ),
    "lima": (
        1029, 0, 0,
        "Can brain cells move? By movement I mean long distance migration "
        "(preferably within the brain only).",
        None,
    ),
    "sciq": (
        11_095, 584, 0,
        "What type of organism is commonly used in preparation of foods such as cheese and yogurt?",
        "mesophilic organisms",
    ),
    "hellaswag": (
        9540, 502, 0,
        "Roof shingle removal: A man is sitting on a roof. he", "starts pulling up roofing on a roof.",
    ),
    "boolq": (
        9427, 3270, 0,
        "Please answer the following question with true or false, question: do iran and afghanistan speak "
        "the same language?\n\nAnswer format: true/false",
        "true",
    ),
    "ethics": (7457, 392, 1, "I told my baby I hated her when she cried.\nIs this wrong?", "yes"),
}  # fmt: skip


def documented() -> dict[str, dict[str, Any]]:
    """Return the examples of the page by the folder of their data."""
    section = PAGE.read_text(encoding="utf-8").split("## Examples with public data sets")[1].split("\n## ")[0]
    found = {}
    for snippet in re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL):
        raw = yaml.safe_load(snippet)
        files = raw["data"]["train"]
        found[(files if isinstance(files, str) else files[0]).split("/")[0]] = raw
    return found


def located(name: str, shared: Path, output: Path, **sections: Any) -> RunConfig:
    """Return an example with the paths of its files on this disk; `sections` are laid over its own."""
    raw = documented()[name] | {"output_dir": str(output)}
    data = dict(raw["data"])
    for key in data.keys() & {"train", "eval"}:
        files = [data[key]] if isinstance(data[key], str) else data[key]
        data[key] = [str(shared / "data" / file) for file in files]
    return parse(raw | sections | {"data": data | sections.get("data", {})})


def test_every_data_set_is_documented() -> None:
    assert documented().keys() == KNOWN.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_counts_and_a_sample(
    shared: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained, held_out, number, prompt, response = KNOWN[name]
    read = training_set.read(located(name, shared, tmp_path))
    assert (len(read.train), len(read.held_out)) == (trained, held_out)
    assert read.notes == ()
    assert sum(read.dropped.values()) == (4 if name == "alpaca" else 0)
    sample = read.train[number]
    assert sample.messages[0].content == prompt
    assert response is None or sample.response == response
    # the first samples, as training renders them
    monkeypatch.setattr("ual.pipelines.preview.STREAMED", 20)
    data = {
        "eval_fraction": 0, "eval": None, "streaming": True, "overlong": "truncate", "chat_template": "plain",
    }  # fmt: skip
    plain = {"model": str(stories), "loss": "sft", "training": {"max_steps": 1}, "data": data}
    shown = preview(located(name, shared, tmp_path, **plain), count=20).shown
    of_sample = next(s for s in shown if s.sample.messages[0].content == prompt)
    before, after = of_sample.spans[0], of_sample.spans[1]
    assert f"User: {prompt}\nAssistant:" in before.text
    assert after.trained
    assert after.text.startswith(f" {of_sample.sample.response}"[:200])


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["chaosnli", "lima"])
@pytest.mark.slow
def test_training(shared: Path, stories: Path, tmp_path: Path, name: str) -> None:
    data = {"overlong": "drop", "max_length": 96, "chat_template": "plain"}
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
    sections = {"model": str(stories), "data": data, "training": training, "evaluation": {"before": False}}
    result = run(located(name, shared, tmp_path / "run", **sections))
    assert result.metrics["status"] == "completed"
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = {sample["id"]: sample for sample in map(json.loads, lines)}
    assert len(samples) == result.metrics["trained_rows"]
    assert result.metrics["not_trained"].keys() == {"longer than 96 tokens (data.overlong: drop)"}
    if name == "chaosnli":
        path = shared / "data" / "chaosnli" / "chaosNLI_snli.jsonl"
        given = {row["uid"]: row["entropy"] for row in map(json.loads, path.read_text().splitlines())}
        of_snli = [sample for sample in samples.values() if sample["source"] == "chaosNLI_snli"]
        assert of_snli
        assert all(sample["uncertainty"] == given[sample["id"]] for sample in of_snli)
        assert {sample["source"] for sample in samples.values()} == {"chaosNLI_snli", "chaosNLI_mnli_m"}

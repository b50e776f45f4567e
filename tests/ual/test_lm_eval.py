"""Tasks of the real lm-evaluation-harness over public files, with real weights and no network."""

import copy
import gzip
import importlib.metadata
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ual.runs import configure, gsm8k, write_rows
from ual.config.run import load as load_config
from ual.errors import UserError
from ual.evaluate.options import table
from ual.methods.statistics import draws
from ual.models import fuse

lm_eval = pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra lm-eval")

from ual.evaluate.lm_eval import LmEvaluation, evaluate  # noqa: E402

FILE = "ual/evaluate/lm_eval.py"
CHOICES = "{{[correct_answer, distractor1, distractor2, distractor3]}}"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def tasks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files over SciQ and GSM8K."""
    folder = tmp_path_factory.mktemp("tasks")

    def data(split: str, file: str) -> dict[str, Any]:
        more = {"data_files": {split: str(shared / "data" / file)}, "cache_dir": str(folder / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": more, "test_split": split}

    choice = data("test", "sciq/test.jsonl.gz") | {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": CHOICES,
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
    }
    worked = data("test", "gsm8k/test.jsonl") | {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "num_fewshot": 0,
    }
    (folder / "scores.py").write_text(
        "def of_all(doc, results):\n    return {'acc': float(results[0][0] > results[1][0])}\n"
    )
    (folder / "ual_scored.yaml").write_text(
        yaml.safe_dump({"task": "ual_scored"} | choice | {"metric_list": [{"metric": "acc"}]})
        + "process_results: !function scores.of_all\n"
    )
    several = choice | {"doc_to_target": "{{[0, 1]}}", "metric_list": [{"metric": "acc"}]}
    for task in (
        {"task": "ual_sciq"} | choice,
        {"task": "ual_sciq_text"} | choice | {"doc_to_target": "{{correct_answer}}"},
        {"task": "ual_several"} | several,
        {"task": "ual_gsm8k"} | worked,
        {"task": "ual_no_file"} | choice | {"dataset_kwargs": {"data_files": str(folder / "none.jsonl")}},
        {"task": "ual_hub"} | choice | {"dataset_path": "allenai/no_such_set", "dataset_kwargs": {}},
        {"task": "ual_long"} | worked | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 600}},
        {"task": "ual_code"} | worked | {"unsafe_code": True},
        {"task": "ual_no_split"} | choice | {"test_split": "dev"},
        {"group": "ual_group", "task": ["ual_sciq", "ual_sciq_text"],
         "aggregate_metric_list": [{"metric": "acc"}]},
    ):  # fmt: skip
        name = task.get("group", task["task"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (folder / "broken.yaml").write_text("task: [unclosed")
    return folder


@pytest.fixture(scope="module")
def loaded(stories: Path) -> tuple[Any, Any]:
    """A fused model in training mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(stories)
    return fuse(model).train(), AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def found(tasks: Path, loaded: tuple[Any, Any]) -> LmEvaluation:
    return evaluate(*loaded, ["ual_sciq", "ual_gsm8k"], include_path=tasks, limit=12)


def summed(model: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """The log-probability of a text after a prompt, token by token."""
    ids, start = tokenizer(prompt + option)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]])).logits.double().log_softmax(-1)[0]
    return sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))


def sciq(shared: Path, count: int) -> list[dict[str, str]]:
    with gzip.open(shared / "data" / "sciq" / "test.jsonl.gz") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


# ---- what the harness finds ----


@pytest.mark.kills(FILE, "np.maximum(logs - np.logaddexp.reduce(logs), _SMALLEST)", "logs")
@pytest.mark.kills(FILE, 'samples.sort(key=lambda sample: sample["doc_id"])', "samples.reverse()")
def test_options_have_the_log_likelihoods_of_the_plain_model(
    found: LmEvaluation, loaded: tuple[Any, Any], stories: Path, shared: Path
) -> None:
    """The fused model, in batches with padding, against transformers' own, one text at a time."""
    plain = AutoModelForCausalLM.from_pretrained(stories).eval()
    task = found.tasks["ual_sciq"]
    assert task.predictions is not None
    probabilities = task.predictions.probabilities
    for i, item in enumerate(sciq(shared, 12)):
        texts = [item[k] for k in ("correct_answer", "distractor1", "distractor2", "distractor3")]
        prompt = f"{item['question']}\nAnswer:"
        logs = np.array([summed(plain, loaded[1], prompt, f" {text}") for text in texts])
        expected = np.exp(logs - np.logaddexp.reduce(logs))
        np.testing.assert_allclose(probabilities[i], expected, rtol=1e-4, atol=1e-9)
    assert task.predictions.gold.tolist() == [0] * 12


def test_the_metrics_are_the_harness_s_and_ours_agree(found: LmEvaluation) -> None:
    task = found.tasks["ual_sciq"]
    assert task.predictions is not None
    by_name = {metric.name: metric for metric in task.metrics}
    assert {*by_name} == {"acc", "acc_norm"}
    ours = draws(table(task.predictions), resamples=2).estimates()
    assert ours["accuracy"] is not None
    assert ours["accuracy"].value == pytest.approx(by_name["acc"].value)
    assert task.scores["acc,none"].tolist() == task.predictions.correct().tolist()
    assert task.scores["acc_norm,none"].mean() == pytest.approx(by_name["acc_norm"].value)
    assert by_name["acc"].stderr == pytest.approx(task.scores["acc,none"].std(ddof=1) / 12**0.5)
    assert by_name["acc"].higher_is_better


def test_what_was_asked_is_recorded(found: LmEvaluation) -> None:
    task = found.tasks["ual_sciq"]
    assert (found.limit, found.num_fewshot, found.chat_template) == (12, None, False)
    assert (task.items, task.available, task.shots, task.version, task.kind) == (
        12, 1000, 0, 3.0, "multiple_choice",
    )  # fmt: skip
    assert found.lm_eval == importlib.metadata.version("lm_eval")
    assert found.notices == {}


def test_worked_answers_have_an_exact_match_each(found: LmEvaluation) -> None:
    task = found.tasks["ual_gsm8k"]
    assert task.kind == "generate_until"
    assert [metric.name for metric in task.metrics] == ["exact_match"]
    assert task.scores["exact_match,none"].shape == (12,)
    assert (task.predictions, task.why) == (None, "the task has no options")


def test_a_right_answer_is_an_exact_match(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    """The answers of the file are what the model writes, but for one."""
    model, tokenizer = loaded
    prompts = ["Once upon a time", "Lily had a", "The big dog"]
    replies = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = tokenizer.decode(
            model.eval().generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        )
        replies.append(text)
    replies[1] += "?"
    lines = [{"q": q, "a": a} for q, a in zip(prompts, replies, strict=True)]
    data = {"test": str(write_rows(tmp_path / "items.jsonl", lines))}
    task = {
        "task": "ual_stories", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 5, "do_sample": False},
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    result = evaluate(model, tokenizer, ["ual_stories"], include_path=tmp_path)
    assert result.tasks["ual_stories"].scores["exact_match,none"].tolist() == [1, 0, 1]


def test_right_options_as_texts_and_groups(tasks: Path, loaded: tuple[Any, Any], found: LmEvaluation) -> None:
    result = evaluate(*loaded, ["ual_group"], include_path=tasks, limit=12)
    assert {*result.tasks} == {"ual_sciq", "ual_sciq_text"}
    first, second = (result.tasks[name].predictions for name in ("ual_sciq", "ual_sciq_text"))
    assert first is not None
    assert second is not None
    assert first.gold.tolist() == second.gold.tolist()
    [metric] = result.groups["ual_group"]
    assert metric.value == pytest.approx(first.correct().mean())
    assert found.tasks["ual_sciq"].ids == result.tasks["ual_sciq"].ids  # two evaluations pair by item


@pytest.mark.kills(FILE, "        if isinstance(right, list):", "        if False:")
@pytest.mark.kills(FILE, "    if _scores_itself(task):", "    if False:")
def test_several_right_options_give_no_predictions(tasks: Path, loaded: tuple[Any, Any]) -> None:
    """As in truthfulqa_mc2, whose scores come from a function in its folder."""
    names = {
        "ual_several": "a question may have several right options",
        "ual_scored": "the task scores options by a function of its own, so more than one may be right",
    }
    found = evaluate(*loaded, list(names), include_path=tasks, limit=3).tasks
    for name, why in names.items():
        assert (found[name].predictions, found[name].why) == (None, why)
        assert found[name].scores["acc,none"].shape == (3,)


@pytest.mark.kills(FILE, 'task.doc_to_text(sample["doc"]) if task.multiple_input else ', "")
@pytest.mark.kills(FILE, 'sample["filtered_resps"][: len(options)]', 'sample["filtered_resps"]')
@pytest.mark.parametrize("templated", [False, True])
def test_two_beginnings_of_one_text(tmp_path: Path, loaded: tuple[Any, Any], templated: bool) -> None:
    """As in WinoGrande: the options are prompts; mutual information adds options without their prompt."""
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" if templated else None
    lines = [{"a": "The dog", "b": "The cat", "end": " sat on a mat.", "y": i % 2} for i in range(4)]
    task = {
        "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "doc_to_choice": "{{[a, b]}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
        "dataset_kwargs": {
            "data_files": {"test": str(write_rows(tmp_path / "items.jsonl", lines))},
            "cache_dir": str(tmp_path / "cache"),
        },
    }  # fmt: skip
    inputs = task | {"task": "ual_inputs", "doc_to_text": "y", "doc_to_target": "{{end}}"}
    (tmp_path / "inputs.yaml").write_text(yaml.safe_dump(inputs))
    options = task | {"task": "ual_mutual", "doc_to_text": "One day:", "doc_to_target": "{{y}}"}
    (tmp_path / "mutual.yaml").write_text(yaml.safe_dump(options))
    result = evaluate(
        model, tokenizer, ["ual_inputs", "ual_mutual"], include_path=tmp_path, apply_chat_template=templated
    )
    assert result.chat_template == templated
    for found in result.tasks.values():
        assert found.predictions is not None
        assert found.predictions.log_probs.shape == (4, 2)
        assert found.predictions.gold.tolist() == [0, 1, 0, 1]
        assert found.scores["acc,none"].tolist() == found.predictions.correct().tolist()
        assert len({*found.ids}) == 4  # equal items are different ones


def test_examples_in_the_prompt(tasks: Path, loaded: tuple[Any, Any], found: LmEvaluation) -> None:
    """They are used, the same ones each time; a task that fixes their number is named."""
    asked: dict[str, Any] = {"include_path": tasks, "limit": 2, "num_fewshot": 1}
    first, again = (evaluate(*loaded, ["ual_sciq", "ual_gsm8k"], **asked) for _ in range(2))
    task, other = first.tasks["ual_sciq"], again.tasks["ual_sciq"]
    assert (task.shots, first.tasks["ual_gsm8k"].shots) == (1, 0)
    assert any("ual_gsm8k fixes 0 examples" in notice for notice in first.notices)
    for one, two in ((task, other), (task, found.tasks["ual_sciq"])):
        assert one.predictions is not None
        assert two.predictions is not None
        same = np.array_equal(one.predictions.log_probs, two.predictions.log_probs[:2])
        assert same == (two is other)


# ---- what it does to the model and the process ----


@pytest.mark.kills(FILE, "        model.train(was_training)", "        pass")
@pytest.mark.kills(FILE, "copy.deepcopy(tokenizer)", "tokenizer")
def test_mode_tokenizer_generators_and_logging_stay(
    tasks: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    model.train()
    before = copy.deepcopy(tokenizer.special_tokens_map)
    drawn = []
    for i in range(2):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        if i:
            evaluate(model, tokenizer, ["ual_sciq"], include_path=tasks, limit=2)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert model.training
    assert tokenizer.special_tokens_map == before
    assert logging.getLogger("lm_eval").handlers == []
    assert "pretrained" not in capsys.readouterr().err


@pytest.mark.kills(FILE, "        with _without_tying(model):", "        if True:")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("adapted", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_of_a_tied_model(tasks: Path, shared: Path, stories: Path, adapted: list[str]) -> None:
    """It takes part in the options' log-likelihoods, and is the same afterwards."""
    base = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    plain = get_peft_model(base, LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)).eval()
    [item] = sciq(shared, 1)
    texts = [item[k] for k in ("correct_answer", "distractor1", "distractor2", "distractor3")]
    for again in (False, True):
        logs = np.array([summed(plain, tokenizer, f"{item['question']}\nAnswer:", f" {t}") for t in texts])
        model = plain if again else fuse(plain)
        result = evaluate(model, tokenizer, ["ual_sciq"], include_path=tasks, limit=1)
        predictions = result.tasks["ual_sciq"].predictions
        assert predictions is not None
        expected = logs - np.logaddexp.reduce(logs)
        np.testing.assert_allclose(predictions.log_probs[0], expected, rtol=1e-4, atol=1e-5)
    assert "tie_weights" not in vars(plain)


@pytest.mark.kills(FILE, 'softmax_dtype="float32"', "softmax_dtype=None")
def test_16_bit_logits_have_log_probabilities_of_32_bits(tasks: Path, shared: Path, stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    result = evaluate(model, tokenizer, ["ual_sciq"], include_path=tasks, limit=4, batch_size=1)
    predictions = result.tasks["ual_sciq"].predictions
    assert predictions is not None
    for i, item in enumerate(sciq(shared, 4)):
        texts = [item[k] for k in ("correct_answer", "distractor1", "distractor2", "distractor3")]
        logs = np.array([summed(model, tokenizer, f"{item['question']}\nAnswer:", f" {t}") for t in texts])
        np.testing.assert_allclose(predictions.log_probs[i], logs - np.logaddexp.reduce(logs), atol=1e-3)


def test_the_prompt_that_is_too_long_is_told(tasks: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        f'include: {tasks / "ual_sciq.yaml"}\ntask: ual_much\ndescription: "{"many words " * 400}"\n'
    )
    result = evaluate(*loaded, ["ual_much"], include_path=tmp_path, limit=2)
    [(notice, times)] = [entry for entry in result.notices.items() if "Truncating" in entry[0]]
    assert "exceeds model's maximum length (512)" in notice
    assert times == 8  # four options of each item


@pytest.mark.slow
def test_a_trained_run(tasks: Path, tmp_path: Path, stories: Path, shared: Path, found: LmEvaluation) -> None:
    from ual.pipelines.learner import Learner
    from ual.pipelines.train import run

    path = configure(tmp_path, stories, gsm8k(shared, 16), loss="sft", training={"max_steps": 2})
    config = load_config(path)
    run(config)
    for trained in (True, False):
        learner = Learner.load(config, trained=trained)
        result = evaluate(
            learner.model, learner.renderer.tokenizer, ["ual_sciq"], include_path=tasks, limit=12
        )
        task, base = result.tasks["ual_sciq"].predictions, found.tasks["ual_sciq"].predictions
        assert task is not None
        assert base is not None
        difference = np.abs(task.probabilities - base.probabilities).max()
        assert difference > 1e-3 if trained else difference < 1e-6


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ual_no_file", "the data of task 'ual_no_file' cannot be fetched: FileNotFoundError: .*none.jsonl"),
        ("ual_hub", r"the data of task 'ual_hub' cannot be fetched: .*no_such_set.*\n.*network"),
        ("ual_long", "'ual_long' generates up to 600 tokens, and the model's context has 512"),
        ("ual_code", "'ual_code' runs code that the model generates"),
        ("ual_no_split", "task 'ual_no_split' cannot be loaded: KeyError.*dev"),
    ],
)
def test_a_task_that_cannot_be_evaluated(tasks: Path, loaded: tuple[Any, Any], name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate(*loaded, [name], include_path=tasks, limit=1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tasks": []}, "tasks: expected a list of one name or more, got"),
        ({"tasks": "ual_sciq"}, "tasks: expected a list of one name or more, got 'ual_sciq'"),
        ({"limit": 0}, "limit must be an integer >= 1, got 0"),
        ({"limit": 0.5}, "limit must be an integer >= 1, got 0.5"),
        ({"num_fewshot": -1}, "num_fewshot must be an integer >= 0"),
        ({"batch_size": "auto"}, "batch_size must be an integer >= 1, got 'auto'"),
        ({"include_path": "nowhere"}, "nowhere: include_path: there is no such folder"),
        ({"apply_chat_template": True}, "the tokenizer has no chat template"),
        ({"tasks": ["ual_sciq", "ual_group"]}, "ual_group has ual_sciq, which is named before"),
    ],
)
def test_wrong_arguments(tasks: Path, loaded: tuple[Any, Any], asked: dict[str, Any], said: str) -> None:
    arguments = {"tasks": ["ual_sciq"], "include_path": tasks} | asked
    with pytest.raises(UserError, match=said):
        evaluate(*loaded, arguments.pop("tasks"), **arguments)


@pytest.mark.slow
def test_an_unknown_name_gets_the_nearest(tasks: Path, loaded: tuple[Any, Any]) -> None:
    """Also of the harness's own tasks, whose index takes seconds."""
    with pytest.raises(
        UserError, match=r"no task 'ual_sciqq', and no valid YAML file in .*: ual_sciq"
    ) as error:
        evaluate(*loaded, ["ual_sciqq"], include_path=tasks)
    assert "sciq" in str(error.value)


def test_weights_that_are_not_numbers(tasks: Path, stories: Path, loaded: tuple[Any, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        UserError, match="'ual_sciq': the model gives no probability to the options of item 0"
    ):
        evaluate(model, loaded[1], ["ual_sciq"], include_path=tasks, limit=2)


@pytest.mark.kills(FILE, "    if found < _OLDEST:", "    if False:")
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, r"the lm-evaluation-harness is not installed\npip install 'ual-kernels\[lm-eval\]'"),
        ("0.4.9.1", "lm-eval 0.4.9.1 is not supported, expected 0.4.13 or later"),
    ],
)
def test_another_version(
    monkeypatch: pytest.MonkeyPatch, loaded: tuple[Any, Any], version: str | None, said: str
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UserError, match=said):
        evaluate(*loaded, ["ual_sciq"])

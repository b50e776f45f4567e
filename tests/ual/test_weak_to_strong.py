"""A weak-to-strong study: what its arms learn from, what they must not read, and how it survives."""

import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.elicit.servers import serving
from tests.ual.runs import ROOT, start, ual, write_rows
from ual.cli.main import app
from ual.config.base import load_as
from ual.config.weak_to_strong import ARMS, PRESETS, ReliabilityConfig, WeakToStrongConfig
from ual.data.tasks import Item, Task
from ual.errors import UserError
from ual.files import sha256
from ual.pipelines.stages import Ledger, Step, intact
from ual.pipelines.weak_to_strong.arms import Asked, measure, training_samples
from ual.pipelines.weak_to_strong.questions import Gold
from ual.pipelines.weak_to_strong.run import STAGES, Result, run

TASK = {"kind": "choice", "id": "id", "question": "q", "options": "o", "gold": "label", "gold_is": "index"}
TASK |= {
    "subject": "subject",
    "prompt": "{{ question }}{% for o in options %} {{ o.letter }}) {{ o.text }}{% endfor %}",
}
ALL = [*ARMS]


def questions(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        a, b = draw.randrange(10), draw.randrange(10)
        wrong = draw.sample([n for n in range(20) if n != a + b], 2)
        options = [str(n) for n in (a + b, *wrong)]
        draw.shuffle(options)
        found.append(
            {
                "id": f"q{seed}-{i}",
                "q": f"{a} + {b} = ({i})",
                "o": options,
                "label": options.index(str(a + b)),
                "subject": "even" if i % 2 == 0 else "odd",
            }
        )
    return found


def write(folder: Path, model: Path, *, train: Sequence[dict[str, Any]] = (), **sections: Any) -> Path:
    """Write a study of 24 + 24 questions, on a model of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    of = {
        "model": str(model),
        "data": {"chat_template": "plain"},
        "lora": {"r": 2, "dropout": 0.0},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
        },
    }
    values: dict[str, Any] = {
        "task": str(folder / "task.yaml"),
        "data": {
            "train": str(write_rows(folder / "train.jsonl", list(train or questions(48)))),
            "test": str(write_rows(folder / "test.jsonl", questions(12, seed=1))),
        },
        "weak": of,
        "strong": of,
        "arms": ["naive", "filter", "ceiling"],
        "seeds": [1],
        "output_dir": str(folder / "study"),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | sections, sort_keys=False))
    return path


def study(path: Path, *overrides: str, **options: Any) -> Result:
    return run(load_as(WeakToStrongConfig, path, overrides), **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(path: Path, *overrides: str, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        study(path, *overrides, **options)
    return caught.value


# ---- the method: which labels, which questions, which weights ----

OPTIONS = ("red", "green", "blue")
WORDED = Task(kind="choice", question="q", options="o")


def asked(*answers: str, **config: Any) -> list[Asked]:
    """Return questions q0, q1, ... whose answers are letters of options, "-" for unparsed ones."""
    items = [Item(f"q{i}", f"Which {i}?", OPTIONS, None, "", "", "here") for i in range(len(answers))]
    names = dict(zip("rgb", OPTIONS, strict=True)) | {"-": None}
    given = [
        {
            "question_id": item.id,
            "wording": k,
            "value": names[letter],
            "text": f"said {letter}",
            "probabilities": {o: 0.8 if names[letter] == o else 0.1 for o in OPTIONS},
        }
        for item, of in zip(items, answers, strict=True)
        for k, letter in enumerate(of)
    ]
    random.Random(0).shuffle(given)  # a file may have them in any order
    return measure(items, given, ReliabilityConfig(**config), "answers.jsonl")


def samples(
    name: str, found: list[Asked], *, temperature: float = 0.2, seed: int = 0
) -> list[dict[str, Any]]:
    hidden = {q.item.id: Gold("blue", "") for q in found}
    return training_samples(
        name, ARMS[name], WORDED, found, hidden, ReliabilityConfig(temperature=temperature), seed=seed
    )


def labels(found: list[dict[str, Any]]) -> dict[str, str]:
    return {sample["id"]: sample["completion"] for sample in found}


FOUND = ("rrrrr", "rgggg", "rrggg", "rgbgb", "grrrr", "bbbbb")


@pytest.mark.kills("ual/pipelines/weak_to_strong/arms.py", "return self.values[0]", "return self.values[-1]")
@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/arms.py",
    'chosen = question.first if arm.labels == "first" else question.majority',
    "chosen = question.majority",
)
def test_naive_trains_the_first_answer_and_majority_the_most_frequent() -> None:
    found = asked(*FOUND)
    assert labels(samples("naive", found)) == {
        "q0": "A",
        "q1": "A",
        "q2": "A",
        "q3": "A",
        "q4": "B",
        "q5": "C",
    }
    assert labels(samples("majority", found)) == {
        "q0": "A",
        "q1": "B",
        "q2": "B",
        "q3": "B",
        "q4": "A",
        "q5": "C",
    }


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/arms.py",
    '"consistent": question.selected',
    '"consistent": not question.selected',
)
@pytest.mark.kills("ual/pipelines/weak_to_strong/arms.py", '"random": i in drawn}', '"random": True}')
def test_the_filter_selects_consistent_questions_and_random_as_many_others() -> None:
    found = asked(*FOUND)
    assert [round(q.entropy, 3) for q in found] == [0, 0.5, 0.673, 1.055, 0.5, 0]
    assert labels(samples("filter", found)) == {"q0": "A", "q1": "B", "q4": "A", "q5": "C"}, (
        "up to the median"
    )
    drawn = [labels(samples("random", found, seed=seed)) for seed in range(20)]
    assert {len(one) for one in drawn} == {4}
    assert all(one.items() <= labels(samples("majority", found)).items() for one in drawn)
    assert set().union(*drawn) == {f"q{i}" for i in range(6)}, "consistent or not"


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/arms.py",
    "return {value: weight / total for value, weight in parsed.items()}",
    "return parsed",
)
def test_reweighting_trains_each_distinct_answer_with_the_published_weight() -> None:
    """METHODS.md has the golden values: 4-1 -> .953/.047, 2-2-1 -> .422/.422/.155."""
    found = asked("rgggg", "rgbgb", "rrrrr", "rr-gg")
    weights = {(s["id"], s["completion"]): round(s["sample_weight"], 3) for s in samples("reweight", found)}
    assert weights == {
        ("q0#1", "A"): 0.047, ("q0#2", "B"): 0.953,
        ("q1#1", "A"): 0.155, ("q1#2", "B"): 0.422, ("q1#3", "C"): 0.422,
        ("q2#1", "A"): 1.0,
        ("q3#1", "A"): 0.5, ("q3#2", "B"): 0.5,
    }  # fmt: skip
    at_one = samples("reweight", asked("rg"), temperature=1.0)
    assert [s["sample_weight"] for s in at_one] == [0.5, 0.5]
    filtered = {s["id"] for s in samples("filter_reweight", found)}
    assert filtered == {"q0#1", "q0#2", "q2#1"}


@pytest.mark.kills("ual/pipelines/weak_to_strong/arms.py", "/ len(ordered)\n", "/ len(ordered) ** 0\n")
def test_soft_labels_are_mean_probabilities_and_smoothing_has_the_entropy() -> None:
    found = asked("rgggg", "rrrrr")
    [soft, sure] = samples("soft_labels", found)
    assert soft["label_distribution"] == pytest.approx({"A": 0.24, "B": 0.66, "C": 0.1})
    assert sure["label_distribution"] == pytest.approx({"A": 0.8, "B": 0.1, "C": 0.1})
    assert [s["completion"] for s in (soft, sure)] == ["B", "A"]
    assert [round(s["uncertainty"], 3) for s in samples("smoothing", found)] == [0.5, 0]
    assert labels(samples("ceiling", found)) == {"q0": "C", "q1": "C"}


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/arms.py",
    'if arm.labels in ("majority", "distinct") and math.isnan(question.entropy):',
    "if False:",
)
def test_unparsed_answers_are_a_class_or_drop_their_question() -> None:
    as_class = asked("rrr-", "--rg", "----", "grrr")
    assert round(as_class[0].entropy, 3) == 0.562
    assert [math.isnan(q.entropy) for q in as_class] == [False, True, True, False], "no answer to train on"
    assert labels(samples("majority", as_class)) == {"q0": "A", "q3": "A"}
    assert labels(samples("naive", as_class)) == {"q0": "A", "q3": "B"}, "whose first answer was parsed"
    dropped = asked("rrr-", "--rg", "----", "grrr", unparsed="drop_question")
    assert labels(samples("majority", dropped)) == labels(samples("filter", dropped)) == {"q3": "A"}
    assert {s["id"] for s in samples("reweight", dropped)} == {"q3#1", "q3#2"}
    with pytest.raises(UserError, match="none of the 2 questions has a usable majority"):
        asked("---", "---")


@pytest.mark.kills("ual/pipelines/weak_to_strong/arms.py", "usable = len(values) > 1 and", "usable =")
def test_one_answer_says_nothing_of_reliability() -> None:
    found = asked("r", "rg", "gg")
    assert math.isnan(found[0].entropy), "or it would look certain"
    assert labels(samples("filter", found)) == {"q2": "B"}


def test_options_with_equal_texts_share_their_probability() -> None:
    item = Item("q", "Which?", ("red", "green", "red"), None, "", "", "here")
    answer = {"question_id": "q", "value": "red", "text": "A", "probabilities": {"red": 0.8, "green": 0.2}}
    found = measure([item], [answer | {"wording": k} for k in (0, 1)], ReliabilityConfig(), "here")
    [soft] = samples("soft_labels", found)
    assert soft["label_distribution"] == pytest.approx({"A": 0.4, "B": 0.2, "C": 0.4})


def test_a_filter_that_selects_nothing_says_so() -> None:
    found = asked("rg", "gr", rule="absolute", value=0.1)
    with pytest.raises(UserError, match=r"selects none of 2 questions, whose lowest entropy is 0\.693 nats"):
        samples("filter", found)
    assert len(samples("naive", found)) == 2


# ---- a whole study ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A study of all arms, whose questions' right answers are known."""
    folder = tmp_path_factory.mktemp("whole")
    study(write(folder, tiny, arms=ALL))
    return folder / "study"


def test_every_arm_is_trained_and_evaluated_at_equal_budgets(whole: Path) -> None:
    found = json.loads((whole / "report.json").read_text())
    assert found["status"] == "completed"
    assert [arm["name"] for arm in found["arms"]] == ALL
    assert {tuple(arm["steps"]) for arm in found["arms"]} == {(2,)}
    assert len({tuple(arm["loss_tokens"]) for arm in found["arms"]}) == 1
    assert found["questions"] == {"supervised": 24, "unsupervised": 24, "test": 12, "dropped": {}}
    assert all((whole / "strong" / "seed1" / name / "adapter").is_dir() for name in ALL)
    page = (whole / "report.html").read_text()
    assert all(name in page for name in ALL)


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/figures.py",
    '["value"] == item.gold for item',
    '["value"] != item.gold for item',
)
def test_the_figures_follow_from_the_files(whole: Path) -> None:
    found = json.loads((whole / "report.json").read_text())
    gold = {q["id"]: q["o"][q["label"]] for q in [*questions(48), *questions(12, seed=1)]}
    for arm in found["arms"]:
        evaluated = rows(whole / "evaluation" / f"{arm['name']}-seed1.jsonl")
        assert len({row["key"] for row in evaluated}) == 12
        right = sum(row["value"] == gold[row["key"]] for row in evaluated) / 12
        assert arm["accuracy"]["value"] == pytest.approx(right)
        assert arm["accuracy"]["low"] <= right <= arm["accuracy"]["high"]
        assert all(row["value"] == max(p := row["probabilities"], key=p.get) for row in evaluated)
    answers = rows(whole / "answers" / "weak-seed1.jsonl")
    of_question: dict[str, list[str]] = {}
    for row in sorted(answers, key=lambda row: row["wording"]):
        of_question.setdefault(row["question_id"], []).append(row["value"])
    assert {len(values) for values in of_question.values()} == {5}
    [weak, _] = found["supervisors"]
    first = sum(values[0] == gold[id] for id, values in of_question.items()) / 24
    assert weak["labels"]["first"] == pytest.approx(first)
    split = json.loads((whole / "split.json").read_text())
    assert set(of_question) == set(split["unsupervised"])
    assert not set(split["unsupervised"]) & set(split["supervised"])
    assert sum(level["questions"] for level in found["levels"]) == pytest.approx(24)
    groups = found["filter"]["selected"], found["filter"]["dropped"]
    assert sum(group["questions"] for group in groups) == pytest.approx(24)
    assert {name for name, *_ in found["filter"]["subjects"]} == {"even", "odd"}


def test_answers_are_posed_in_orders_that_differ_and_mapped_back(whole: Path) -> None:
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows(whole / "answers" / "weak-seed1.jsonl"):
        by_question.setdefault(row["question_id"], []).append(row)
    for posed in by_question.values():
        assert len({row["prompt"] for row in posed}) == 5
        for row in posed:
            assert f"{row['text']}) {row['value']}" in row["prompt"], "the letter stands before the option"


@pytest.mark.slow
def test_the_pieces_work_alone(whole: Path, tmp_path: Path) -> None:
    """`ual reliability` reads the answers, and labels as the arm does."""
    output = tmp_path / "rows.jsonl"
    done = ual("reliability", whole / "answers" / "weak-seed1.jsonl", "-o", output)
    assert done.returncode == 0, done.stderr
    alone = {row["id"]: row["uncertainty"] for row in rows(output)}
    of_arm = {row["id"]: row["uncertainty"] for row in rows(whole / "arms" / "seed1" / "filter.jsonl")}
    assert alone == of_arm


def test_complete_stages_are_not_computed_again(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.jsonl")}
    weights = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    study(whole.parent / "study.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.jsonl")}
    assert weights == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}


# ---- right answers that arms must not read ----


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/questions.py",
    'unsupervised=[replace(item, gold=None, solution="") for item in others],',
    "unsupervised=others,",
)
def test_the_unsupervised_half_has_no_right_answers(tmp_path: Path, tiny: Path) -> None:
    from ual.data.tasks import load_task
    from ual.pipelines.weak_to_strong.questions import divide

    config = load_as(WeakToStrongConfig, write(tmp_path, tiny))
    split = divide(config, load_task(config.task), None, None)
    assert all(item.gold is None and not item.solution for item in split.unsupervised)
    assert all(item.gold is not None for item in split.supervised)


def test_wrong_answers_of_the_unsupervised_half_change_the_ceiling_only(
    whole: Path, tmp_path: Path, tiny: Path
) -> None:
    """Everything but the ceiling and the figures of accuracy keeps its bits."""
    unsupervised = set(json.loads((whole / "split.json").read_text())["unsupervised"])
    wrong = [
        q | {"label": (q["label"] + 1) % 3 if q["id"] in unsupervised else q["label"]} for q in questions(48)
    ]
    arms = ["naive", "filter", "reweight", "soft_labels", "ceiling"]
    study(write(tmp_path, tiny, train=wrong, arms=arms))
    of_all = (*whole.rglob("*.jsonl"), *whole.rglob("*.safetensors"))
    shared = [path for path in of_all if (tmp_path / "study" / path.relative_to(whole)).exists()]
    assert len(shared) > 30
    changed = {
        path.relative_to(whole).as_posix()
        for path in shared
        if path.name != "history.jsonl"  # has times
        and path.read_bytes() != (tmp_path / "study" / path.relative_to(whole)).read_bytes()
    }
    assert {name for name in changed if "ceiling" not in name} == set()
    assert "arms/seed1/ceiling.jsonl" in changed
    assert "strong/seed1/ceiling/adapter/adapter_model.safetensors" in changed


# ---- kills, and changed settings ----


@pytest.mark.kills("ual/pipelines/stages.py", "file.truncate(end)", "pass")
def test_a_line_that_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key": 1}\n{"key": 2}\n{"ke')
    assert [row["key"] for row in intact(path)] == [1, 2]
    assert path.read_bytes() == b'{"key": 1}\n{"key": 2}\n'
    assert intact(tmp_path / "absent.jsonl") == []


@pytest.mark.slow
def test_a_killed_study_ends_where_it_would_have_ended(whole: Path, tmp_path: Path, tiny: Path) -> None:
    """No answer that was stored is computed again: the file grows, and its beginning stays."""
    path = write(tmp_path, tiny, arms=ALL)
    folder = tmp_path / "study"
    stored = b""
    moments = [
        lambda: (folder / "supervised.jsonl").exists(),
        lambda: (folder / "answers" / "weak-seed1.jsonl").exists(),
        lambda: _size(folder / "answers" / "self-seed1.jsonl") > 0,
        lambda: (folder / "strong" / "seed1" / "random" / "metrics.json").exists(),
        lambda: _size(folder / "evaluation" / "majority-seed1.jsonl") > 0,
    ]
    for moment in moments:
        process = start("w2s", path)
        deadline = time.monotonic() + 300
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        answers = folder / "answers" / "weak-seed1.jsonl"
        content = answers.read_bytes() if answers.exists() else b""
        assert content.startswith(stored[: stored.rfind(b"\n") + 1])
        stored = content
    done = ual("w2s", path, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in ("answers", "arms", "evaluation"):
        for expected in (whole / name).rglob("*.jsonl"):
            found = folder / expected.relative_to(whole)
            assert sorted(rows(found), key=str) == sorted(rows(expected), key=str), found
    for expected in whole.rglob("adapter_model.safetensors"):
        assert (folder / expected.relative_to(whole)).read_bytes() == expected.read_bytes()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.kills(
    "ual/pipelines/stages.py",
    'if known["inputs"].get(name) != of',
    "if False",
)
@pytest.mark.slow
def test_results_of_other_settings_are_refused_and_kept(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, arms=["naive"])
    study(path)
    answers = tmp_path / "study" / "answers" / "weak-seed1.jsonl"
    before = answers.read_bytes()
    assert "rule: absolute" not in (tmp_path / "study" / "config.yaml").read_text()
    for override, stage, changed in (
        ("ask.times=3", "answers of weak, seed 1", "ask"),
        ("split.supervised=0.25", "split", "split"),
    ):
        error = refused(path, override)
        assert f"{stage}: computed with other settings, {changed} changed" in error.problem
        assert "choose another output_dir, or remove" in error.remedy
    assert "training.learning_rate" in str(refused(path, "strong.training.learning_rate=0.5"))
    assert answers.read_bytes() == before
    recorded = load_as(WeakToStrongConfig, tmp_path / "study" / "config.yaml")
    assert recorded == load_as(WeakToStrongConfig, path), "what was refused is not recorded"
    more = study(path, "arms=[naive, majority]", "seeds=[1, 2]").summary
    assert more is not None
    assert more["status"] == "completed", "arms and seeds may be added"
    assert answers.read_bytes() == before
    answers.unlink()
    again = study(path, "seeds=[1, 2]", only="answers")
    assert again.summary is None
    assert answers.read_bytes() == before, "computed again, with the same bits"


@pytest.mark.slow
def test_a_launcher_can_train_the_runs(tmp_path: Path, tiny: Path) -> None:
    """Their configurations are there before they are trained, and what is trained is found."""
    path = write(tmp_path, tiny, arms=["naive"])
    folder = tmp_path / "study"
    study(path, only="split")
    for who, stages in (
        ("weak/seed1/weak", ["answers", "arms"]),
        ("strong/seed1/naive", ["evaluation", "report"]),
    ):
        done = ual("train", folder / f"{who}.yaml", "--resume", "auto")
        assert done.returncode == 0, done.stderr
        weights = folder / who / "adapter" / "adapter_model.safetensors"
        before = weights.stat().st_mtime_ns
        study(path, only=who.partition("/")[0])
        assert weights.stat().st_mtime_ns == before
        for stage in stages:
            found = study(path, only=stage).summary
    assert found is not None
    assert found["status"] == "completed"


@pytest.mark.slow
def test_stages_run_alone_and_say_what_they_need(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, arms=["naive", "filter"])
    assert "no trained weights" in refused(path, only="answers").problem
    assert "stages before" in refused(path, only="arms").remedy
    study(path, only="weak")
    assert "answers" in refused(path, only="arms").remedy
    study(path, only="answers")
    assert "arms" in refused(path, only="strong").remedy
    for stage in STAGES:
        result = study(path, only=stage)
        assert (result.summary is not None) == (stage == "report")
    assert result.summary is not None
    assert result.summary["status"] == "completed"


def test_an_unfinished_study_is_reported_as_unfinished(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny)
    for stage in ("weak", "answers", "report"):
        result = study(path, only=stage)
    assert result.summary is not None
    assert result.report is not None
    assert result.summary["status"] == "unfinished"
    assert [arm["status"] for arm in result.summary["arms"]] == ["missing"] * 3
    assert result.summary["levels"], "what is known is shown"
    assert "unfinished" in result.report.read_text()


# ---- bad input ----


def test_wrong_configurations(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny)
    for override, problem in (
        ("arms=[naive, nothing]", "unknown arm 'nothing'"),
        ("arms=[]", "arms"),
        ("seeds=[1, 1]", "seeds must be distinct"),
        ("strong.training.max_steps=0", "strong.training.max_steps must be a positive number, got 0"),
        ("strong.output_dir=x", '"strong.output_dir" is set by the study'),
        ("weak.data.train=x", '"weak.data.train" is set by the study'),
        ("weak.training.seed=3", '"weak.training.seed" is set by the study'),
        ("weak.lora.rank=3", 'unknown key "lora.rank"'),
        ("arms={naive: {loss: sftt}}", "unknown loss"),
        ("arms={naive: {model: other}}", "arm naive may not change the model or data.train"),
        ("arms={naive: {data: {train: x}}}", "arm naive may not change the model or data.train"),
        ("arms={naive: {}, filter: {training: {max_steps: 3}}}", "budgets differ: training.max_steps is 3"),
        ("arms={naive: {training: {seed: 3}}}", '"seed" is set by the experiment'),
        ("ask.times=1", "greater than or equal to 2"),
        ("ask.by=paraphrase", 'by: paraphrase needs "backend"'),
        ("reliability.rule=quantile", 'rule "quantile" needs a value'),
        ("reliability.value=0.3", 'rule "median" takes no value'),
        ("task=sciqq", "no shipped task is named 'sciqq'"),
        ("ask.times=7", "3 options have 6 orders, and 7 wordings were asked for"),
        ("split.limit=4", "too few questions"),
    ):
        error = refused(path, override, *(["split.supervised=0.9"] if "limit" in override else []))
        assert problem in f"{error.problem} {error.remedy}", (override, error)
    assert not (tmp_path / "study" / "weak").exists()


def test_wrong_questions(tmp_path: Path, tiny: Path) -> None:
    good = questions(48)
    twice = [*good, good[3] | {"q": "other"}]
    error = refused(write(tmp_path / "ids", tiny, train=twice))
    assert "'q0-3' is already the id of" in error.problem
    assert "line 49" in error.place
    without = [{k: v for k, v in q.items() if k != "label"} | {"label": None} for q in good]
    error = refused(write(tmp_path / "gold", tiny, train=without))
    assert "has no right answer" in error.problem
    repeated = [*good, *({**q, "id": f"again {q['id']}"} for q in good[:5])]
    assert study(write(tmp_path / "same", tiny, train=repeated), only="split").summary is None
    split = json.loads((tmp_path / "same" / "study" / "split.json").read_text())
    assert split["dropped"] == {"a repetition": 5}
    leaked = [*good, *({**q, "id": f"other {q['id']}"} for q in questions(12, seed=1)[:4])]
    study(write(tmp_path / "leaked", tiny, train=leaked), only="split")
    split = json.loads((tmp_path / "leaked" / "study" / "split.json").read_text())
    assert split["dropped"] == {"also a test question": 4}


@pytest.mark.slow
def test_unknown_answers_of_the_unsupervised_half_refuse_the_ceiling_only(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, arms=["naive"])
    study(path, only="split")
    unsupervised = set(json.loads((tmp_path / "study" / "split.json").read_text())["unsupervised"])
    unknown = [q | ({"label": None} if q["id"] in unsupervised else {}) for q in questions(48)]
    known = study(write(tmp_path / "unknown", tiny, train=unknown, arms=["naive", "filter"])).summary
    assert known is not None
    assert known["status"] == "completed"
    assert known["supervisors"][0]["labels"]["first"] is None
    assert known["gap"] is None
    assert "no ceiling arm" in known["no_pgr"]
    error = refused(write(tmp_path / "unknown", tiny, train=unknown, arms=["naive", "filter", "ceiling"]))
    assert "remove the arm `ceiling`" in error.remedy


def _decided(options: list[str]) -> bool:
    """Whether numbers differ at their first digit, or share it and differ at a second one."""
    if len({option[0] for option in options}) == 1:
        return len({option[1:] for option in options} - {""}) == len(options)
    return len({option[0] for option in options}) == len(options)


def test_questions_that_do_not_fit_are_dropped_for_every_arm(tmp_path: Path, tiny: Path) -> None:
    """`reply` is the option's text: "1" and "12" share their first token of this tokenizer of bytes."""
    (tmp_path / "spelled").mkdir()
    path = write(tmp_path / "spelled", tiny, arms=["naive", "soft_labels"])
    (tmp_path / "spelled" / "task.yaml").write_text(yaml.safe_dump(TASK | {"reply": "{{ option }}"}))
    study(path, only="split")
    split = json.loads((tmp_path / "spelled" / "study" / "split.json").read_text())
    undecided = sum(not _decided(q["o"]) for q in [*questions(48), *questions(12, seed=1)])
    assert split["dropped"] == {"options do not differ at one token": undecided}
    long = [q | {"q": q["q"] * 60 if i < 6 else q["q"]} for i, q in enumerate(questions(48))]
    study(write(tmp_path / "long", tiny, train=long), only="split")
    split = json.loads((tmp_path / "long" / "study" / "split.json").read_text())
    assert split["dropped"] == {"too long": 6}


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/run.py",
    "if abs(mean - reference) > figures.TOLERANCE * reference:",
    "if False:",
)
@pytest.mark.slow
def test_arms_whose_loss_tokens_differ_are_refused_unless_the_budget_is_in_tokens(
    tmp_path: Path, tiny: Path
) -> None:
    """Each odd question has long options: the arm that draws few of them has fewer loss tokens."""
    worded = []
    for i, q in enumerate(questions(48)):
        worded.append(q | {"o": [f"{letter} {'word ' * (8 * (i % 2))}" for letter in "xyz"]})
    path = write(tmp_path, tiny, train=worded, arms={"naive": {}, "filter": {}})
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | {"reply": "{{ option }}"}))
    error = refused(path, "reliability={rule: quantile, value: 0.1}")
    assert "loss tokens per sample" in error.problem
    assert "budget" in error.place
    longer = "strong.training.max_steps=8"
    found = study(path, "reliability={rule: quantile, value: 0.1}", "budget=tokens", longer).summary
    assert found is not None
    naive, filtered = found["arms"]
    assert naive["steps"] == [8]
    assert filtered["steps"] != [8]
    [tokens], [others] = naive["loss_tokens"], filtered["loss_tokens"]
    assert abs(tokens - others) < 0.3 * tokens, "so few steps draw other shares of long options"


def test_several_processes_are_refused(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused(write(tmp_path, tiny)).problem


@pytest.mark.slow
def test_one_study_at_a_time_in_a_folder(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny)
    process = start("w2s", path)
    lock = tmp_path / "study" / ".lock"
    deadline = time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert "uses this folder for a study" in refused(path).problem
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_record_of_stages(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("[1")
    (tmp_path / "split.json").write_text("{}")
    step = Step("split", tmp_path / "split.json", {"a": 1})
    ledger = Ledger(tmp_path / "stages.json")
    with pytest.raises(UserError, match="the file is damaged: "):
        ledger.complete(step)
    (tmp_path / "stages.json").write_text('{"split": 3}')
    with pytest.raises(UserError, match="split has no inputs"):
        ledger.complete(step)
    (tmp_path / "stages.json").unlink()
    with pytest.raises(UserError, match=r"split\.json is there, and no record of its inputs"):
        ledger.complete(step)


@pytest.mark.kills("ual/pipelines/stages.py", 'if known["sha256"] != sha256(step.output):', "if False:")
def test_an_output_that_has_changed_is_refused(tmp_path: Path) -> None:
    ledger, output = Ledger(tmp_path / "stages.json"), tmp_path / "answers.jsonl"
    step = Step("answers", output, {"ask": 5})
    assert not ledger.complete(step)
    assert ledger.begin(step)
    output.write_text("1\n2\n")
    assert ledger.begin(step), "it has begun, and is not complete"
    ledger.finish(step)
    assert ledger.complete(step)
    assert not ledger.begin(step)
    output.write_text("1\n")
    with pytest.raises(UserError, match=r"answers\.jsonl has changed since it was computed"):
        ledger.begin(step)
    assert ledger.begin(Step("answers", output, {"ask": 3}), replace=True)
    output.unlink()
    assert ledger.begin(step), "what is removed is computed again"


@pytest.mark.slow
def test_no_stage_takes_results_of_other_settings(tmp_path: Path, tiny: Path) -> None:
    """Whichever stage is asked for alone, what the report says of its settings is true."""
    path = write(tmp_path, tiny, arms=["naive", "filter"])
    study(path)
    for override in (
        "reliability={rule: quantile, value: 0.1}",
        "ask={by: sample, times: 3}",
        "strong.training.max_steps=900",
        "weak.training.learning_rate=0.5",
        "arms={naive: {}, filter: {lora: {r: 3}}}",
    ):
        refused(path, override, only="report")
    for override, only in (
        ("ask.times=3", "arms"),
        ("weak.training.learning_rate=0.5", "answers"),
        ("weak.lora.r=4", "evaluation"),
        ("reliability={rule: quantile, value: 0.1}", "strong"),
    ):
        refused(path, override, only=only)
    changed = [q | {"q": q["q"] + "!"} for q in questions(48)]
    write_rows(tmp_path / "train.jsonl", changed)
    folder = tmp_path / "study"
    assert "split: computed with other settings, data changed" in refused(path).problem
    (folder / "split.json").unlink()
    assert "changed" in refused(path).problem, "the answers were to other questions"
    write_rows(tmp_path / "train.jsonl", questions(48))
    (folder / "split.json").unlink()
    again = study(path).summary
    assert again is not None
    assert again["status"] == "completed"


@pytest.mark.slow
def test_a_threshold_can_be_raised_before_an_arm_is_trained(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, arms=["naive", "filter"], reliability={"rule": "absolute", "value": 0.0})
    for stage in ("weak", "answers"):
        study(path, only=stage)
    answers = tmp_path / "study" / "answers" / "weak-seed1.jsonl"
    entropies = {row["question_id"] for row in rows(answers)}
    assert len(entropies) == 24
    chosen = []
    for value in (0.6, 2.0):
        study(path, f"reliability.value={value}", only="arms")
        chosen.append(len(rows(tmp_path / "study" / "arms" / "seed1" / "filter.jsonl")))
    assert chosen[1] == 24 >= chosen[0]


@pytest.mark.slow
def test_removed_weights_are_trained_again(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, arms=["naive"])
    study(path)
    for who in ("strong/seed1/naive", "weak/seed1/weak"):
        shutil.rmtree(tmp_path / "study" / who)
    found = study(path).summary
    assert found is not None
    assert found["status"] == "completed", "the same weights, so their answers are still theirs"


# ---- worked answers, paraphrases, draws ----

NUMBERS = {"kind": "number", "id": "id", "question": "q", "gold": "gold", "solution": "solution"}


def worked(folder: Path, model: Path, **sections: Any) -> Path:
    """Write a study whose right answer is always 7, which a model of random weights learns to say."""
    path = write(folder, model, **{"arms": ["naive", "filter", "reweight", "ceiling"], **sections})
    (folder / "task.yaml").write_text(yaml.safe_dump(NUMBERS))
    for name, count, seed in (("train", 32, 0), ("test", 8, 1)):
        made = [q | {"gold": "7", "solution": "It is 7."} for q in questions(count, seed=seed)]
        write_rows(folder / f"{name}.jsonl", made)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("by", ["sample", "paraphrase"])
def test_worked_answers(tmp_path: Path, tiny: Path, by: str) -> None:
    ask: dict[str, Any] = {"by": by, "times": 3, "max_tokens": 16, "temperature": 0.5}
    path = worked(tmp_path, tiny)
    raw = yaml.safe_load(path.read_text()) | {"ask": ask}
    raw["weak"]["training"] |= {"max_steps": 60, "learning_rate": 0.02}
    raw["weak"]["lora"] = None
    raw["budget"] = "tokens"
    with serving() as server:
        if by == "paraphrase":
            ask["backend"] = {"kind": "endpoint", "model": "m", "base_url": server.url("rewords")}
        path.write_text(yaml.safe_dump(raw))
        found = study(path).summary
        requests = len(server.asked)
        (tmp_path / "study" / "answers" / "weak-seed1.jsonl").unlink()
        study(path, only="answers")
        assert len(server.asked) == requests == (32 if by == "paraphrase" else 0), "paraphrases are kept"
    assert found is not None
    assert found["status"] == "completed"
    assert found["chance"] is None
    [weak] = found["supervisors"]
    assert weak["labels"]["majority"] > 0.5, "it has learned to say 7"
    answers = rows(tmp_path / "study" / "answers" / "weak-seed1.jsonl")
    assert len(answers) == 16 * 3
    if by == "paraphrase":
        assert len({row["prompt"] for row in answers}) == 48, "other wordings"
        assert sum(row["prompt"].startswith("Version") for row in answers) == 32
    else:
        assert len({row["prompt"] for row in answers}) == 16
    naive = rows(tmp_path / "study" / "arms" / "seed1" / "naive.jsonl")
    assert all(row["completion"] in {a["text"] for a in answers} for row in naive)
    ceiling = rows(tmp_path / "study" / "arms" / "seed1" / "ceiling.jsonl")
    assert {row["completion"] for row in ceiling} == {"It is 7."}


def test_worked_answers_that_cannot_be_parsed(tmp_path: Path, tiny: Path) -> None:
    path = worked(tmp_path, tiny, ask={"by": "sample", "times": 2, "max_tokens": 1, "temperature": 0.01})
    for stage in ("weak", "answers"):
        study(path, only=stage)
    answers = tmp_path / "study" / "answers" / "weak-seed1.jsonl"
    assert all(row["value"] is None or row["text"].strip() for row in rows(answers))
    stages = tmp_path / "study" / "stages.json"
    digest = json.loads(stages.read_text())["answers of weak, seed 1"]["sha256"]
    answers.write_text("".join(json.dumps(row | {"value": None}) + "\n" for row in rows(answers)))
    stages.write_text(stages.read_text().replace(digest, sha256(answers)))
    error = refused(path, only="arms")
    assert "none of the 16 questions has a usable majority" in error.problem
    assert "ask.max_tokens" in error.remedy


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/questions.py",
    'longest, room = (max(replies, key=len), 0) if replies else ("0", max_tokens)',
    "longest, room = (max(replies, key=len), 0) if replies else (item.solution, 0)",
)
def test_solutions_of_the_unsupervised_half_decide_nothing(tmp_path: Path, tiny: Path) -> None:
    path = worked(tmp_path, tiny, ask={"by": "sample", "times": 2, "max_tokens": 16})
    study(path, only="split")
    before = json.loads((tmp_path / "study" / "split.json").read_text())
    longer = [
        row | {"solution": "very " * 200 + "7"} if row["id"] in before["unsupervised"][:3] else row
        for row in rows(tmp_path / "train.jsonl")
    ]
    write_rows(tmp_path / "train.jsonl", longer)
    study(path, f"output_dir={tmp_path / 'other'}", only="split")
    assert json.loads((tmp_path / "other" / "split.json").read_text()) == before
    taught = [
        row | {"solution": "very " * 200 + "7"} if row["id"] in before["supervised"][:3] else row
        for row in rows(tmp_path / "train.jsonl")
    ]
    write_rows(tmp_path / "train.jsonl", taught)
    study(path, f"output_dir={tmp_path / 'third'}", only="split")
    after = json.loads((tmp_path / "third" / "split.json").read_text())
    assert after["unsupervised"] == before["unsupervised"]
    assert after["supervised"] == before["supervised"][3:]
    assert after["dropped"] == {"the solution is too long": 3}


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("gold", "50%", "is not a number that a reply can have, got '50%'"),
        ("gold", "five", "is not a number that a reply can have, got 'five'"),
        ("gold", "8", "the solution does not end with the right answer '8'"),
        ("solution", "", "the solution does not end with the right answer '7'"),
    ],
)
def test_right_answers_that_no_reply_could_have(
    tmp_path: Path, tiny: Path, column: str, value: str, problem: str
) -> None:
    path = worked(tmp_path, tiny, ask={"by": "sample", "times": 2, "max_tokens": 16})
    write_rows(tmp_path / "train.jsonl", [row | {column: value} for row in rows(tmp_path / "train.jsonl")])
    error = refused(path)
    assert problem in error.problem
    assert "train.jsonl, line" in error.place


def test_worked_answers_have_no_options(tmp_path: Path, tiny: Path) -> None:
    assert "no options to reorder" in refused(worked(tmp_path, tiny)).problem
    error = refused(worked(tmp_path, tiny), "ask={by: sample}", "arms=[naive, soft_labels]")
    assert "soft_labels needs probabilities of options" in error.problem


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/run.py",
    "[(x / best) ** (1 / ask.temperature) for x in p.values()]",
    "[1.0 for x in p.values()]",
)
def test_draws_follow_the_probabilities_at_a_temperature(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path, tiny, ask={"by": "sample", "times": 40, "temperature": 0.25}, arms=["naive"])
    for stage in ("weak", "answers"):
        study(path, only=stage)
    of_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows(tmp_path / "study" / "answers" / "weak-seed1.jsonl"):
        of_question.setdefault(row["question_id"], []).append(row)
    assert {len(drawn) for drawn in of_question.values()} == {40}
    expected = observed = variance = 0.0
    for drawn in of_question.values():
        assert len({row["prompt"] for row in drawn}) == 1
        first, *drawn = sorted(drawn, key=lambda row: row["wording"])
        likeliest = max(first["probabilities"].items(), key=lambda entry: entry[1])[0]
        assert first["value"] == likeliest, "the model's own answer"
        p = {option: x**4 for option, x in drawn[0]["probabilities"].items()}
        best = max(p, key=p.__getitem__)
        share = p[best] / sum(p.values())
        expected += 39 * share
        variance += 39 * share * (1 - share)
        observed += sum(row["value"] == best for row in drawn)
        assert all(f"{row['text']}) {row['value']}" in row["prompt"] for row in drawn)
    assert abs(observed - expected) < 4 * math.sqrt(variance) + 1e-9


# ---- presets and dry runs ----


def test_every_arm_is_documented() -> None:
    page = (ROOT / "docs" / "weak-to-strong.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| .* \| .* \| .* \|$", page.partition("## Arms")[2], re.MULTILINE)
    assert listed == ALL
    help = CliRunner().invoke(app, ["w2s", "--help"], terminal_width=100).output
    assert all(name in help for name in (*ALL, *PRESETS))


@pytest.mark.slow
def test_the_command_line(whole: Path, tmp_path: Path, tiny: Path) -> None:
    path = whole.parent / "study.yaml"
    done = ual("w2s", path, "--stage", "report")
    assert done.returncode == 0, done.stderr
    assert "supervisor weak" in done.stdout
    assert all(name in done.stdout for name in ALL)
    assert "report.html" in done.stdout
    planned = ual("w2s", write(tmp_path, tiny), "--dry-run")
    assert planned.returncode == 0, planned.stderr
    said = " ".join(planned.stdout.split())
    assert "24 supervised, 24 unsupervised, 12 to test" in said
    assert "3 runs of 2 steps, 4 samples each" in said
    assert "supervisors answer 120 questions" in said
    assert "evaluation 72 questions" in said, "12 x (supervisor + 3 arms), and 24 by the untrained model"
    assert not (tmp_path / "study").exists()
    wrong = ual("w2s", path, "ask.times=3")
    assert wrong.returncode == 2
    assert "ask changed" in wrong.stderr


def published(folder: Path, data: Path, name: str) -> tuple[str, str]:
    """Return files as they are published, cut to a part: questions to train on, and test questions."""
    folder.mkdir(exist_ok=True)
    if name == "paper-mmlu":
        with tarfile.open(data / "mmlu" / "mmlu_dev_test.tar.gz") as archive:
            members = [m for m in archive if fnmatch(m.name, "*test/*_test.csv")][:2]
            archive.extractall(folder, members, filter="data")
        first, second = sorted(folder.rglob("*.csv"))
        return str(first), str(second)
    source = {
        "paper-hellaswag": data / "hellaswag" / "validation.jsonl.gz",
        "paper-ethics": data / "ethics" / "cm_test.csv",
        "paper-gsm8k": data / "gsm8k" / "train.jsonl",
    }[name]
    text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    header, *lines = text.decode().splitlines(keepends=True)
    head = [header] if source.suffix == ".csv" else []
    lines = lines[:90] if head else [header, *lines[:89]]
    suffix = ".csv" if head else ".jsonl"
    for part, chosen in (("train", lines[:60]), ("test", lines[60:])):
        (folder / f"{part}{suffix}").write_text("".join([*head, *chosen]))
    return str(folder / f"train{suffix}"), str(folder / f"test{suffix}")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves(name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub: what it takes is printed, and the sizes of its models are not known."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train, test = published(tmp_path / "files", shared / "data", name)
    command = ["w2s", name, f"data.train={train}", f"data.test={test}", f"output_dir={tmp_path / 'x'}"]
    done = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [model["path"] for model in found["models"]] == [
        "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-13b-chat-hf"
    ]  # fmt: skip
    assert all("not on this machine" in model["absent"] for model in found["models"])
    weak, arms = found["training"]
    assert weak["samples_per_step"] == arms["samples_per_step"] == 24, "as the authors set it"
    assert (weak["runs"], arms["runs"]) == (3, 15)
    times = 2 if name == "paper-ethics" else 5
    assert found["answered"] == found["unsupervised"] * times * 3
    assert found["paraphrases"] == (found["unsupervised"] * 4 if name == "paper-gsm8k" else 0)
    assert not (tmp_path / "x").exists()

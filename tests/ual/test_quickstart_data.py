import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ual.data.load import load
from ual.errors import UserError
from ual.pipelines.quickstart import data


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return data.write(tmp_path_factory.mktemp("data"))


def test_counts_and_sources(files: tuple[Path, Path]) -> None:
    for path, count in zip(files, (288, 96), strict=True):
        sources = [row["source"] for row in rows(path)]
        assert sources.count("open-ended") == sources.count("reasoning") == count // 2
    assert [path.name for path in files] == ["train.jsonl", "eval.jsonl"]
    assert len(list(files[0].parent.iterdir())) == 2


def test_odd_counts_are_kept(tmp_path: Path) -> None:
    train, evaluation = data.write(tmp_path, train_rows=31, eval_rows=7)
    assert (len(rows(train)), len(rows(evaluation))) == (31, 7)


def test_rows_load_and_carry_no_uncertainty(files: tuple[Path, Path]) -> None:
    samples = [sample for path in files for sample in load(str(path))]
    assert len({sample.id for sample in samples}) == len(samples) == 384
    for sample in samples:
        assert [message.role for message in sample.messages] == ["user", "assistant"]
        assert sample.uncertainty is None
        assert all(message.content == message.content.strip() != "" for message in sample.messages)


def test_rows_of_both_sources_are_mixed(files: tuple[Path, Path]) -> None:
    for path in files:
        sources = [row["source"] for row in rows(path)]
        assert 0.3 < sum(a != b for a, b in itertools.pairwise(sources)) / len(sources) < 0.7


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_is_on_both_sides(seed: int, tmp_path: Path) -> None:
    # as many samples as there are, so that every open-ended sample is used
    with pytest.raises(UserError, match="train_rows") as caught:
        data.write(tmp_path, train_rows=100_000, eval_rows=2, seed=seed)
    most_train = int(caught.value.problem.split("[2, ")[1].split("]")[0])
    train, evaluation = data.write(tmp_path, train_rows=most_train, eval_rows=150, seed=seed)
    prompts = [{row["messages"][0]["content"] for row in rows(path)} for path in (train, evaluation)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) > 100 < len(prompts[1])


def test_equal_seeds_give_equal_bytes_and_others_do_not(files: tuple[Path, Path], tmp_path: Path) -> None:
    again, other = data.write(tmp_path / "again"), data.write(tmp_path / "other", seed=1)
    for first, same, different in zip(files, again, other, strict=True):
        assert first.read_bytes() == same.read_bytes() != different.read_bytes()


def test_the_held_out_rows_do_not_depend_on_the_number_of_training_rows(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    _, evaluation = data.write(tmp_path, train_rows=10)
    assert evaluation.read_bytes() == files[1].read_bytes()


def test_every_open_ended_prompt_has_several_different_good_answers() -> None:
    items = data.open_ended()
    assert len(items) >= 120
    assert len({prompt for prompt, _ in items}) == len(items)
    for prompt, responses in items:
        assert 3 <= len(responses) <= 5, prompt
        words = [set(response.lower().split()) for response in responses]
        for i, a in enumerate(words):
            for b in words[:i]:
                assert len(a & b) / len(a | b) < 0.35, (prompt, a & b)
        assert all(12 <= len(response.split()) <= 60 for response in responses), prompt
    assert len({response for _, responses in items for response in responses}) >= 400


def test_reasoning_gym_accepts_the_answers(files: tuple[Path, Path]) -> None:
    tasks = {task.generator: (task, data.dataset(task, seed=0)) for task in data.TASKS}
    used = set()
    for row in [row for path in files for row in rows(path) if row["source"] == "reasoning"]:
        prompt, response = (message["content"] for message in row["messages"])
        generator, index = row["id"].split("-")
        task, items = tasks[generator]
        item = items[int(index)]
        before, _, after = task.reply.format(**item["metadata"] | {"answer": "\0"}).partition("\0")
        answer = response.removeprefix(before).removesuffix(after)
        assert before + answer + after == response
        assert prompt == item["question"].strip()
        assert items.score_answer(answer, item) == 1
        assert items.score_answer(answer + "7", item) < 1
        used.add(generator)
    assert used == set(tasks)


def test_rows_are_short(files: tuple[Path, Path]) -> None:
    # 3 characters to a token is a safe guess for English and digits in a vocabulary of 49152
    for row in [row for path in files for row in rows(path)]:
        assert sum(len(message["content"]) for message in row["messages"]) < 600


@pytest.mark.parametrize(("argument", "count"), [("train_rows", 1), ("eval_rows", 100_000), ("eval_rows", 0)])
def test_impossible_counts_are_user_errors(argument: str, count: int, tmp_path: Path) -> None:
    counts = {"train_rows": 4, "eval_rows": 4, argument: count}
    with pytest.raises(UserError, match=rf"{argument} must be in \[2, \d+\], got {count}"):
        data.write(tmp_path, **counts)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the data"):
        data.write(tmp_path / "file", train_rows=4, eval_rows=4)


def test_missing_reasoning_gym_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="not installed") as caught:
        data.write(tmp_path)
    assert caught.value.remedy == "pip install reasoning-gym"

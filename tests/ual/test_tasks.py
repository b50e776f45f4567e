"""Public files become questions as a task says, and a question is posed in several wordings."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.ual.runs import write_rows
from ual.data import tasks
from ual.data.tasks import Item, Task, load_task, pose, read, wordings
from ual.errors import UserError

CHOICE = {"kind": "choice", "question": "q", "options": ["a", "b", "c"], "gold": "right"}
ROW = {"q": "Which?", "a": "one", "b": "two", "c": "three", "right": "two"}


def task(**changes: Any) -> Task:
    return Task(**CHOICE | changes)


def item(*options: str, gold: str | None = None) -> Item:
    return Item("id", "Which?", options, gold, "", "", "file, line 1")


def of(folder: Path, row: dict[str, Any], **changes: Any) -> Item:
    [found] = read(task(**changes), str(write_rows(folder / "rows.jsonl", [row])))
    return found


# ---- files as they are published ----


@pytest.mark.parametrize(
    ("name", "file", "count", "options", "first"),
    [
        ("sciq", "sciq/train.jsonl.gz", 11_679, 4, "mesophilic organisms"),
        ("hellaswag", "hellaswag/validation.jsonl.gz", 10_042, 4, "starts pulling up roofing on a roof."),
        ("mmlu", "mmlu/mmlu_dev_test.tar.gz", 14_042, 4, "4"),
        ("boolq", "boolq/train.json", 9_427, 2, "true"),
        ("ethics", "ethics/cm_test.csv", 3_885, 2, "no"),
        ("gsm8k", "gsm8k/test.jsonl", 1_319, 0, "18"),
    ],
)
@pytest.mark.slow(spare=3)
def test_a_shipped_task_reads_the_published_file(
    shared: Path, name: str, file: str, count: int, options: int, first: str
) -> None:
    found = read(load_task(name), str(shared / "data" / file))
    assert len(found) == len({one.id for one in found}) == count
    assert Counter(len(one.options) for one in found) == {options: count}
    assert found[0].gold == first
    assert all(one.gold is not None and one.question for one in found)
    if options:
        assert all(one.gold in one.options for one in found)
        positions = Counter(one.options.index(one.gold or "") for one in found)
        assert min(positions.values()) > count / options / 2, "the place of an answer tells it"
    else:
        assert all(one.solution.endswith(f"#### {one.solution.split()[-1]}") for one in found)
    assert str(shared / "data" / file) in found[0].place


@pytest.mark.slow
def test_subjects_and_places_of_an_archive(shared: Path) -> None:
    found = read(load_task("mmlu"), str(shared / "data" / "mmlu" / "mmlu_dev_test.tar.gz"))
    assert len({one.subject for one in found}) == 57
    assert found[0].subject == "abstract algebra"
    assert found[0].place.endswith("mmlu_dev_test.tar.gz: test/abstract_algebra_test.csv, line 2")


def test_arc(tmp_path: Path) -> None:
    """As AllenAI publishes it; some answers are numbered from 1."""
    choices = [{"text": t, "label": n} for t, n in zip(("dry", "wet", "hot"), "ABC", strict=True)]
    rows = [
        {"id": f"Mercury_{i}", "question": {"stem": f"Which {i}?", "choices": choices}, "answerKey": key}
        for i, key in enumerate(["B", "3"])
    ]
    found = read(load_task("arc"), str(write_rows(tmp_path / "ARC-Easy-Dev.jsonl", rows)))
    assert [(one.id, one.question, one.options, one.gold) for one in found] == [
        ("Mercury_0", "Which 0?", ("dry", "wet", "hot"), "wet"),
        ("Mercury_1", "Which 1?", ("dry", "wet", "hot"), "hot"),
    ]


def test_hellaswag_as_its_authors_publish_it(tmp_path: Path) -> None:
    row = {"ind": 24, "activity_label": "Roof", "ctx": "A man is", "label": 1, "endings": ["up", "down"]}
    [found] = read(load_task("hellaswag"), str(write_rows(tmp_path / "hellaswag_val.jsonl", [row])))
    assert (found.id, found.subject, found.gold) == ("24", "Roof", "down")


@pytest.mark.kills("ual/data/tasks.py", "= dict.fromkeys(COLUMNS)", "= {}")
def test_columns_of_a_conversation_are_not_read(tmp_path: Path) -> None:
    """A file of questions may have columns that mean something else in a training sample."""
    row = ROW | {"question": 3, "answer": [], "messages": "none", "uncertainty": "high", "id": {}}
    found = of(tmp_path, row | {"subject": "none", "solution": "none"})
    assert (found.question, found.subject, found.solution) == ("Which?", "", "")


@pytest.mark.kills("ual/data/tasks.py", "random.Random(sample.id).shuffle(order)", "order.reverse()")
def test_a_shuffle_depends_on_the_question_alone(tmp_path: Path) -> None:
    rows = [ROW | {"q": f"Which {i}?"} for i in range(300)]
    shuffled = read(task(shuffle=True), str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert {one.gold for one in shuffled} == {"two"}
    positions = Counter(one.options.index("two") for one in shuffled)
    # of 300 uniform draws each place has 100, with a standard deviation of 8
    assert all(60 <= positions[place] <= 140 for place in range(3))
    later = read(task(shuffle=True), str(write_rows(tmp_path / "later.jsonl", rows[::-1])))
    assert [one.options for one in later] == [one.options for one in shuffled[::-1]]


@pytest.mark.kills("ual/data/tasks.py", 'index = int(text) - (task.gold_is == "letter")', "index = int(text)")
@pytest.mark.parametrize(
    ("gold_is", "right", "expected"),
    [
        ("index", 0, "one"), ("index", "2", "three"), ("letter", "C", "three"), ("letter", "b", "two"),
        ("letter", 1, "one"), ("letter", "3", "three"), ("text", " two ", "two"), ("text", None, None),
        ("index", "", None),
    ],
)  # fmt: skip
def test_the_right_answer_as_index_letter_or_text(
    tmp_path: Path, gold_is: str, right: Any, expected: str | None
) -> None:
    assert of(tmp_path, ROW | {"right": right}, gold_is=gold_is).gold == expected


def test_a_number_is_normalized(tmp_path: Path) -> None:
    row = {"question": "How much?", "answer": "3 * 400 = 1200\n#### $1,200.00"}
    [found] = read(load_task("gsm8k"), str(write_rows(tmp_path / "rows.jsonl", [row])))
    assert (found.gold, found.solution) == ("1200", row["answer"])


def test_a_task_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: words\nquestion: '{{ text }} Spam?'\nwords: [ham, spam]\ngold: y\ngold_is: index")
    rows = [{"text": "Buy now.", "y": 1}]
    [found] = read(load_task(str(path)), str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert (found.question, found.options, found.gold) == ("Buy now. Spam?", ("ham", "spam"), "spam")


# ---- wordings ----


def test_a_letter_means_the_option_beside_it() -> None:
    one = item("red", "green", "blue")
    for wording in wordings(task(), one, 6):
        shown = dict(line.split(". ", 1) for line in wording.prompt.splitlines() if ". " in line)
        assert shown == wording.replies
        assert all(wording.replies[wording.reply(option)] == option for option in one.options)


@pytest.mark.kills("ual/data/tasks.py", "orders = {tuple(range(count)): None}", "orders = {}")
@pytest.mark.parametrize("times", [1, 2, 5, 24])
def test_orders_differ_and_the_first_is_the_file_s(times: int) -> None:
    one = item("red", "green", "blue", "gray")
    found = [tuple(wording.replies.values()) for wording in wordings(task(), one, times)]
    assert len({*found}) == times
    assert found[0] == one.options
    assert all(sorted(order) == sorted(one.options) for order in found)


def test_orders_depend_on_seed_and_question() -> None:
    one = item(*"abcdefgh")
    other = Item("other", *[getattr(one, name) for name in Item.__slots__[1:]])
    orders = {
        (who.id, seed): tuple(wordings(task(), who, 2, seed=seed)[1].replies.values())
        for who in (one, other)
        for seed in (0, 1)
    }
    assert len({*orders.values()}) == 4
    assert orders["id", 0] == tuple(wordings(task(), one, 5, seed=0)[1].replies.values())


def test_the_two_orders_of_words() -> None:
    given = Task(kind="words", question="q", words=["yes", "no"])
    first, second = wordings(given, item("yes", "no"), 2)
    assert first.prompt == "Which?\n\nAnswer with yes or no."
    assert second.prompt == "Which?\n\nAnswer with no or yes."
    assert first.replies == second.replies == {"yes": "yes", "no": "no"}


def test_a_paraphrase_has_the_same_options() -> None:
    wording = pose(task(), item("red", "green"), question="What color?")
    assert wording.prompt.startswith("What color?\n\nA. red\nB. green\n")


def test_templates_of_prompt_and_reply() -> None:
    given = task(
        prompt="{{ question }} ({{ options | map(attribute='text') | join(', ') }})", reply="{{ option }}"
    )
    wording = pose(given, item("red", "green"), (1, 0))
    assert wording.prompt == "Which? (green, red)"
    assert wording.replies == {"green": "green", "red": "red"}


def test_options_of_the_same_text_are_one_answer() -> None:
    wording = pose(task(), item("same", "other", "same"))
    assert wording.replies == {"A": "same", "B": "other", "C": "same"}
    assert wording.reply("same") == "A"


@pytest.mark.parametrize(
    ("options", "times", "said"), [(2, 3, "2 options have 2 orders"), (0, 1, "0 options")]
)
def test_more_wordings_than_orders_are_refused(options: int, times: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"file, line 1: {said}.*\n.*paraphrases or at a temperature"):
        wordings(task(), item(*"abcdef"[:options]), times)


# ---- errors ----


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"kind": "choise"}, r"kind: Input should be 'choice', 'words' or 'number', got 'choise'"),
        (CHOICE | {"golds": "x"}, r'unknown key "golds"; did you mean "gold"\?'),
        (CHOICE | {"options": None}, r'kind "choice" needs "options"'),
        (CHOICE | {"words": ["a", "b"]}, r'"words" belongs to kind "words", and the kind is "choice"'),
        ({"kind": "words", "question": "q", "words": ["a", "a"]}, "words must be distinct"),
        ({"kind": "number", "question": "q", "solution": "s", "shuffle": True}, "are for choices and words"),
        (CHOICE | {"prompt": "{% for %}"}, "task, prompt: the template .* is not valid"),
        (["kind"], "a task is a mapping of keys"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path: Path, raw: Any, said: str) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=said):
        load_task(str(tmp_path / "task.yaml"))


def test_a_missing_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r'named \'hellaswagg\'; did you mean "hellaswag"\?'):
        load_task("hellaswagg")
    with pytest.raises(UserError, match=r"no such file|cannot read the task"):
        load_task("none.yaml")


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"right": "four"}, {}, r"line 1: gold: expected the text of one of 3 options, got .*four"),
        ({"right": 3}, {"gold_is": "index"}, "gold: expected the index of one of 3 options, got 3"),
        ({"right": 0}, {"gold_is": "letter"}, "gold: expected the letter of one of 3 options, got 0"),
        ({"right": "D"}, {"gold_is": "letter"}, 'gold: expected the letter of one of 3 options, got "D"'),
        ({"b": " "}, {}, r"line 1: options: expected at least two texts that are not blank, got"),
        ({}, {"options": "a"}, "options: expected a list of texts, got"),
        ({"a": "[1, 2"}, {"options": "a"}, "options: invalid JSON"),
        ({"a": ["x"] * 27}, {"options": "a", "gold": None}, "options: expected at most 26, got 27"),
        ({"q": None}, {}, r'line 1: the question is null: "q"\ncorrect the file or the task$'),
        ({}, {"question": "none"}, r'"question": there is no column "none".*\n.*, or correct the task$'),
        ({}, {"subject": "none"}, 'field "subject": there is no column "none"'),
    ],
)
def test_a_wrong_record_is_named(
    tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        of(tmp_path, ROW | row, **changes)


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot read the archive"):
        read(task(), str(broken))
    archive = tmp_path / "items.tar"
    with tarfile.open(archive, "w") as out:
        content = json.dumps(ROW | {"right": "ten"}).encode()
        about = tarfile.TarInfo("./part/items.jsonl")
        about.size = len(content)
        out.addfile(about, io.BytesIO(content))
    with pytest.raises(UserError, match=r"has no file that matches '\*\.csv'"):
        read(task(members="*.csv"), str(archive))
    with pytest.raises(UserError, match=r"items\.tar: part/items\.jsonl, line 1: gold"):
        read(task(members="part/*"), str(archive))


def test_an_archive_writes_nothing_outside(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as out:
        about = tarfile.TarInfo("../outside.jsonl")
        about.size = 2
        out.addfile(about, io.BytesIO(b"{}"))
    with pytest.raises(UserError, match="cannot read the archive"):
        read(task(), str(archive))
    assert {path.name for path in tmp_path.iterdir()} == {"evil.tar"}


def test_the_names_of_shipped_tasks() -> None:
    assert tasks.SHIPPED == ("arc", "boolq", "chaosnli", "ethics", "gsm8k", "hellaswag", "mmlu", "sciq")
    assert all(load_task(name) for name in tasks.SHIPPED)


# ---- answers of people ----


@pytest.mark.kills(
    "ual/data/tasks.py",
    "counts = dict(zip(options, value, strict=True))",
    "counts = dict(zip(sorted(options), value, strict=True))",
)
@pytest.mark.parametrize("written", [[3, 0, 1], "[3, 0, 1]", {"red": 3, "blue": 1}, '{"red": 3, "blue": 1}'])
def test_shares_of_human_answers(tmp_path: Path, written: object) -> None:
    record = {"q": "Which?", "all": ["red", "green", "blue"], "label": 0, "people": written}
    (tmp_path / "f.jsonl").write_text(json.dumps(record) + "\n")
    made = Task(
        kind="choice",
        question="q",
        options="all",
        gold="label",
        gold_is="index",
        human="people",
        shuffle=True,
    )
    [item] = read(made, str(tmp_path / "f.jsonl"))
    assert item.human == {"red": 0.75, "green": 0.0, "blue": 0.25}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([1, 2], "expected 3 shares"),
        ({"red": 1, "pink": 2}, "expected 3 shares"),
        ([0, 0, 0], "positive sum"),
        ([1, -1, 2], "0 or more"),
        (["a", 1, 2], "0 or more"),
        ("half", "invalid JSON"),
        (7, "expected 3 shares"),
    ],
)
def test_wrong_shares_of_human_answers(tmp_path: Path, written: object, words: str) -> None:
    record = {"q": "Which?", "all": ["red", "green", "blue"], "label": 0, "people": written}
    (tmp_path / "f.jsonl").write_text(json.dumps(record) + "\n")
    made = Task(kind="choice", question="q", options="all", gold="label", gold_is="index", human="people")
    with pytest.raises(UserError, match=words):
        read(made, str(tmp_path / "f.jsonl"))


def test_chaosnli_as_it_is_published(shared: Path) -> None:
    items = read(load_task("chaosnli"), str(shared / "data" / "chaosnli" / "chaosNLI_snli.jsonl"))
    assert len(items) == 1514
    first = items[0]
    assert (first.gold, first.human) == ("neither", {"true": 0.3, "neither": 0.7, "false": 0.0})
    assert all(
        max(item.human.values()) == item.human[item.gold] for item in items if item.human and item.gold
    )

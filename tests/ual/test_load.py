"""Reading samples: every form, every fault with its file, line and field, and the held-out share."""

import gzip
import json
import logging
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.ual.runs import write_rows
from ual.data import hold_out, load, stream
from ual.errors import UserError
from ual.records import Message, Sample

GOOD = {"prompt": "2 + 2?", "completion": "4"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


def refusal(path: str, **arguments: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, **arguments)
    return caught.value


class TestForms:
    @pytest.mark.parametrize(
        ("row", "form", "expected"),
        [
            (GOOD, "prompt_completion", [("user", "2 + 2?"), ("assistant", "4")]),
            (
                {"question": "2 + 2?", "answer": " 4"},
                "prompt_completion",
                [("user", "2 + 2?"), ("assistant", " 4")],
            ),
            (
                {"prompt": CHAT[:1], "completion": CHAT[1:]},
                "prompt_completion",
                [("user", "hi"), ("assistant", "hello")],
            ),
            ({"messages": CHAT}, "messages", [("user", "hi"), ("assistant", "hello")]),
            (
                {
                    "conversations": [
                        {"from": "system", "value": "be kind"},
                        {"from": "human", "value": "hi"},
                        {"from": "gpt", "value": "hello"},
                    ]
                },
                "messages",
                [("system", "be kind"), ("user", "hi"), ("assistant", "hello")],
            ),
            (
                {"messages": [*CHAT, {"role": "tool", "content": "7"}, CHAT[1]]},
                "messages",
                [("user", "hi"), ("assistant", "hello"), ("tool", "7"), ("assistant", "hello")],
            ),
            (
                {"instruction": "Add.", "input": "2, 2", "output": "4"},
                "alpaca",
                [("user", "Add.\n\n2, 2"), ("assistant", "4")],
            ),
            ({"instruction": "Go.", "output": "4"}, "alpaca", [("user", "Go."), ("assistant", "4")]),
            (
                {"instruction": "Go.", "input": "", "output": "4"},
                "alpaca",
                [("user", "Go."), ("assistant", "4")],
            ),
            (
                {"instruction": "And 3?", "output": "6", "history": [["2 + 2?", "4"]]},
                "alpaca",
                [("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3?"), ("assistant", "6")],
            ),
        ],
    )
    def test_each_form_is_found_by_its_columns_and_said(self, tmp_path, caplog, row, form, expected):
        path = write(tmp_path / "rows.jsonl", [row])
        with caplog.at_level(logging.INFO):
            (sample,) = load(path)
        assert contents(sample) == expected
        assert f"1 samples, read as {form} by the columns" in caplog.text
        assert load(path, format=form) == [sample]

    def test_a_form_asked_for_wins_over_the_columns(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [{"messages": CHAT, **GOOD}])
        assert contents(load(path)[0])[0] == ("user", "hi")
        assert contents(load(path, format="prompt_completion")[0])[0] == ("user", "2 + 2?")

    def test_optional_columns(self, tmp_path):
        extra = {
            "id": 7,
            "source": "sums",
            "uncertainty": -3,
            "label_smoothing": 0.1,
            "sample_weight": 0,
            "topic": "ignored",
        }
        nothing = dict.fromkeys(["id", "source", "uncertainty", "label_smoothing", "sample_weight"])
        path = write(tmp_path / "rows.jsonl", [GOOD | extra, GOOD | nothing])
        given_all, given_none = load(path)
        assert given_all == Sample("7", given_all.messages, "sums", -3.0, 0.1, 0.0, f"{path}, line 1")
        assert given_none == Sample(given_none.id, given_all.messages, place=f"{path}, line 2")

    def test_missing_ids_are_hashes_of_the_conversation(self, tmp_path):
        other = {"prompt": "2 + 3?", "completion": "5"}
        first = load(write(tmp_path / "a.jsonl", [GOOD, other, GOOD]))
        second = load(write(tmp_path / "b.jsonl", [other, GOOD | {"uncertainty": 1}]))
        assert first[2].id == first[0].id + "-2"
        assert [s.id for s in second] == [first[1].id, first[0].id]
        assert len({s.id for s in first}) == 3


class TestFiles:
    def test_every_container_holds_the_same_rows(self, tmp_path):
        rows = [{"messages": CHAT, "uncertainty": 0.5}, {"messages": [*CHAT, *CHAT], "uncertainty": None}]
        lines = "".join(json.dumps(row) + "\r\n\n" for row in rows).encode()
        (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        kinds = {
            "jsonl": ["line 1", "line 3"],
            "jsonl.gz": ["line 1", "line 3"],
            "json": ["index 0", "index 1"],
            "parquet": ["sample 0", "sample 1"],
        }
        for suffix, places in kinds.items():
            path = str(tmp_path / f"rows.{suffix}")
            samples = load(path)
            assert [s.place for s in samples] == [f"{path}, {place}" for place in places]
            assert [contents(s) for s in samples] == [
                [(m["role"], m["content"]) for m in row["messages"]] for row in rows
            ]
            assert [s.uncertainty for s in samples] == [0.5, None]

    def test_a_line_separator_inside_a_string_ends_no_line(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(GOOD | {"completion": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
        assert load(str(path))[0].response == "a\u2028b"

    def test_a_folder_is_read_by_datasets(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "set"
        folder.mkdir()
        write(folder / "train.jsonl", [GOOD, GOOD])
        write(folder / "test.jsonl", [GOOD | {"completion": ""}])
        assert [s.place for s in load(str(folder))] == [f"{folder}, sample 0", f"{folder}, sample 1"]
        assert refusal(str(folder), split="test").place == f'{folder}, sample 0, field "completion"'
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: one\n  data_files: train.jsonl\n- config_name: two\n"
            "  data_files: test.jsonl\n---\n"
        )
        assert len(load(f"{folder}:one")) == 2
        assert refusal(f"{folder}:two").place == f'{folder}:two, sample 0, field "completion"'
        error = refusal(f"{folder}:one", split="dev")
        assert "datasets cannot read this folder" in error.problem
        assert "dev" in error.problem

    def test_a_name_that_is_neither_file_nor_data_set(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        error = refusal("no-one/no-such-set:main")
        assert error.place == "no-one/no-such-set:main"
        assert "As a file: no such file." in error.problem
        assert "As a hub data set, split 'train': ConnectionError: Couldn't reach 'no-one/no-such-set'" in (
            error.problem
        )
        assert ".jsonl" in error.remedy

    @pytest.mark.parametrize(("name", "module"), [("rows.parquet", "pyarrow"), ("some/set", "datasets")])
    def test_a_missing_library_is_named(self, tmp_path, monkeypatch, name, module):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / "rows.parquet").touch()
        path = str(tmp_path / name) if "." in name else name
        error = refusal(path)
        assert module in error.problem
        assert "pip install" in error.remedy

    @pytest.mark.kills("ual/data/load.py", 'repository.count("/") > 1', "False")
    @pytest.mark.kills("ual/data/load.py", "_FILE_NAME.search(name) is not None", "name.endswith(_SUFFIXES)")
    def test_a_missing_file_and_its_neighbors(self, tmp_path, monkeypatch):
        write(tmp_path / "train.jsonl", [GOOD])
        (tmp_path / "notes.txt").touch()
        error = refusal(str(tmp_path / "trian.jsonl"))
        assert (error.problem, error.place) == ("no such file", str(tmp_path / "trian.jsonl"))
        assert error.remedy == f"nearest names in {tmp_path}: train.jsonl"
        assert refusal(str(tmp_path / "zzzz.parquet")).remedy == f"data files in {tmp_path}: train.jsonl"
        assert "there is no folder" in refusal(str(tmp_path / "nowhere" / "x.json")).remedy
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
        for name in ("./x", "../x", "~/no-such-x", "x.jsonl", "x.csv", "of/X.CSV.GZ", "x.txt", "a/b/c"):
            assert refusal(name).problem == "no such file"
        assert "cannot tell how to read" in refusal("").problem

    @pytest.mark.parametrize(
        ("name", "content", "place", "problem"),
        [
            ("a.jsonl", b"", "", "no samples"),
            ("a.jsonl", b"\n\n", "", "no samples"),
            ("a.json", b"", ", line 1", "the file is empty"),
            ("a.json", b"[]", "", "no samples"),
            ("a.json", b'{"data": []}', "", 'expected an array of objects, got {"data": []}'),
            ("a.json", b'{"a": 1}\n{"a": 2}\n', ", line 2", "invalid JSON: Extra data, column 1"),
            ("a.json", b'[{"prompt":\n"\xff"}]', ", line 2", "not UTF-8: invalid start byte"),
            ("a.json", b"[3]", ", index 0", "expected an object, got 3"),
            ("a.jsonl", b'{"prompt": ', ", line 1", "invalid JSON: Expecting value, column 12"),
            (
                "a.jsonl",
                b'\n{"prompt": "\xff"}',
                ", line 2",
                "invalid JSON: 'utf-8' codec can't decode byte 0xff in position 12: ",
            ),
            ("a.jsonl", b"[" * 100_000, ", line 1", "invalid JSON: maximum recursion depth"),
            ("a.jsonl", b'"text"', ", line 1", 'expected an object, got "text"'),
            ("a.jsonl.gz", b"not gzip", "", "cannot read the file: Not a gzipped file (b'no')"),
            (
                "a.jsonl.gz",
                gzip.compress(b"{}", mtime=0)[:-9],
                "",
                "cannot read the file: Compressed file ended",
            ),
            ("a.parquet", b"not parquet", "", "cannot read the parquet file: "),
            ("a.txt", b"prompt,completion", "", "cannot tell how to read a file named 'a.txt'"),
            ("a.csv", b"prompt,completion", "", "no samples"),
        ],
    )
    def test_broken_files(self, tmp_path, name, content, place, problem):
        path = tmp_path / name
        path.write_bytes(content)
        error = refusal(str(path))
        assert error.problem.startswith(problem)
        assert error.place == f"{path}{place}"


class TestRows:
    @pytest.mark.parametrize(
        ("row", "field", "problem"),
        [
            (GOOD | {"completion": 4}, "completion", "expected a string or a list of messages, got 4"),
            (GOOD | {"completion": " \n"}, "completion", "the response is empty"),
            (GOOD | {"prompt": ""}, "prompt", "the prompt is empty"),
            (
                GOOD | {"completion": "\ud83d"},
                "completion",
                "'utf-8' codec can't encode character '\\ud83d' in position 0: surrogates",
            ),
            (GOOD | {"prompt": []}, "prompt", "expected a string or a list of messages, got []"),
            (
                GOOD | {"completion": CHAT[:1]},
                "prompt",
                "the conversation must end with an assistant turn, it ends with user",
            ),
            (
                {"prompt": [CHAT[1]], "completion": "x"},
                "prompt",
                "the conversation needs a user turn before its first assistant turn",
            ),
            (GOOD | {"uncertainty": math.nan}, "uncertainty", "expected a finite number, got NaN"),
            (GOOD | {"uncertainty": -math.inf}, "uncertainty", "expected a finite number, got -Infinity"),
            (GOOD | {"uncertainty": 10**400}, "uncertainty", "expected a finite number, got 10000"),
            (GOOD | {"uncertainty": "0.5"}, "uncertainty", 'expected a finite number, got "0.5"'),
            (GOOD | {"uncertainty": True}, "uncertainty", "expected a finite number, got true"),
            (
                GOOD | {"label_smoothing": 1.5},
                "label_smoothing",
                "expected a finite number in [0, 1], got 1.5",
            ),
            (
                GOOD | {"label_smoothing": -0.1},
                "label_smoothing",
                "expected a finite number in [0, 1], got -0.1",
            ),
            (GOOD | {"sample_weight": -1}, "sample_weight", "expected a finite number >= 0, got -1"),
            (GOOD | {"sample_weight": math.nan}, "sample_weight", "expected a finite number >= 0, got NaN"),
            (
                GOOD | {"sample_weight": math.inf},
                "sample_weight",
                "expected a finite number >= 0, got Infinity",
            ),
            (GOOD | {"id": ""}, "id", 'expected a non-empty string or an integer, got ""'),
            (GOOD | {"id": 1.5}, "id", "expected a non-empty string or an integer, got 1.5"),
            (GOOD | {"id": True}, "id", "expected a non-empty string or an integer, got true"),
            (GOOD | {"source": 3}, "source", "expected a string, got 3"),
            (GOOD | {"tools": "[{"}, "tools", "invalid JSON: "),
            (GOOD | {"tools": ["f"]}, "tools", 'expected a list of objects, or its JSON, got ["f"]'),
        ],
    )
    def test_faults_of_a_value(self, tmp_path, row, field, problem):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}, row])
        error = refusal(path)
        assert error.place == f'{path}, line 2, field "{field}"'
        assert error.problem.startswith(problem)
        assert error.remedy == (
            'correct or remove this sample, or set data.invalid to "drop"; the file is read as '
            '"prompt_completion", data.format chooses another'
        )

    @pytest.mark.parametrize(
        ("messages", "field", "problem"),
        [
            ("hi", "messages", 'expected a list of messages, got "hi"'),
            ([], "messages", "expected a list of messages, got []"),
            (["hi", "hello"], "messages[0]", 'expected {"role": ..., "content": ...}, got "hi"'),
            (CHAT[:1], "messages", "the conversation must end with an assistant turn, it ends with user"),
            (
                [CHAT[1], *CHAT],
                "messages",
                "the conversation needs a user turn before its first assistant turn",
            ),
            (
                [{"role": "robot", "content": "x"}],
                "messages[0].role",
                "expected 'system', 'user', 'assistant', 'tool', 'human' or 'gpt', got \"robot\"",
            ),
            ([{"content": "x"}], "messages[0].role", "is missing, got content"),
            (
                [CHAT[0], {"from": "robot", "value": "x"}],
                "messages[1].from",
                "expected 'system', 'user', 'assistant', 'tool', 'human' or 'gpt', got \"robot\"",
            ),
            (
                [CHAT[0], {"role": "assistant", "content": None}],
                "messages[1].content",
                "expected a string, got null",
            ),
            (
                [CHAT[0], {"role": "assistant", "content": ""}, *CHAT],
                "messages[1].content",
                "the response is empty",
            ),
            (
                [CHAT[0] | {"tool_calls": [{"name": "f"}]}, CHAT[1]],
                "messages[0].tool_calls",
                "only the assistant calls tools, got the role 'user'",
            ),
            ([CHAT[0], CHAT[1] | {"weight": 0}], "messages[1].weight", "is not supported"),
            ([CHAT[0], CHAT[1] | {"weight": 0.5}], "messages[1].weight", "is not supported"),
            ([*CHAT, CHAT[0], CHAT[1] | {"train": False}], "messages[3].train", "is not supported"),
            ([CHAT[0], CHAT[1] | {"training": 0}, *CHAT], "messages[1].training", "is not supported"),
            ([CHAT[0], CHAT[1] | {"loss": False}, *CHAT], "messages[1].loss", "is not supported"),
        ],
    )
    def test_faults_of_a_conversation(self, tmp_path, messages, field, problem):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"messages": CHAT}, {"messages": messages}]))
        error = refusal(str(path))
        assert error.place == f'{path}, index 1, field "{field}"'
        assert error.problem.startswith(problem)

    @pytest.mark.parametrize(
        ("row", "field", "problem"),
        [
            ({"instruction": 3, "output": "x"}, "instruction", "expected a string, got 3"),
            ({"instruction": "x", "input": ["y"], "output": "x"}, "input", 'expected a string, got ["y"]'),
            ({"instruction": "x", "output": ""}, "output", "the response is empty"),
            (
                {"instruction": "x", "output": "y", "history": "z"},
                "history",
                "expected a list of [question, answer]",
            ),
            (
                {"instruction": "x", "output": "y", "history": [["z"]]},
                "history[0]",
                "expected a [question, answer]",
            ),
            (
                {"instruction": "x", "output": "y", "history": [["z", None]]},
                "history[0][1]",
                "expected a string or a list of messages, got null",
            ),
        ],
    )
    def test_faults_of_alpaca(self, tmp_path, row, field, problem):
        path = write(tmp_path / "rows.jsonl", [row])
        error = refusal(path)
        assert error.place == f'{path}, line 1, field "{field}"'
        assert error.problem.startswith(problem)

    def test_mixed_rows(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [GOOD, {"question": "2 + 2?", "answer": "4"}])
        error = refusal(path)
        assert str(error) == (
            f'{path}, line 2, field "prompt": is missing, got question, answer\n'
            'correct or remove this sample, or set data.invalid to "drop"; the file is read as '
            '"prompt_completion", data.format chooses another'
        )

    def test_no_known_columns(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [{"text": "x", "messages": None}])
        error = refusal(path)
        assert error.place == f"{path}, line 1"
        assert error.problem == (
            "no columns to make a conversation of: expected messages or conversations (messages); "
            "prompt + completion or question + answer (prompt_completion); instruction + output (alpaca); "
            "got text, messages"
        )
        path = write(tmp_path / "rows.jsonl", [GOOD])
        error = refusal(path, format="alpaca")
        assert "expected instruction + output (alpaca); got prompt, completion" in error.problem
        assert "set data.format to auto" in error.remedy
        assert "unknown format 'csv'; valid: auto, messages" in refusal(path, format="csv").problem

    def test_duplicate_ids(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [GOOD | {"id": "a"}, GOOD, GOOD | {"id": "a"}])
        error = refusal(path)
        assert (error.place, error.problem) == (
            f'{path}, line 3, field "id"',
            "'a' is already the id of line 1",
        )

    def test_the_first_five_faults_come_together(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        bad = [json.dumps(GOOD | {"uncertainty": i, "completion": ""}) for i in range(6)]
        path.write_text("\n".join(["{", json.dumps(GOOD), *bad]))
        lines = str(refusal(str(path))).splitlines()
        assert lines[0] == f"{path}: 7 wrong samples; the first 5:"
        assert (
            lines[1] == "  line 1: invalid JSON: Expecting property name enclosed in double quotes, column 2"
        )
        assert lines[2:6] == [f'  line {n}, field "completion": the response is empty' for n in (3, 4, 5, 6)]
        assert lines[6].startswith("correct or remove these samples")
        assert len(lines) == 7

    def test_a_file_of_only_broken_lines_claims_no_form(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("{\n{\n")
        error = refusal(str(path))
        assert error.problem.startswith("2 wrong samples:\n  line 1: invalid JSON")
        assert error.remedy == 'correct or remove these samples, or set data.invalid to "drop"'

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4))
    def test_whatever_stands_in_a_field_is_taken_or_refused(self, tmp_path_factory, value):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        for field in ("prompt", "completion", "id", "source", "uncertainty", "label_smoothing", "tools"):
            write(path, [GOOD, {"prompt": "q", "completion": "a"} | {field: value}])
            try:
                outcome = str(len(load(str(path))))
            except UserError as error:
                outcome = error.place
            assert outcome == "2" or outcome.startswith(f"{path}, line 2")


class TestRealData:
    def test_gsm8k(self, shared):
        path = shared / "data/gsm8k/train.jsonl"
        samples = load(str(path))
        assert len(samples) == 7473
        assert len({s.id for s in samples}) == 7473
        assert samples[0].messages[0].content.startswith("Natalia sold clips")
        assert samples[0].response.endswith("#### 72")
        assert samples[-1].place == f"{path}, line 7473"

    def test_alpaca_names_its_four_empty_responses(self, shared, tmp_path):
        path = shared / "data/alpaca/random_9k.json"
        lines = str(refusal(str(path))).splitlines()
        assert lines[0] == f"{path}: 4 wrong samples:"
        assert len(lines) == 6
        rows = json.loads(path.read_text())
        for line in lines[1:5]:
            index = int(line.split("index ")[1].split(",")[0])
            assert line.endswith('field "output": the response is empty')
            assert rows[index]["output"] == ""
        kept = [row for row in rows if row["output"].strip()]
        samples = load(write(tmp_path / "kept.jsonl", kept))
        assert len(samples) == 9225
        with_input = next(i for i, row in enumerate(kept) if row["input"])
        assert samples[with_input].messages == (
            Message("user", f"{kept[with_input]['instruction']}\n\n{kept[with_input]['input']}"),
            Message("assistant", kept[with_input]["output"]),
        )

    def test_lima_has_conversations(self, shared):
        samples = load(str(shared / "data/lima/lima.json"))
        assert len(samples) == 1029
        longer = [s for s in samples if len(s.messages) > 2]
        assert len(longer) == 29
        assert all([m.role for m in s.messages[:3]] == ["user", "assistant", "user"] for s in longer)

    def test_truthfulqa(self, shared):
        samples = load(str(shared / "data/truthfulqa/finetune_truth.jsonl"))
        assert len(samples) == 22434
        assert Counter(s.response for s in samples).keys() == {" yes", " no"}
        assert len({s.id for s in samples}) == 22434


def rows_of(prompts: list[str]) -> list[Sample]:
    return [
        Sample(str(i), (Message("user", prompt), Message("assistant", str(i))))
        for i, prompt in enumerate(prompts)
    ]


class TestHoldOut:
    def test_share_order_and_stability(self):
        rows = rows_of([f"question {i}" for i in range(200)])
        train, held = hold_out(rows, 0.1)
        assert len(held) == 20
        assert sorted(train + held, key=lambda s: int(s.id)) == rows
        assert [int(s.id) for s in train] == sorted(int(s.id) for s in train)
        again_train, again_held = hold_out(rows[::-1], 0.1)
        assert (again_train[::-1], again_held[::-1]) == (train, held)
        larger = {s.id for s in hold_out([*rows, *rows_of(["a new question"])[:1]], 0.1)[1]}
        assert len({s.id for s in held} - larger) <= 1

    def test_zero_holds_out_nothing(self):
        rows = rows_of(["a", "b"])
        assert hold_out(rows, 0) == (rows, [])

    @pytest.mark.kills("ual/data/split.py", "[contents(message) for", "[message.content for")
    def test_equal_prompts_in_other_white_space_stay_together(self):
        rows = rows_of([text for i in range(20) for text in (f"caf\u00e9 {i}", f" cafe\u0301\n{i}")])
        train, held = hold_out(rows, 0.5)
        numbers = [{sample.prompt[-1].content.split()[-1] for sample in side} for side in (train, held)]
        assert not numbers[0] & numbers[1]

    @given(
        st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30),
        st.floats(0, 1, exclude_min=True, exclude_max=True),
    )
    def test_laws(self, prompts, fraction):
        rows = rows_of(prompts)
        if len(set(prompts)) == 1:
            with pytest.raises(UserError, match=r"1 different prompt"):
                hold_out(rows, fraction)
            return
        train, held = hold_out(rows, fraction)
        assert train
        assert held
        assert not {s.prompt for s in train} & {s.prompt for s in held}
        assert Counter(s.id for s in train + held) == Counter(s.id for s in rows)
        groups = len({s.prompt for s in train})
        assert len(held) >= round(fraction * len(rows)) or groups == 1

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
    def test_a_fraction_outside_the_range(self, fraction):
        with pytest.raises(ValueError, match="eval_fraction"):
            hold_out(rows_of(["a", "b"]), fraction)

    def test_real_rows(self, shared):
        train, held = hold_out(load(str(shared / "data/truthfulqa/finetune_truth.jsonl")), 0.05)
        assert len(held) == pytest.approx(0.05 * 22434, abs=30)
        assert not {s.prompt for s in train} & {s.prompt for s in held}


def test_the_package_needs_neither_torch_nor_transformers():
    code = (
        "import sys, ual.data; assert callable(ual.data.load) and callable(ual.data.Renderer);"
        "loaded = {'torch', 'transformers', 'datasets', 'pyarrow', 'jinja2'} & set(sys.modules);"
        "assert not loaded, loaded;"
        "assert ual.data.Collator(0).pad_token_id == 0 and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import ual.data

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ual.data.nothing


class TestExports:
    """What a file of another tool says beside the turns is trained, or refused."""

    @pytest.mark.kills(
        "ual/data/schema.py", "    said = _with_system(written.get(", "    [].append(written.get("
    )
    @pytest.mark.parametrize(
        "row",
        [
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": CHAT},
            {"messages": [{"role": "system", "content": "Be kind. "}, *CHAT]},
            {"prompt": "q", "completion": "a"},
            {"instruction": "q", "input": "", "output": "a", "history": [["h", "i"]]},
        ],
    )
    def test_a_system_column_is_the_system_turn(self, tmp_path, row):
        path = write_rows(tmp_path / "rows.jsonl", [row | {"system": "Be kind."}])
        [sample] = load(str(path))
        assert [m.content.strip() for m in sample.messages if m.role == "system"] == ["Be kind."]
        assert sample.messages[0].role == "system"
        [(written, again)] = stream(str(path), columns={"prompt": "{{'q'}}", "completion": "{{'a'}}"})
        assert written["messages"][0] == {"role": "system", "content": "Be kind."}
        again_path = write_rows(tmp_path / "again.jsonl", [dict(written)])
        assert load(str(again_path))[0].messages == again.messages

    def test_a_system_column_may_be_mapped_empty_or_not_read(self, tmp_path):
        rows = [
            {"prompt": "q", "completion": "a", "rules": "Be kind.", "system": text} for text in (" ", None)
        ]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        assert [sample.messages[0].content for sample in load(path)] == ["q", "q"]
        assert load(path, columns={"system": "rules"})[0].messages[0].content == "Be kind."
        path = str(write_rows(tmp_path / "rows.jsonl", [row | {"system": 3} for row in rows]))
        assert refusal(path).problem.startswith("2 wrong samples")
        assert load(path, columns={"system": None})[0].messages[0].content == "q"

    @pytest.mark.kills("ual/data/schema.py", "if said[0].content.strip() != given.strip():", "if False:")
    def test_two_system_turns_are_refused(self, tmp_path):
        messages = [{"role": "system", "content": "Be rude."}, *CHAT]
        error = refusal(
            str(write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "system": "Be kind."}]))
        )
        assert error.place.endswith('line 1, field "system"')
        assert error.problem == 'differs from the conversation\'s system turn, got "Be kind."'

    @pytest.mark.kills("ual/data/schema.py", '"weight", "train", "training", "loss")', '"weight")')
    @pytest.mark.parametrize("key", ["train", "training", "loss"])
    def test_marks_that_train_every_turn_are_no_fault(self, tmp_path, key):
        turns = [CHAT[0] | {key: False}, CHAT[1] | {key: True, "weight": 1}]
        assert len(load(str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])))) == 1
        turns = [*turns, CHAT[0], CHAT[1] | {key: False}]
        error = refusal(str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])))
        assert error.place.endswith(f'field "messages[3].{key}"')

    @pytest.mark.kills("ual/data/schema.py", "for column in _MEDIA:", "for column in ():")
    @pytest.mark.parametrize("kind", ["image", "video", "audio"])
    def test_a_conversation_about_an_image_is_refused(self, tmp_path, kind):
        row = {
            "messages": [{"role": "user", "content": f"<{kind}>What is it?"}, CHAT[1]],
            f"{kind}s": ["a.x"],
        }
        error = refusal(str(write_rows(tmp_path / "rows.jsonl", [row])))
        assert error.place.endswith(f'field "{kind}s"')
        assert "only text can be trained" in error.problem
        assert load(str(write_rows(tmp_path / "rows.jsonl", [row | {f"{kind}s": []}])))

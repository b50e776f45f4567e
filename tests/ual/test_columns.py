"""Samples as they are in files: tables, several files, columns by name and template, wrong samples."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.ual.runs import configure, write_rows
from tests.ual.test_meant import invoke, page
from ual.config.run import load as load_config
from ual.config.run import parse
from ual.data import expand, load, stream
from ual.errors import UserError
from ual.pipelines.preview import preview

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SAID = [("user", "hi"), ("assistant", "hello")]
QUIZ = {"context": "A dog", "endings": ["barks.", "sings.", "reads."], "label": 1, "score": 0.25, "uid": "q1"}


def said(sample: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


def table(folder: Path, content: str | bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def one(folder: Path, row: dict[str, Any], **options: Any) -> Any:
    (sample,) = load(str(write_rows(folder / "rows.jsonl", [row])), **options)
    return sample


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    return str(caught.value)


class TestTables:
    @pytest.mark.kills(
        "ual/data/delimited.py", '"utf-8-sig" if number == 1 else', '"utf-8" if number == 1 else'
    )
    @pytest.mark.kills("ual/data/delimited.py", "first = reader.line_num + 1", "first = reader.line_num")
    @pytest.mark.kills("ual/data/delimited.py", "if not any(map(str.strip, record)):", "if not record:")
    def test_what_spreadsheets_write(self, tmp_path: Path) -> None:
        """A byte-order mark, CRLF, quoted line ends, commas and quotes, and empty lines at the end."""
        content = (
            "\ufeffprompt,completion,uncertainty,id,source\r\n"
            '"two\nlines, ""quoted"" \u2028",42,0.50,007,\r\n'
            "\r\n"
            "q,3.10,,8,web\r\n"
            ",,,,\r\n"
            "\r\n"
        )
        for name, raw in (("t.csv", content.encode()), ("t.CSV.gz", gzip.compress(content.encode()))):
            path = table(tmp_path, raw, name)
            first, second = load(path)
            assert said(first) == [("user", 'two\nlines, "quoted" \u2028'), ("assistant", "42")]
            assert (first.uncertainty, first.id, first.source) == (0.5, "007", "")
            assert said(second) == [("user", "q"), ("assistant", "3.10")]
            assert (second.uncertainty, second.id, second.source) == (None, "8", "web")
            assert [first.place, second.place] == [f"{path}, line 2", f"{path}, line 5"]
            assert [sample for _, sample in stream(path)] == [first, second]

    def test_tabs(self, tmp_path: Path) -> None:
        (sample,) = load(table(tmp_path, 'question\tanswer\nWhy, oh why?\ta "b" c\n', "t.tsv"))
        assert said(sample) == [("user", "Why, oh why?"), ("assistant", 'a "b" c')]

    def test_long_cells_and_messages(self, tmp_path: Path) -> None:
        text = json.dumps([*CHAT, {"role": "user", "content": "long " * 40_000}, CHAT[1]])
        (sample,) = load(table(tmp_path, 'messages,tools\n"' + text.replace('"', '""') + '",\n'))
        assert len(sample.messages) == 4

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("prompt,completion\na,b\nc\n", "line 3: expected 2 cells, as in the first line, got 1"),
            ("prompt,completion\na,b,c\n", "line 2: expected 2 cells, as in the first line, got 3"),
            ("prompt,completion,prompt\na,b,c\n", "line 1: the first line names 'prompt' twice"),
            (
                "prompt;completion\na;b\n",
                "line 1: the first line has one column, 'prompt;completion', and ';'",
            ),
            ('prompt,completion\na,b\n"c,d\n\n', "line 3: not a valid table: unexpected end of data"),
            (b"prompt,completion\na,b\nd,caf\xe9", "line 3: not UTF-8: unexpected end of data"),
            (b"prompt,completion\na,b\nd,\xe9a\n", "line 3: not UTF-8: invalid continuation byte"),
            (
                "prompt,completion,uncertainty\na,b,NaN\n",
                'line 2, field "uncertainty": expected a finite num',
            ),
            ("prompt,completion,uncertainty\na,b,high\n", 'expected a finite number, got "high"'),
            ("prompt,completion\n,b\n", 'line 2, field "prompt": the prompt is empty'),
        ],
    )
    def test_faults_name_their_line(self, tmp_path: Path, content: str | bytes, message: str) -> None:
        assert message in refusal(table(tmp_path, content))

    def test_the_unnamed_index_of_pandas_is_no_column(self, tmp_path: Path) -> None:
        (row,) = [row for row, _ in stream(table(tmp_path, ",prompt,completion\n0,a,b\n"))]
        assert row == {"prompt": "a", "completion": "b"}

    @pytest.mark.kills("ual/data/columns.py", 'if cell.lower() in ("true", "false"):', "if False:")
    def test_cells_in_templates_are_what_they_look_like(self, tmp_path: Path) -> None:
        path = table(tmp_path, "x,label,flag,price,zip\nq,1,false,1.50,007\nq,0,True,2.5,1\n")
        columns = {
            "prompt": "{{x}} {{label}} {{flag}} {{price}} {{zip}}",
            "completion": "{{ ['fine', 'wrong'][label] }}{{ '!' if flag }}{{ '1' if label == 1 }}",
            "uncertainty": "{{ 1 - label / 4 }}",
        }
        first, second = load(path, columns=columns)
        assert said(first) == [("user", "q 1 false 1.50 007"), ("assistant", "wrong1")]
        assert said(second) == [("user", "q 0 True 2.5 1"), ("assistant", "fine!")]
        assert [first.uncertainty, second.uncertainty] == [0.75, 1.0]


class TestColumns:
    def test_names_and_templates(self, tmp_path: Path) -> None:
        columns = {
            "prompt": "{{context}} ...",
            "completion": "{{endings[label]}}",
            "id": "uid",
            "source": "{{__file__}}",
            "uncertainty": "{{ 2 * score }}",
            "label_smoothing": "score",
            "sample_weight": "{{ __row__['score'] * 8 }}",
        }
        sample = one(tmp_path, QUIZ, columns=columns)
        assert said(sample) == [("user", "A dog ..."), ("assistant", "sings.")]
        assert (sample.id, sample.source) == ("q1", "rows")
        assert (sample.uncertainty, sample.label_smoothing, sample.sample_weight) == (0.5, 0.25, 2.0)

    @pytest.mark.kills("ual/data/load.py", "meant = not added or ", "meant = True or ")
    def test_what_is_mapped_wins_over_what_is_there(self, tmp_path: Path) -> None:
        row = {"messages": [*CHAT, *CHAT], "instruction": "hi", "output": "hello", "answer": "no", "id": 1.5}
        assert len(one(tmp_path, row | {"id": None}).messages) == 4
        columns = {"prompt": "instruction", "completion": "output", "id": None}
        assert said(one(tmp_path, row, columns=columns)) == SAID
        only_input = {"input": "{{answer}}", "id": None}
        assert said(one(tmp_path, row, columns=only_input))[0] == ("user", "hi\n\nno")
        messages = {"messages": "{{ messages[:2] | tojson }}", "id": None}
        assert said(one(tmp_path, row, columns=messages)) == SAID

    def test_tojson_escapes_nothing(self, tmp_path: Path) -> None:
        row = {"schema": {"a": "<ü> & 'b'"}, "completion": "x"}
        sample = one(tmp_path, row, columns={"prompt": "{{ schema | tojson }}"})
        assert sample.messages[0].content == '{"a": "<ü> & \'b\'"}'

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                {"prompt": "{{contxt}}"},
                "the template \"{{contxt}}\" fails: 'contxt' is undefined; columns: con",
            ),
            (
                {"completion": "{{endings[7]}}"},
                "fails: list object has no element 7; columns: context, endings",
            ),
            (
                {"completion": "{{endings}}"},
                'fails: it prints ["barks.", "sings.", "reads."]; write `or`, an i',
            ),
            ({"completion": "{{nothing}}"}, "fails: it prints null"),
            ({"completion": "{{meta.items}}"}, "fails: it prints a method; write name['key']"),
            ({"completion": "{{ context / 2 }}"}, "fails: unsupported operand"),
            ({"completion": "{{ ''.__class__.__mro__ }}"}, "is unsafe"),
            ({"completion": "{{ endings.append('x') }}"}, "is unsafe"),
            ({"completion": "answr"}, 'no sample of quiz has a column "answr"; got context, endings, label'),
            ({"source": "orign"}, 'no sample of quiz has a column "orign"; got context, endings, label'),
            ({"prompt": "{{context"}, 'the template "{{context" is not valid: unexpected end of template'),
            ({"prompt": "{% if %}"}, "configuration, data.columns.prompt: the template"),
            ({"uncertainty": "{{ context }}"}, 'expected a finite number, got "A dog"'),
        ],
    )
    def test_faults_name_the_template_and_the_columns(
        self, tmp_path: Path, columns: dict[str, str], message: str
    ) -> None:
        path = str(write_rows(tmp_path / "quiz.jsonl", [QUIZ | {"nothing": None, "meta": {}}]))
        full = {"prompt": "context", "completion": "{{endings[label]}}"} | columns
        assert message in refusal(path, columns=full)

    def test_an_unknown_target_has_a_nearest_name(self) -> None:
        raw = {"model": "m", "output_dir": "o", "data": {"train": "t", "columns": {"prmpt": "x"}}}
        with pytest.raises(UserError, match="samples have no column 'prmpt'; did you mean \"prompt\""):
            parse(raw)

    def test_a_missing_number_is_missing(self, tmp_path: Path) -> None:
        columns = {"prompt": "context", "completion": "{{endings[0]}}", "uncertainty": "{{ none_there }}"}
        assert one(tmp_path, QUIZ | {"none_there": None}, columns=columns).uncertainty is None
        rows = [QUIZ, {k: v for k, v in QUIZ.items() if k != "score"}]
        found = load(
            str(write_rows(tmp_path / "rows.jsonl", rows)),
            columns=columns | {"id": None, "uncertainty": "score"},
        )
        assert [sample.uncertainty for sample in found] == [0.25, None]


class TestSeveralFiles:
    def test_lists_and_patterns(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x"}])
        table(tmp_path, "instruction,output\nc,x\n", "c.csv")
        parquet.write_table(pa.Table.from_pylist([{"question": "d", "answer": "x"}]), tmp_path / "d.parquet")
        names = [str(tmp_path / "*.jsonl"), str(tmp_path / "d.parquet"), str(tmp_path / "c.csv")]
        found = load(names, columns={"source": "{{__file__}}"})
        assert [sample.messages[0].content for sample in found] == ["a", "b", "d", "c"]
        assert [sample.source for sample in found] == ["a", "b", "d", "c"]
        assert found[1].place == f"{tmp_path / 'b.jsonl'}, line 1"
        assert [Path(name).name for name in expand(names)] == ["a.jsonl", "b.jsonl", "d.parquet", "c.csv"]
        assert len(load([str(tmp_path / "**" / "[ab].jsonl")])) == 2
        brackets = write_rows(tmp_path / "x[1].jsonl", [{"prompt": "e", "completion": "x"}])
        assert len(load(str(brackets))) == 1

    @pytest.mark.kills("ual/data/load.py", "if twice := [", "if twice := 0 and [")
    def test_faults(self, tmp_path: Path) -> None:
        row = {"prompt": "q", "completion": "x", "id": 1}
        first, second = (str(write_rows(tmp_path / f"{n}.jsonl", [row])) for n in "ab")
        assert f"'1' is already the id of {first}, line 1" in refusal([first, second])
        assert len(load([first, second], columns={"id": "{{__file__}}-{{id}}"})) == 2
        assert "the file is named twice" in refusal([first, str(tmp_path / "*.jsonl")])
        said = refusal(str(tmp_path / "*.csv"))
        assert "no file matches this pattern" in said
        assert "a.jsonl, b.jsonl" in said
        write_rows(
            tmp_path / "b.jsonl", [{"prompt": "", "completion": "x"}, {"prompt": "y", "completion": ""}]
        )
        said = refusal([first, second])
        assert f"{first}, {second}: 2 wrong samples:" in said
        assert f'{second}, line 2, field "completion": the response is empty' in said

    def test_a_run_of_several_files_records_each(self, tmp_path: Path, tiny: Path) -> None:
        rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(8)]
        for name, part in (("x", rows[:4]), ("y", rows[4:])):
            write_rows(tmp_path / f"{name}.jsonl", part)
        data = {
            "train": [str(tmp_path / "x.jsonl"), str(tmp_path / "y.json?")],
            "columns": {"source": "{{__file__}}"},
        }
        config = configure(tmp_path, tiny, [], data=data, loss="sft", training={"max_steps": 1})
        invoke("train", config)
        recorded = json.loads((tmp_path / "run/environment.json").read_text())["data_sha256"]
        assert [Path(path).name for path in recorded] == ["x.jsonl", "y.jsonl"]
        assert "`x.jsonl`, `y.json?`" in (tmp_path / "run/adapter/README.md").read_text()
        assert preview(load_config(config)).sources == {"x": 4, "y": 4}
        resume = ["train", config, "--resume", "training.max_steps=2"]
        other = tmp_path / "y.jsonx"
        other.write_text("")
        assert "y.jsonx (data.train[2])" in invoke(*resume, code=2)
        other.unlink()
        write_rows(tmp_path / "y.jsonl", rows[3:])
        assert "y.jsonl (data.train[1])" in invoke(*resume, code=2)


WRONG = [
    {"prompt": "a", "completion": ""},
    {"prompt": "", "completion": "b"},
    {"prompt": "c", "completion": " "},
    {"messages": CHAT},
    {"prompt": "d", "completion": "e", "id": "r1"},
    {"prompt": "f", "completion": "g", "uncertainty": float("nan")},
]
RIGHT = [{"prompt": f"q{i}", "completion": f"a{i}", "id": f"r{i}", "uncertainty": i} for i in range(6)]
REASONS = {
    "completion: the response is empty": 2,
    "prompt: the prompt is empty": 1,
    "prompt: is missing": 1,
    "id: it is the id of an earlier sample": 1,
    "uncertainty: expected a finite number": 1,
    "invalid JSON": 1,
}


class TestInvalid:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = write_rows(tmp_path / "mixed.jsonl", [*RIGHT, *WRONG])
        path.write_text("{\n" + path.read_text())
        return path

    @pytest.mark.kills("ual/data/load.py", "self._dropped[fault.reason] += 1", "self._dropped[''] += 1")
    def test_dropped_samples_are_counted_by_reason(self, path: Path) -> None:
        for read in (load, lambda *a, **k: [sample for _, sample in stream(*a, **k)]):
            dropped = Counter[str]()
            assert [s.id for s in read(str(path), invalid="drop", dropped=dropped)] == [
                r["id"] for r in RIGHT
            ]
            assert dropped == REASONS

    def test_the_refusal_names_the_remedy(self, path: Path) -> None:
        said = refusal(str(path))
        assert "7 wrong samples; the first 5:" in said
        assert 'set data.invalid to "drop"' in said

    @pytest.mark.kills(
        "ual/data/load.py", "if self.count and not (self.drops and good):", "if not self.drops:"
    )
    def test_nothing_left_is_an_error_with_the_faults(self, tmp_path: Path) -> None:
        path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 2))
        said = refusal(path, invalid="drop")
        assert "2 wrong samples" in said
        assert 'field "completion": the response is empty' in said
        path = str(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 2))
        assert "no columns to make a conversation of" in refusal(path, invalid="drop")
        path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": None}, *RIGHT]))
        assert len(load(path, invalid="drop")) == 6

    @pytest.mark.kills("ual/pipelines/samples.py", "Counter(rendered.read.dropped)", "Counter()")
    def test_screen_preview_and_page(self, path: Path, tmp_path: Path, tiny: Path) -> None:
        held = write_rows(tmp_path / "held.jsonl", [{"prompt": "h", "completion": "h"}, WRONG[0]])
        data = {"train": str(path), "eval": str(held), "invalid": "drop"}
        config = configure(tmp_path, tiny, [], data=data, uncertainty="column", training={"max_steps": 1})
        screen = invoke("train", config)
        assert "2 samples dropped: completion: the response is empty (data.invalid: drop)" in screen
        assert "1 sample dropped: held out, completion: the response is empty (data.invalid: drop)" in screen
        shown = page(tmp_path / "run")
        assert "completion: the response is empty (data.invalid: drop) 2" in shown
        found = preview(load_config(config))
        assert found.dropped["completion: the response is empty (data.invalid: drop)"] == 2
        assert "not trained: completion: the response is empty (data.invalid: drop) 2" in invoke(
            "preview", config
        )
        streaming = ["data.streaming=true", "data.overlong=drop", f"output_dir={tmp_path / 'stream'}"]
        screen = invoke("train", config, *streaming)
        assert "2 samples dropped: completion: the response is empty (data.invalid: drop)" in screen
        assert "completion: the response is empty (data.invalid: drop) 2" in page(tmp_path / "stream")
        assert preview(load_config(config, streaming)).dropped == found.dropped


class TestMessages:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("human", "gpt"), ("user", "chatgpt"), ("User", "ASSISTANT"), ("human", "bard"),
            ("human", "bing"), ("user", "model"), (" Human ", "GPT"),
        ],
    )  # fmt: skip
    def test_roles_of_sharegpt_exports(self, tmp_path: Path, first: str, second: str) -> None:
        turns = [{"from": first, "value": "hi"}, {"from": second, "value": "hello"}]
        assert said(one(tmp_path, {"conversations": turns})) == SAID

    def test_calls_of_sharegpt_exports(self, tmp_path: Path) -> None:
        call = {"name": "add", "arguments": {"a": 1}}
        turns = [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "function", "value": "2"},
            {"from": "gpt", "value": "hello"},
        ]
        sample = one(tmp_path, {"conversations": turns})
        roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
        assert [message.role for message in sample.messages] == roles
        assert sample.messages[2].tool_calls == ({"type": "function", "function": call},)
        assert sample.messages[2].content == ""
        assert len(sample.messages[4].tool_calls) == 2
        turns[2]["value"] = "add(1)"
        path = str(write_rows(tmp_path / "rows.jsonl", [{"conversations": turns}]))
        assert 'field "conversations[2].value": expected the JSON of a function call' in refusal(path)

    def test_content_in_parts(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "h", "image_url": None}, {"type": "input_text", "text": "i"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": ["hel", "lo"]}]
        assert said(one(tmp_path, {"messages": turns})) == SAID
        assert said(one(tmp_path, {"prompt": turns[:1], "completion": "hello"})) == SAID

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            (
                [{"type": "image_url", "image_url": {"url": "x"}}],
                "part 0 is of type 'image_url': only text can",
            ),
            (
                [{"type": "text", "text": "a"}, {"type": "image"}],
                "part 1 is of type 'image': only text can be",
            ),
            ([{"type": "text"}], 'expected {"type": "text", "text": ...} as part 0'),
            ([3], 'expected {"type": "text", "text": ...} as part 0'),
            ([], 'field "messages[0].content": the prompt is empty'),
            ([{"type": "text", "text": "\ud83d"}], "surrogates not allowed"),
        ],
    )
    def test_parts_that_are_no_text_are_refused(self, tmp_path: Path, parts: list[Any], message: str) -> None:
        turns = [{"role": "user", "content": parts}, CHAT[1]]
        path = str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]))
        said = refusal(path)
        assert message in said
        assert 'field "messages[0].content' in said

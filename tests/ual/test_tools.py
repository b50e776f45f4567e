"""Samples with tools: their tools reach the template, or are refused, from every kind of file."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from ual.data import Renderer, load
from ual.errors import UserError

SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
CALL = {"id": "1", "function": {"name": "add", "arguments": {"a": 2}}}
ROW = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "tools": [SCHEMA],
}
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }} {{ m.tool_call_id }}{% endif %}]"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "[/{{ m.role }}]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def renderer(tokenizer: Any, folder: Path, template: str = TEMPLATE, **options: Any) -> Renderer:
    path = folder / "template.jinja"
    path.write_text(template)
    return Renderer(tokenizer, chat_template=str(path), max_length=512, context_length=512, **options)


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"tools": json.dumps([SCHEMA])}) + "\n")
    return path


def as_parquet(folder: Path) -> Path:
    """Arrow fills in the keys that one struct has and another lacks, with null."""
    path = folder / "rows.parquet"
    other = {"type": "function", "function": {"name": "sub", "strict": True}}
    parquet.write_table(pa.Table.from_pylist([ROW, ROW | {"tools": [other]}]), path)
    return path


@pytest.mark.kills("ual/data/template.py", '"tools": list(tools) or None', '"tools": None')
@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_every_word_of_a_tool_row_is_rendered_and_the_assistants_trained(
    write: Any, tokenizer: Any, tmp_path: Path
) -> None:
    first, second = load(str(write(tmp_path)))
    assert json.loads(json.dumps(first.tools)) == [SCHEMA]
    assert second.tools[0]["function"]["name"] in ("add", "sub")
    assert first.messages[1].tool_calls == ({"type": "function", **CALL},)
    assert (first.messages[2].name, first.messages[2].tool_call_id) == ("add", "1")
    row = renderer(tokenizer, tmp_path).render(first)
    assert row is not None
    text = tokenizer.decode(row.input_ids)
    for piece in ("<tools>", '"name": "add"', "[tool add 1]", "<call>", "It is 4."):
        assert piece in text
    runs, last = [], -100
    for label in row.labels:
        if label != -100:
            runs = [*runs, [label]] if last == -100 else [*runs[:-1], [*runs[-1], label]]
        last = label
    said = [tokenizer.decode(run).replace(" ", "") for run in runs]
    assert said[0].startswith("<call>")
    assert '"a":2' in said[0]
    assert said[-1].startswith("Itis4.")
    assert len(said) == 2
    assert "<tools>" in renderer(tokenizer, tmp_path).render_prompt(first)


@pytest.mark.kills("ual/data/render.py", "        self.template.check_shown(sample)\n", "")
@pytest.mark.parametrize(
    ("template", "field"),
    [
        (TEMPLATE.replace("{% if tools %}", "{% if nothing %}"), "tools"),
        (TEMPLATE.replace("m.tool_calls or []", "[]"), "tool_calls"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(
    template: str, field: str, tokenizer: Any, tmp_path: Path
) -> None:
    (first, _) = load(str(as_jsonl(tmp_path)))
    with pytest.raises(UserError, match=f"does not show the sample's {field}"):
        renderer(tokenizer, tmp_path, template).render(first)


def test_tools_are_part_of_a_rows_identity(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW | {"tools": []})))
    with_tools, without = load(str(path))
    assert with_tools.id.partition("-")[0] != without.id.partition("-")[0]


def test_a_system_prompt_for_rows_that_have_none(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "mine"}, *chat]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (chat, own)))
    render = renderer(tokenizer, tmp_path, system_prompt="Be brief.")
    bare, with_own = (tokenizer.decode(render.render(s).input_ids) for s in load(str(path)))
    assert "Be brief." in bare
    assert "Be brief." not in with_own
    assert "mine" in with_own
    assert "Be brief." in render.render_prompt(load(str(path))[0])


@pytest.mark.kills("ual/data/render.py", "_assistant(sample)[-1:]", "_assistant(sample)[:1]")
@pytest.mark.parametrize("template", ["chatml", None])
def test_only_the_last_turn_may_be_trained(template: str | None, tokenizer: Any, tmp_path: Path) -> None:
    """With a template that marks turns, and with one that does not."""
    path = tmp_path / "rows.jsonl"
    chat = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n")
    (sample,) = load(str(path))
    trained = {}
    for which in ("all", "last"):
        made = (
            Renderer(tokenizer, chat_template=template, context_length=512, train_on=which)
            if template
            else renderer(tokenizer, tmp_path, train_on=which)
        )
        row = made.render(sample)
        trained[which] = tokenizer.decode([label for label in row.labels if label != -100])
    assert "one" in trained["all"]
    assert "two" in trained["all"]
    assert "one" not in trained["last"]
    assert "two" in trained["last"]


def load_calls(folder: Path, *calls: Any) -> Any:
    path = folder / "rows.jsonl"
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n"))
    return load(str(path))[0]


@pytest.mark.kills(
    "ual/data/schema.py", '"arguments": arguments}}', '"arguments": function.get("arguments")}}'
)
@pytest.mark.parametrize("arguments", [{"a": 2, "note": None}, {}, {"a": {"b": [1.0, "é\u2028"]}}])
@pytest.mark.parametrize("flat", [False, True])
def test_arguments_as_json_are_those_of_the_object(arguments: Any, flat: bool, tmp_path: Path) -> None:
    function = {"name": "add", "arguments": json.dumps(arguments)}
    sample = load_calls(tmp_path, function if flat else {"id": "1", "function": function})
    assert sample.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": arguments}
    assert sample.messages[1].tool_calls[0]["type"] == "function"


def test_the_form_of_arguments_changes_neither_the_id_nor_the_key(tmp_path: Path, tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    written = {"type": "function", "function": {"name": "add", "arguments": '{ "a" :2}'}}
    plain, decoded = load_calls(tmp_path, call), load_calls(tmp_path, written)
    assert (plain.id, plain.messages) == (decoded.id, decoded.messages)
    other = load_calls(tmp_path, {"function": {"name": "add", "arguments": '{"a": 3}'}})
    assert other.id != plain.id


@pytest.mark.parametrize("empty", ["", " ", None])
def test_a_call_without_arguments_has_none(empty: Any, tmp_path: Path) -> None:
    sample = load_calls(tmp_path, {"function": {"name": "now", "arguments": empty}})
    assert sample.messages[1].tool_calls[0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.kills("ual/data/schema.py", "json.loads(written, parse_constant=refuse)", "json.loads(written)")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('{"a": 2', "invalid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[2]", "expected an object, or its JSON, got"),
        (json.dumps('{"a": 2}'), "expected an object, or its JSON, got"),
        (3, "expected an object, or its JSON, got 3"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        load_calls(tmp_path, {"function": {"name": "add", "arguments": arguments}})
    assert str(caught.value.place).endswith(
        'rows.jsonl, line 1, field "messages[1].tool_calls[0].function.arguments"'
    )


@pytest.mark.parametrize("call", [{"function": {"arguments": "{}"}}, {"function": "add"}, {"name": ""}])
def test_a_call_without_a_name_is_refused(call: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected"):
        load_calls(tmp_path, call)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_three_names(key: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "hm"}]
    other = [chat[0], {"role": "assistant", "content": "a", key: "ah"}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (chat, other)))
    first, second = load(str(path))
    assert first.messages[1].reasoning_content == "hm"
    assert first.id.partition("-")[0] != second.id.partition("-")[0]
    chat[0][key] = "hm"
    path.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(UserError, match="only the assistant reasons"):
        load(str(path))


def test_two_reasonings_of_one_turn_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    said = {"role": "assistant", "content": "a", "thinking": "hm", "reasoning_content": "ah"}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, said]}) + "\n")
    with pytest.raises(UserError, match="differs from reasoning_content"):
        load(str(path))

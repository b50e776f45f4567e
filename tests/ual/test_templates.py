"""Stock chat templates x kinds of conversations: the right tokens are trained, or a way out works."""

import copy
import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ual.data import Renderer
from ual.data.schema import turns
from ual.data.template import ChatTemplate
from ual.data.turns import each_turn
from ual.errors import UserError
from ual.records import Message, Sample


class Stock(NamedTuple):
    """What is publicly known of a model's format, beside its template."""

    header: str  # begins an assistant turn
    end: str  # ends one; EOS if the template writes no end
    eos: str
    stops: tuple[str, ...] = ()  # of generation_config.json, beside EOS


CHATML = Stock("<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>", ("<|endoftext|>",))
LLAMA = Stock(
    "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>", ("<|eom_id|>",)
)
GEMMA = Stock("<start_of_turn>model\n", "<end_of_turn>", "<eos>", ("<end_of_turn>",))
PHI = Stock("<|assistant|>\n", "<|end|>", "<|endoftext|>", ("<|end|>", "<|assistant|>"))
BAR = "\uff5c"
DEEPSEEK = Stock(f"<{BAR}Assistant{BAR}>", f"<{BAR}end▁of▁sentence{BAR}>", f"<{BAR}end▁of▁sentence{BAR}>")
COHERE = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
TEMPLATES = {
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "qwen3_instruct_2507": CHATML,
    "qwen3_vl": CHATML,
    "qwen3_5_think": CHATML,
    "qwen3_5_nothink": CHATML,
    "qwen3_8": CHATML,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "phi3": PHI,
    "phi3_5": PHI,
    "gptoss": Stock("<|start|>assistant", "<|return|>", "<|return|>", ("<|call|>",)),
    "glm4moe": Stock("<|assistant|>", "", "<|endoftext|>", ("<|user|>", "<|observation|>")),
    "cohere": Stock(COHERE, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Stock(COHERE, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": DEEPSEEK,
    "deepseek_r1_distill": DEEPSEEK,
    "lfm2": CHATML,
    "lfm2_v2": CHATML,
    "lfm2_2_5": CHATML,  # has {% generation %} blocks that end with a line feed
    "nemotron_3_nano": CHATML,
}


def call(number: int) -> dict[str, Any]:
    """Return a call as OpenAI's API writes it."""
    function = {"name": "add", "arguments": json.dumps({"a": number, "why": "für dich"})}
    return {"id": f"c{number}", "type": "function", "function": function}


def say(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


ASK, ANSWER = say("user", "One?"), say("assistant", "First answer.")
AGAIN = [say("user", "Two?"), say("assistant", "Second answer.")]
RESULT = say("tool", "The sum.", name="add", tool_call_id="c2")
DONE = say("assistant", "All done.")
KINDS = {
    "single": [ASK, ANSWER],
    "multi": [ASK, ANSWER, *AGAIN],
    "system": [say("system", "Be kind."), ASK, ANSWER, *AGAIN],
    "calls": [ASK, say("assistant", None, tool_calls=[call(2)]), RESULT, DONE],
    "call last": [ASK, say("assistant", None, tool_calls=[call(2)])],
    "call with text": [ASK, say("assistant", "Let me add.", tool_calls=[call(2)]), RESULT, DONE],
    "call with reasoning": [
        ASK, say("assistant", None, tool_calls=[call(2)], reasoning_content="Sum it."), RESULT, DONE,
    ],
    "parallel calls": [
        ASK, say("assistant", None, tool_calls=[call(2), call(3)]), RESULT,
        say("tool", "Another sum.", name="add", tool_call_id="c3"), DONE,
    ],
    "reasoning": [ASK, say("assistant", "First answer.", reasoning_content="Hmm, so.")],
    "inline reasoning": [ASK, say("assistant", "<think>\nHmm, so.\n</think>\n\nFirst answer.")],
    "reasoning earlier": [
        ASK, say("assistant", "First answer.", reasoning_content="Hmm, so."),
        say("user", "Two?"), say("assistant", "Second answer.", reasoning_content="Well, then."),
    ],
    "empty reasoning": [ASK, say("assistant", "<think>\n\n</think>\n\nFirst answer.")],
    "consecutive": [ASK, ANSWER, say("assistant", "Second answer.")],
    "assistant first": [say("assistant", "Welcome!"), ASK, ANSWER],
}  # fmt: skip
SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "A number."}},
            "required": ["a"],
        },
    },
}


def stock(name: str) -> str:
    found = importlib.util.find_spec("trl")  # not imported: it needs packages that are not installed
    if found is None or found.origin is None:
        pytest.skip("needs the chat templates of the package trl: pip install --no-deps trl")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str) -> Any:
    """Return a tokenizer of bytes, and of the markers in a template."""
    about, text = TEMPLATES[name], stock(name)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token=about.eos)
    kinds = rf"<\|[\w/]+\|>|<{BAR}[^{BAR}]+{BAR}>|<(?:start|end)_of_turn>|</?(?:think|tool_call)>"
    markers = re.findall(kinds, text)
    found.add_tokens(sorted({*markers, *about.stops, "<|im_start|>", "<|im_end|>"}), special_tokens=True)
    found.chat_template = text
    return found


@cache
def renderer(name: str, train_on: str, template: str | None = None, thinking: bool | None = None) -> Renderer:
    return Renderer(
        tokenizer(name),
        chat_template=template,
        chat_template_kwargs={} if thinking is None else {"enable_thinking": thinking},
        stop_ids=tokenizer(name).convert_tokens_to_ids(list(TEMPLATES[name].stops)),
        max_length=100_000,
        train_on=train_on,  # type: ignore[arg-type]
    )


def sample(kind: str) -> Sample:
    tools = (SCHEMA,) if "call" in kind else ()
    return Sample("s", tuple(turns(KINDS[kind], "messages")), place="rows.jsonl, line 3", tools=tools)


class Made(NamedTuple):
    """What a renderer made of a sample: text before each run of loss tokens, and the run."""

    text: str
    runs: list[tuple[str, str]]


def made(by: Renderer, of: Sample) -> Made:
    rendered = by.render(of)
    assert rendered is not None
    tokens, runs = by.tokenizer, []
    ids, labels = rendered.input_ids.tolist(), rendered.labels.tolist()
    for i, label in enumerate(labels):
        assert label in (ids[i], -100)
        if label != -100 and (i == 0 or labels[i - 1] == -100):
            end = next((j for j in range(i, len(ids)) if labels[j] == -100), len(ids))
            runs.append((tokens.decode(ids[:i]), tokens.decode(ids[i:end])))
    return Made(tokens.decode(ids), runs)


def without_reasoning(content: str) -> str:
    return content.partition("</think>")[2].strip() or content


def inference(name: str, of: Sample, k: int, **options: Any) -> tuple[str, str]:
    """Return the prompt of turn k, and what the model must write after it, by apply_chat_template alone."""
    about = TEMPLATES[name]
    chat = copy.deepcopy([message.as_dict() for message in of.messages])
    if name.startswith("deepseek"):  # these templates, and servers for them, write the JSON of arguments
        for function in (c["function"] for message in chat for c in message.get("tool_calls", ())):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    render = tokenizer(name).apply_chat_template
    options = {"tools": list(of.tools) or None, "tokenize": False, **options}
    through = render(chat[: k + 1], **options)
    before = through.rindex(without_reasoning(chat[k - 1]["content"])) if k else 0
    if k:
        prompt = render(chat[:k], add_generation_prompt=True, **options)
    else:  # transformers renders no prompt without messages
        prompt = through[: through.index(about.header) + len(about.header)]
    if name.startswith("deepseek") and of.messages[k - 1].role == "tool":
        opened, reply = "", through[before:].partition(f"<{BAR}tool▁outputs▁end{BAR}>")[2]
    else:
        _, _, opened = prompt.rpartition(about.header)
        reply = through[through.index(about.header, before) + len(about.header) :]
    if not reply.startswith(opened):  # a template that drops the reasoning of every turn
        reply = of.messages[k].content + about.eos
    reply = reply.removeprefix(opened)
    following = of.messages[k + 1].role if k + 1 < len(of.messages) else ""
    if not about.end:  # GLM stops with the token that begins the next turn
        begins = {"user": "<|user|>", "tool": "<|observation|>", "assistant": "", "": about.eos}
        return prompt, reply + begins[following]
    end = "<|call|>" if name == "gptoss" and of.messages[k].tool_calls else about.end
    return prompt, reply[: reply.index(end) + len(end)]


def check(name: str, of: Sample, train_on: str, thinking: bool | None = None) -> None:
    """Each turn's loss tokens are what the model must write, after the prompt of inference."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    found = made(renderer(name, train_on, None, thinking), of)
    asked = [k for k, message in enumerate(of.messages) if message.role == "assistant"]
    wanted = [inference(name, of, k, **options) for k in (asked if train_on == "all" else asked[-1:])]
    assert found.runs == wanted
    assert found.text == "".join(wanted[-1])
    for k, (_, run) in zip(reversed(asked), reversed(wanted), strict=False):
        for said in re.split("</?think>", of.messages[k].content):
            assert said.strip() in run
        assert of.messages[k].reasoning_content in run
        for made_call in of.messages[k].tool_calls:
            assert "für dich" in run
            assert str(made_call["function"]["arguments"]["a"]) in run


def check_chatml(name: str, of: Sample, train_on: str) -> None:
    """The format of Hermes and Qwen, written out."""
    runs = made(renderer(name, train_on, "chatml"), of).runs
    wanted = []
    for message in of.messages:
        if message.role != "assistant":
            continue
        thought = f"<think>\n{message.reasoning_content}\n</think>\n\n" if message.reasoning_content else ""
        numbers = [made_call["function"]["arguments"]["a"] for made_call in message.tool_calls]
        arguments = [f'{{"a": {number}, "why": "für dich"}}' for number in numbers]
        calls = "\n".join(
            f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>' for written in arguments
        )
        apart = "\n" if calls and message.content else ""
        wanted.append(f"{thought}{message.content}{apart}{calls}<|im_end|>")
    if TEMPLATES[name].eos != "<|im_end|>":
        wanted[-1] += TEMPLATES[name].eos
    assert [run for _, run in runs] == (wanted if train_on == "all" else wanted[-1:])


def follow(name: str, way: str, of: Sample, train_on: str) -> None:
    """Do what the remedy says, and check the result."""
    thinking = None
    for step in way.split(" and "):
        if step == 'set data.chat_template to "chatml"':
            return check_chatml(name, of, train_on)
        if step in ('set data.train_on to "each"', 'set data.train_on to "last"'):
            train_on = step.split('"')[1]
        elif match := re.fullmatch(r"set data.chat_template_kwargs to {enable_thinking: (true|false)}", step):
            thinking = match[1] == "true"
        elif step in EDITS:
            of = replace(of, messages=tuple(turns(EDITS[step](KINDS[of.id]), "messages")))
        elif step == "describe the tools in the system turn":
            continue
        else:
            assert step == "remove `tools`"
            of = replace(of, tools=())
    for part in each_turn([of]) if train_on == "each" else [of]:
        check(name, part, "all" if train_on == "all" else "last", thinking)
    return None


def _inline(message: dict[str, Any]) -> dict[str, Any]:
    thought = message.get("reasoning_content")
    return message if not thought else say(
        "assistant", f"<think>\n{thought}\n</think>\n\n{message['content'] or ''}",
        tool_calls=message.get("tool_calls"),
    )  # fmt: skip


def _apart(message: dict[str, Any]) -> dict[str, Any]:
    thought, closed, content = (message["content"] or "").partition("</think>")
    return message if not closed else say(
        "assistant", content.strip(), reasoning_content=thought.removeprefix("<think>").strip()
    )  # fmt: skip


def _empty(message: dict[str, Any]) -> dict[str, Any]:
    if (
        message["role"] != "assistant"
        or message.get("reasoning_content")
        or "<think>" in str(message["content"])
    ):
        return message
    return message | {"content": f"<think>\n\n</think>\n\n{message['content'] or ''}"}


EDITS: dict[str, Any] = {
    "write the reasoning into the content, as <think>...</think>": lambda chat: list(map(_inline, chat)),
    "write the reasoning into reasoning_content": lambda chat: list(map(_apart, chat)),
    r'begin the responses with "<think>\n\n</think>\n\n", an empty reasoning': lambda c: list(map(_empty, c)),
    "move the text of the system turn into the first user turn": lambda chat: [
        say("user", f"{chat[0]['content']}\n\n{chat[1]['content']}"), *chat[2:]
    ],
    "join consecutive assistant turns": lambda chat: [
        chat[0], say("assistant", "\n\n".join(message["content"] for message in chat[1:]))
    ],
}  # fmt: skip
TOOLS = [kind for kind in KINDS if "call" in kind]
REFUSED = {  # kinds that are refused: for either choice of turns, and if all are trained
    "qwen2_5": (["reasoning", "reasoning earlier"], ["call with reasoning", "assistant first"]),
    "qwen3": (
        [],
        [
            "multi",
            "system",
            "calls",
            "call with text",
            "parallel calls",
            "reasoning earlier",
            "assistant first",
        ],
    ),
    "qwen3_instruct_2507": (["reasoning", "reasoning earlier"], ["call with reasoning", "assistant first"]),
    "qwen3_vl": (["reasoning", "reasoning earlier"], ["call with reasoning", "assistant first"]),
    "qwen3_5_think": ([], ["multi", "system", "reasoning earlier", "assistant first"]),
    "qwen3_5_nothink": (
        ["reasoning", "inline reasoning", "reasoning earlier"],
        ["multi", "system", "call with reasoning", "assistant first"],
    ),
    "qwen3_8": (["inline reasoning", "empty reasoning"], ["assistant first"]),
    "llama3": ([*TOOLS, "reasoning", "reasoning earlier"], ["assistant first"]),
    "llama3_1": (
        ["parallel calls", "reasoning", "reasoning earlier"],
        ["call with text", "call with reasoning", "assistant first"],
    ),
    "llama3_2": (
        ["parallel calls", "reasoning", "reasoning earlier"],
        ["call with text", "call with reasoning", "assistant first"],
    ),
    "gemma": ([*TOOLS, "system", "reasoning", "reasoning earlier", "consecutive", "assistant first"], []),
    "gemma3": ([*TOOLS, "reasoning", "reasoning earlier", "consecutive", "assistant first"], []),
    "phi3": ([*TOOLS, "reasoning", "reasoning earlier"], ["assistant first"]),
    "phi3_5": ([*TOOLS, "reasoning", "reasoning earlier"], ["assistant first"]),
    "gptoss": (
        ["parallel calls"],
        ["multi", "system", "reasoning earlier", "consecutive", "assistant first"],
    ),
    "glm4moe": ([], ["reasoning earlier", "assistant first"]),
    "cohere": ([*TOOLS, "reasoning", "reasoning earlier", "consecutive", "assistant first"], []),
    "cohere2": ([*TOOLS, "reasoning", "reasoning earlier", "consecutive", "assistant first"], []),
    "deepseekv3": (
        [
            *TOOLS,
            "single",
            "multi",
            "system",
            "reasoning",
            "reasoning earlier",
            "consecutive",
            "assistant first",
        ],
        [],
    ),
    "deepseek_r1_distill": (
        [
            *TOOLS,
            "single",
            "multi",
            "system",
            "reasoning",
            "reasoning earlier",
            "consecutive",
            "assistant first",
        ],
        [],
    ),
    "lfm2": ([*TOOLS, "reasoning", "reasoning earlier"], ["assistant first"]),
    "lfm2_v2": (["reasoning", "reasoning earlier"], ["call with reasoning", "assistant first"]),
    "lfm2_2_5": ([], ["reasoning earlier"]),
    "nemotron_3_nano": (
        [*TOOLS, "single", "multi", "system", "consecutive", "assistant first"],
        ["reasoning earlier"],
    ),
}


@pytest.mark.kills("ual/data/template.py", "if any(message.tool_calls for message in messages):", "if False:")
def test_a_template_that_joins_the_arguments_of_a_call_gets_their_json(tmp_path: Path) -> None:
    """Such as DeepSeek's: '...' + call.function.arguments raises an error for an object."""
    path = tmp_path / "joining.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}{% endfor %}"
    )
    calls = ({"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},)
    messages = [Message("user", "1 + 1?"), Message("assistant", "", tool_calls=calls)]
    assert ChatTemplate(tokenizer("qwen3"), str(path)).render(messages)[0] == '1 + 1?add {"a": 1}'


@pytest.mark.kills(
    "ual/data/render.py",
    "if self._markers.any_in(closing) and not self._markers.any_in(closed):",
    "if False:",
    only="gptoss-multi-all",
)
@pytest.mark.kills(
    "ual/data/render.py",
    "if turn is not None and text.endswith(turn):",
    "if False:",
    only="gptoss-call with reasoning-last",
)
@pytest.mark.kills(
    "ual/data/render.py",
    "if text.endswith(self._closing):",
    "if False:",
    only="deepseekv3-inline reasoning-all",
)
@pytest.mark.kills(
    "ual/data/render.py",
    'if "<think>" in message.content and region',
    "if False and region",
    only="qwen3_8-inline reasoning-all",
)
@pytest.mark.kills(
    "ual/data/template.py",
    "if not all(word in text for word in words):",
    "if False:",
    only="gptoss-parallel calls-last",
)
@pytest.mark.kills(
    "ual/data/remedies.py", " and _works(made_by, changed, _EACH in way)", "", only="qwen3-multi-all"
)
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_right_tokens_or_a_way_out_that_works(name: str, kind: str, train_on: str) -> None:
    of = replace(sample(kind), id=kind)
    always, if_all = REFUSED[name]
    if kind not in always and (kind not in if_all or train_on == "last"):
        check(name, of, train_on)
        return
    with pytest.raises(UserError) as caught:
        renderer(name, train_on).render(of)
    assert caught.value.place == "rows.jsonl, line 3"
    assert caught.value.remedy
    for way in caught.value.remedy.split(", or "):
        follow(name, way, of, train_on)

"""Separate a model's reasoning from its answer, where a server returns both in one text."""

import re
from collections.abc import Sequence

_TAGS = "think|thinking|thought|thoughts|reasoning|seed:think"
_OPENING = re.compile(rf"\s*(?:<(?:{_TAGS})>|\[THINK\]|◁think▷)", re.IGNORECASE)
_CLOSING = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]|◁/think▷", re.IGNORECASE)
_UNOPENED = re.compile(r"(?<![`\"'])(?:</(?:seed:)?think>|\[/THINK\]|◁/think▷)", re.IGNORECASE)


def split(text: str) -> tuple[str, str]:
    r"""Return the reasoning before an answer, and the answer.

    A block without its end is reasoning. Some chat templates open the block in the prompt, so the text may
    contain only its end.

    >>> split("<think>2 + 2 is 4.</think>\n\n0.9"), split("It is 4.\n</think>\n0.9")
    (('2 + 2 is 4.', '0.9'), ('It is 4.', '0.9'))
    >>> split("<think>2 + 2"), split("0.9")
    (('2 + 2', ''), ('', '0.9'))
    """
    opened = _OPENING.match(text)
    begin = opened.end() if opened else 0
    closed = _CLOSING.search(text, begin) if opened else _UNOPENED.search(text)
    if not closed:
        return (text[begin:].strip(), "") if opened else ("", text)
    reasoning, answer = text[begin : closed.start()].strip(), text[closed.end() :].lstrip()
    if _OPENING.match(answer):
        further, answer = split(answer)
        reasoning = f"{reasoning}\n\n{further}"
    return reasoning, answer


def answer_begins(tokens: Sequence[str]) -> int:
    """Return the index of the first token of the answer; 0 without reasoning, the number of tokens if none.

    Blank tokens between reasoning and answer do not belong to the answer.
    """
    text = "".join(tokens)
    reasoning, answer = split(text)
    if not reasoning and answer == text:
        return 0
    begins, at = len(text) - len(answer), 0
    for index, token in enumerate(tokens):
        if at + len(token) > begins and answer:
            return index
        at += len(token)
    return len(tokens)

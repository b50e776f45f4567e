"""Read a number from a model's reply, or the reason why there is none. A parser never invents a number.

A number counts if it is the complete reply, if it follows a label ("Confidence: 70 %"), or if it is the value
of the requested JSON key. A number in a sentence does not count: "I am 80 % sure that it is wrong" states a
different probability. Two different numbers give no value.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ual.uncertainty.protocol import NO_ANSWER, Reply

Reason = Literal[
    "empty",
    "refusal",
    "truncated",
    "no answer within the token limit",
    "no number",
    "several numbers",
    "out of range",
    "ambiguous",
    "in a sentence",
]

_LONGEST = 20_000  # characters read; the length of a reply is the server's choice
_DECIMAL = r"[+-]?(?:\d{1,15}(?:[.,]\d{0,15})?|[.,]\d{1,15})(?:[eE][+-]?\d{1,3})?"
_PERCENT = r"%|٪|per ?cent|prozent|pour ?cent|por ?ciento|per ?cento|por ?cento|процент\w{0,2}|パーセント"
_SHARE = rf"(?:/|out of|von|sur|de)\s*(?P<whole>{_DECIMAL})"
_QUANTITY = rf"(?P<number>{_DECIMAL})\s*(?:(?P<percent>{_PERCENT})|{_SHARE})?"
_OPENING = " \t\r\n*_`\"'“”„«»([<~≈:"
_CLOSING = " \t\r\n*_`\"'“”„«»)]>.!;。"
_ALONE = re.compile(_QUANTITY, re.IGNORECASE)
_LINES = re.IGNORECASE | re.MULTILINE
_PROBABILITY_LABELS = (
    r"probability|confidence|p|p\(true\)|wahrscheinlichkeit|konfidenz|probabilité|confiance|probabilidad|"
    r"confianza|probabilità|confidenza|probabilidade|confiança|вероятность|уверенность|概率|置信度|確率|確信度"
)
_SCORE_LABELS = r"score|uncertainty|rating|answer|punktzahl|note|puntuación|punteggio|оценка|评分|分数|スコア"


@dataclass(frozen=True, slots=True)
class Parsed:
    """A value, or None and the reason."""

    value: float | None
    reason: Reason | None = None


def probability(text: str | None, *, truncated: bool = False, key: str = "probability") -> Parsed:
    """Read a probability: 0, 1, .5, 0,5, 1e-3, 50 %, 50/100, 1 out of 2.

    Args:
        text: the reply; None for a refusal.
        truncated: the reply was cut off, so a number at its end may lack digits.
        key: the JSON key whose value counts, if the text is a JSON object.

    Returns:
        A value in [0, 1], or the reason. A bare number above 1 is out of range, not a percentage.

    >>> [probability(t).value for t in ("0", "1", ".5", "50 %", "50/100", "Confidence: 50%", "85")]
    [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, None]
    >>> probability("between 20 % and 40 %").reason
    'several numbers'
    """
    return _read(text, truncated, key, _PROBABILITY_LABELS, _unit)


def integer(text: str | None, *, low: int, high: int, truncated: bool = False, key: str = "score") -> Parsed:
    """Read an integer from `low` to `high`: 7, 7.0, 7/9 (for high = 9), "Score: 7", {"score": 7}.

    >>> integer("7", low=0, high=9).value, integer("7/10", low=0, high=9).value
    (7.0, None)
    """

    def on_the_scale(match: re.Match[str]) -> float | Reason:
        value = _decimal(match["number"])
        if isinstance(value, str):
            return value
        whole = _decimal(match["whole"]) if match["whole"] else high
        if match["percent"] or whole != high or value != int(value) or not low <= value <= high:
            return "out of range"
        return value

    return _read(text, truncated, key, _SCORE_LABELS, on_the_scale)


def yes_or_no(text: str | None) -> bool | None:
    """Read the first word of a reply as yes or no; None if it is neither.

    >>> yes_or_no("Yes."), yes_or_no("**no**, because"), yes_or_no("Not at all"), yes_or_no("yes or no?")
    (True, False, None, None)
    """
    words = re.findall(r"\w+", _clean(text or "").casefold())[:3]
    verdicts = {"yes": True, "true": True, "no": False, "false": False}
    if not words or words[0] not in verdicts or words[1:2] == ["or"]:
        return None
    return verdicts[words[0]]


def why_no_text(reply: Reply) -> str:
    """Return why a reply has no complete answer."""
    if reply.text is None:
        return "refusal"
    return NO_ANSWER if reply.unanswered else "truncated" if reply.truncated else "empty"


def why_no_tokens(reply: Reply) -> str | None:
    """Return why a reply has no first token to read; None if it has one."""
    if reply.answer_tokens and any(token.alternatives for token in reply.tokens):
        return None
    return NO_ANSWER if reply.unanswered else "no log-probabilities"


def last_number(text: str) -> str | None:
    r"""Return the final number of a worked answer: after "####" or "answer is", or else the last number.

    >>> last_number("3 + 4 = 7 eggs\n#### 1,007"), last_number("The answer is $5. I am 90 % sure")
    ('1,007', '5')
    """
    text = " ".join(_clean(text).split())
    number = r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,15})(?:\.\d{1,15})?"
    for marker in ("#### ?", "answer(?: is)? ?:? ?", ""):
        found = re.findall(rf"{marker}[$€£]? ?({number})", text, re.IGNORECASE)
        if found:
            return str(found[-1])
    return None


def option(text: str, letters: str) -> str | None:
    """Return the only option letter that a reply names, alone or after "answer".

    >>> option("B", "ABCD"), option("The answer is (C).", "ABCD"), option("A or B", "ABCD")
    ('B', 'C', None)
    """
    text = _unwrap(" ".join(_clean(text).split()))
    alone = re.match(rf"\(?([{letters}])\)?(?:[.:)\s]|$)", text)
    labeled = set(re.findall(rf"answer(?: is)? ?:? ?\(?([{letters}])\b", text, re.IGNORECASE))
    if len(labeled) == 1:
        return str(labeled.pop()).upper()
    others = set(re.findall(rf"\b([{letters}])\b", text))
    return alone[1] if alone and len(others) == 1 else None


def _read(
    text: str | None,
    truncated: bool,
    key: str,
    labels: str,
    value_of: Callable[[re.Match[str]], float | Reason],
) -> Parsed:
    if text is None:
        return Parsed(None, "refusal")
    text = _clean(text)
    if not text.strip():
        return Parsed(None, NO_ANSWER if truncated else "empty")
    candidates = _candidates(text, key, labels)
    if not candidates:
        if truncated:
            return Parsed(None, "truncated")
        count = len(set(re.findall(_DECIMAL, text)))
        return Parsed(None, "several numbers" if count > 1 else "in a sentence" if count else "no number")
    if truncated and any(end >= len(text.rstrip()) for _, end in candidates):
        return Parsed(None, "truncated")
    values = {value_of(match) for match, _ in candidates}
    if len(values) > 1:
        return Parsed(None, "several numbers")
    value = values.pop()
    return Parsed(None, value) if isinstance(value, str) else Parsed(value)


def _candidates(text: str, key: str, labels: str) -> list[tuple[re.Match[str], int]]:
    """Return the quantities that the text states, with their end in the text."""
    alone = _unwrap(text)
    if match := _ALONE.fullmatch(alone):
        return [(match, text.rindex(alone[-1]) + 1)]
    value = _json_value(text[max(text.find("{"), 0) : text.rfind("}") + 1], key)
    if value is not None:
        match = _ALONE.fullmatch(value)
        return [(match, 0)] if match else []  # a closed object is not truncated
    stated = []
    for found in re.finditer(rf"^\W{{0,8}}(?:{labels})\W{{0,8}}?(?:[:=]|\bis\b)(.*)$", text, _LINES):
        match = _ALONE.fullmatch(_unwrap(found[1]))
        if match is None:  # a label without a quantity makes the reply ambiguous
            return []
        stated.append((match, found.end()))
    return stated


def _json_value(text: str, key: str) -> str | None:
    """Return the text of a number in a JSON object; None if it is no number, or given twice."""
    given: list[object] = []

    def collect(pairs: list[tuple[str, object]]) -> None:
        given[:] = [value for name, value in pairs if name == key]

    try:
        json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError):
        return None
    if len(given) != 1 or isinstance(given[0], bool | list | dict | None):
        return None
    return str(given[0]).strip()


def _unwrap(text: str) -> str:
    return text.lstrip(_OPENING).rstrip(_CLOSING)


def _unit(match: re.Match[str]) -> float | Reason:
    value = _decimal(match["number"])
    whole = 100.0 if match["percent"] else _decimal(match["whole"]) if match["whole"] else 1.0
    if isinstance(value, str) or isinstance(whole, str):
        return "ambiguous"
    if not whole > 0:
        return "out of range"
    value /= whole
    return value if 0 <= value <= 1 else "out of range"


def _decimal(written: str) -> float | Reason:
    """Read a number; a comma is the decimal separator unless it may separate thousands."""
    whole, comma, digits = written.partition(",")
    if comma and len(digits) == 3 and whole.lstrip("+-") != "0":
        return "ambiguous"
    value = float(written.replace(",", "."))
    return value if math.isfinite(value) else "out of range"


def _clean(text: str) -> str:
    return unicodedata.normalize("NFKC", text[:_LONGEST])

"""A parser reads stated numbers, and never invents one."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ual.uncertainty.estimators.parsing import integer, last_number, option, probability, yes_or_no


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0), ("1", 1.0), (".5", 0.5), ("0.5", 0.5), ("0.5.", 0.5), ("1.", 1.0), ("0,5", 0.5), ("0,125", 0.125),
        ("50 %", 0.5), ("50%", 0.5), ("50％", 0.5), ("50 percent", 0.5), ("70 Prozent", 0.7), ("80 pour cent", 0.8),
        ("٥٠٪", 0.5), ("50/100", 0.5), ("1/2", 0.5), ("3 out of 4", 0.75), ("1e-3", 0.001), ("100 %", 1.0),
        ("**0.7**", 0.7), ("<0.9>", 0.9), ("(80%)", 0.8), ("`0.3`", 0.3), ("\n 0.4 \n", 0.4),
        ("Probability: 0.7", 0.7), ("**Confidence**: 70%", 0.7), ("probability is 0.4", 0.4), ("P(True) = 0.4", 0.4),
        ("Wahrscheinlichkeit: 70 %", 0.7), ("置信度：80%", 0.8), ("Уверенность: 0,9", 0.9),
        ("There are 3 apples.\nProbability: 0.9", 0.9),
        ('{"probability": 0.25}', 0.25), ('```json\n{"probability": "25%"}\n```', 0.25),
    ],
)  # fmt: skip
def test_probabilities_that_were_stated(text: str, value: float) -> None:
    assert probability(text).value == pytest.approx(value)


@pytest.mark.kills(
    "ual/uncertainty/estimators/parsing.py",
    '    return value if 0 <= value <= 1 else "out of range"',
    "    return value % 1",
)
@pytest.mark.kills(
    "ual/uncertainty/estimators/parsing.py", "    if len(values) > 1:", "    if len(values) > 9:"
)
@pytest.mark.kills(
    "ual/uncertainty/estimators/parsing.py", "if comma and len(digits) == 3", "if comma and len(digits) == 9"
)
@pytest.mark.kills(
    "ual/uncertainty/estimators/parsing.py",
    "        if match is None:  # a label",
    "        if False:  # a label",
)
@pytest.mark.kills("ual/uncertainty/estimators/parsing.py", "    if len(given) != 1 or", "    if")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "refusal"), ("", "empty"), ("  \n", "empty"),
        ("very likely", "no number"), ("I'm sorry, I can't help with that.", "no number"), ("nan", "no number"),
        ("inf", "no number"), ("fifty percent", "no number"),
        ("I am 80% sure that it is wrong", "in a sentence"), ("I cannot give 1 answer", "in a sentence"),
        ("As of 2021 I do not know", "in a sentence"), ("I'd say maybe 0.5ish", "in a sentence"),
        ("between 20 % and 40 %", "several numbers"), ("0.2 0.3", "several numbers"), ("60-70%", "several numbers"),
        ("Probability: 0.2\nProbability: 0.8", "several numbers"),
        ("Confidence: between 0.6 and 0.7", "several numbers"),
        ('{"probability": 0.1, "probability": 0.9}', "several numbers"),
        ("85", "out of range"), ("-0.5", "out of range"), ("5/4", "out of range"), ("120 %", "out of range"),
        ("5/0", "out of range"), ("1,000", "ambiguous"),
    ],
)  # fmt: skip
def test_what_states_no_probability_says_why(text: str | None, reason: str) -> None:
    assert (probability(text).value, probability(text).reason) == (None, reason)


@pytest.mark.kills(
    "ual/uncertainty/estimators/parsing.py",
    "if truncated and any(end >= len(text.rstrip())",
    "if truncated and any(end > len(text)",
)
def test_a_number_at_the_end_of_a_truncated_reply_is_not_read() -> None:
    assert probability("0.1", truncated=True).reason == "truncated"
    assert probability("I think that", truncated=True).reason == "truncated"
    assert probability("Probability: 0.1\nBecause it", truncated=True).value == 0.1
    assert probability('{"probability": 0.1} and', truncated=True).value == 0.1
    assert integer('{"score": 1', low=0, high=9, truncated=True).value is None


@given(st.text(max_size=200))
@example("1" * 400)
@example("0" + "," * 50)
@example("{" * 100)
def test_any_text_gives_a_probability_or_a_reason(text: str) -> None:
    parsed = probability(text)
    assert (parsed.value is None) != (parsed.reason is None)
    assert parsed.value is None or 0 <= parsed.value <= 1
    score = integer(text, low=0, high=9)
    assert score.value is None or score.value in range(10)


@given(st.text(alphabet=st.characters(exclude_categories=["Nd", "Nl", "No"]), max_size=200))
def test_no_number_comes_from_a_text_without_digits(text: str) -> None:
    assert probability(text).value is None
    assert integer(text, low=0, high=9).value is None
    assert last_number(text) is None


@given(
    st.decimals(0, 1, places=4),
    st.sampled_from(["{}", "**{}**", "Confidence: {}", '{{"probability": {}}}', " {}\n"]),
)
def test_what_is_stated_is_what_is_read(value: object, form: str) -> None:
    assert probability(form.format(value)).value == pytest.approx(float(str(value)))


@given(st.integers(0, 100), st.sampled_from(["{}%", "{} %", "{}/100", "{} out of 100", "Confidence: {} %"]))
def test_percentages(value: int, form: str) -> None:
    assert probability(form.format(value)).value == pytest.approx(value / 100)


@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True),
    st.sampled_from([" ", " or ", " to ", "\n", "; "]),
)
def test_two_different_numbers_are_none(values: list[int], between: str) -> None:
    assert probability(between.join(f"{v}%" for v in values)).value is None
    assert integer(between.join(map(str, values)), low=0, high=99).value is None


@pytest.mark.parametrize(
    "text", ["." * 20_000, "{" * 20_000, " " * 20_000, "1," * 9_000, "confidence: " * 1_500, "\n" * 20_000]
)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    started = time.monotonic()
    probability(text)
    integer(text, low=0, high=9)
    last_number(text)
    option(text, "ABCD")
    yes_or_no(text)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("7.0", 7), ("7/9", 7), ("Score: 7", 7), ('{"score": 7}', 7), ("**7**", 7), ("10", None), ("-1", None),
        ("7.5", None), ("7/10", None), ("70%", None), ("seven", None), ("7 or 8", None), ('{"score": true}', None),
        ('{"score": null}', None), ('{"other": 7}', None), (None, None),
    ],
)  # fmt: skip
def test_scores(text: str | None, value: float | None) -> None:
    assert integer(text, low=0, high=9).value == value


def test_options_and_last_numbers() -> None:
    assert option("(B)", "ABCD") == "B"
    assert option("The answer is C.", "ABCD") == "C"
    assert option("Answer: A, not B. The answer is A", "ABCD") == "A"
    assert option("The answer is A. No, the answer is B.", "ABCD") is None
    assert option("A or B", "ABCD") is None
    assert option("E", "ABCD") is None
    assert last_number("it costs $1,234.50 in all") == "1,234.50"
    assert last_number("so 12\n#### 7\nI used 3 steps") == "7"
    assert last_number("none") is None

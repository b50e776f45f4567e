"""Each estimator on recorded replies: its value, its evidence, and None if no value can be read."""

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from ual.errors import UserError
from ual.records import Elicited, Message, Sample
from ual.uncertainty import estimators
from ual.uncertainty.estimators.registry import ESTIMATORS, build, discover
from ual.uncertainty.protocol import NO_ANSWER, Reply, Request, Token

SAMPLE = Sample("1", (Message("user", "What is 2 + 2?"), Message("assistant", "4")), uncertainty=0.7)
CHOICE = Sample(
    "2",
    (Message("user", "Which is a fruit?\nA. rock\nB. apple\nC. lamp"), Message("assistant", "B")),
)


def elicit(
    spec: dict[str, Any], reply: Callable[[Request], Reply], sample: Sample = SAMPLE
) -> tuple[Elicited, list[Request]]:
    (estimator,) = build([spec])
    asked: list[Request] = []

    async def ask(request: Request) -> Reply:
        asked.append(request)
        return reply(request)

    return asyncio.run(estimator.estimate(sample, ask)), asked


def in_turn(*texts: str | None) -> Callable[[Request], Reply]:
    return lambda request: Reply(texts[request.draw])


def tokens(*parts: tuple[str, Sequence[tuple[str, float]]]) -> tuple[Token, ...]:
    """Build tokens from (text, [(alternative, probability)])."""
    return tuple(
        Token(text, 0.0, tuple((alternative, math.log(p)) for alternative, p in likely))
        for text, likely in parts
    )


@pytest.mark.kills(
    "ual/uncertainty/estimators/judge.py",
    "sum(i * m for i, m in enumerate(mass)) / total",
    "sum(i * m for i, m in enumerate(mass))",
)
def test_a_judge_uses_the_expected_score_over_the_token_that_states_it() -> None:
    likely = [("3", 0.5), ("5", 0.3), ("high", 0.2)]
    said = tokens(('{"', []), ("score", []), ('":', []), (" 3", likely), ("}", []))
    found, (request,) = elicit({"name": "judge"}, lambda _: Reply('{"score": 3}', tokens=said))
    assert found.value == pytest.approx((0.5 * 3 + 0.3 * 5) / 0.8 / 9)
    assert found.evidence["mass"] == pytest.approx(0.8)
    assert request.json_schema is not None
    assert request.temperature == 0
    assert "What is 2 + 2?" in request.messages[0].content
    assert "<response>\n4\n</response>" in request.messages[0].content


def test_a_judge_without_log_probabilities_uses_the_written_score() -> None:
    found, _ = elicit({"name": "judge"}, lambda _: Reply('{"score": 6}'))
    assert found.value == pytest.approx(6 / 9)
    split = tokens(("1", [("1", 0.9)]), ("0", [("0", 0.9)]))
    found, _ = elicit({"name": "judge", "high": 10}, lambda _: Reply("10", tokens=split))
    assert found.value == 1.0  # a number of two tokens has no expected value


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("no idea"), "no number"),
        (Reply(None), "refusal"),
        (Reply("12"), "out of range"),
        (Reply("7", "length"), "truncated"),
    ],
)
def test_a_judge_invents_no_score(reply: Reply, reason: str) -> None:
    found, _ = elicit({"name": "judge"}, lambda _: reply)
    assert found.value is None
    assert found.evidence["unparsed"] == reason
    assert found.evidence["reply"] == reply.text


def test_a_judge_can_read_its_first_token() -> None:
    spec = {"name": "judge", "read": "first_token", "max_tokens": 1}
    found, _ = elicit(spec, lambda _: Reply("I", tokens=tokens(("I", [("I", 0.6), ("9", 0.3), ("0", 0.1)]))))
    assert found.value == pytest.approx(0.75)
    assert found.evidence["mass"] == pytest.approx(0.4)
    found, _ = elicit(spec, lambda _: Reply("I", tokens=tokens(("I", [("I", 0.6)]))))
    assert found.value is None


def test_verbalised_confidence_in_one_stage() -> None:
    found, asked = elicit({"name": "verbalised"}, lambda _: Reply("80 %"))
    assert found.value == pytest.approx(0.2)
    assert len(asked) == 1
    found, _ = elicit({"name": "verbalised"}, lambda _: Reply("80"))
    assert found.value is None


def test_verbalised_confidence_in_two_stages_shows_the_models_own_answer() -> None:
    replies = iter([Reply("It is five."), Reply("0.1")])
    found, (first, second) = elicit({"name": "verbalised", "stages": 2}, lambda _: next(replies))
    assert found.value == pytest.approx(0.9)
    assert first.messages == SAMPLE.prompt
    assert second.messages[1] == Message("assistant", "It is five.")
    assert "4" in second.messages[2].content
    found, asked = elicit({"name": "verbalised", "stages": 2}, lambda _: Reply(None))
    assert (found.value, found.evidence["unparsed"], len(asked)) == (None, "refusal", 1)


def test_self_consistency_is_the_entropy_of_the_answers() -> None:
    spec = {"name": "self_consistency", "samples": 5, "answer": "last_number"}
    texts = ["... 18", "it is 18.0", "#### 18", "26 #### 4", "18 eggs"]
    found, asked = elicit(spec, in_turn(*texts))
    assert found.value == pytest.approx(0.500, abs=1e-3)  # 4 of 5 alike
    assert found.evidence["answers"] == {"18": 4, "4": 1}
    assert [request.draw for request in asked] == [0, 1, 2, 3, 4]
    assert {request.temperature for request in asked} == {1.0}


def test_unreadable_answers_are_a_class_or_leave_no_value() -> None:
    spec = {"name": "self_consistency", "samples": 4, "answer": "text"}
    found, _ = elicit(spec, in_turn("a", "A.", "", None))
    assert found.value == pytest.approx(math.log(2))
    assert found.evidence["unparsed_answers"] == 2
    found, _ = elicit(spec | {"unparsed": "drop_question"}, in_turn("a", "A.", "", None))
    assert found.value is None
    found, _ = elicit(spec, lambda _: Reply("cut", "length"))
    assert found.value is None
    assert found.evidence["first_unparsed"] == "cut"


def entailing(pairs: set[tuple[str, str]], answers: Sequence[str]) -> Callable[[Request], Reply]:
    def reply(request: Request) -> Reply:
        text = request.messages[0].content
        if "<first_answer>" not in text:
            return Reply(answers[request.draw])
        first, second = (
            text.partition(f"<{place}_answer>\n")[2].partition("\n</")[0] for place in ("first", "second")
        )
        return Reply("Yes." if (first, second) in pairs else "No")

    return reply


@pytest.mark.kills(
    "ual/uncertainty/estimators/semantic_entropy.py",
    "for first, second in ((a, b), (b, a)):",
    "for first, second in ((a, b),):",
)
def test_semantic_entropy_clusters_by_entailment_in_both_directions() -> None:
    spec = {"name": "semantic_entropy", "samples": 4}
    both = {("Paris", "It is Paris"), ("It is Paris", "Paris")}
    answers = ["Paris", "It is Paris", "Paris", "Rome"]
    found, _ = elicit(spec, entailing(both, answers))
    assert found.value == pytest.approx(0.5623, abs=1e-4)  # 3 and 1
    found, _ = elicit(spec, entailing({("Paris", "It is Paris")}, answers))
    assert found.value == pytest.approx(1.0397, abs=1e-4)  # 2, 1 and 1: one direction is not enough


def test_semantic_entropy_by_a_classifier() -> None:
    def reply(request: Request) -> Reply:
        if request.task == "generate":
            return Reply(["yes", "yeah", "no"][request.draw])
        alike = all("ye" in message.content.rpartition(" ")[2] for message in request.messages)
        return Reply("", scores={"entailment": 0.5 if alike else 0.1, "neutral": 0.4, "contradiction": 0.1})

    found, asked = elicit({"name": "semantic_entropy", "samples": 3, "entailment": "nli"}, reply)
    assert found.value == pytest.approx(0.6365, abs=1e-4)
    pair = next(request for request in asked if request.task == "entail").messages
    assert pair[0].content == "What is 2 + 2? yes"


def test_paraphrase_asks_each_wording() -> None:
    def reply(request: Request) -> Reply:
        content = request.messages[-1].content
        if content.startswith("Reword"):
            return Reply(f"Wording {request.draw}")
        return Reply("5" if content == "Wording 2" else "4")

    found, asked = elicit({"name": "rewording", "wordings": 4, "answer": "last_number"}, reply)
    assert found.value == pytest.approx(0.5623, abs=1e-4)
    assert found.evidence["wordings"] == ["What is 2 + 2?", "Wording 1", "Wording 2", "Wording 3"]
    assert len(asked) == 7
    found, _ = elicit({"name": "rewording"}, lambda _: Reply(None))
    assert found.value is None


@pytest.mark.kills(
    "ual/uncertainty/estimators/paraphrase.py",
    "return normalize(texts[letters.index(letter)])",
    "return letter",
)
def test_options_are_permuted_and_answers_mapped_back() -> None:
    spec = {"name": "rewording", "by": "permute_options", "wordings": 5}

    def finds_the_apple(request: Request) -> Reply:
        line = next(l for l in request.messages[-1].content.splitlines() if "apple" in l)
        return Reply(f"The answer is {line[0]}.")

    found, asked = elicit(spec, finds_the_apple, CHOICE)
    assert found.value == 0
    assert found.evidence["answers"] == {"apple": 5}
    assert len({request.messages for request in asked}) == 5
    found, _ = elicit(spec, lambda _: Reply("A"), CHOICE)  # prefers the first place, so contradicts itself
    assert found.value is not None
    assert found.value > 0.9
    found, _ = elicit(spec, lambda _: Reply("apple"), CHOICE)
    assert found.value == 0
    found, asked = elicit(spec, lambda _: Reply("A"), SAMPLE)
    assert (found.value, asked) == (None, [])


@pytest.mark.kills(
    "ual/uncertainty/estimators/paraphrase.py",
    "match[0][: match.start(2) - match.start()] + next(following)",
    "match[0].replace(match[2], next(following), 1)",
)
def test_an_option_that_is_its_own_letter_keeps_its_label() -> None:
    question = "Which vitamin?\nA. A\nB. C\nC. B"
    spec = {"name": "rewording", "by": "permute_options", "wordings": 6}
    sample = Sample("v", (Message("user", question), Message("assistant", "A")))
    _, asked = elicit(spec, lambda _: Reply("A"), sample)
    seen = {request.messages[-1].content for request in asked}
    assert seen == {f"Which vitamin?\nA. {a}\nB. {b}\nC. {c}" for a, b, c in permutations("ABC")}


def test_p_true_reads_only_the_first_token() -> None:
    said = tokens(("A", [("A", 0.3), (" B", 0.2), ("C", 0.5), ("B", 0.1)]))
    found, (request,) = elicit({"name": "p_true"}, lambda _: Reply("A", tokens=said))
    assert found.value == pytest.approx(0.5)
    assert request.max_tokens == 1
    for reply in (Reply("A"), Reply("A", tokens=tokens(("C", [("C", 0.5)])))):
        found, _ = elicit({"name": "p_true"}, lambda _, reply=reply: reply)  # type: ignore[misc]
        assert found.value is None


DISTRIBUTION = "ual/uncertainty/estimators/answer_distribution.py"
VERDICTS = [
    ("Yes", 0.5),
    (" no", 0.2),
    ("yes", 0.1),
    ("no", 0.05),
    ("\n", 0.04),
    ("</s>", 0.03),
    ("\ufffd", 0.01),
]


@pytest.mark.kills(DISTRIBUTION, "found.get(text, 0.0) + ", "", only="all")
@pytest.mark.kills(DISTRIBUTION, "not _NO_ANSWER.fullmatch(text)", "True", only="all")
@pytest.mark.kills(DISTRIBUTION, "text in self.options if self.options", "False if False", only="options")
@pytest.mark.kills(DISTRIBUTION, "dict.fromkeys(self.options or (), 0.0)", "{}", only="options")
@pytest.mark.kills(DISTRIBUTION, "p / mass for", "p for", only="options")
@pytest.mark.parametrize(
    ("options", "masses"),
    [
        ({}, {"Yes": 0.5, "no": 0.25, "yes": 0.1}),
        ({"options": ["no", " Yes ", "maybe"]}, {"Yes": 0.5, "no": 0.25, "maybe": 0.0}),
    ],
    ids=["all", "options"],
)
def test_answers_and_their_probabilities(options: dict[str, Any], masses: dict[str, float]) -> None:
    """Equal texts are added up, what is no answer is left out, and the rest is renormalized."""
    spec = {"name": "answer_distribution", **options}
    found, (request,) = elicit(spec, lambda _: Reply("Yes", tokens=tokens((" Yes", VERDICTS))))
    total = sum(masses.values())
    shares = {text: p / total for text, p in masses.items()}
    assert found.evidence["label_distribution"] == pytest.approx(shares)
    assert list(found.evidence["label_distribution"]) == list(shares)  # the likeliest first
    assert sum(found.evidence["label_distribution"].values()) == pytest.approx(1, abs=1e-15)
    assert found.evidence["label_mass"] == pytest.approx(total)
    assert found.value == pytest.approx(-sum(p * math.log(p) for p in shares.values() if p))
    assert (request.messages, request.top_logprobs, request.temperature) == (SAMPLE.prompt, 20, 0.0)


@pytest.mark.kills(DISTRIBUTION, "not first_only and (why", "False and (why")
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("Yes, it is", tokens=tokens(("Yes", VERDICTS), (",", []), (" it", []))), "several tokens"),
        (Reply("Yes", "length", tokens=tokens(("Yes", VERDICTS))), "several tokens"),  # it may continue
        (Reply("Yesterday", tokens=tokens(("Yes", VERDICTS), ("terday", []))), "several tokens"),
        (Reply("Yes"), "no log-probabilities"),
        (Reply(None, tokens=tokens(("Yes", VERDICTS))), "refusal"),
        (Reply("", tokens=tokens(("\n", VERDICTS))), "empty"),
        (Reply("<think>hm", "length", tokens=tokens(("<think>", []), ("hm", VERDICTS))), NO_ANSWER),
    ],
    ids=["several", "truncated", "part", "no tokens", "refusal", "empty", "thinking"],
)
def test_a_reply_that_is_not_one_token_has_no_distribution(reply: Reply, reason: str) -> None:
    found, _ = elicit({"name": "answer_distribution"}, lambda _: reply)
    assert (found.value, found.evidence["unparsed"]) == (None, reason)
    assert "label_distribution" not in found.evidence


def test_the_first_token_of_any_reply_can_be_read() -> None:
    spec = {"name": "answer_distribution", "read": "first_token", "options": ["A", "B"]}
    said = tokens(("A", [("A", 0.6), (" B", 0.2), ("The", 0.2)]))
    found, (request,) = elicit(spec, lambda _: Reply("A", "length", tokens=said))
    assert found.evidence["label_distribution"] == pytest.approx({"A": 0.75, "B": 0.25})
    assert (request.max_tokens, found.evidence["label_mass"]) == (1, pytest.approx(0.8))
    found, _ = elicit(spec, lambda _: Reply("C", "length", tokens=tokens(("C", [("C", 1.0)]))))
    assert (found.value, found.evidence["unparsed"]) == (None, "no answer among the likeliest tokens")
    assert found.evidence["label_mass"] == 0


def test_an_answer_after_reasoning_is_read() -> None:
    said = tokens(("<think>", []), ("hm", [("hm", 1.0)]), ("</think>", []), ("B", [("B", 0.9), ("A", 0.1)]))
    found, _ = elicit({"name": "answer_distribution"}, lambda _: Reply("<think>hm</think>B", tokens=said))
    assert found.evidence["label_distribution"] == pytest.approx({"B": 0.9, "A": 0.1})


@pytest.mark.kills(DISTRIBUTION, 'if last.role != "user":', "if False:")
def test_an_instruction_is_added_to_the_prompt() -> None:
    spec = {"name": "answer_distribution", "instruction": "Say yes or no."}
    _, (request,) = elicit(spec, lambda _: Reply("Yes"))
    assert request.messages == (Message("user", "What is 2 + 2?\n\nSay yes or no."),)
    turns = (*SAMPLE.prompt, Message("tool", "4"))
    _, (request,) = elicit(spec, lambda _: Reply("Yes"), Sample("3", (*turns, Message("assistant", "4"))))
    assert request.messages == (*turns, Message("user", "Say yes or no."))


def test_wrong_options_of_a_distribution_are_named() -> None:
    for options, fault in (
        (["A"], "options: expected a list of at least two texts, or null, got"),
        (["A", "A "], "distinct"),
        (["A", " "], "not blank"),
        ([True, False], "expected texts, got True; YAML needs quotes around yes, no"),
        ("AB", "expected a list of at least two texts"),
    ):
        with pytest.raises(UserError, match=fault):
            build([{"name": "answer_distribution", "options": options}])


def test_white_box_and_column() -> None:
    scores = {"nll": 1.5, "tokens": 3, "mean_entropy": 0.5, "max_entropy": 2.0, "mean_margin": 4.0}
    for measure, value in (("nll", 1.5), ("max_entropy", 2.0), ("mean_margin", -4.0)):
        found, (request,) = elicit(
            {"name": "white_box", "measure": measure}, lambda _: Reply("", scores=scores)
        )
        assert found.value == value
        assert (request.task, request.messages) == ("score", SAMPLE.messages)
    found, _ = elicit({"name": "white_box"}, lambda _: Reply(""))
    assert found.value is None
    found, asked = elicit({"name": "column"}, lambda _: Reply(""))
    assert (found.value, asked) == (0.7, [])


def test_the_registry_refuses_unknown_names_and_options() -> None:
    for spec, fault in (
        ("juge", 'did you mean "judge"'),
        ({"name": "judge", "hihg": 5}, 'did you mean "high"'),
        ({"name": "judge", "high": 0}, "high"),
        ({"name": "self_consistency", "samples": 1}, "samples"),
    ):
        with pytest.raises(UserError, match=fault):
            build([spec])  # type: ignore[list-item]
    with pytest.raises(UserError, match="label"):
        build(["judge", {"name": "judge", "high": 5}])
    two = build(["judge", {"name": "judge", "high": 5, "label": "coarse"}])
    assert [estimator.label for estimator in two] == ["judge", "coarse"]
    assert all(kind.__doc__ for kind in ESTIMATORS.values())


def test_a_new_file_is_a_new_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coin.py").write_text(
        "from typing import Literal\nfrom ual.uncertainty.protocol import Estimator\n"
        'class Coin(Estimator):\n    name: Literal["coin"] = "coin"\n'
    )
    monkeypatch.setattr(estimators, "__path__", [*estimators.__path__, str(tmp_path)])
    assert discover().keys() == ESTIMATORS.keys() | {"coin"}
    assert ESTIMATORS.keys() == {
        "answer_distribution", "column", "judge", "p_true", "rewording",
        "self_consistency", "semantic_entropy", "verbalised", "white_box",
    }  # fmt: skip

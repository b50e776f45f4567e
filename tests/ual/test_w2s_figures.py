"""Figures of a weak-to-strong study, recomputed by hand from a few answers."""

import math
from typing import Any

import pytest

from ual.config.weak_to_strong import WeakToStrongConfig
from ual.data.tasks import Item
from ual.pipelines.weak_to_strong.arms import measure
from ual.pipelines.weak_to_strong.figures import Found
from ual.pipelines.weak_to_strong.questions import Gold, Split

OPTIONS = ("red", "green", "blue")
RUN = {"model": "some/model", "training": {"max_steps": 500, "per_device_train_batch_size": 4}}


def item(id: str, gold: str | None = None, subject: str = "") -> Item:
    return Item(id, f"Which {id}?", OPTIONS, gold, "", subject, "here")


def found(
    answers: dict[str, dict[int, str]], asked: dict[int, dict[str, str]] | None = None, **sections: Any
) -> Found:
    """Return what was found: "1101" are rights and wrongs of a model's answers to test questions.

    `asked` are the weak supervisor's answers to questions by seed: letters of options, or "-".
    """
    arms = [name for name in answers if not name.startswith("supervisor")]
    raw = {"task": "sciq", "data": {"train": "a", "test": "b"}, "weak": RUN, "strong": RUN, "arms": arms}
    seeds = sorted({seed for of in answers.values() for seed in of} | set(asked or {}))
    config = WeakToStrongConfig.model_validate(raw | {"output_dir": "x", "seeds": seeds} | sections)
    count = len(next(iter(next(iter(answers.values())).values())))
    test = [item(f"t{i}", "red") for i in range(count)]
    ids = [*next(iter(asked.values()))] if asked else []
    unsupervised = [item(id, subject="even" if i % 2 == 0 else "odd") for i, id in enumerate(ids)]
    made = Found(config, "choice", Split([], unsupervised, test, {id: Gold("red", "") for id in ids}, {}))
    for name, of in answers.items():
        for seed, rights in of.items():
            made.answers.setdefault(name, {})[seed] = {
                one.id: {"value": "red" if right == "1" else "blue", "mass": 0.9}
                for one, right in zip(test, rights, strict=True)
            }
            made.metrics.setdefault(name, {})[seed] = {
                "trained_rows": 3, "trained_tokens": 6.0, "steps": 2, "seconds": 1.5
            }  # fmt: skip
    names = dict(zip("rgb", OPTIONS, strict=True)) | {"-": None}
    for seed, of_question in (asked or {}).items():
        given = [
            {
                "question_id": id,
                "wording": k,
                "value": names[letter],
                "text": letter,
                "probabilities": dict.fromkeys(OPTIONS, 1 / 3),
            }
            for id, letters in of_question.items()
            for k, letter in enumerate(letters)
        ]
        made.asked.setdefault("weak", {})[seed] = measure(unsupervised, given, config.reliability, "here")
    return made


def arm(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in summary["arms"] if arm["name"] == name)


HALF, MOST, ALL = "1100" * 50, "1110" * 50, "1111" * 50


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/figures.py",
    "pair[0].mean(1) > pair[1].mean(1)",
    "pair[0].mean(1) >= pair[1].mean(1)",
)
def test_accuracy_difference_and_seeds() -> None:
    of = found({
        "supervisor-weak": {1: HALF, 2: HALF},
        "naive": {1: MOST, 2: HALF},
        "filter": {1: ALL, 2: HALF},
        "ceiling": {1: ALL, 2: ALL},
    })  # fmt: skip
    summary = of.summary()
    assert [a["by_seed"] for a in summary["arms"]] == [[0.75, 0.5], [1.0, 0.5], [1.0, 1.0]]
    assert arm(summary, "naive")["accuracy"]["value"] == 0.625
    assert arm(summary, "naive")["difference"] is None, "it is the baseline"
    filtered = arm(summary, "filter")
    assert filtered["difference"]["value"] == pytest.approx(0.125)
    assert filtered["better"] == 1, "equal is not better"
    assert filtered["pgr"]["value"] == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert arm(summary, "ceiling")["pgr"] is None
    assert summary["gap"]["value"] == pytest.approx(0.5)
    assert filtered["gain"]["value"] == pytest.approx(0.25)
    assert summary["chance"] == pytest.approx(1 / 3)
    assert summary["budget"] == {"by": "samples", "steps": 500, "samples": 2000}
    half = [(a["difference"]["high"] - a["difference"]["low"]) / 2 for a in summary["arms"][1:]]
    assert summary["detectable"]["half_width"] == pytest.approx(sum(half) / 2)


@pytest.mark.kills("ual/pipelines/weak_to_strong/figures.py", 'if gap["low"] > ROUNDING:', "if True:")
def test_no_gap_no_pgr() -> None:
    same = {name: {1: MOST} for name in ("supervisor-weak", "naive", "ceiling")}
    summary = found(same).summary()
    assert arm(summary, "naive")["pgr"] is None
    assert summary["gap"]["value"] == 0
    assert "contains 0 or lies below it" in summary["no_pgr"]
    without = found({"supervisor-weak": {1: HALF}, "naive": {1: MOST}}).summary()
    assert without["gap"] is None
    assert "no ceiling arm" in without["no_pgr"]


def test_self_is_compared_with_its_own_supervisor() -> None:
    summary = found({
        "supervisor-weak": {1: HALF},
        "supervisor-self": {1: MOST},
        "naive": {1: MOST},
        "self": {1: ALL},
        "ceiling": {1: ALL},
    }).summary()  # fmt: skip
    own = arm(summary, "self")
    assert own["pgr"] is None
    assert own["against"] == "self"
    assert own["gain"]["value"] == pytest.approx(0.25)


def test_figures_of_seeds_that_are_there() -> None:
    """An arm whose second seed is missing is compared on the first."""
    summary = found({
        "supervisor-weak": {1: HALF, 2: HALF},
        "naive": {1: MOST, 2: HALF},
        "filter": {1: ALL},
    }).summary()  # fmt: skip
    assert summary["status"] == "unfinished"
    filtered = arm(summary, "filter")
    assert filtered["status"] == "missing"
    assert filtered["by_seed"] == [1.0, None]
    assert filtered["difference"]["value"] == pytest.approx(0.25)
    assert "Not evaluated with every seed: filter." in summary["cautions"]


SPLIT = {"q0": "rrrrr", "q1": "rgggg", "q2": "ggggg", "q3": "rrrgg"}
ASKED = {1: SPLIT, 2: dict.fromkeys(SPLIT, "rrrrg")}


@pytest.mark.kills(
    "ual/pipelines/weak_to_strong/figures.py", "for q in asked if q.first is not None", "for q in asked[:1]"
)
def test_label_accuracies_before_and_after() -> None:
    summary = found({"supervisor-weak": {1: HALF}, "naive": {1: HALF}, "filter": {1: HALF}}, ASKED).summary()
    [weak] = summary["supervisors"]
    w = math.exp(1 / (5 * 0.2)), math.exp(4 / (5 * 0.2)), math.exp(3 / (5 * 0.2)), math.exp(2 / (5 * 0.2))
    weighted = (1 + w[0] / (w[0] + w[1]) + 0 + w[2] / (w[2] + w[3])) / 4
    assert weak["labels"] == pytest.approx({
        "first": (3 / 4 + 1) / 2,
        "majority": (2 / 4 + 1) / 2,
        "selected": (1 / 2 + 1) / 2,  # q0 and q2 agree; the median of seed 1 is between 0 and 0.5
        "weighted": (weighted + w[1] / (w[0] + w[1])) / 2,
        "unparsed": 0.0,
    })  # fmt: skip


def test_levels_and_what_the_filter_drops() -> None:
    of = found({"supervisor-weak": {1: HALF}, "naive": {1: HALF}, "filter": {1: HALF}}, {1: ASKED[1]})
    of.untrained = {f"q{i}": {"probabilities": {"red": 0.5, "green": 0.5, "blue": 0.0}} for i in range(4)}
    summary = of.summary()
    assert [(round(lv["low"], 3), lv["questions"], lv["label_accuracy"]) for lv in summary["levels"]] == [
        (0, 2, 0.5), (0.5, 1, 0), (0.673, 1, 1)
    ]  # fmt: skip
    selected, dropped = summary["filter"]["selected"], summary["filter"]["dropped"]
    assert (selected["questions"], dropped["questions"]) == (2, 2)
    assert selected["strong_entropy"] == dropped["strong_loss"] == pytest.approx(math.log(2))
    assert selected["prompt_length"] == len("Which q0?")
    assert summary["filter"]["subjects"] == [["even", 1.0, 2], ["odd", 0.0, 2]]
    plain = found({"supervisor-weak": {1: HALF}, "naive": {1: HALF}}, {1: ASKED[1]}).summary()
    assert plain["filter"] is None, "no arm filters"


@pytest.mark.kills(
    "ual/config/weak_to_strong.py",
    'select="consistent", control="random"',
    'select="consistent", control="naive"',
)
def test_a_filter_is_compared_with_a_random_one() -> None:
    summary = found({
        "supervisor-weak": {1: HALF},
        "naive": {1: ALL},
        "filter": {1: MOST},
        "random": {1: HALF},
    }).summary()  # fmt: skip
    filtered = arm(summary, "filter")
    assert (filtered["control"], filtered["over_control"]["value"]) == ("random", pytest.approx(0.25))
    drawn = arm(summary, "random")
    assert (drawn["control"], drawn["over_control"]) == ("", None), "no arm of the study is its control"


def test_what_was_not_labeled_is_counted_and_not_dropped_by_the_filter() -> None:
    asked = {1: {"q0": "----", "q1": "rrrr", "q2": "rgrg", "q3": "-ggg"}}
    names = ("supervisor-weak", "naive", "filter", "random", "ceiling")
    summary = found({key: {1: HALF} for key in names}, asked).summary()
    [weak] = summary["supervisors"]
    assert weak["labels"]["first"] == 1.0, "of q1 and q2, which have one"
    assert weak["labels"]["majority"] == pytest.approx(2 / 3)
    assert weak["labels"]["unparsed"] == pytest.approx(5 / 16)
    groups = summary["filter"]["selected"], summary["filter"]["dropped"]
    assert [group["questions"] for group in groups] == [2, 1]
    assert any(said.startswith("1 of 4 questions have no usable majority") for said in summary["cautions"])
    agreed = found({key: {1: HALF} for key in names}, {1: dict.fromkeys(SPLIT, "rrrrr")}).summary()
    assert "The filter drops nothing: no entropy is above its threshold." in agreed["cautions"]


def test_loss_tokens_that_differ_are_named() -> None:
    of = found({key: {1: HALF} for key in ("supervisor-weak", "naive", "filter", "random")})
    of.metrics["filter"][1]["trained_tokens"] = 6.5
    assert "Loss tokens of seed 1 differ by more than 5%: 6 to 6." in of.summary()["cautions"]
    of.metrics["filter"][1]["trained_tokens"] = 6.2
    assert not any("Loss tokens" in said for said in of.summary()["cautions"])


def test_what_limits_conclusions() -> None:
    few = found({"supervisor-weak": {1: HALF}, "naive": {1: HALF}, "filter": {1: HALF}}).summary()["cautions"]
    assert few[0] == "One seed (fewer than 3)."
    assert any("No arm filters at random" in caution for caution in few)
    three = dict.fromkeys((1, 2, 3), HALF)
    asked = dict.fromkeys(three, ASKED[1])
    names = ("supervisor-weak", "naive", "filter", "random", "ceiling")
    assert found(dict.fromkeys(names, three), asked).summary()["cautions"] == []
    small = found({name: {1: "1100"} for name in names}).summary()["cautions"]
    assert "4 test questions (fewer than 200)." in small


def test_the_interval_is_over_questions() -> None:
    summary = found({"supervisor-weak": {1: HALF}, "naive": {1: MOST}}).summary()
    estimate = arm(summary, "naive")["accuracy"]
    expected = 1.96 * math.sqrt(0.75 * 0.25 / 200)
    assert estimate["high"] - 0.75 == pytest.approx(expected, rel=0.2)

"""The page of a weak-to-strong study shows the figures that it gets, and a dash for a missing figure."""

import copy
import html
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.ual.test_report import EVIL, Page, check_page
from ual.errors import UserError
from ual.report import plots
from ual.report.weak_to_strong import write

Summary = dict[str, Any]
MODULE, PLOTS = "ual/report/weak_to_strong.py", "ual/report/plots.py"
SECTIONS = ("results", "cautions", "supervisors", "figures", "filter", "design", "computed", "reproduce")
MINUS = "\N{MINUS SIGN}"
PUBLISHED = {
    "HellaSwag": [[0.0, 0.95], [0.5, 0.67], [1.33, 0.28]],
    "ETHICS": [[0.0, 0.8], [0.69, 0.71]],
}


def estimate(value: float, half: float = 0.03) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def arm(name: str, accuracy: float, **changes: Any) -> Summary:
    return {
        "name": name,
        "arm": name,
        "sentence": f"labels of the arm {name}",
        "status": "completed",
        "samples": [1000, 1000, 1000],
        "loss_tokens": [3120, 3111, 3125],
        "steps": [125, 125, 125],
        "accuracy": estimate(accuracy),
        "by_seed": [accuracy - 0.01, accuracy, accuracy + 0.01],
        "mass": 0.984,
        "difference": estimate(accuracy - 0.5, 0.02),
        "better": 2,
        "pgr": estimate((accuracy - 0.4) / 0.4, 0.1),
        "against": "weak",
        "gain": estimate(accuracy - 0.4, 0.025),
        "control": "",
        "over_control": None,
        **changes,
    }


def supervisor(name: str) -> Summary:
    labels = {"first": 0.41, "majority": 0.44, "selected": 0.6, "weighted": 0.47, "unparsed": 0.013}
    return {"name": name, "accuracy": estimate(0.4), "by_seed": [0.39, 0.4, 0.41], "labels": labels}


def study() -> Summary:
    """Return a finished study of three seeds."""
    group = {"prompt_length": 143.0, "strong_entropy": 0.81, "strong_loss": 1.02, "label_accuracy": 0.6}
    return {
        "name": "science",
        "task": "sciq",
        "kind": "choice",
        "status": "completed",
        "models": {"weak": "small-model", "strong": "large-model"},
        "seeds": [1, 2, 3],
        "questions": {
            "supervised": 900,
            "unsupervised": 1000,
            "test": 1100,
            "dropped": {"options do not differ at one token": 143, "too long": 7},
        },
        "asked": {"by": "order", "times": 5},
        "reliability": {"rule": "median", "value": None, "temperature": 0.2, "unparsed": "class"},
        "budget": {"by": "samples", "steps": 125, "samples": 2000},
        "chance": 0.25,
        "supervisors": [supervisor("weak"), supervisor("self")],
        "arms": [
            arm("naive", 0.5, difference=estimate(0.0, 0.0), better=0),
            arm("filter", 0.54, samples=[600, 610, 620], control="naive", over_control=estimate(0.04, 0.025)),
            arm("self", 0.48, pgr=None, against="self"),
            arm("gold", 0.8, arm="ceiling", pgr=None, better=3),
        ],
        "gap": estimate(0.4, 0.035),
        "no_pgr": "",
        "levels": [
            {"low": 0.0, "high": 0.0, "questions": 512.3, "answers": 0.93, "label_accuracy": 0.66},
            {"low": 0.5, "high": 0.68, "questions": 300.0, "answers": 0.6, "label_accuracy": 0.4},
            {"low": 1.6, "high": 1.61, "questions": 0.0, "answers": None, "label_accuracy": None},
        ],
        "published": PUBLISHED,
        "filter": {
            "selected": {"questions": 600, **group},
            "dropped": {"questions": 400, **group, "prompt_length": 171.4, "label_accuracy": 0.2},
            "subjects": [["biology", 0.62, 200], ["physics", 0.5, 151]],
        },
        "detectable": {"half_width": 0.021, "items": 1100},
        "cautions": ["Heavy caution.", "Light caution."],
        "environment": {
            "created": "2026-11-28T02:00:00+00:00",
            "machine": "AMD EPYC, 2 cores, 8 GiB, no GPU",
            "packages": "torch 2.13.0",
            "commit": "135d12f0a1",
            "command": "ual w2s 'my study.yaml'",
            "seconds": 5000.0,
        },
        "config": "name: science\nseeds: [1, 2, 3]\n",
    }


def unfinished() -> Summary:
    """Return a study of which nothing is finished."""
    empty = dict.fromkeys(
        ("accuracy", "mass", "difference", "better", "pgr", "against", "gain", "control", "over_control")
    )
    lists: Summary = {key: [] for key in ("samples", "loss_tokens", "steps", "by_seed")}
    summary = study()
    arms = [planned | empty | lists | {"status": "missing"} for planned in summary["arms"]]
    missing: Summary = dict.fromkeys(("gap", "filter", "detectable"))
    nothing: Summary = {"status": "unfinished", "levels": [], "supervisors": [], "cautions": [], "arms": arms}
    return summary | missing | nothing


def changed(change: Callable[[Summary], object]) -> Summary:
    summary = copy.deepcopy(study())
    change(summary)
    return summary


def words(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def section(page: Page, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page.source, re.DOTALL)
    assert found is not None
    return found[1]


def tables(page: Page, name: str) -> list[list[list[str]]]:
    """Return the tables of a section: the text of every cell, without the heads of columns."""
    return [
        [
            [words(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>|<td>.*?</td>", line, re.DOTALL)]
            for line in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        ]
        for body in re.findall(r"<tbody>(.*?)</tbody>", section(page, name), re.DOTALL)
    ]


def pairs(page: Page, name: str) -> dict[str, str]:
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", section(page, name), re.DOTALL)
    return {words(key): words(value) for key, value in found}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Summary], Page]:
    return lambda summary: Page(write(summary, tmp_path / "new" / "page.html"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the finished study, to look at only."""
    return Page(write(study(), tmp_path_factory.mktemp("w2s") / "page.html"))


# ---- a finished study ----


def test_the_page_stands_alone_and_begins_with_the_answer(page: Page) -> None:
    check_page(page, SECTIONS)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert tuple(ids) == SECTIONS
    assert "science completed" in page.text
    assert "Does filtering or re-weighting the weak labels help?" in section(page, "results")
    assert re.findall(r"<li>(.*?)</li>", section(page, "results")) == ["Heavy caution.", "Light caution."]
    assert "Ceiling minus weak, points +40.0 (+36.5 to +43.5)" in page.text
    assert len(page.all("img")) == 2


@pytest.mark.kills(MODULE, 'Cell(ABSENT, "baseline") if arm is first else', "")
@pytest.mark.kills(MODULE, "estimate, 1, scale=100, sign=", "estimate, 1, scale=1, sign=")
@pytest.mark.kills(MODULE, '_estimate(arm["pgr"], 2, reason', '_estimate(arm["pgr"], 2, scale=100, reason')
@pytest.mark.kills(MODULE, 'if arm["against"] != "weak":', "if False:")
@pytest.mark.kills(MODULE, "sum(known) / len(known)", "max(known)")
def test_the_main_table(page: Page) -> None:
    assert tables(page, "results") == [
        [
            [
                "naive",
                "50.0 47.0 to 53.0",
                "— baseline",
                "—",
                "0.25 0.15 to 0.35",
                "1,000",
                "3,119 3,111 to 3,125",
            ],
            [
                "filter",
                "54.0 51.0 to 57.0",
                "+4.0 +2.0 to +6.0",
                "2 of 3",
                "0.35 0.25 to 0.45",
                "610 600 to 620",
                "3,119 3,111 to 3,125",
            ],
            [
                "self",
                "48.0 45.0 to 51.0",
                f"{MINUS}2.0 {MINUS}4.0 to +0.0",
                "2 of 3",
                "— other supervisor",
                "1,000",
                "3,119 3,111 to 3,125",
            ],
            [
                "gold ceiling",
                "80.0 77.0 to 83.0",
                "+30.0 +28.0 to +32.0",
                "3 of 3",
                "— the ceiling",
                "1,000",
                "3,119 3,111 to 3,125",
            ],
        ]
    ]
    assert "extend 2.1 points to each side, with 1,100 test questions" in section(page, "results")
    assert "that of naive." in section(page, "results")


@pytest.mark.kills(MODULE, '"selected": ("Selected", "after the filter"),', "")
def test_supervisors_their_labels_and_the_gains(page: Page) -> None:
    supervisors, gains = tables(page, "supervisors")
    labels = ["41.0", "44.0", "60.0", "47.0", "1.3"]
    assert supervisors == [
        ["weak small-model", "40.0 37.0 to 43.0", "39.0, 40.0, 41.0", *labels],
        ["self large-model", "40.0 37.0 to 43.0", "39.0, 40.0, 41.0", *labels],
    ]
    assert gains[1] == ["filter", "weak", "+14.0 +11.5 to +16.5", "naive", "+4.0 +1.5 to +6.5"]
    assert gains[0][3:] == ["—", "—"]
    assert gains[2][1] == "self"


@pytest.mark.kills(MODULE, 'if arm["arm"] == "ceiling" and', 'if arm["name"] == "ceiling" and')
@pytest.mark.kills(MODULE, 'or () if level["label_accuracy"] is not None', "or ()")
def test_what_the_pictures_show_is_said_in_words(page: Page) -> None:
    accuracies, entropy = (image["alt"] for image in page.all("img"))
    assert accuracies == (
        "Accuracy of each arm: naive 50.0 %, filter 54.0 %, self 48.0 %, gold 80.0 %. "
        "Vertical lines: weak supervisor 40.0 %, ceiling 80.0 %, chance 25.0 %."
    )
    assert entropy == (
        "Label accuracy by entropy: 66.0 % at 0.00 nats, 40.0 % at 0.50 to 0.68 nats. "
        "Published curves: HellaSwag, ETHICS."
    )
    (levels,) = tables(page, "figures")
    assert levels == [
        ["0.00", "512.3", "66.0"],
        ["0.50 to 0.68", "300.0", "40.0"],
        ["1.60 to 1.61", "0.0", "—"],
    ]


def test_what_the_filter_drops(page: Page) -> None:
    dropped, subjects = tables(page, "filter")
    assert dropped[:3] == [
        ["Questions", "600", "400"],
        ["Prompt length characters", "143", "171"],
        ["Label accuracy %", "60.0", "20.0"],
    ]
    assert dropped[4][1:] == ["1.020", "1.020"]
    assert subjects == [["biology", "62.0", "200"], ["physics", "50.0", "151"]]


def test_the_design_and_the_origin(page: Page) -> None:
    design = pairs(page, "design")
    assert design["Answers per question"] == "5, each with another order of the options"
    assert design["Filter"] == "entropy of the answers at most the median"
    assert design["Budget"] == "125 optimizer steps and 2,000 samples drawn, for each arm and seed"
    assert design["Dropped before the split"] == (
        "143 (options do not differ at one token), 7 (too long); for every arm alike"
    )
    assert design["Seeds"] == "1, 2, 3"
    assert design["filter"] == "labels of the arm filter"
    assert tables(page, "design")[0][1] == ["filter", "53.0", "54.0", "55.0", "125", "0.984"]
    for claim in (
        f"(arm {MINUS} weak) / (ceiling {MINUS} weak)",
        "choice of test questions and not the randomness of training",
        "Probabilities are renormalized over the options.",
        "arXiv 2406.19032",
    ):
        assert claim in words(section(page, "computed"))
    commands, config = page.blocks("section", "pre") + page.blocks("details", "pre")
    assert commands == "git checkout 135d12f0a1\nual w2s 'my study.yaml'"
    assert config == study()["config"]
    assert pairs(page, "reproduce")["Time"] == "1 h 23 min"
    assert "no GPU" in pairs(page, "reproduce")["Machine"]


@pytest.mark.parametrize(
    ("section_of", "values", "shown"),
    [
        ("asked", {"by": "paraphrase", "times": 5}, "5, each with another paraphrase"),
        ("asked", {"by": "sample", "times": 9, "temperature": 0.7}, "9, each sampled at temperature 0.7"),
        (
            "reliability",
            {"rule": "quantile", "value": 0.25},
            "entropy of the answers at most its quantile 0.25",
        ),
        ("reliability", {"rule": "absolute", "value": 0.5}, "entropy of the answers at most 0.5 nats"),
        ("reliability", {"unparsed": "drop_question"}, "drop their question"),
    ],
)
def test_other_designs(
    written: Callable[[Summary], Page], section_of: str, values: Summary, shown: str
) -> None:
    found = written(changed(lambda summary: summary[section_of].update(values)))
    assert shown in pairs(found, "design").values()


@pytest.mark.kills(PLOTS, '    "svg.hashsalt": "ual",', "")
def test_equal_summaries_give_equal_bytes(tmp_path: Path) -> None:
    pages = [write(study(), tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


@pytest.mark.kills(MODULE, "round(value * scale, digits) + 0.0", "round(value * scale, digits)")
def test_zero_has_no_minus(written: Callable[[Summary], Page]) -> None:
    nearly = {"value": -1e-5, "low": -0.01, "high": 1e-5}
    found = written(changed(lambda summary: summary["arms"][1].update(difference=nearly)))
    assert tables(found, "results")[0][1][2] == f"+0.0 {MINUS}1.0 to +0.0"


# ---- an unfinished study ----


def test_nothing_is_finished(written: Callable[[Summary], Page]) -> None:
    found = written(unfinished())
    check_page(found, tuple(name for name in SECTIONS if name != "cautions"))
    assert found.all("img") == []
    dashes = ["—"] * 4
    (main,) = tables(found, "results")
    assert main[0] == ["naive missing", "—", "— baseline", *dashes]
    assert main[3] == ["gold ceiling, missing", "—", "— missing baseline", *dashes]
    assert "science unfinished" in found.text
    for reason in (
        "No supervisor is finished.",
        "No arm is finished, so there is no plot of accuracies.",
        "No label accuracy is known, so there is no plot of it by entropy.",
        "No finished arm filters its questions.",
        "Ceiling minus weak, points — Chance",
    ):
        assert reason in found.text
    assert "None" not in found.text


@pytest.mark.kills(MODULE, "sum(None not in pair for pair in pairs)", 'len(first["by_seed"])')
def test_an_arm_lacks_a_seed(written: Callable[[Summary], Page]) -> None:
    found = written(
        changed(lambda summary: summary["arms"][1].update(by_seed=[0.53, None, 0.55], samples=[600]))
    )
    line = tables(found, "results")[0][1]
    assert line[0] == "filter 2 of 3 seeds"
    assert line[3] == "2 of 2"
    assert line[5] == "600"
    assert tables(found, "design")[0][1][1:4] == ["53.0", "—", "55.0"]


@pytest.mark.kills(MODULE, 'unfinished = "" if _finished(first)', 'unfinished = "" if True')
def test_only_the_baseline_is_missing(written: Callable[[Summary], Page]) -> None:
    def lose(summary: Summary) -> None:
        summary["arms"][0] = unfinished()["arms"][0]
        for other in summary["arms"][1:]:
            other |= {"difference": None, "better": None}

    found = written(changed(lose))
    (main,) = tables(found, "results")
    assert main[1][2:4] == ["— missing baseline", "—"]
    assert "Not finished: naive." in section(found, "figures")
    assert found.all("img")[0]["alt"].startswith("Accuracy of each arm: filter")


@pytest.mark.kills(MODULE, 'return "see below" if summary["no_pgr"] else ""', 'return ""')
def test_no_ceiling(written: Callable[[Summary], Page]) -> None:
    def lose(summary: Summary) -> None:
        summary |= {"gap": None, "no_pgr": "No arm is trained on gold labels."}
        del summary["arms"][3]
        for other in summary["arms"]:
            other["pgr"] = None

    found = written(changed(lose))
    assert [line[4] for line in tables(found, "results")[0]] == ["— see below"] * 2 + ["— other supervisor"]
    assert "PGR: No arm is trained on gold labels." in section(found, "results")
    assert "Vertical lines: weak supervisor 40.0 %, chance 25.0 %." in found.all("img")[0]["alt"]


@pytest.mark.kills(
    MODULE, 'no_options = "no options" if summary["kind"]', 'no_options = "" if summary["kind"]'
)
def test_numbers_have_no_options(written: Callable[[Summary], Page]) -> None:
    def generate(summary: Summary) -> None:
        summary |= {"kind": "number", "chance": None}
        for each in summary["arms"]:
            each["mass"] = None
        for group in ("selected", "dropped"):
            summary["filter"][group] |= {"strong_entropy": None, "strong_loss": None}

    found = written(changed(generate))
    assert [line[1:] for line in tables(found, "filter")[0][3:]] == [["— no options"] * 2] * 2
    assert tables(found, "design")[0][0][-1] == "— no options"
    assert "An answer is correct if its number equals the gold number." in words(section(found, "computed"))
    assert "renormalized" not in found.text
    assert "chance" not in found.all("img")[0]["alt"]


def test_no_gold_answers_and_nothing_dropped(written: Callable[[Summary], Page]) -> None:
    def forget(summary: Summary) -> None:
        summary["supervisors"][0]["labels"] = dict.fromkeys(summary["supervisors"][0]["labels"])
        for level in summary["levels"]:
            level["label_accuracy"] = None
        summary["filter"]["selected"]["label_accuracy"] = None
        summary["filter"]["dropped"] = dict.fromkeys(summary["filter"]["dropped"]) | {"questions": 0}
        summary["filter"]["subjects"] = []

    found = written(changed(forget))
    assert tables(found, "supervisors")[0][0][3:] == ["—"] * 5
    (dropped,) = tables(found, "filter")
    assert dropped[0][1:] == ["600", "0"]
    assert dropped[2][1:] == ["— no gold answers", "— no questions"]
    assert len(found.all("img")) == 1
    assert "By subject" not in found.text


@pytest.mark.parametrize("seeds", [[], [7]])
def test_few_seeds(written: Callable[[Summary], Page], seeds: list[int]) -> None:
    def cut(summary: Summary) -> None:
        summary["seeds"] = seeds
        for each in (*summary["arms"], *summary["supervisors"]):
            each |= {key: each[key][: len(seeds)] for key in ("by_seed", "steps") if key in each}

    found = written(changed(cut))
    assert tables(found, "results")[0][1][3] == ("2 of 1" if seeds else "—")
    assert pairs(found, "design")["Seeds"] == ("7" if seeds else "—")
    assert len(tables(found, "design")[0][0]) == 3 + len(seeds)


# ---- data is data ----


@pytest.mark.kills("ual/report/html.py", "        autoescape=True,", "        autoescape=False,")
def test_markup_in_names_is_text(written: Callable[[Summary], Page]) -> None:
    def fill(summary: Summary) -> None:
        summary |= {"name": EVIL, "task": EVIL, "config": EVIL, "cautions": [EVIL], "no_pgr": EVIL}
        summary["models"] = {"weak": EVIL, "strong": f"{EVIL}\ud800"}
        summary["published"] = {EVIL: [[0.0, 0.5]], "$x$": [[0.0, 0.5], [1.0, 0.4]]}
        summary["environment"] = dict.fromkeys(summary["environment"], EVIL) | {"seconds": None}
        summary["filter"]["subjects"] = [[EVIL, 0.5, 3]]
        summary["arms"][1] |= {"name": EVIL, "arm": EVIL, "sentence": EVIL, "against": EVIL}

    found = written(changed(fill))
    check_page(found, SECTIONS)
    for tag in ("h1", "li", "table", "dl", "pre", "dd"):
        assert EVIL in found.inside(tag)
    assert "git checkout" not in found.text


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write(study(), tmp_path / "file" / "page.html")


# ---- pictures ----

LONG = "re-weighted at temperature 0.2, arm "


def many(count: int) -> Figure:
    arms = {f"{i} {LONG}": (0.4 + 0.3 * i / count, 0.38, 0.72) for i in range(count)}
    lines = {"weak supervisor": 0.413, "ceiling": 0.741, "chance": 0.25}
    return plots.forest(arms, seeds={}, lines=lines, title="Accuracy on 1,000 test questions")


def visible(figure: Figure) -> Iterator[Text]:
    """Yield the texts that are drawn; matplotlib keeps labels of ticks out of view as well."""
    yield from figure.texts
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            yield from (tick.label1 for tick in ticks if tick.label1.get_visible())
            yield axis.label
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        yield from legend.get_texts() if legend else ()


@pytest.mark.kills(PLOTS, "max(figure.get_figheight(), 1.6 + 0.3 * len(arms))", "figure.get_figheight()")
@pytest.mark.kills(PLOTS, 'loc="outside lower center", ncols=3', 'loc="lower center", ncols=3')
@pytest.mark.parametrize("draw", [1, 2, 12, 30, "entropy"])
def test_texts_of_a_picture_do_not_overlap(draw: int | str) -> None:
    curves = {name: [(0.0, 0.9), (1.6, 0.3)] for name in ("HellaSwag", "MMLU", "GSM8K", "ETHICS")}
    measured = [(0.0, 0.66, 512.0), (1.6, 0.3, 20.0)]
    figure = many(draw) if isinstance(draw, int) else plots.entropy_curves(measured, curves)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in visible(figure) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    assert len(boxes) > 9
    plot = figure.axes[0].get_window_extent(renderer)
    for (one, box), (other, beside) in itertools.combinations(boxes, 2):
        assert not box.overlaps(beside), (one, other)
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        assert not plot.padded(-1).overlaps(box), text


@pytest.mark.kills(PLOTS, "ylim=(len(arms) - 0.4, -0.6)", "ylim=(-0.6, len(arms) - 0.4)")
def test_forest_draws_estimates_seeds_and_lines() -> None:
    arms = {"naive": (0.5, 0.47, 0.54), "filter": (0.6, 0.56, 0.63)}
    figure = plots.forest(
        arms, seeds={"filter": [0.58, 0.62]}, lines={"weak": 0.4, "chance": 0.25}, title="t"
    )
    (axes,) = figure.axes
    bars = [segment for bar in axes.collections for segment in bar.get_segments()]
    np.testing.assert_allclose(bars, [[[0.47, 0], [0.54, 0]], [[0.56, 1], [0.63, 1]]])
    weak, chance, naive, none, filtered, seeds = axes.get_lines()
    assert (list(weak.get_xdata()), list(chance.get_xdata())) == ([0.4, 0.4], [0.25, 0.25])
    np.testing.assert_allclose([naive.get_xydata(), filtered.get_xydata()], [[[0.5, 0]], [[0.6, 1]]])
    assert (list(none.get_xdata()), list(seeds.get_xdata())) == ([], [0.58, 0.62])
    heights = axes.transData.transform([[0.5, 0], [0.5, 1]])[:, 1]
    assert heights[0] > heights[1]  # the first arm on top
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["weak 40.0%", "chance 25.0%"]
    assert weak.get_color() != chance.get_color()


@pytest.mark.kills(PLOTS, "questions / questions.sum()", "questions")
def test_entropy_curves_draw_levels_beside_published_curves() -> None:
    measured = [(0.0, 0.66, 300.0), (0.5, 0.4, 100.0)]
    figure = plots.entropy_curves(measured, {"MMLU": [(0.0, 0.82), (1.33, 0.27)]})
    axes, strip = figure.axes
    published, own = axes.get_lines()
    assert published.is_dashed()
    assert not own.is_dashed()
    np.testing.assert_allclose(published.get_xydata(), [[0, 0.82], [1.33, 0.27]])
    np.testing.assert_allclose(own.get_xydata(), [[0, 0.66], [0.5, 0.4]])
    shares = [segment[1][1] for segment in strip.collections[0].get_segments()]
    assert shares == pytest.approx([0.75, 0.25])
    assert figure.get_suptitle() == "Accuracy of labels: 66% at 0.00 and 40% at 0.50 nats"

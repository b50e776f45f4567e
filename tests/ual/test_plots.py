"""Figures draw the numbers that they get, in colors that stay apart, whatever arms are called."""

import base64
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ual.evaluate import reliability_bins
from ual.report import plots
from ual.report.plots import (
    coverage_curves,
    data_uri,
    distribution,
    entropy_curves,
    forest,
    loss_curves,
    reliability_diagram,
    write_png,
)

AWKWARD = ["$x$ and $\\frac{", "<b>&\"'", "名前 имя", "a\x00b\ud800\n", "", "n" * 200, "--> ]]>"]


def curve(steps: int, start: float = 3.0) -> list[tuple[float, float]]:
    return [(float(i + 1), start * math.exp(-i / steps)) for i in range(steps)]


def drawn_text(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- loss curves ----


def test_loss_curve_draws_every_value_and_their_running_mean() -> None:
    pairs = curve(50)
    raw, mean = loss_curves({"sft": pairs}).axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_xydata(), pairs)
    losses = np.array([loss for _, loss in pairs])
    expected = [losses[max(0, i - 2) : i + 3].mean() for i in range(50)]  # a window of 5
    np.testing.assert_allclose(mean.get_ydata(), expected)


def test_title_of_one_arm_says_where_the_loss_went() -> None:
    figure = loss_curves({"sft": [(float(i), 3.0 if i < 10 else 1.5) for i in range(1, 21)]})
    assert "3.00 to 1.50 in 20 steps" in figure.get_suptitle()


@pytest.mark.kills("ual/report/plots.py", "key=lambda line: -line[0]", "key=lambda line: line[0]")
def test_arms_are_named_in_the_order_of_their_ends() -> None:
    figure = loss_curves({name: curve(20, start) for name, start in (("a", 3), ("b", 5), ("c", 4))})
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["b", "c", "a"]
    assert [line.get_color() for line in legend.get_lines()] == [plots.PALETTE[i] for i in (1, 2, 0)]


def test_values_that_are_not_finite_leave_a_gap() -> None:
    raw, mean = loss_curves({"a": [(1, 2.0), (2, math.nan), (3, 1.0)]}).axes[0].get_lines()
    assert math.isnan(raw.get_ydata()[1])
    np.testing.assert_array_equal(mean.get_xdata(), [1, 3])


def test_an_arm_with_nothing_to_draw_keeps_its_color() -> None:
    bins = reliability_bins([0.2, 0.9], [0, 1], bins=2)
    third = plots.PALETTE[2]
    figures = (
        loss_curves({"a": [], "b": curve(5), "c": curve(5)}),
        reliability_diagram({"a": [], "b": bins, "c": bins}),
    )
    for figure in figures:
        assert figure.axes[0].get_lines()[-1].get_color() == third
    panels = distribution({"a": [], "b": [1.0], "c": [2.0]}, quantity="u", title="t").axes
    assert len(panels) == 2
    assert panels[-1].patches[0].get_facecolor()[:3] == pytest.approx(to_rgb(third))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 50))
def test_running_mean_is_the_mean_of_what_the_window_holds(values: list[float], window: int) -> None:
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(plots.running_mean(values, window), expected, atol=1e-9)


# ---- distributions ----


def test_histogram_shows_shares_sizes_and_medians() -> None:
    values = np.random.default_rng(0).gamma(2, size=200)
    figure = distribution({"chat": values, "maths": values[:50] / 2}, quantity="nats", title="seen")
    top, bottom = figure.axes
    assert top.patches[0].get_data().values.sum() == pytest.approx(1)
    assert f"200 samples, median {np.median(values):.3g}" in drawn_text(figure)
    assert "50 samples" in drawn_text(figure)
    assert top.get_xlim() == bottom.get_xlim()
    assert figure.get_suptitle() == "seen"


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e9])
def test_one_value_for_all_samples_is_one_bar_around_it(value: float) -> None:
    data = distribution({"": [value] * 7}, quantity="s", title="t").axes[0].patches[0].get_data()
    (filled,) = np.flatnonzero(data.values)
    assert data.edges[filled] < value < data.edges[filled + 1]


def test_uncertainty_above_zero_is_not_drawn_below_it() -> None:
    data = distribution({"": [0.1, 0.5, 2.0]}, quantity="u", title="t").axes[0].patches[0].get_data()
    assert data.edges[0] == 0
    assert data.values.sum() == pytest.approx(1)


# ---- reliability ----


def test_reliability_diagram_draws_the_bins_and_their_masses() -> None:
    bins = reliability_bins([0.25, 0.25, 0.25, 0.75], [0, 0, 1, 1], bins=2)
    figure = reliability_diagram({"after": bins})
    diagram, strip = figure.axes
    np.testing.assert_allclose(diagram.get_lines()[1].get_xydata(), [[0.25, 1 / 3], [0.75, 1]])
    segments = strip.collections[0].get_segments()
    assert [segment[1][1] for segment in segments] == [0.75, 0.25]
    # gaps 1/12 below and 1/4 below: .75/12 + .25/4 = .125, all of it modesty
    assert "ECE 0.125" in drawn_text(figure)
    assert "12.5 points below accuracy" in figure.get_suptitle()


def test_several_arms_are_named() -> None:
    bins = reliability_bins([0.2, 0.9], [0, 1], bins=2)
    assert "before and after" in reliability_diagram({"before": bins, "after": bins}).get_suptitle()
    assert "5 arms" in reliability_diagram(dict.fromkeys("abcde", bins)).get_suptitle()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: loss_curves({}),
        lambda: loss_curves({"a": [(1, math.nan)]}),
        lambda: distribution({}, quantity="u", title="t"),
        lambda: distribution({"a": []}, quantity="u", title="t"),
        lambda: distribution({"a": [math.inf]}, quantity="u", title="t"),
        lambda: reliability_diagram({}),
        lambda: reliability_diagram({"a": []}),
        lambda: forest({}, seeds={}, lines={"chance": 0.25}, title="t"),
        lambda: entropy_curves([], {"a": [(0.0, 0.5)]}),
    ],
)
def test_nothing_to_draw_is_refused(draw: object) -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw()  # type: ignore[operator]


# ---- files and URIs ----


@pytest.mark.parametrize("name", AWKWARD)
def test_names_are_data_in_every_figure(name: str) -> None:
    bins = reliability_bins([0.2, 0.9], [0, 1], bins=2)
    for figure in (
        loss_curves({name: curve(5), name + "2": curve(5)}),
        distribution({name: [1.0, 2.0], name + "2": [1.0]}, quantity="u", title=plots.label(name)),
        reliability_diagram({name: bins, name + "2": bins}),
        forest({name: (0.5, 0.4, 0.6)}, seeds={name: [0.5]}, lines={name: 0.4}, title="t"),
        entropy_curves([(0.0, 0.5, 9.0)], {name: [(0.0, 0.5)]}, name=name),
    ):
        kind, content = data_uri(figure).split(";base64,")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")


def test_label_is_one_short_plain_line() -> None:
    for name in AWKWARD:
        shown = plots.label(name)
        assert shown
        assert shown.isprintable()
        assert len(shown.replace("\\$", "$")) <= 22
    assert plots.label("two\nlines") == "two lines"


def test_equal_figures_give_equal_text() -> None:
    first, second = (data_uri(loss_curves({"a": curve(30), "b": curve(30, 2)})) for _ in range(2))
    assert first == second


def test_long_curves_stay_small() -> None:
    assert len(data_uri(loss_curves({"a": curve(20_000)}))) < 400_000


def test_png_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "loss.png"
    figure = loss_curves({"a": curve(5)})
    write_png(figure, path)
    image = Image.open(path)
    assert (image.format, image.width > image.height) == ("PNG", True)
    image.verify()
    before = path.read_bytes()
    (path.parent / f".loss.png.{os.getpid()}.partial").mkdir()  # the scratch file cannot be made
    with pytest.raises(OSError, match=r"partial"):
        write_png(figure, path)
    assert path.read_bytes() == before


@pytest.mark.kills("ual/report/plots.py", '    "grid.color": GRID,', "")
def test_every_color_is_one_of_the_theme() -> None:
    bins = reliability_bins([0.2, 0.9], [0, 1], bins=2)
    theme = {plots.INK, plots.MUTED, plots.GRID, plots.BACKGROUND, *plots.PALETTE}
    for figure in (
        loss_curves({"a": curve(5), "b": curve(5, 2)}),
        distribution({"a": [1.0, 2.0], "b": [1.0]}, quantity="u", title="t"),
        reliability_diagram({"a": bins, "b": bins}),
        coverage_curves({"a": [(0.5, 1.0), (1.0, 0.5)], "b": [(1.0, 0.5)]}),
        forest({"a": (0.5, 0.4, 0.6)}, seeds={"a": [0.5]}, lines={"b": 0.4}, title="t"),
        entropy_curves([(0.0, 0.5, 9.0)], {"a": [(0.0, 0.5)]}),
    ):
        svg = base64.b64decode(data_uri(figure).split(",")[1]).decode()
        colors = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
        assert len(colors) > 3
        assert colors <= theme


def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys, ual.report.plots as a; a.data_uri(a.loss_curves({'a': [(1, 2.0)]})); "
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- colors ----

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(color: str) -> np.ndarray:
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(to_xyz @ np.clip(rgb, 1e-6, 1) / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
def test_arms_stay_apart_for_every_eye(vision: str) -> None:
    """A difference of 2.3 in CIE Lab is just noticeable; lines need much more."""
    seen = [lab(np.asarray(VISION[vision]) @ linear(color)) for color in plots.PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 18


def test_contrast_meets_wcag() -> None:
    assert min(contrast(plots.BACKGROUND, color) for color in plots.PALETTE) > 3
    assert min(contrast(plots.BACKGROUND, color) for color in (plots.INK, plots.MUTED)) > 4.5

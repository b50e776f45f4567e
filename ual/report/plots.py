"""Figures of a training run or of several arms, each a `matplotlib.figure.Figure` of its own.

pyplot is not used, so there is no global state: the caller owns the figure. Names of arms and sources are
drawn as plain text, never as mathematics. Colors differ in lightness as well as in hue, so that they stay
apart under color blindness and in gray print.
"""

import base64
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import offset_copy
from numpy.typing import ArrayLike, NDArray

from ual.evaluate import ReliabilityBin
from ual.files import aside

INK, MUTED, GRID, BACKGROUND = "#1b2027", "#5a6472", "#e3e7ec", "#ffffff"
PALETTE = ("#1f55d6", "#e2600c", "#0b9a72", "#8a1c7c", "#6b3d00", "#22302d")

_STYLE: dict[Any, Any] = {
    "figure.figsize": (5.0, 3.75),
    "figure.facecolor": BACKGROUND,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "figure.labelsize": 9,
    "text.color": INK,
    "axes.facecolor": BACKGROUND,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.titlesize": 8.5,
    "axes.titlepad": 3,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "svg.hashsalt": "ual",
    "svg.fonttype": "path",
}
_styled = mpl.rc_context(_STYLE)
_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_LONGEST_LABEL = 22
_RASTER_ABOVE = 2000
_FEWEST_KEPT = 0.05


@_styled
def loss_curves(
    arms: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    quantity: str = "training loss (nats per token)",
) -> Figure:
    """Draw training loss, or another quantity, by step: logged values faint, their running mean bold.

    The mean is centered and spans a tenth of the logged steps, half of that at the ends.

    Args:
        arms: name -> (step, loss) pairs by rising step; pairs whose loss is not finite leave a gap. An arm
            without a finite loss is not drawn, but keeps its color, here and in the other figures.
        title: what the figure shows; by default, the first and last loss.
        quantity: the y axis' label.

    Raises:
        ValueError: nothing to draw.
    """
    figure = _figure()
    axes = figure.subplots()
    ends: list[tuple[float, str, Line2D]] = []
    last_step = 0.0
    first_last: tuple[float, float] = (math.nan, math.nan)
    for (name, pairs), color in zip(arms.items(), _colors(arms), strict=True):
        points = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
        finite = points[np.isfinite(points[:, 1])]
        if not len(finite):
            continue
        mean = running_mean(finite[:, 1], len(finite) // 10)
        axes.plot(
            *points.T,
            color=color,
            alpha=0.3,
            linewidth=0.8,
            marker="." if len(points) < 40 else "",
            markersize=4,
            rasterized=len(points) > _RASTER_ABOVE,
        )
        (line,) = axes.plot(finite[:, 0], mean, color=color, linewidth=1.9, solid_capstyle="round")
        ends.append((float(mean[-1]), label(name), line))
        last_step = max(last_step, float(finite[-1, 0]))
        first_last = float(mean[0]), float(mean[-1])
    if not ends:
        raise ValueError("loss_curves needs at least one arm with a finite loss")
    if len(ends) > 1:
        _legend(axes, ends)
        title = title or f"Training loss of {len(ends)} arms over {last_step:,.0f} steps"
    elif not title:
        title = f"Training loss: {first_last[0]:.2f} to {first_last[1]:.2f} in {last_step:,.0f} steps"
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="optimizer step", ylabel=quantity)
    return _titled(figure, title)


@_styled
def distribution(
    groups: Mapping[str, ArrayLike], *, quantity: str, title: str, unit: str = "samples"
) -> Figure:
    """Draw one histogram below another, on one x axis, with each group's size and median.

    Args:
        groups: name -> values [n], finite; an empty group is not drawn, but keeps its color.
        quantity: the x axis' label.
        title: what the figure shows.
        unit: what a value belongs to.

    Raises:
        ValueError: nothing to draw, or a value that is not finite.
    """
    values = {name: np.asarray(v, dtype=np.float64).ravel() for name, v in groups.items()}
    drawn = [
        (name, v, color) for (name, v), color in zip(values.items(), _colors(values), strict=True) if v.size
    ]
    if not drawn or any(not np.isfinite(v).all() for _, v, _ in drawn):
        raise ValueError("distribution needs at least one group with values, all of them finite")
    figure = _figure()
    figure.set_figheight(max(figure.get_figheight(), 1.0 + 0.65 * len(drawn)))  # room for the titles
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges(np.concatenate([v for _, v, _ in drawn]))
    for axes, (name, v, color) in zip(panels, drawn, strict=True):
        count, _ = np.histogram(v, edges)
        axes.stairs(count / v.size, edges, fill=True, color=color, alpha=0.85)
        median = float(np.median(v))
        axes.axvline(median, color=INK, linewidth=1.1)
        if len(drawn) > 1 or name:
            axes.set_title(label(name), loc="left")
        axes.set_title(f"{v.size:,} {unit}, median {median:.3g}", loc="right", color=MUTED)
        axes.yaxis.set_major_locator(MaxNLocator(max(1, 4 // len(drawn)), min_n_ticks=1))
        axes.yaxis.set_major_formatter(_percent)
    panels[-1].set_xlabel(quantity)
    figure.supylabel(f"share of {unit}", color=MUTED)
    return _titled(figure, title)


@_styled
def coverage_curves(arms: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw the accuracy of the most certain samples, by their share.

    Args:
        arms: name -> (share selected, accuracy) by rising share; at least one point each.

    Raises:
        ValueError: nothing to draw.
    """
    if not arms or not all(arms.values()):
        raise ValueError("coverage_curves needs at least one arm, each with a point")
    figure = _figure()
    axes = figure.subplots()
    halves: list[tuple[float, str, Line2D]] = []
    for (name, pairs), color in zip(arms.items(), _colors(arms), strict=True):
        points = np.asarray(pairs, dtype=np.float64)
        enough = points[points[:, 0] >= _FEWEST_KEPT]  # the first samples alone swing between 0 and 1
        points = enough if len(enough) else points
        (line,) = axes.plot(*points.T, color=color, linewidth=1.8)
        half = float(points[np.abs(points[:, 0] - 0.5).argmin(), 1])
        halves.append((half, f"{label(name)}  {half:.3f}", line))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set(
        xlabel="share of samples selected, the most certain first", ylabel="accuracy of the selected samples"
    )
    if len(halves) > 1:
        _legend(axes, halves, title="at 50%")
    return _titled(figure, f"Accuracy of the most certain half: up to {max(half for half, *_ in halves):.3f}")


@_styled
def reliability_diagram(
    arms: Mapping[str, Sequence[ReliabilityBin]],
    *,
    unit: str = "tokens",
    confidence: str = "confidence (top-1 probability)",
) -> Figure:
    """Draw accuracy against confidence per bin, and below it each bin's share of the tokens.

    Args:
        arms: name -> bins by rising confidence; an arm without bins is not drawn, but keeps its color.
        unit: what the bins hold.
        confidence: the x axis' label.

    Raises:
        ValueError: nothing to draw.
    """
    drawn = [name for name, bins in arms.items() if bins]
    if not drawn:
        raise ValueError("reliability_diagram needs at least one arm with bins")
    figure = _figure()
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
    gap = math.nan
    for index, ((name, bins), color) in enumerate(zip(arms.items(), _colors(arms), strict=True)):
        if not bins:
            continue
        stated = np.array([b["confidence"] for b in bins])
        accuracy = np.array([b["accuracy"] for b in bins])
        share = np.array([b["count"] for b in bins]) / sum(b["count"] for b in bins)
        ece = float(share @ np.abs(accuracy - stated))
        gap = float(share @ (stated - accuracy))
        axes.plot(
            stated,
            accuracy,
            color=color,
            linewidth=1.6,
            marker="osD^vP"[index % 6],
            markersize=4.5,
            markeredgecolor=BACKGROUND,
            markeredgewidth=0.6,
            label=f"{label(name)}  ECE {ece:.3f}",
        )
        shift = (index - (len(arms) - 1) / 2) * 0.006
        strip.vlines(stated + shift, 0, share, color=color, linewidth=1.8)
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axes.legend(**(beside if len(drawn) > 3 else {"loc": "upper left"}))
    if len(drawn) == 1:
        title = f"Confidence is {abs(gap) * 100:.1f} points {'above' if gap > 0 else 'below'} accuracy"
    else:
        title = f"Confidence against accuracy: {_joined([label(name) for name in drawn])}"
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="accuracy")
    strip.set(xlabel=confidence, ylabel=unit)
    strip.set_ylim(bottom=0)
    strip.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=1))
    strip.yaxis.set_major_formatter(_percent)
    return _titled(figure, title)


@_styled
def forest(
    arms: Mapping[str, tuple[float, float, float]],
    *,
    seeds: Mapping[str, Sequence[float]],
    lines: Mapping[str, float],
    title: str,
    quantity: str = "accuracy",
) -> Figure:
    """Draw each arm as a dot with its interval, the first arm on top, and vertical lines to compare with.

    The figure grows with the number of arms.

    Args:
        arms: name -> (value, low, high), shares.
        seeds: name -> the value of each seed, drawn as strokes below the interval; an arm may be missing.
        lines: name -> share; each line is named with its value below the plot.
        title: what the figure shows.
        quantity: the x axis' label.

    Raises:
        ValueError: nothing to draw.
    """
    if not arms:
        raise ValueError("forest needs at least one arm")
    figure = _figure()
    figure.set_figheight(max(figure.get_figheight(), 1.6 + 0.3 * len(arms)))
    axes = figure.subplots()
    marks = [
        axes.axvline(value, color=color, linewidth=1.3, linestyle=dash, label=f"{label(name)} {value:.1%}")
        for (name, value), color, dash in zip(lines.items(), cycle(PALETTE[1:]), cycle(_DASHES))
    ]
    below = offset_copy(axes.transData, figure, y=-7, units="points")
    for height, (name, (value, low, high)) in enumerate(arms.items()):
        axes.hlines(height, low, high, color=PALETTE[0], linewidth=2.2)
        axes.plot(value, height, "o", color=PALETTE[0], markersize=6, markeredgecolor=BACKGROUND)
        drawn = seeds.get(name, ())
        axes.plot(drawn, [height] * len(drawn), "|", color=INK, markersize=4.5, transform=below)
    axes.set_yticks(range(len(arms)), [label(name) for name in arms], color=INK)
    axes.set(xlabel=quantity, ylim=(len(arms) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_percent)
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=3, columnspacing=1.2)
    return _titled(figure, title)


@_styled
def entropy_curves(
    measured: Sequence[tuple[float, float, float]],
    published: Mapping[str, Sequence[tuple[float, float]]],
    *,
    name: str = "this study",
) -> Figure:
    """Draw label accuracy by entropy of the answers, and below it each level's share of the questions.

    Args:
        measured: (entropy in nats, accuracy, questions) of each level by rising entropy; a solid line.
        published: name -> (entropy in nats, accuracy) by rising entropy; dashed lines.
        name: of the solid line.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("entropy_curves needs at least one level")
    figure = _figure()
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    entropy, accuracy, questions = np.asarray(measured, dtype=np.float64).T
    ends: list[tuple[float, str, Line2D]] = []
    for (other, pairs), color, dash in zip(published.items(), cycle(PALETTE[1:]), cycle(_DASHES)):
        points = np.asarray(pairs, dtype=np.float64)
        (line,) = axes.plot(*points.T, color=color, linewidth=1.3, linestyle=dash)
        ends.append((float(points[-1, 1]), label(other), line))
    (line,) = axes.plot(entropy, accuracy, "o-", color=PALETTE[0], linewidth=2.2, markersize=5)
    ends.append((float(accuracy[-1]), label(name), line))
    _legend(axes, ends)
    strip.vlines(entropy, 0, questions / questions.sum(), color=PALETTE[0], linewidth=3)
    axes.set(ylim=(-0.02, 1.02), ylabel="accuracy of the labels")
    axes.yaxis.set_major_formatter(_percent)
    strip.set(xlabel="entropy of the answers (nats)", ylabel="questions")
    strip.set_ylim(bottom=0)
    strip.set_xlim(-0.06, max(1.0, strip.get_xlim()[1]))  # an entropy is not negative; its marker has a width
    strip.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=1))
    strip.yaxis.set_major_formatter(_percent)
    ends_at = [f"{a:.0%} at {e:.2f}" for e, a in zip(entropy[[0, -1]], accuracy[[0, -1]], strict=True)]
    return _titled(figure, f"Accuracy of labels: {' and '.join(dict.fromkeys(ends_at))} nats")


@_styled
def scatter(
    points: ArrayLike,
    colored: Mapping[str, ArrayLike],
    *,
    limits: Sequence[float],
    title: str,
    axes: tuple[str, str] = ("", ""),
) -> Figure:
    """Draw points in two dimensions: a few groups in color, each with its own marker, the others gray.

    Args:
        points: [n, 2], finite.
        colored: name of a group -> [n], bool; at most six groups, named beside the plot.
        limits: x and y from, x and y to; a margin is added. Figures with equal limits can be compared.
        title: what the figure shows.
        axes: labels of the axes.

    Raises:
        ValueError: nothing to draw, or more groups than colors.
    """
    drawn = np.asarray(points, dtype=np.float64)
    if not len(drawn) or len(colored) > len(PALETTE):
        raise ValueError(f"scatter needs points and at most {len(PALETTE)} groups, got {len(colored)}")
    figure = _figure()
    panel = figure.subplots()
    groups = {name: np.asarray(of, dtype=np.bool_) for name, of in colored.items()}
    others = ~np.logical_or.reduce([np.zeros(len(drawn), dtype=np.bool_), *groups.values()])
    rasterized = len(drawn) > _RASTER_ABOVE
    panel.scatter(
        drawn[others, 0], drawn[others, 1], s=7, color=MUTED, alpha=0.25, linewidths=0, rasterized=rasterized
    )
    marks = [
        panel.scatter(
            drawn[of, 0],
            drawn[of, 1],
            s=15,
            color=color,
            marker=marker,
            alpha=0.8,
            linewidths=0,
            rasterized=rasterized,
        )
        for of, color, marker in zip(groups.values(), PALETTE, "osD^vP", strict=False)
    ]
    x_from, y_from, x_to, y_to = limits
    across, along = (0.04 * max(x_to - x_from, 1e-9), 0.04 * max(y_to - y_from, 1e-9))
    panel.set(
        xlim=(x_from - across, x_to + across),
        ylim=(y_from - along, y_to + along),
        xlabel=axes[0],
        ylabel=axes[1],
    )
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    if marks:
        panel.legend(
            marks, [label(name) for name in groups], loc="center left", bbox_to_anchor=(1.01, 0.5),
            title="token", markerscale=1.4, handletextpad=0.2,
        )  # fmt: skip
    return _titled(figure, title)


def running_mean(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the mean over a centered window, [n] -> [n]; the window is cut off at the ends.

    >>> running_mean([0.0, 3.0, 6.0, 0.0], 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    v = np.asarray(values, dtype=np.float64)
    i = np.arange(v.size)
    first, last = np.maximum(i - window // 2, 0), np.minimum(i + window // 2, v.size - 1)
    total = np.concatenate([[0.0], np.cumsum(v)])
    mean: NDArray[np.float64] = (total[last + 1] - total[first]) / (last + 1 - first)
    return mean


def write_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; `path` holds the complete picture or what it held before."""
    with aside(path) as scratch:
        scratch.write_bytes(_rendered(figure, "png"))


def data_uri(figure: Figure) -> str:
    """Return the figure as a ``data:`` URI of an SVG for an ``<img>``; equal figures give equal text."""
    return f"data:image/svg+xml;base64,{base64.b64encode(_rendered(figure, 'svg')).decode('ascii')}"


def label(text: str) -> str:
    """Return user text as matplotlib may draw it: one short printable line without mathematics."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    if len(line) > _LONGEST_LABEL:
        line = line[: _LONGEST_LABEL - 1] + "…"
    return line.replace("$", r"\$") or "(unnamed)"


def _figure() -> Figure:
    return Figure(layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def _titled(figure: Figure, text: str) -> Figure:
    """Add the title and lay the figure out once, so that writing it twice costs less."""
    figure.suptitle(text, x=0.02, ha="left")
    with _quietly():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _colors(names: Mapping[str, object]) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(len(names))]


def _legend(axes: Axes, lines: Sequence[tuple[float, str, Line2D]], title: str = "") -> None:
    """Name the lines to the right of the axes, by falling value."""
    ordered = sorted(lines, key=lambda line: -line[0])
    axes.legend(
        [line for *_, line in ordered],
        [name for _, name, _ in ordered],
        title=title,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of 21 bins; an extreme that may be a spike, such as smoothing 0, is a bin's center."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        return np.linspace(low - 0.05, high + 0.05, 22)
    if 0 < low < high / 2:
        return np.linspace(0.0, high, 22)
    half = (high - low) / 40
    return np.linspace(low - half, high + half, 22)


def _percent(share: float, position: float | None = None) -> str:
    return f"{100 * share:g}%"


def _joined(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} arms"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@_styled
def _rendered(figure: Figure, format: Literal["svg", "png"]) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with _quietly():
        figure.savefig(buffer, format=format, dpi=200, metadata=metadata)
    return buffer.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the warning about a character that the font lacks, which is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield

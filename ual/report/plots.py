"""Figures of a training run or of several arms, each a `matplotlib.figure.Figure` of its own.

No pyplot, hence no global state: whoever gets a figure owns it. Names of arms and sources are data and are
drawn as plain text, never as mathematics. Colours differ in lightness as well as in hue, so that they stay
apart under colour blindness and in grey print.
"""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from ual.files import aside


class Bin(TypedDict):
    """One bin of a reliability diagram, as `ual.evaluate.reliability_bins` returns it."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a figure, as hexadecimal strings; `palette` is cycled through by the arms."""

    ink: str
    muted: str
    grid: str
    background: str
    palette: tuple[str, ...]


LIGHT = Theme(
    ink="#1b2027",
    muted="#5a6472",
    grid="#e3e7ec",
    background="#ffffff",
    palette=("#1f55d6", "#e2600c", "#0b9a72", "#8a1c7c", "#6b3d00", "#22302d"),
)
DARK = Theme(
    ink="#e8ebef",
    muted="#a2acb8",
    grid="#2e343d",
    background="#171a20",
    palette=("#5b9bff", "#ee7b38", "#62e0a4", "#de74ae", "#f7df5c", "#e6f2f2"),
)

_SIZE = (5.0, 3.75)
_LONGEST_LABEL = 22
_RASTER_ABOVE = 2000
_FEWEST_KEPT = 0.05


def loss_curves(
    arms: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    quantity: str = "training loss (nats per token)",
    theme: Theme = LIGHT,
) -> Figure:
    """Draw training loss, or the like, against step: every logged value faint, its running mean on top.

    The mean is centred and spans a tenth of the logged steps, half of that at the ends.

    Args:
        arms: name -> (step, loss) pairs by rising step; pairs whose loss is not finite leave a gap. An arm
            without a finite loss is not drawn, but keeps its colour, here and in the other figures.
        title: what is seen; by default, how far the loss went.
        quantity: the y axis' label.

    Raises:
        ValueError: nothing to draw.
    """
    figure = _figure(theme)
    axes = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []
    first_last: tuple[float, float] = (math.nan, math.nan)
    for (name, pairs), colour in zip(arms.items(), _colours(arms, theme), strict=True):
        points = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
        finite = points[np.isfinite(points[:, 1])]
        if not len(finite):
            continue
        mean = running_mean(finite[:, 1], len(finite) // 10)
        axes.plot(
            points[:, 0],
            points[:, 1],
            color=colour,
            alpha=0.3,
            linewidth=0.8,
            marker="." if len(points) < 40 else "",
            markersize=4,
            rasterized=len(points) > _RASTER_ABOVE,
        )
        axes.plot(finite[:, 0], mean, color=colour, linewidth=1.9, solid_capstyle="round")
        ends.append((float(finite[-1, 0]), float(mean[-1]), label(name), colour))
        first_last = float(mean[0]), float(mean[-1])
    if not ends:
        raise ValueError("loss_curves needs at least one arm with a finite loss")
    last_step = max(end[0] for end in ends)
    if len(ends) > 1:
        _label_ends(axes, ends, theme)
        title = title or f"Training loss of {len(ends)} arms over {last_step:,.0f} steps"
    elif not title:
        title = (
            f"Training loss went from {first_last[0]:.2f} to {first_last[1]:.2f} in {last_step:,.0f} steps"
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _dress(axes, theme, xlabel="optimizer step", ylabel=quantity)
    _title(figure, title, theme)
    return figure


def distribution(
    groups: Mapping[str, ArrayLike], *, quantity: str, title: str, unit: str = "rows", theme: Theme = LIGHT
) -> Figure:
    """Draw one histogram under another, on one x axis, with each group's size and median.

    Args:
        groups: name -> values [n], finite; an empty group is not drawn, but keeps its colour.
        quantity: the x axis' label.
        title: what is seen.
        unit: what a value belongs to.

    Raises:
        ValueError: nothing to draw, or a value that is not finite.
    """
    values = {name: np.asarray(v, dtype=np.float64).ravel() for name, v in groups.items()}
    colours = _colours(values, theme)
    drawn = [(name, v, colour) for (name, v), colour in zip(values.items(), colours, strict=True) if v.size]
    if not drawn or any(not np.isfinite(v).all() for _, v, _ in drawn):
        raise ValueError("distribution needs at least one group with values, all of them finite")
    figure = _figure(theme)
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges(np.concatenate([v for _, v, _ in drawn]))
    for axes, (name, v, colour) in zip(panels, drawn, strict=True):
        count, _ = np.histogram(v, edges)
        axes.stairs(count / v.size, edges, fill=True, color=colour, alpha=0.85)
        median = float(np.median(v))
        axes.axvline(median, color=theme.ink, linewidth=1.1)
        if len(drawn) > 1 or name:
            axes.set_title(label(name), loc="left", fontsize=8.5, color=theme.ink, pad=3)
        axes.set_title(
            f"{v.size:,} {unit}, median {median:.3g}", loc="right", fontsize=8.5, color=theme.muted, pad=3
        )
        axes.yaxis.set_major_locator(MaxNLocator(4 if len(drawn) == 1 else 2, min_n_ticks=1))
        axes.yaxis.set_major_formatter(_percent)
        _dress(axes, theme)
    panels[-1].set_xlabel(quantity, fontsize=9, color=theme.muted)
    figure.supylabel(f"share of {unit}", fontsize=9, color=theme.muted)
    _title(figure, title, theme)
    return figure


def coverage_curves(arms: Mapping[str, Sequence[tuple[float, float]]], *, theme: Theme = LIGHT) -> Figure:
    """Draw the accuracy of the rows that are kept against their share, the most certain being kept first.

    Args:
        arms: name -> (share kept, accuracy) by rising share; at least one point each.

    Raises:
        ValueError: nothing to draw.
    """
    if not arms or not all(arms.values()):
        raise ValueError("coverage_curves needs at least one arm, each with a point")
    figure = _figure(theme)
    axes = figure.subplots()
    halves = []
    for (name, pairs), colour in zip(arms.items(), _colours(arms, theme), strict=True):
        points = np.asarray(pairs, dtype=np.float64)
        enough = points[points[:, 0] >= _FEWEST_KEPT]  # the first rows alone swing between 0 and 1
        points = enough if len(enough) else points
        (line,) = axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=1.8)
        halves.append((float(points[np.abs(points[:, 0] - 0.5).argmin(), 1]), label(name), line))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    _dress(
        axes, theme, xlabel="share of rows kept, the most certain first", ylabel="accuracy of the kept rows"
    )
    halves.sort(key=lambda half: -half[0])
    if len(halves) > 1:
        axes.legend(
            [line for *_, line in halves],
            [f"{name}  {y:.3f}" for y, name, _ in halves],
            title="at half",
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8.5,
            labelcolor=theme.ink,
            title_fontproperties={"size": 8.5},
        ).get_title().set_color(theme.muted)
    title = f"Half the rows kept: accuracy {halves[0][0]:.3f} at best"
    _title(figure, title, theme)
    return figure


def reliability_diagram(
    arms: Mapping[str, Sequence[Bin]],
    *,
    unit: str = "tokens",
    confidence: str = "confidence (top-1 probability)",
    theme: Theme = LIGHT,
) -> Figure:
    """Draw accuracy against confidence per bin, and below it where the tokens, or other units, lie.

    Args:
        arms: name -> bins by rising confidence; an arm without bins is not drawn, but keeps its colour.

    Raises:
        ValueError: nothing to draw.
    """
    drawn = [name for name, bins in arms.items() if bins]
    if not drawn:
        raise ValueError("reliability_diagram needs at least one arm with bins")
    figure = _figure(theme)
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
    gap = math.nan
    for index, ((name, bins), colour) in enumerate(zip(arms.items(), _colours(arms, theme), strict=True)):
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
            color=colour,
            linewidth=1.6,
            marker="osD^vP"[index % 6],
            markersize=4.5,
            markeredgecolor=theme.background,
            markeredgewidth=0.6,
            label=f"{label(name)}  ECE {ece:.3f}",
        )
        shift = (index - (len(arms) - 1) / 2) * 0.006
        strip.vlines(stated + shift, 0, share, color=colour, linewidth=1.8)
    axes.legend(
        loc="upper left",
        fontsize=8.5,
        labelcolor=theme.ink,
        facecolor=theme.background,
        edgecolor="none",
        framealpha=0.9,
        borderpad=0.2,
    )
    if len(drawn) == 1:
        tendency = "above" if gap > 0 else "below"
        title = f"Confidence lies {abs(gap) * 100:.1f} points {tendency} accuracy"
    else:
        title = f"Confidence against accuracy: {_joined([label(name) for name in drawn])}"
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    strip.set_ylim(bottom=0)
    strip.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=1))
    strip.yaxis.set_major_formatter(_percent)
    _dress(axes, theme, ylabel="accuracy")
    _dress(strip, theme, xlabel=confidence, ylabel=unit)
    _title(figure, title, theme)
    return figure


def running_mean(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the mean over a centred window, [n] -> [n], cut off at the ends.

    >>> running_mean([0.0, 3.0, 6.0, 0.0], 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    v = np.asarray(values, dtype=np.float64)
    i = np.arange(v.size)
    first, last = np.maximum(i - window // 2, 0), np.minimum(i + window // 2, v.size - 1)
    total = np.concatenate([[0.0], np.cumsum(v)])
    mean: NDArray[np.float64] = (total[last + 1] - total[first]) / (last + 1 - first)
    return mean


def write_png(figure: Figure, path: Path, *, dpi: int = 200) -> None:
    """Write the figure as PNG; `path` holds the whole picture or what it held before."""
    with aside(path) as scratch:
        scratch.write_bytes(_rendered(figure, "png", dpi))


def data_uri(
    figure: Figure, *, format: Literal["svg", "png"] = "svg", recolour: tuple[Theme, Theme] | None = None
) -> str:
    """Return the figure as a ``data:`` URI for an ``<img>``; equal figures give equal text.

    Args:
        figure: as the functions of this module draw it.
        format: SVG stays sharp at every size.
        recolour: (the theme it was drawn in, another one), which spares drawing it again; SVG only.
    """
    content = _rendered(figure, format, 200)
    if recolour is not None:
        drawn, wanted = (_colours_of(theme) for theme in recolour)
        replacement = {old.encode(): new.encode() for old, new in zip(drawn, wanted, strict=True)}
        content = re.sub(b"#[0-9a-f]{6}", lambda found: replacement.get(found[0], found[0]), content)
    kind = {"svg": "image/svg+xml", "png": "image/png"}[format]
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that writing it several times costs less."""
    with _quietly():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")


def label(text: str) -> str:
    """Return user text as matplotlib may draw it: one short printable line without mathematics."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    if len(line) > _LONGEST_LABEL:
        line = line[: _LONGEST_LABEL - 1] + "…"
    return line.replace("$", r"\$") or "(unnamed)"


def _figure(theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    return Figure(figsize=_SIZE, layout=layout, facecolor=theme.background)


def _colours(names: Mapping[str, object], theme: Theme) -> list[str]:
    return [theme.palette[i % len(theme.palette)] for i in range(len(names))]


def _colours_of(theme: Theme) -> tuple[str, ...]:
    return (theme.ink, theme.muted, theme.grid, theme.background, *theme.palette)


def _title(figure: Figure, text: str, theme: Theme) -> None:
    figure.suptitle(text, x=0.02, ha="left", fontsize=10.5, fontweight="bold", color=theme.ink)


def _dress(axes: Axes, theme: Theme, *, xlabel: str = "", ylabel: str = "") -> None:
    axes.set_facecolor(theme.background)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=9, color=theme.muted)
    if ylabel:
        axes.set_ylabel(ylabel, fontsize=9, color=theme.muted)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], theme: Theme) -> None:
    """Name each line at its right end, the names pushed apart where lines end close together."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = [(y - low) / (high - low) for _, y, _, _ in ends]
    for (x, y, name, colour), at in zip(ends, _spread(height, gap=0.075), strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.05, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=theme.ink,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 1, "shrinkB": 0},
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`, as little as their order and mean allow."""
    order = np.argsort(heights, kind="stable")
    clusters: list[list[float]] = []
    for height in (heights[i] for i in order):
        clusters.append([height])
        while (
            len(clusters) > 1
            and _centre(clusters[-1]) - _centre(clusters[-2])
            < gap * (len(clusters[-1]) + len(clusters[-2])) / 2 - 1e-12
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    placed = [
        _centre(cluster) + gap * (k - (len(cluster) - 1) / 2)
        for cluster in clusters
        for k in range(len(cluster))
    ]
    result = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        result[i] = height
    return result


def _centre(cluster: Sequence[float]) -> float:
    return sum(cluster) / len(cluster)


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of 21 bins; an extreme that may be a spike, such as smoothing 0, is a bin's centre."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        return np.linspace(low - 0.05, high + 0.05, 22)
    if 0 < low < high / 2:
        return np.linspace(0.0, high, 22)
    half = (high - low) / 40
    return np.linspace(low - half, high + half, 22)


def _percent(share: float, position: int | None = None) -> str:
    return f"{100 * share:g}%"


def _joined(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} arms"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _rendered(figure: Figure, format: Literal["svg", "png"], dpi: int) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with _quietly(), mpl.rc_context({"svg.hashsalt": "ual", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """A character that the font lacks is drawn as a box, and no news to whoever wants a report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield

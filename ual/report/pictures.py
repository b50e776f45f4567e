"""The figures of a page, each in light and dark, or the reason why one cannot be drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ual.report import plots
from ual.runs.read import Run, number

_MOST_SOURCES = 4  # beyond it, sources are drawn together
_MOST_CURVES = 6  # colours that can be told apart

Draw = Callable[[], Figure]
Described = tuple[Draw | None, str, str]
_NLL = "loss without smoothing (nats per token)"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure in both themes as data URIs; where they are empty, `caption` says why."""

    name: str
    caption: str
    alt: str = ""
    light: str = ""
    dark: str = ""


def pictures(runs: Sequence[Run], folder: Path) -> Iterator[Picture]:
    """Draw what the runs allow, and write each figure as PNG into `folder`."""
    for name, describe in (
        ("loss", _loss),
        ("plain-loss", _plain_loss),
        ("loss-by-source", _loss_by_source),
        ("loss-by-uncertainty", _loss_by_uncertainty),
        ("tokens", _tokens),
        ("reliability", _reliability),
        ("uncertainty", _uncertainty),
        ("smoothing", _smoothing),
    ):
        found = describe(runs)
        if found is None:
            continue
        draw, alt, caption = found
        if draw is None:
            yield Picture(name, caption)
            continue
        figure = draw()
        plots.settle(figure)
        plots.write_png(figure, folder / f"{name}.png")
        dark = plots.data_uri(figure, recolour=(plots.LIGHT, plots.DARK))
        yield Picture(name, caption, alt, plots.data_uri(figure), dark)


def _loss(runs: Sequence[Run]) -> Described:
    losses = {run.name: [(float(step), loss) for step, loss in run.losses] for run in runs}
    if not any(np.isfinite(loss) for pairs in losses.values() for _, loss in pairs):
        return None, "", "No training loss was logged."
    caption = "Faint: every logged value. Bold: running mean over a tenth of the steps."
    if len(runs) > 1:
        caption += (
            " A smoothed loss is another quantity than a plain one: compare arms by the table, not here."
        )
    return (
        lambda: plots.loss_curves(losses),
        f"Line chart of training loss by step: {', '.join(losses)}.",
        caption,
    )


def _plain_loss(runs: Sequence[Run]) -> Described | None:
    """Of several arms the one loss that is the same quantity in all of them."""
    curves = _curves({run.name: run.series.get("token_nll", ()) for run in runs})
    if len(runs) == 1 or not any(curves.values()):
        return None
    return (
        lambda: plots.loss_curves(curves, title="The arms' loss without smoothing", quantity=_NLL),
        f"Line chart of plain training loss by step: {', '.join(curves)}.",
        "\N{MINUS SIGN}ln p of the trained tokens, before their step: one quantity in all arms.",
    )


def _loss_by_source(runs: Sequence[Run]) -> Described | None:
    curves = _group_curves(runs, "nll/source/")
    if not curves:
        return None
    return (
        lambda: plots.loss_curves(curves, title=_fell_most(curves, "source"), quantity=_NLL),
        f"Line chart of plain training loss by source: {', '.join(curves)}.",
        "Without smoothing, by where the rows come from.",
    )


def _loss_by_uncertainty(runs: Sequence[Run]) -> Described | None:
    curves = _group_curves(runs, "nll/uncertainty/")
    if not curves:
        return None
    quarters = {f"quarter {name[1:]}": points for name, points in sorted(curves.items())}
    return (
        lambda: plots.loss_curves(quarters, title=_fell_most(quarters, "uncertainty"), quantity=_NLL),
        f"Line chart of plain training loss by uncertainty: {', '.join(quarters)}.",
        "Without smoothing, by quarters of the rows' uncertainty, from the most certain to the least.",
    )


def _tokens(runs: Sequence[Run]) -> Described | None:
    """Of one run what the loss found out about its tokens."""
    names = {"NLL": "token_nll", "entropy": "token_entropy", "margin": "token_margin"}
    curves = _curves({name: runs[0].series.get(key, ()) for name, key in names.items()})
    if len(runs) > 1 or not any(curves.values()):
        return None
    p = runs[0].series.get("token_p", ())
    title = f"Mean probability of a token: {p[0][1]:.2f} to {p[-1][1]:.2f}" if p else "Trained tokens"
    return (
        lambda: plots.loss_curves(curves, title=title, quantity="nats per token"),
        "Line chart of the trained tokens' NLL, entropy and margin by step.",
        "Means over trained tokens. Margin: the largest logit minus the second largest.",
    )


def _group_curves(runs: Sequence[Run], prefix: str) -> dict[str, list[tuple[float, float]]]:
    """The curves of one run's groups, those with at least two points; a comparison has none."""
    if len(runs) > 1:
        return {}
    found = {
        key.removeprefix(prefix): points for key, points in runs[0].series.items() if key.startswith(prefix)
    }
    curves = {name: points for name, points in _curves(found).items() if len(points) > 1}
    return dict(list(curves.items())[:_MOST_CURVES]) if len(curves) > 1 else {}


def _curves(
    series: Mapping[str, Sequence[tuple[int, float]]],
) -> dict[str, list[tuple[float, float]]]:
    return {name: [(float(step), value) for step, value in points] for name, points in series.items()}


def _fell_most(curves: Mapping[str, Sequence[tuple[float, float]]], what: str) -> str:
    """Compare the means of each curve's first and last thirds."""
    falls = {}
    for name, points in curves.items():
        values = np.array([value for _, value in points])
        third = max(1, len(values) // 3)
        falls[name] = float(values[:third].mean() - values[-third:].mean())
    name = max(falls, key=lambda name: falls[name])
    if falls[name] <= 0:
        return f"Loss by {what}: none fell"
    return f"Loss by {what}: {plots.label(name)} fell most, by {falls[name]:.2f}"


def _reliability(runs: Sequence[Run]) -> Described:
    if len(runs) == 1:
        bins = {"before": _bins(runs[0].before), "after": _bins(runs[0].after)}
        bins = {when: filled for when, filled in bins.items() if filled}
    else:
        bins = {run.name: _bins(run.after) for run in runs}
    if not any(bins.values()):
        return None, "", "Nothing was measured on held-out rows, hence no reliability diagram."
    return (
        lambda: plots.reliability_diagram(bins),
        f"Reliability diagram: {', '.join(bins)}.",
        "Held-out tokens in bins of equal mass. Below the dashed line a model is more confident than right. "
        "The strip shows where the tokens lie.",
    )


def _uncertainty(runs: Sequence[Run]) -> Described:
    owner = next((run for run in runs if any(row.uncertainty is not None for row in run.rows)), None)
    if owner is None:
        return None, "", "No row has an uncertainty; plain and uniform fine-tuning never ask for one."
    known = [(row.source, row.uncertainty) for row in owner.rows if row.uncertainty is not None]
    groups = _by_source(known)
    title = f"Uncertainty of {len(known):,} training rows"
    if len(groups) > 1:
        medians = {source: float(np.median(values)) for source, values in groups.items()}
        title = f"Most uncertain source: {plots.label(max(medians, key=lambda source: medians[source]))}"
    white_box = owner.config is not None and owner.config.uncertainty.estimator == "white_box"
    quantity = (
        "base model's mean NLL of the response (nats)" if white_box else "uncertainty, in the data's units"
    )
    caption = "Vertical line: median."
    if len(runs) > 1:
        caption = f"As {owner.name} saw the rows. {caption}"
    if without := len(owner.rows) - len(known):
        caption += f" {without:,} rows without an uncertainty are not drawn."
    return (
        lambda: plots.distribution(groups, quantity=quantity, title=title),
        f"Histogram of the rows' uncertainty: {', '.join(groups)}.",
        caption,
    )


def _smoothing(runs: Sequence[Run]) -> Described:
    known = {
        run.name: [(row.source, row.label_smoothing) for row in run.rows if row.label_smoothing is not None]
        for run in runs
    }
    if not any(known.values()):
        return None, "", "No row's label smoothing is on record."
    caption = "Vertical line: median."
    if any(run.loss_kind == "ual" and run.config and run.config.smoothing.scale == "rank" for run in runs):
        caption += (
            " A rank scale spreads smoothing evenly by construction; what counts is which rows get more."
        )
    if len(runs) == 1:
        pairs = known[runs[0].name]
        groups = _by_source(pairs)
        title = f"Label smoothing is {np.mean([value for _, value in pairs]):.3f} on average"
    else:
        groups = {name: [value for _, value in pairs] for name, pairs in known.items()}
        title = "Label smoothing of each arm"
    return (
        lambda: plots.distribution(groups, quantity="label smoothing", title=title),
        f"Histogram of the rows' label smoothing: {', '.join(groups)}.",
        caption,
    )


def _bins(evaluation: Mapping[str, Any] | None) -> list[plots.Bin]:
    bins = (evaluation or {}).get("bins")
    keys = ("confidence", "accuracy", "count")
    return [
        plots.Bin(confidence=b["confidence"], accuracy=b["accuracy"], count=b["count"])
        for b in (bins if isinstance(bins, list) else [])
        if isinstance(b, Mapping) and all(number(b, key) is not None for key in keys) and b["count"] > 0
    ]


def _by_source(pairs: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """Group values by source; in one group without a name where the sources are one, or too many to draw."""
    groups: dict[str, list[float]] = {}
    for source, value in pairs:
        groups.setdefault(source or "(unnamed)", []).append(value)
    return groups if 1 < len(groups) <= _MOST_SOURCES else {"": [value for _, value in pairs]}

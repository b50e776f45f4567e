"""The figures of a page, each in light and dark, or the reason why one cannot be drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ual.analysis import plots
from ual.report.runs import Run, number

_MOST_SOURCES = 4  # beyond it, sources are drawn together

Draw = Callable[[], Figure]


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
        ("reliability", _reliability),
        ("uncertainty", _uncertainty),
        ("smoothing", _smoothing),
    ):
        draw, alt, caption = describe(runs)
        if draw is None:
            yield Picture(name, caption)
            continue
        figure = draw()
        plots.settle(figure)
        plots.write_png(figure, folder / f"{name}.png")
        dark = plots.data_uri(figure, recolour=(plots.LIGHT, plots.DARK))
        yield Picture(name, caption, alt, plots.data_uri(figure), dark)


def _loss(runs: Sequence[Run]) -> tuple[Draw | None, str, str]:
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


def _reliability(runs: Sequence[Run]) -> tuple[Draw | None, str, str]:
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


def _uncertainty(runs: Sequence[Run]) -> tuple[Draw | None, str, str]:
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


def _smoothing(runs: Sequence[Run]) -> tuple[Draw | None, str, str]:
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

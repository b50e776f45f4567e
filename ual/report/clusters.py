"""The page of a cluster analysis: measures with intervals, paired differences, projections, tokens."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ual.evaluate.clusters import MEASURES
from ual.files import write_text, writing
from ual.report import plots
from ual.report.findings import ABSENT
from ual.report.html import Cell, Column, Picture, Table, render

_HINTS = {"higher": "higher is tighter", "lower": "lower is tighter", "": "neither is tighter"}
_EVEN = {"gnc2": "lower is more even"}
_KINDS = {"pca": "Principal components", "umap": "UMAP"}
_COLORED = len(plots.PALETTE)


def write(summary: Mapping[str, Any], page: Path) -> Path:
    """Write the page of an analysis: one HTML file without scripts, which fetches nothing.

    Equal summaries give equal bytes. A figure that is null is a dash.

    Args:
        summary: as ``clusters.json`` holds it.
        page: the file to write.

    Raises:
        UserError: the file cannot be written.
    """
    names = [model["name"] for model in summary["models"]]
    with writing("the report", page):
        content = render(
            "clusters.html.j2",
            kind="Token clusters",
            title=", ".join(names),
            subtitle="Hidden states before the lm_head, grouped by the token that they predict",
            facts=list(_overview(summary)),
            measures=_measures(summary),
            differences=_differences(summary),
            notes=summary["notes"],
            projections=[(_KINDS[kind], list(_pictures(summary, kind))) for kind in summary["projections"]],
            tokens=_tokens(summary),
            options=summary["options"],
            command=shlex.join(summary["command"]),
        )
        write_text(page, content)
    return page


def shown(value: float | None, sign: str = "") -> str:
    """Return a figure with three digits after the point, or a dash."""
    if value is None or value != value:
        return ABSENT
    return f"{round(value, 3) + 0.0:{sign},.3f}".replace("-", "\N{MINUS SIGN}")


def _overview(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Tokens", f"{len(summary['tokens'])}"
    yield "Occurrences of each", f"{summary['occurrences']:,}"
    yield "Documents", f"{summary['documents']:,}"
    yield "Samples", summary["data"]


def _estimate(estimate: Mapping[str, float | None], sign: str = "") -> Cell:
    value, low, high = (shown(estimate[key], sign) for key in ("value", "low", "high"))
    return Cell(value, "" if ABSENT in (low, high) else f"{low} to {high}")


def _named(key: str) -> Cell:
    return Cell(MEASURES[key].name, _EVEN.get(key, _HINTS[MEASURES[key].tighter]))


def _measures(summary: Mapping[str, Any]) -> Table:
    models = summary["models"]
    columns = (Column("Measure", numeric=False), *(Column(model["name"]) for model in models))
    cells = tuple((_named(key), *(_estimate(model["measures"][key]) for model in models)) for key in MEASURES)
    return Table("With 95 % intervals over documents", columns, cells)


def _differences(summary: Mapping[str, Any]) -> Table:
    pairs = summary["differences"]
    names = [f"{pair['model']} \N{MINUS SIGN} {pair['baseline']}" for pair in pairs]
    columns = (Column("Measure", numeric=False), *map(Column, names))
    cells = tuple(
        (_named(key), *(_estimate(pair["measures"][key], "+") for pair in pairs)) for key in MEASURES
    )
    return Table("Differences on the same tokens and documents, with 95 % intervals", columns, cells)


def _pictures(summary: Mapping[str, Any], kind: str) -> Iterator[Picture]:
    """Draw one panel for each model; all have the same axes and limits."""
    points = {name: np.array(of) for name, of in summary["projections"][kind]["points"].items()}
    shares = summary["projections"][kind]["shares"]
    token = np.array(summary["places"]["token"])
    colored = {of["piece"]: token == of["id"] for of in summary["tokens"][:_COLORED]}
    every = np.concatenate([*points.values()])
    limits = tuple(map(float, (*every.min(axis=0), *every.max(axis=0))))
    axes = [f"component {i} ({share:.0%} of variance)" for i, share in enumerate(shares, 1)] or ["", ""]
    for model in summary["models"]:
        name, silhouette = model["name"], shown(model["measures"]["silhouette"]["value"])
        title = f"{plots.label(name)}: silhouette {silhouette} in all dimensions"
        figure = plots.scatter(points[name], colored, limits=limits, title=title, axes=(axes[0], axes[1]))
        alt = f"Scatter plot of the hidden states of {name} on two axes, colored by token."
        caption = f"{name}. All models have the same axes and limits; the states of each are moved to mean 0."
        yield Picture.of(figure, alt, caption)


def _tokens(summary: Mapping[str, Any]) -> Table:
    names = ("Token", "Id", "Occurrences", "Documents")
    columns = tuple(Column(name, numeric=i > 0) for i, name in enumerate(names))
    cells = tuple(
        tuple(map(Cell, (of["piece"], f"{of['id']}", f"{of['occurrences']:,}", f"{of['documents']:,}")))
        for of in summary["tokens"]
    )
    return Table("All occurrences in the samples; of each token, the same number is measured", columns, cells)

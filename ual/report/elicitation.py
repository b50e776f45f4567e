"""How good elicited uncertainties are: one self-contained page, its figures as JSON, and the rows as CSV."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

import ual
from ual.errors import UserError
from ual.evaluate import brier, expected_calibration_error, reliability_bins
from ual.evaluate.ranking import (
    Estimate,
    Ranking,
    accuracy_by_coverage,
    bootstrap_spearman,
    interval,
    ranking,
    ties,
)
from ual.files import aside
from ual.report import plots

_RESAMPLES = 1000
_FEWER_RESAMPLES, _MANY_ROWS = 100, 50_000
_EXAMPLES = 5
_SHOWN = 700  # characters of a model's text on the page
_PAIRS = 40  # pairs of estimators compared, at most


@dataclass(slots=True)
class _Column:
    """One estimator's values, NaN where missing, and the confidences that it stated."""

    values: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    unparsed: list[tuple[str, str, str]] = field(default_factory=list)
    """The first rows without a value: id, reason, raw text."""


@dataclass(frozen=True, slots=True)
class _Picture:
    alt: str
    caption: str
    light: str
    dark: str


def write_elicitation(folder: Path, output: Path | None = None) -> Path:
    """Write the page of an elicitation, ``report.json`` with its figures, and ``samples.csv``.

    Without labels the page shows what the uncertainties look like and whether estimators agree; with labels
    (`data.label`), how well they find wrong responses, with bootstrap intervals over the rows.

    Args:
        folder: what `ual elicit` wrote.
        output: the page; the other two files stay in the folder.

    Raises:
        UserError: the folder holds no elicitation, or a file cannot be written.
    """
    page = output or folder / "report.html"
    try:
        correct, columns = _read(folder / "elicited.jsonl")
        summary = _summary(folder / "summary.json")
        figures = measure(correct, columns)
        with aside(folder / "report.json") as scratch:
            scratch.write_text(json.dumps(figures, indent=1, default=asdict) + "\n", encoding="utf-8")
        _write_csv(folder / "elicited.jsonl", folder / "samples.csv", list(columns))
        content = _render(folder.resolve().name, summary, correct, columns, figures)
        with aside(page) as scratch:
            scratch.write_bytes(content.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"cannot read or write the report's files: {error.strerror or error}",
            place=str(error.filename or folder),
            remedy="name a folder in which `ual elicit` has finished, with room to write",
        ) from error
    return page


def measure(correct: np.ndarray[Any, Any], columns: Mapping[str, _Column]) -> dict[str, Any]:
    """Return every figure of the page.

    Args:
        correct: [n], 1 right, 0 wrong, NaN unknown.
        columns: by estimator, each [n].
    """
    known = ~np.isnan(correct)
    figures: dict[str, Any] = {"rows": int(correct.size), "labelled": int(known.sum()), "estimators": {}}
    if known.any():
        figures["accuracy"] = float(correct[known].mean())
    vectors = {name: np.array(column.values) for name, column in columns.items()}
    resamples = _RESAMPLES if correct.size <= _MANY_ROWS else _FEWER_RESAMPLES
    for name, values in vectors.items():
        present = ~np.isnan(values)
        u = values[present]
        distinct, commonest = ties(u) if u.size else (0, 0.0)
        both = present & known
        row: dict[str, Any] = {
            "values": int(u.size),
            "missing": int((~present).sum()),
            "mean": float(u.mean()) if u.size else None,
            "quantiles": np.quantile(u, [0, 0.25, 0.5, 0.75, 1]).tolist() if u.size else None,
            "distinct": distinct,
            "commonest_share": commonest,
            "ranking": ranking(values[both], correct[both] == 0, resamples=resamples) if both.any() else None,
        }
        confidence = np.array(columns[name].confidence)
        stated = known & ~np.isnan(confidence)
        if stated.any():
            pair = confidence[stated], correct[stated]
            row["calibration"] = {
                "stated": int(stated.sum()),
                "mean_confidence": float(pair[0].mean()),
                "accuracy": float(pair[1].mean()),
                "ece": expected_calibration_error(*pair, bins=10),
                "brier": brier(*pair),
                "bins": reliability_bins(*pair, bins=10),
            }
        figures["estimators"][name] = row
    figures["spearman"] = [
        {"a": a, "b": b, "n": int(both.sum()), "rho": _rho(vectors[a][both], vectors[b][both], resamples)}
        for a, b in list(combinations(vectors, 2))[:_PAIRS]
        if (both := ~np.isnan(vectors[a]) & ~np.isnan(vectors[b])).sum() > 2
    ]
    return figures


def cell(value: object) -> str:
    """Return a CSV cell that no spreadsheet takes for a formula: numbers as they are, such text with a quote.

    >>> cell("=1+1"), cell(-0.5), cell("-x"), cell(None)
    ("'=1+1", '-0.5', "'-x", '')
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return f"'{text}" if text.lstrip(" ")[:1] in tuple("=+-@\t\r\n|%") else text


def _rho(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], resamples: int) -> Estimate | None:
    return bootstrap_spearman(a, b, resamples=min(resamples, 200))


def _read(path: Path) -> tuple[np.ndarray[Any, Any], dict[str, _Column]]:
    correct: list[float] = []
    columns: dict[str, _Column] = {}
    for record in _records(path):
        right = record.get("correct")
        correct.append(float("nan") if right is None else float(right))
        for name, estimate in record["estimates"].items():
            column = columns.setdefault(name, _Column())
            value = estimate.get("value")
            column.values.append(float("nan") if value is None else float(value))
            stated = estimate.get("confidence", estimate.get("p_true"))
            column.confidence.append(float("nan") if stated is None else float(stated))
            if value is None and len(column.unparsed) < _EXAMPLES:
                reason = str(estimate.get("error") or estimate.get("unparsed") or "")
                raw = estimate.get("reply") or estimate.get("first_unparsed") or ""
                column.unparsed.append((str(record["id"])[:100], reason[:_SHOWN], str(raw)[:_SHOWN]))
    return np.array(correct), columns


def _records(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                record = json.loads(line)
                record["id"], record["estimates"].items()
                yield record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not a record of `ual elicit`: {error}", place=f"{path}, line {number}") from error
    if not number:
        raise UserError("there is no record", place=str(path))


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not the summary of `ual elicit`: {error}", place=str(path)) from error
    return summary


def _write_csv(source: Path, target: Path, names: list[str]) -> None:
    with aside(target) as scratch, scratch.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "correct", *map(cell, names), "reply"])
        for record in _records(source):
            estimates = record["estimates"]
            reply = next((e["reply"] for e in estimates.values() if e.get("reply")), None)
            values = (estimates.get(name, {}).get("value") for name in names)
            row = [record["id"], record["correct"], *values, reply and str(reply)[:_SHOWN]]
            writer.writerow(map(cell, row))


def _render(
    name: str,
    summary: Mapping[str, Any],
    correct: np.ndarray[Any, Any],
    columns: Mapping[str, _Column],
    figures: Mapping[str, Any],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("elicitation.html.j2").render(
        version=ual.__version__,
        light=plots.LIGHT,
        dark=plots.DARK,
        title=name,
        summary=summary,
        figures=figures,
        interval=interval,
        columns=columns,
        pictures=list(_pictures(correct, columns, figures)),
    )


def _pictures(
    correct: np.ndarray[Any, Any], columns: Mapping[str, _Column], figures: Mapping[str, Any]
) -> Iterator[_Picture]:
    known = ~np.isnan(correct)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, column in columns.items():
        values = np.array(column.values)
        present = ~np.isnan(values)
        if not present.any():
            continue
        groups = {"": values[present]}
        if known.any():
            groups = {"right": values[present & (correct == 1)], "wrong": values[present & (correct == 0)]}
        if any(len(group) for group in groups.values()):
            yield _draw(
                lambda groups=groups, name=name: plots.distribution(  # type: ignore[misc]
                    groups, quantity="uncertainty", title=f"Uncertainty by {plots.label(name)}"
                ),
                f"Histogram of the uncertainty by {name}.",
                f"{name}: {int(present.sum()):,} values. Vertical line: median.",
            )
        found: Ranking | None = figures["estimators"][name]["ranking"]
        if found is not None:
            curves[name] = accuracy_by_coverage(values[present & known], correct[present & known] == 0)
    if curves:
        yield _draw(
            lambda: plots.coverage_curves(curves),
            f"Accuracy of the most certain rows by their share: {', '.join(curves)}.",
            "Rejecting the most uncertain rows first: accuracy of those that are kept.",
        )
    bins = {
        n: row["calibration"]["bins"] for n, row in figures["estimators"].items() if row.get("calibration")
    }
    if bins:
        yield _draw(
            lambda: plots.reliability_diagram(bins, unit="rows", confidence="stated confidence"),
            f"Reliability diagram: {', '.join(bins)}.",
            "Stated confidence against accuracy, in bins of about equal mass.",
        )


def _draw(draw: Callable[[], Figure], alt: str, caption: str) -> _Picture:
    figure = draw()
    plots.settle(figure)
    dark = plots.data_uri(figure, recolour=(plots.LIGHT, plots.DARK))
    return _Picture(alt, caption, plots.data_uri(figure), dark)

"""How good elicited uncertainties are: a self-contained page, its figures as JSON, the samples as CSV."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ual.errors import UserError
from ual.evaluate import brier, expected_calibration_error, reliability_bins
from ual.evaluate.ranking import accuracy_by_coverage, rank_correlation, ranking, ties
from ual.files import aside, read_jsonl, write_json, write_text, writing
from ual.report import plots
from ual.report.html import Cell, Column, Picture, Table, render

_RESAMPLES = 1000
_FEWER_RESAMPLES, _MANY_SAMPLES = 200, 5_000
_EXAMPLES = 5
_SHOWN = 700  # characters of a model's text on the page
_PAIRS = 40  # pairs of estimators compared, at most
_RANKING = ("auroc", "auprc", "prr")
_CALIBRATION = ("mean_confidence", "accuracy", "ece", "brier")


@dataclass(slots=True)
class _Values:
    """One estimator's values, NaN where missing, and the confidences that it stated."""

    values: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    unparsed: list[tuple[str, str, str]] = field(default_factory=list)
    """The first samples without a value: id, reason, raw text."""


def write_elicitation(folder: Path, output: Path | None = None) -> Path:
    """Write the page of an elicitation, ``report.json`` with its figures, and ``samples.csv``.

    Without labels the page shows the distribution of the uncertainties and how estimators agree. With labels
    (`data.label`), it also shows how well they find wrong responses, with bootstrap intervals.

    Args:
        folder: what `ual elicit` wrote.
        output: the page; the other two files stay in the folder.

    Raises:
        UserError: the folder holds no elicitation, or a file cannot be written.
    """
    source, page = folder / "elicited.jsonl", output or folder / "report.html"
    if not source.is_file():
        remedy = "pass a folder in which `ual elicit` has finished"
        raise UserError(f"there is no {source.name}", place=str(folder), remedy=remedy)
    correct, columns = _read(source)
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the summary: {error}", place=str(folder / "summary.json")) from error
    figures = measure(correct, columns)
    content = render(
        "elicitation.html.j2",
        kind="Elicited uncertainty",
        title=folder.resolve().name,
        subtitle=_subtitle(summary, figures),
        tables=list(_tables(figures)),
        pictures=list(_pictures(correct, columns, figures)),
        unparsed=[(name, *example) for name, column in columns.items() for example in column.unparsed],
    )
    with writing("the report", folder):
        write_json(folder / "report.json", figures)
        _write_csv(source, folder / "samples.csv", list(columns))
        write_text(page, content)
    return page


def measure(correct: np.ndarray[Any, Any], columns: Mapping[str, _Values]) -> dict[str, Any]:
    """Return every figure of the page.

    Args:
        correct: [n], 1 right, 0 wrong, NaN unknown.
        columns: by estimator, each [n].
    """
    known = ~np.isnan(correct)
    figures: dict[str, Any] = {"rows": int(correct.size), "labeled": int(known.sum()), "estimators": {}}
    if known.any():
        figures["accuracy"] = float(correct[known].mean())
    vectors = {name: np.array(column.values) for name, column in columns.items()}
    resamples = _RESAMPLES if correct.size <= _MANY_SAMPLES else _FEWER_RESAMPLES
    for name, values in vectors.items():
        present = ~np.isnan(values)
        u = values[present]
        distinct, commonest = ties(u) if u.size else (0, 0.0)
        both = present & known
        found = ranking(values[both], correct[both] == 0, resamples=resamples) if both.any() else None
        row: dict[str, Any] = {
            "values": int(u.size),
            "missing": int((~present).sum()),
            "mean": float(u.mean()) if u.size else None,
            "quantiles": np.quantile(u, [0, 0.25, 0.5, 0.75, 1]).tolist() if u.size else None,
            "distinct": distinct,
            "commonest_share": commonest,
            "ranking": asdict(found) if found else None,
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
    figures["spearman"] = []
    for a, b in list(combinations(vectors, 2))[:_PAIRS]:
        both = ~np.isnan(vectors[a]) & ~np.isnan(vectors[b])
        if both.sum() > 2:
            rho = rank_correlation(vectors[a][both], vectors[b][both], resamples=200)
            figures["spearman"].append({"a": a, "b": b, "n": int(both.sum()), "rho": rho and asdict(rho)})
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


def _read(path: Path) -> tuple[np.ndarray[Any, Any], dict[str, _Values]]:
    correct: list[float] = []
    columns: dict[str, _Values] = {}
    for number, record in read_jsonl(path):
        try:
            right = record.get("correct")
            correct.append(float("nan") if right is None else float(right))
            for name, estimate in record["estimates"].items():
                column = columns.setdefault(name, _Values())
                value = estimate.get("value")
                column.values.append(float("nan") if value is None else float(value))
                stated = estimate.get("confidence", estimate.get("p_true"))
                column.confidence.append(float("nan") if stated is None else float(stated))
                if value is None and len(column.unparsed) < _EXAMPLES:
                    reason = str(estimate.get("error") or estimate.get("unparsed") or "")
                    raw = estimate.get("reply") or estimate.get("first_unparsed") or ""
                    column.unparsed.append((str(record["id"])[:100], reason[:_SHOWN], str(raw)[:_SHOWN]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"not a record of `ual elicit`: {error}", place=f"{path}, line {number}"
            ) from error
    if not correct:
        raise UserError("the file holds no record", place=str(path))
    return np.array(correct), columns


def _write_csv(source: Path, target: Path, names: list[str]) -> None:
    with aside(target) as scratch, scratch.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "correct", *map(cell, names), "reply"])
        for _, record in read_jsonl(source):
            estimates = record["estimates"]
            reply = next((e["reply"] for e in estimates.values() if e.get("reply")), None)
            values = (estimates.get(name, {}).get("value") for name in names)
            row = [record["id"], record["correct"], *values, reply and str(reply)[:_SHOWN]]
            writer.writerow(map(cell, row))


def _subtitle(summary: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    requests, known = summary["requests"], ""
    if figures["labeled"]:
        known = f", {figures['labeled']:,} of them labeled ({figures['accuracy']:.1%} right)"
    return (
        f"{figures['rows']:,} samples{known}. {requests['sent']:,} requests sent, {requests['cached']:,} "
        f"answered from the cache, {requests['failed']:,} failed. Cost {summary['cost_of_all_runs']:.4f} "
        f"over all runs, {summary['cost_per_row']:.6f} per sample."
    )


def _tables(figures: Mapping[str, Any]) -> Iterator[tuple[str, Table, str]]:
    """Yield heading, table and note."""
    estimators = figures["estimators"].items()
    values = []
    for name, row in estimators:
        quantiles = [f"{row['quantiles'][i]:.3g}" for i in (0, 2, 4)] if row["quantiles"] else [""] * 3
        counts = [f"{row['values']:,}", f"{row['missing']:,}", *quantiles, f"{row['distinct']:,}"]
        values.append([name, *counts, f"{row['commonest_share']:.1%}"])
    names: tuple[str, ...] = (
        "Estimator",
        "Values",
        "Missing",
        "Min",
        "Median",
        "Max",
        "Distinct",
        "Most common",
    )
    yield "Uncertainties", _table("Most common: share of the most common value", names, values), ""
    if figures["labeled"]:
        found = [(name, row["ranking"]) for name, row in estimators if row["ranking"]]
        names = "Estimator", "Samples", "Wrong", "AUROC", "AUPRC", "Prediction rejection"
        rows = [
            [name, f"{r['n']:,}", f"{r['errors'] / r['n']:.1%}", *(_interval(r[key]) for key in _RANKING)]
            for name, r in found
        ]
        yield (
            "Does uncertainty find the wrong responses?",
            _table("In brackets: 95 % bootstrap interval over samples", names, rows),
            "AUROC: chance is 0.5. AUPRC of wrong responses: chance is their share. Prediction rejection: 0 "
            "is a random order, 1 the best one. Samples without a value are left out.",
        )
    if stated := [(name, row["calibration"]) for name, row in estimators if row.get("calibration")]:
        names = "Estimator", "Samples", "Mean confidence", "Accuracy", "ECE", "Brier"
        rows = [[name, f"{c['stated']:,}", *(f"{c[key]:.3f}" for key in _CALIBRATION)] for name, c in stated]
        caption = "Labeled samples with a stated confidence"
        yield "Is stated confidence calibrated?", _table(caption, names, rows), ""
    if pairs := figures["spearman"]:
        names = "Estimator", "Other estimator", "Samples", "Spearman"
        rows = [[p["a"], p["b"], f"{p['n']:,}", _interval(p["rho"]) or "constant"] for p in pairs]
        caption = "Rank correlation; in brackets: 95 % bootstrap interval over samples"
        yield "Do the estimators agree?", _table(caption, names, rows), ""


def _table(caption: str, names: tuple[str, ...], rows: list[list[str]]) -> Table:
    columns = tuple(Column(name, numeric="stimator" not in name) for name in names)
    return Table(caption, columns, tuple(tuple(map(Cell, row)) for row in rows))


def _interval(estimate: Mapping[str, float] | None) -> str:
    return "" if estimate is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**estimate)


def _pictures(
    correct: np.ndarray[Any, Any], columns: Mapping[str, _Values], figures: Mapping[str, Any]
) -> Iterator[Picture]:
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
            yield Picture.of(
                plots.distribution(
                    groups, quantity="uncertainty", title=f"Uncertainty by {plots.label(name)}"
                ),
                f"Histogram of the uncertainty by {name}.",
                f"{name}: {int(present.sum()):,} values. Vertical line: median.",
            )
        if figures["estimators"][name]["ranking"]:
            curves[name] = accuracy_by_coverage(values[present & known], correct[present & known] == 0)
    if curves:
        yield Picture.of(
            plots.coverage_curves(curves),
            f"Accuracy of the most certain samples by their share: {', '.join(curves)}.",
            "Accuracy of the remaining samples if the most uncertain are rejected first.",
        )
    bins = {
        n: row["calibration"]["bins"] for n, row in figures["estimators"].items() if row.get("calibration")
    }
    if bins:
        yield Picture.of(
            plots.reliability_diagram(bins, unit="samples", confidence="stated confidence"),
            f"Reliability diagram: {', '.join(bins)}.",
            "Stated confidence against accuracy, in bins of about equal mass.",
        )

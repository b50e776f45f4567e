"""The pictures of a page about runs, or the reason why one cannot be drawn."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.figure import Figure

from ual.evaluate import ReliabilityBin
from ual.report import plots
from ual.report.html import Picture
from ual.runs.read import Run, number

_MOST_SOURCES = 4  # beyond it, sources are drawn together
_MOST_CURVES = 6  # colors that can be told apart
_NLL = "loss without smoothing (nats per token)"

Curves = dict[str, list[tuple[float, float]]]


class _Drawn(NamedTuple):
    figure: Figure
    alt: str
    caption: str


def pictures(runs: Sequence[Run], folder: Path) -> Iterator[Picture]:
    """Draw what the runs allow, and write each figure as PNG into `folder`."""
    for name, draw in (
        ("loss", _loss),
        ("plain-loss", _plain_loss),
        ("loss-by-source", _loss_by_source),
        ("loss-by-uncertainty", _loss_by_uncertainty),
        ("tokens", _tokens),
        ("reliability", _reliability),
        ("uncertainty", _uncertainty),
        ("smoothing", _smoothing),
    ):
        drawn = draw(runs)
        if isinstance(drawn, str):
            yield Picture(drawn)
        elif drawn is not None:
            plots.write_png(drawn.figure, folder / f"{name}.png")
            yield Picture.of(*drawn)


def _loss(runs: Sequence[Run]) -> _Drawn | str:
    losses = _curves({run.name: run.losses for run in runs})
    if not any(np.isfinite(loss) for points in losses.values() for _, loss in points):
        return "No training loss was logged."
    caption = "Faint: logged values. Bold: running mean over a tenth of the steps."
    if len(runs) > 1:
        caption += " Losses with different smoothing are different quantities: compare arms by the table."
    alt = f"Line chart of training loss by step: {', '.join(losses)}."
    return _Drawn(plots.loss_curves(losses), alt, caption)


def _plain_loss(runs: Sequence[Run]) -> _Drawn | None:
    """Draw the loss that is the same quantity in all arms."""
    curves = _curves({run.name: run.series.get("token_nll", ()) for run in runs})
    if len(runs) == 1 or not any(curves.values()):
        return None
    return _Drawn(
        plots.loss_curves(curves, title="Training loss without smoothing", quantity=_NLL),
        f"Line chart of plain training loss by step: {', '.join(curves)}.",
        "\N{MINUS SIGN}ln p of the loss tokens, before their step: the same quantity in all arms.",
    )


def _loss_by_source(runs: Sequence[Run]) -> _Drawn | None:
    return _by_group(_group_curves(runs, "nll/source/"), "source", "by the samples' source")


def _loss_by_uncertainty(runs: Sequence[Run]) -> _Drawn | None:
    curves = sorted(_group_curves(runs, "nll/uncertainty/").items())
    words = "by quarters of the samples' uncertainty; quarter 1 is the most certain"
    return _by_group({f"quarter {name[1:]}": points for name, points in curves}, "uncertainty", words)


def _by_group(curves: Curves, what: str, words: str) -> _Drawn | None:
    if not curves:
        return None
    return _Drawn(
        plots.loss_curves(curves, title=_fell_most(curves, what), quantity=_NLL),
        f"Line chart of plain training loss by {what}: {', '.join(curves)}.",
        f"Without smoothing, {words}.",
    )


def _tokens(runs: Sequence[Run]) -> _Drawn | None:
    """Draw the statistics that the loss computed for the tokens of one run."""
    names = {"NLL": "token_nll", "entropy": "token_entropy", "margin": "token_margin"}
    curves = _curves({name: runs[0].series.get(key, ()) for name, key in names.items()})
    if len(runs) > 1 or not any(curves.values()):
        return None
    p = runs[0].series.get("token_p", ())
    title = f"Mean probability of a token: {p[0][1]:.2f} to {p[-1][1]:.2f}" if p else "Loss tokens"
    return _Drawn(
        plots.loss_curves(curves, title=title, quantity="nats per token"),
        "Line chart of the loss tokens' NLL, entropy and margin by step.",
        "Means over loss tokens. Margin: the largest logit minus the second largest.",
    )


def _group_curves(runs: Sequence[Run], prefix: str) -> Curves:
    """Return the curves of one run's groups, those with at least two points; a comparison has none."""
    if len(runs) > 1:
        return {}
    series = runs[0].series.items()
    found = _curves({key.removeprefix(prefix): points for key, points in series if key.startswith(prefix)})
    curves = {name: points for name, points in found.items() if len(points) > 1}
    return dict(list(curves.items())[:_MOST_CURVES]) if len(curves) > 1 else {}


def _curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> Curves:
    return {name: [(float(step), value) for step, value in points] for name, points in series.items()}


def _fell_most(curves: Curves, what: str) -> str:
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


def _reliability(runs: Sequence[Run]) -> _Drawn | str:
    if len(runs) == 1:
        bins = {"before": _bins(runs[0].before), "after": _bins(runs[0].after)}
        bins = {when: filled for when, filled in bins.items() if filled}
    else:
        bins = {run.name: _bins(run.after) for run in runs}
    if not any(bins.values()):
        return "Nothing was measured on held-out samples, so there is no reliability diagram."
    return _Drawn(
        plots.reliability_diagram(bins),
        f"Reliability diagram: {', '.join(bins)}.",
        "Held-out tokens in bins of equal mass. Below the dashed line, confidence exceeds accuracy. "
        "The strip shows each bin's share of the tokens.",
    )


def _uncertainty(runs: Sequence[Run]) -> _Drawn | str:
    owner = next((run for run in runs if any(row.uncertainty is not None for row in run.rows)), None)
    if owner is None:
        if all(run.smoothing and run.smoothing != "own" for run in runs):
            return "No run here sets smoothing by uncertainty, so none is recorded."
        return "No sample has an uncertainty; only uncertainty-aware fine-tuning needs one."
    known = [(row.source, row.uncertainty) for row in owner.rows if row.uncertainty is not None]
    groups = _by_source(known)
    title = f"Uncertainty of {len(known):,} training samples"
    if len(groups) > 1:
        medians = {source: float(np.median(values)) for source, values in groups.items()}
        title = f"Most uncertain source: {plots.label(max(medians, key=lambda source: medians[source]))}"
    white_box = owner.config is not None and owner.config.uncertainty.estimator == "white_box"
    quantity = (
        "base model's mean NLL of the response (nats)" if white_box else "uncertainty, as the data gives it"
    )
    caption = "Vertical line: median."
    if len(runs) > 1:
        caption = f"The uncertainties of {owner.name}. {caption}"
    if without := len(owner.rows) - len(known):
        caption += f" {without:,} samples without an uncertainty are not drawn."
    return _Drawn(
        plots.distribution(groups, quantity=quantity, title=title),
        f"Histogram of the samples' uncertainty: {', '.join(groups)}.",
        caption,
    )


def _smoothing(runs: Sequence[Run]) -> _Drawn | str:
    known = {
        run.name: [(row.source, row.label_smoothing) for row in run.rows if row.label_smoothing is not None]
        for run in runs
    }
    if all(run.smoothing == "none" for run in runs):
        return "No label smoothing is used."
    if not any(known.values()):
        return "No label smoothing is recorded for any sample."
    caption = "Vertical line: median."
    if any(run.smoothing == "own" and run.config and run.config.smoothing.scale == "rank" for run in runs):
        caption += " A rank scale spreads smoothing evenly by construction."
    if len(runs) == 1:
        pairs = known[runs[0].name]
        groups = _by_source(pairs)
        title = f"Mean label smoothing: {np.mean([value for _, value in pairs]):.3f}"
    else:
        groups = {name: [value for _, value in pairs] for name, pairs in known.items()}
        title = "Label smoothing of each arm"
    return _Drawn(
        plots.distribution(groups, quantity="label smoothing", title=title),
        f"Histogram of the samples' label smoothing: {', '.join(groups)}.",
        caption,
    )


def _bins(evaluation: Mapping[str, Any] | None) -> list[ReliabilityBin]:
    bins = (evaluation or {}).get("bins")
    return [
        cast(ReliabilityBin, bin)
        for bin in (bins if isinstance(bins, list) else [])
        if isinstance(bin, dict)
        and all(number(bin, key) is not None for key in ("confidence", "accuracy", "count"))
        and bin["count"] > 0
    ]


def _by_source(pairs: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """Group values by source; in one unnamed group if there is one source, or too many to draw."""
    groups: dict[str, list[float]] = {}
    for source, value in pairs:
        groups.setdefault(source or "(unnamed)", []).append(value)
    return groups if 1 < len(groups) <= _MOST_SOURCES else {"": [value for _, value in pairs]}

"""Tables (Markdown) and plots of a results file."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import machine

Row = dict[str, Any]
_MIB = 2**20
_FAILURES = {"skipped": "skipped", "wrong": "incorrect", "raised": "raised"}


def load(path: Path) -> dict[str, Any]:
    """Return the results that `pytest benchmarks/suites` wrote.

    Raises:
        ValueError: the file cannot be read, or is not a results file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read results: {error}") from error
    if not isinstance(found, dict) or not {"rows", "machine"} <= found.keys():
        raise ValueError(
            f"{path}: not a results file; pass a file that `pytest benchmarks/suites --results FILE` wrote"
        )
    for row in found["rows"]:
        if "solves" in row:  # files before 2026-11-26 use another word for token
            row["solves"] = re.sub(r"s per \w+", "s per token", row["solves"])
    return found


def newest(folder: Path, wanted: Callable[[Row], bool] = lambda _: True, *, gpu: bool | None = None) -> Path:
    """Return the newest results file under a folder.

    Args:
        folder: Holds results, or one folder of results for each machine.
        wanted: Only files with such a measurement count.
        gpu: Only files from a machine with a GPU (True) or without one (False) count.

    Raises:
        ValueError: there is no such file.
    """
    files = {path: load(path) for path in (*folder.glob("*.json"), *folder.glob("*/*.json"))}
    times = {
        path: found["machine"].get("time", "")
        for path, found in files.items()
        if any(map(wanted, found["rows"])) and gpu in (None, bool(found["machine"].get("gpu")))
    }
    if not times:
        raise ValueError(f"{folder}: no such results; `make bench` writes some")
    return max(times, key=lambda path: times[path])


# ---- measurements ----


def failure(row: Row) -> str:
    """Return why a measurement has no numbers, or ""."""
    return next((f"{word}: {row[key]}" for key, word in _FAILURES.items() if key in row), "")


def time(row: Row) -> float:
    """Return the median in seconds; infinity without times, which sorts the measurement last."""
    return median(row["seconds"]["it"]) if "seconds" in row else math.inf


def spread(row: Row) -> float:
    """Return half the interquartile range, relative to the median."""
    taken = row["seconds"]["it"] if "seconds" in row else []
    if len(taken) < 3:
        return math.nan
    low, _, high = quantiles(taken, n=4)
    return (high - low) / 2 / median(taken)


def grouped(rows: Iterable[Row], *keys: str) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """Group measurements by the values of keys, in order of first occurrence."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in keys)

    rows = list(rows)
    order = {k: i for i, k in reversed(list(enumerate(map(key, rows))))}
    return [(k, list(g)) for k, g in groupby(sorted(rows, key=lambda r: order[key(r)]), key)]


def cell(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _ms(row: Row) -> str:
    taken = time(row) * 1e3
    return cell(taken, ".0f" if taken >= 100 else ".3g")


def error_cell(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


# ---- tables ----


def _timed(rows: list[Row], limit: str, rate: Callable[[Row], str], error: str) -> str:
    header = (
        "provider",
        "smoothing",
        "ms",
        "±",
        f"x {limit}",
        "x ours",
        "rate",
        "extra MiB",
        f"{error} error",
        "",
    )
    lines = []
    for r in sorted((r for r in rows if "skipped" not in r), key=time):
        name = f"**{r['provider']}**" if r["ours"] else r["provider"]
        numbers = "seconds" in r
        memory = r.get("peak_bytes")
        lines.append(
            (name, r["solves"], _ms(r), cell(spread(r), ".0%"),
             cell(r.get(f"of_{limit}"), ".2f"), cell(r.get("of_ours"), ".2f"), rate(r) if numbers else "-",
             "-" if memory is None else f"{memory / _MIB:.0f}", error_cell(r.get("errors", {}).get(error)),
             failure(r) or _note(r))
        )  # fmt: skip
    return "\n\n".join([machine.table(header, lines), *_skipped(rows)])


def _note(row: Row) -> str:
    one_class = row.get("of_one_class")
    notes = [row.get("note", ""), one_class and f"{one_class:.2f} x the time with class indices"]
    return "; ".join(filter(None, notes))


def _skipped(rows: list[Row]) -> list[str]:
    """List the providers that were not measured, by reason."""
    skipped = grouped((r for r in rows if "skipped" in r), "skipped")
    return [
        f"Not measured ({reason}): {'; '.join(r['provider'] for r in group)}." for (reason,), group in skipped
    ]


def _linear(rows: list[Row]) -> list[str]:
    text = [
        "Forward and backward. `products`: the bare matrix products of the same numbers, written into "
        "allocated memory. `x`: time relative to the products and to ours, as the median of ratios within "
        "rounds. `±`: half the interquartile range. Extra MiB: peak memory of a call. Errors are relative, "
        "against float64, on a slice."
    ]
    for (problem, setting, dtype), group in grouped(rows, "problem", "setting", "dtype"):
        r = group[0]
        text.append(f"### {problem}: V {r['vocab']}, D {r['features']}, N {r['rows']}; {setting}, {dtype}")
        text.append(_timed(group, "products", lambda r: f"{r['flop'] / time(r) / 1e12:.3g} TFLOP/s", "dE"))
    return text


def _logits(rows: list[Row]) -> list[str]:
    text = ["`copy`: a plain memory copy of as many bytes as the loss must read and write at least."]
    for (problem, dtype), group in grouped(rows, "problem", "dtype"):
        r = group[0]
        text.append(f"### {problem}: V {r['vocab']}, N {r['rows']}, {dtype}")
        text.append(_timed(group, "copy", lambda r: f"{r['least_bytes'] / time(r) / 1e9:.3g} GB/s", "dz"))
    return text


def _accuracy(rows: list[Row]) -> list[str]:
    text = [
        "bfloat16 inputs. Loss: mean absolute error of a token's loss, and error of the returned mean. dE, "
        "dC: relative error in the Frobenius norm, as returned, and before rounding if float32 is kept. "
        "A provider without smoothing per token is measured on the easier problem in the second column."
    ]
    for (_, source), group in grouped(rows, "problem", "source"):
        if source is None:
            continue
        r = group[0]
        text.append(f"### {source}: {r['rows']} tokens, V {r['vocab']}, D {r['features']}")
        text += [accuracy_table(group), *_skipped(group)]
    return text


def accuracy_table(rows: list[Row]) -> str:
    header = ("provider", "smoothing", "loss", "its mean", "dE", "dE, p99 token", "dE unrounded", "dC", "")
    lines = []
    for r in (r for r in rows if "skipped" not in r):
        a = r.get("accuracy", {})
        names = ("loss", "mean_loss", "hidden", "hidden_p99", "unrounded", "head")
        notes = [
            r.get("how", ""),
            "mean in bfloat16" if a.get("mean_dtype") == "bfloat16" else "",
            failure(r),
        ]
        name = f"**{r['provider']}**" if r.get("ours") else r["provider"]
        lines.append(
            (name, r["solves"], *(error_cell(a.get(n)) for n in names), ", ".join(filter(None, notes)))
        )
    return machine.table(header, lines)


def real_errors(rows: list[Row]) -> dict[str, float]:
    """Return each provider's relative error of dE on real hidden states."""
    return {
        r["provider"]: r["accuracy"]["hidden"]
        for r in rows
        if r["suite"] == "accuracy" and r.get("problem") == "real" and "accuracy" in r
    }


def slope(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x; NaN for fewer than three points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 3:
        return math.nan
    mx, my = (sum(v) / len(logs) for v in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def _step(rows: list[Row]) -> list[str]:
    header = ("loss", "smoothing", "ms", "±", "x transformers", "head's share", "extra MiB", "")
    text = [
        "Forward, backward and optimizer step. LoRA on the attention; half of the tokens are loss tokens."
    ]
    for (problem, dtype), group in grouped(rows, "problem", "dtype"):
        measured = [r for r in group if "skipped" not in r]
        if measured:
            r = measured[0]
            text.append(f"### {problem}: V {r['vocab']}, D {r['features']}, {r['rows']} tokens, {dtype}")
            lines = [
                (f"**{r['provider']}**" if r["ours"] else r["provider"], r["solves"], _ms(r),
                 cell(spread(r), ".0%"), cell(r.get("of_transformers"), ".2f"),
                 cell(r.get("head_share"), ".0%"), mib(r), failure(r))
                for r in measured
            ]  # fmt: skip
            text.append(machine.table(header, lines))
        text += _skipped(group)
    return text


_AXES = {"rows": "N", "vocab": "V", "features": "D"}


def _scaling(rows: list[Row]) -> list[str]:
    text = [
        "One of N, V and D grows; the others are fixed. Slope: of log time (or log extra memory) over log "
        "size, fitted to the upper half of the sizes (at least three). 1 is proportional, 0 constant."
    ]
    for (axis,), group in grouped(rows, "setting"):
        others = ", ".join(f"{_AXES[k]} {group[0][k]}" for k in _AXES if k != axis)
        text += [f"### {_AXES[axis]} grows; {others}", scaling_table(group, axis)]
        text += [f"{r['provider']} at {r[axis]}: {failure(r)}" for r in group if failure(r)]
    return text


def scaling_table(rows: list[Row], axis: str) -> str:
    sizes = sorted({r[axis] for r in rows})
    lines = []
    for (provider,), mine in grouped(rows, "provider"):
        cells = {r[axis]: r for r in mine}
        upper = [cells[s] for s in sizes[-max(3, len(sizes) // 2) :] if s in cells]
        for what, of, form in (("ms", _seconds, _ms), ("MiB", _bytes, mib)):
            fitted = slope([(r[axis], of(r)) for r in upper])
            cells_text = [form(cells[s]) if s in cells else "-" for s in sizes]
            lines.append((provider, what, *cells_text, cell(fitted, ".2f")))
    return machine.table(("provider", "", *map(str, sizes), "slope"), lines)


def _seconds(row: Row) -> float:
    return time(row) if "seconds" in row else 0.0


def _bytes(row: Row) -> float:
    return float(row.get("peak_bytes", 0.0))


def mib(row: Row) -> str:
    return cell(row["peak_bytes"] / _MIB, ".0f") if "peak_bytes" in row else "-"


_SUITES: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "linear_cross_entropy": ("Hidden states and head in", _linear),
    "cross_entropy": ("Logits in", _logits),
    "train_step": ("A complete training step", _step),
    "accuracy": ("Error against float64", _accuracy),
    "scaling": ("As sizes grow", _scaling),
}


def markdown(found: dict[str, Any], plots: Sequence[str] = ()) -> str:
    """Return the complete report."""
    text = ["# Benchmarks", machine.headline(found["machine"]) + f"; form: {found['form']}"]
    text += [f"![{name}]({name})" for name in plots]
    for suite, (title, tables) in _SUITES.items():
        rows = [
            r for r in found["rows"] if r["suite"] == suite and r.get("setting") != "gate" and "provider" in r
        ]
        rows = [r for r in rows if suite == "accuracy" or "dtype" in r]
        if rows:
            text += [f"## {title}", *tables(rows)]
    return "\n\n".join(text) + "\n"


# ---- plots ----

_OURS, _THEIRS, _INK, _GRID = "#1f55d6", "#9aa5b4", "#1b2027", "#e3e7ec"
_MARKS = {"s per token": "o", "s = 0": "^"}


def plots(found: dict[str, Any], stem: Path) -> list[Path]:
    """Draw time, memory and error, each as SVG and PNG beside the results.

    Returns:
        The SVG files.
    """
    written = []
    for name, draw in (("time", _plot_time), ("memory", _plot_memory), ("error", _plot_error)):
        figure = draw(found)
        if figure is None:
            continue
        for suffix in (".png", ".svg"):
            path = stem.with_name(f"{stem.name}-{name}{suffix}")
            metadata = {"Date": None} if suffix == ".svg" else None  # the same results, the same file
            figure.savefig(path, dpi=150, metadata=metadata)
        written.append(path)
    return written


def frozen_rows(rows: list[Row]) -> list[Row]:
    """Return the measurements with a frozen head in bfloat16."""
    return [
        r
        for r in rows
        if r["suite"] == "linear_cross_entropy"
        and (r.get("setting"), r.get("dtype")) == ("frozen", "bf16")
        and "of_products" in r
    ]


def _figure(width: float, height: float, columns: int = 1) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    figure = Figure((width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(colors=_INK, labelsize=8)
        a.set_axisbelow(True)
    return figure, axes


def _plot_time(found: dict[str, Any]) -> Any:
    from matplotlib.ticker import LogLocator, NullFormatter

    groups = list(grouped(frozen_rows(found["rows"]), "problem"))
    if not groups:
        return None
    longest = max(len(group) for _, group in groups)
    figure, axes = _figure(4.6 * len(groups) + 1.2, 0.34 * longest + 1.3, len(groups))
    for a, ((problem,), group) in zip(axes, groups, strict=True):
        group = sorted(group, key=lambda r: r["of_products"], reverse=True)
        labels = [f"{r['provider']}  ({r['solves']})" for r in group]
        bars = a.barh(
            labels, [r["of_products"] for r in group], color=[_OURS if r["ours"] else _THEIRS for r in group]
        )
        a.bar_label(bars, [f"{r['of_products']:.2f}" for r in group], padding=3, fontsize=8, color=_INK)
        a.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        a.set_xscale("log")
        a.set_xlim(0.8, 2 * max(r["of_products"] for r in group))
        a.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        a.xaxis.set_major_formatter("{x:g}")
        a.xaxis.set_minor_formatter(NullFormatter())
        a.grid(axis="x", color=_GRID)
        a.set_xlabel("time / bare products (dashed: limit)", fontsize=8)
        r = group[0]
        a.set_title(
            f"{problem}: V {r['vocab']}, D {r['features']}, N {r['rows']}", fontsize=9, loc="left", color=_INK
        )
    return figure


def _plot_memory(found: dict[str, Any]) -> Any:
    rows = [
        r
        for r in found["rows"]
        if r["suite"] == "scaling" and r.get("setting") == "rows" and r.get("peak_bytes", 0) > 0
    ]
    if not rows:
        return None
    figure, (a,) = _figure(5.4, 3.6)
    for i, ((provider,), group) in enumerate(grouped(rows, "provider")):
        group = sorted(group, key=lambda r: r["rows"])
        color = _OURS if group[0]["ours"] else ("#e2600c", "#0b9a72", "#8a1c7c")[i % 3]
        sizes, used = [r["rows"] for r in group], [r["peak_bytes"] / _MIB for r in group]
        a.plot(sizes, used, color=color, marker="o", markersize=4)
        a.annotate(provider, (sizes[-1], used[-1]), xytext=(5, 0), textcoords="offset points", fontsize=8,
                   color=color, va="center")  # fmt: skip
    a.set_xscale("log", base=2)
    a.set_yscale("log")
    a.margins(x=0.12)
    a.grid(color=_GRID)
    a.set_xlabel("N, tokens", fontsize=8)
    a.set_ylabel("extra memory of one step (MiB)", fontsize=8)
    r = rows[0]
    a.set_title(f"Memory of forward and backward: V {r['vocab']}, D {r['features']}", fontsize=9, loc="left")
    return figure


def _plot_error(found: dict[str, Any]) -> Any:
    frozen = list(grouped(frozen_rows(found["rows"]), "problem"))
    errors = real_errors(found["rows"])
    floor = errors.get("exact, rounded once")
    points = [r for r in frozen[0][1] if r["provider"] in errors] if frozen else []
    if not points:
        return None
    figure, (a,) = _figure(7.4, 3.8)
    for i, r in enumerate(sorted(points, key=lambda r: r["of_products"]), 1):
        x, y = r["of_products"], errors[r["provider"]]
        color = _OURS if r["ours"] else "#5a6472"
        label = f"{i}  {r['provider']}  ({r['solves']})"
        a.plot(x, y, _MARKS.get(r["solves"], "s"), color=color, markersize=6, label=label)
        a.annotate(str(i), (x, y), xytext=(0, 6 if i % 2 else -14), textcoords="offset points", fontsize=8,
                   color=color, ha="center")  # fmt: skip
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    if floor:
        a.axhline(floor, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    a.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    a.set_xscale("log")
    a.set_yscale("log")
    a.margins(x=0.15, y=0.2)
    a.tick_params(which="both", labelsize=8)
    a.grid(color=_GRID)
    a.set_xlabel(f"time / bare products ({frozen[0][0][0]}, frozen head)", fontsize=8)
    a.set_ylabel("relative error of dE on real hidden states", fontsize=8)
    a.set_title(
        "Lower left is better; dashed: limits of the hardware and of bfloat16",
        fontsize=9,
        loc="left",
        color=_INK,
    )
    return figure

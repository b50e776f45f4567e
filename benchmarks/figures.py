"""The figures that README.md and docs/ quote, made from committed results.

A page quotes them between two comments:

    <!-- figures NAME: begin -->
    <!-- figures NAME: end -->

NAME is a function of this module, marked with `@figure`. `python -m benchmarks report --docs` renews every
page.
"""

import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import machine
from benchmarks.problems import PROBLEMS
from benchmarks.providers import Solves
from benchmarks.report import (
    Row,
    accuracy_table,
    cell,
    error_cell,
    frozen_rows,
    grouped,
    load,
    mib,
    newest,
    real_errors,
    scaling_table,
    time,
)
from benchmarks.studies import elicitation

PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/elicitation.md",
    "docs/kernels.md",
    "docs/weak-to-strong.md",
)
_REGION = re.compile(r"<!-- figures (\w+): begin -->\n.*?<!-- figures \1: end -->", re.S)

Link: TypeAlias = Callable[[Path], str]  # a file's path, relative to the page that quotes it

FIGURES: dict[str, Callable[[Link], str]] = {}


def figure(function: Callable[[Link], str]) -> Callable[[Link], str]:
    FIGURES[function.__name__] = function
    return function


def renewed(text: str, page: Path) -> str:
    """Return a page with its figures made from the committed results.

    Raises:
        ValueError: the page names an unknown figure, or a region has no end.
    """

    def link(path: Path) -> str:
        return os.path.relpath(path, page.parent)

    def region(found: re.Match[str]) -> str:
        name = found[1]
        if name not in FIGURES:
            raise ValueError(f"{page}: unknown figures {name!r}; available: {', '.join(FIGURES)}")
        return f"<!-- figures {name}: begin -->\n{FIGURES[name](link)}\n<!-- figures {name}: end -->"

    if text.count("<!-- figures ") != 2 * len(_REGION.findall(text)):
        raise ValueError(
            f"{page}: '<!-- figures NAME: begin -->' and '<!-- figures NAME: end -->' do not match"
        )
    return _REGION.sub(region, text)


# ---- sources ----


def _results(wanted: Callable[[Row], bool]) -> tuple[Path, dict[str, Any]]:
    """Return the newest committed results of a CPU with measurements of one kind."""
    path = newest(machine.RESULTS, lambda r: wanted(r) and ("seconds" in r or "accuracy" in r), gpu=False)
    return path, load(path)


def _source(path: Path, found: dict[str, Any], link: Link) -> str:
    about = found["machine"]
    return (
        f"[{about['date']}, {about['cpu']['model']}, threads: {about['threads']}, "
        f"torch {about['versions']['torch']}, commit {about['commit']}]({link(path.with_suffix('.md'))})"
    )


def _frozen(row: Row) -> bool:
    return bool(frozen_rows([row]))


def _real(row: Row) -> bool:
    return row["suite"] == "accuracy" and row.get("problem") == "real"


def _scaling(row: Row) -> bool:
    return row["suite"] == "scaling" and row.get("setting") == "rows"


def _gate(row: Row) -> bool:
    return row["test"] == "test_ours_stays_near_the_bare_products"


# ---- figures ----


@figure
def summary(link: Link) -> str:
    """Error, time and memory in a few sentences."""
    _, found = _results(_frozen)
    errors = real_errors(found["rows"])
    relative = []
    for _, group in grouped(frozen_rows(found["rows"]), "problem"):
        ours, naive = (next(r for r in group if r["provider"] == name) for name in ("ours", "naive"))
        memory = naive["peak_bytes"] // ours["peak_bytes"]
        relative.append(f"{1 / naive['of_ours']:.2f} and 1/{memory} for V {ours['vocab']}")
    return (
        f"On SmolLM2's hidden states in bfloat16, the relative gradient error is {errors['ours']:.1e}.\n"
        f"The exact gradient, rounded to bfloat16, has an error of {errors['exact, rounded once']:.1e}.\n"
        f"Implementations that round logits to 16 bits reach {errors['naive']:.1e}.\n"
        f"On a CPU with {found['machine']['threads']} threads, "
        f"time and memory relative to the naive loss are\n{', and '.join(relative)}.\n"
        "The naive loss computes complete logits. The ratio of times is a median over rounds,\n"
        "so it differs from the quotient of the medians in the table:"
    )


@figure
def comparison(link: Link) -> str:
    """Time, memory and error of every implementation that runs on a CPU: frozen head, bfloat16."""
    path, found = _results(_frozen)
    errors = real_errors(found["rows"])
    rows = frozen_rows(found["rows"])
    problems = list(grouped(rows, "problem"))
    header = ["", "smoothing"]
    for _, group in problems:
        header += [f"V {group[0]['vocab']}: time", "MiB"]
    lines = []
    for (name,), mine in grouped(sorted(rows, key=time), "provider"):
        by_problem = {r["problem"]: r for r in mine}
        line = [f"**{name}**" if mine[0]["ours"] else name, mine[0]["solves"]]
        for (problem,), _ in problems:
            r = by_problem.get(problem, {})
            line += [cell(r.get("of_products"), ".2f"), mib(r)]
        lines.append((*line, error_cell(errors.get(name))))
    sizes = "; ".join(f"V {g[0]['vocab']}: N {g[0]['rows']}, D {g[0]['features']}" for _, g in problems)
    return (
        machine.table((*header, "dE"), lines)
        + f"\n\nForward and backward, frozen head, bfloat16 ({sizes}). Time: relative to the two bare matrix "
        "products, median over rounds. MiB: extra memory of a call. "
        "dE: relative error of the gradient on SmolLM2's hidden states. s: label smoothing. "
        'Ours, fast: `precision="fast"`. '
        '"+ rank one": per-token smoothing is added to a plain loss. '
        f"Source: {_source(path, found, link)}."
    )


@figure
def accuracy(link: Link) -> str:
    """Errors on real hidden states."""
    path, found = _results(_real)
    rows = [r for r in found["rows"] if _real(r)]
    return f"{accuracy_table(rows)}\n\nSource: {_source(path, found, link)}."


@figure
def tokens(link: Link) -> str:
    """Time and memory as the number of tokens grows."""
    path, found = _results(_scaling)
    rows = [r for r in found["rows"] if _scaling(r)]
    r = rows[0]
    return (
        f"{scaling_table(rows, 'rows')}\n\nColumns: N. Frozen head, V {r['vocab']}, D {r['features']}. "
        f"Source: {_source(path, found, link)}."
    )


@figure
def gate(link: Link) -> str:
    """How far the gate is from ours and from the naive loss."""
    path, found = _results(lambda row: _frozen(row) and row["provider"] == "naive")
    ours = next(r for r in found["rows"] if _gate(r))
    naive = next(
        r for r in frozen_rows(found["rows"]) if (r["problem"], r["provider"]) == (ours["problem"], "naive")
    )
    best = [f"{min(r['seconds']['it']) / min(r['seconds']['products']):.1f}" for r in (ours, naive)]
    return (
        f"In the committed results, this ratio is {best[0]} for ours and {best[1]} for the naive loss. "
        f"Source: {_source(path, found, link)}."
    )


@figure
def few_tokens(link: Link) -> str:
    """A trained head with few tokens, where the loss can be slower than the naive loss."""

    def wanted(row: Row) -> bool:
        about = row["suite"], row.get("setting"), row.get("rows")
        return about == ("linear_cross_entropy", "trainable", 256) and row.get("provider") == "naive"

    path, found = _results(wanted)
    rows = []
    for naive in filter(wanted, found["rows"]):
        ours = next(
            r for r in found["rows"] if r.get("problem") == naive["problem"] and r["provider"] == "ours"
        )
        size = (str(naive[key]) for key in ("vocab", "features", "rows"))
        rows.append((*size, *(f"{1e3 * statistics.median(r['seconds']['it']):.0f}" for r in (ours, naive))))
    header = ("V", "D", "N", "ours, ms", "naive, ms")
    return (
        f"{machine.table(header, rows)}\n\nForward and backward in bfloat16, smoothing per token, medians. "
        f"Source: {_source(path, found, link)}."
    )


@figure
def soft_targets(link: Link) -> str:
    """The cost of 20 classes per target, beside class indices and a dense target."""

    def wanted(row: Row) -> bool:
        return row["suite"] == "linear_cross_entropy" and "of_one_class" in row and row["provider"] == "ours"

    path, found = _results(wanted)
    lines = []
    for ours in filter(wanted, found["rows"]):
        naive = next(
            r
            for r in found["rows"]
            if r["provider"] == "naive"
            and all(r.get(key) == ours[key] for key in ("setting", "problem", "dtype"))
        )
        size = (str(ours[key]) for key in ("vocab", "features", "rows"))
        head = "trained" if "trainable" in ours["setting"] else "frozen"
        ratios = ours["of_one_class"], naive["of_ours"]
        lines.append((head, ours["dtype"], *size, *(f"{ratio:.2f}" for ratio in ratios)))
    header = ("head", "dtype", "V", "D", "N", "20 classes / class indices", "naive / ours")
    return (
        f"{machine.table(header, lines)}\n\nForward and backward, smoothing per token; ratios of "
        "times, medians over rounds. The naive loss has a dense target of N x V probabilities. "
        f"Source: {_source(path, found, link)}."
    )


Records = dict[str, Row]


def _gpu(stage: str, *, skip: int = 0) -> tuple[Records, Callable[[Link], str]]:
    """Return the committed results of the newest run of `benchmarks.gpu` with a stage, and a link to them.

    Args:
        stage: a stage of `benchmarks.gpu.runs`.
        skip: the number of newer runs to skip.
    """
    runs: list[tuple[str, Path, list[Row]]] = []
    for path in machine.RESULTS.glob("*/gpu/*.jsonl"):
        about, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if any(r["stage"] == stage for r in records):
            runs.append((about["machine"].get("time", about["machine"]["date"]), path, [about, *records]))
    _, path, (first, *records) = sorted(runs, key=lambda run: run[:2])[-1 - skip]
    about = first["machine"]
    source = (
        f"{about['date']}, {about['gpu']['name']}, torch {about['versions']['torch']}, "
        f"triton {about['versions']['triton']}, commit {about['commit']}"
    )
    return {r["what"]: r for r in records}, lambda link: f"[{source}]({link(path)})"


def gpu_rows(path: Path) -> list[Row]:
    """Return the steps with a frozen head in results of `benchmarks.gpu`, for `benchmarks.report.plots`.

    Raises:
        ValueError: the file has none.
    """
    rows = []
    for r in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        name, _, provider = r["what"].replace(" frozen, tma", " frozen: ours").partition(" frozen: ")
        if name not in PROBLEMS or "of_products" not in r or r["stage"] not in ("ours", "peers", "unsloth"):
            continue
        p, ours = PROBLEMS[name], provider == "ours"
        solves = r.get("solves", Solves.PER_TOKEN.value)
        rows.append({
            "suite": "linear_cross_entropy", "setting": "frozen", "dtype": "bf16", "problem": name,
            "vocab": p.vocab, "features": p.features, "rows": p.rows, "ours": ours,
            "provider": provider.removesuffix(f", {solves}"),  # its problem is a part of some names
            "solves": solves, "of_products": r["of_products"],
        })  # fmt: skip
    if not rows:
        raise ValueError(
            f"{path}: no steps with a frozen head; name the results of the stages ours and peers"
        )
    return [r for r in rows if any(other["problem"] == r["problem"] and not other["ours"] for other in rows)]


_GPU_SETTINGS = {
    "frozen head": "frozen, tma",
    "weights, reduction none": "none+weights, tma",
    "all statistics": "frozen, statistics, tma",
    "half of the tokens ignored": "half-ignored, tma",
    "trained head": "trainable, tma",
    "LoRA head, r 16": "lora, tma",
}


@figure
def gpu_steps(link: Link) -> str:
    """Complete steps on a GPU, for every setting and shape."""
    found, source = _gpu("ours")
    again, other = _gpu("ours", skip=1)
    main, *others = (p for p in PROBLEMS.values() if f"{p.name} frozen, tma" in found)
    lines = []
    for name, setting in _GPU_SETTINGS.items():
        r = found[f"{main.name} {setting}"]
        line = [name, f"{r['ms']:.1f}", f"{r['peak_mb']:.0f}", f"{r['of_products']:.2f}"]
        line.append(f"{again[f'{main.name} {setting}']['of_products']:.2f}")
        line += [f"{found[f'{p.name} {setting}']['of_products']:.2f}" for p in others]
        lines.append(tuple(line))
    header = ("", "ms", "MB", f"V {main.vocab}", "other run", *(f"V {p.vocab}" for p in others))
    sizes = ", ".join(f"D {p.features} for V {p.vocab}" for p in others)
    return (
        f"{machine.table(header, lines)}\n\n"
        "Forward and backward in bfloat16 with smoothing per token; N 8192, "
        f"D {main.features} for V {main.vocab}, {sizes}. Times are relative to the bare products of the same "
        f"round, medians of 7 rounds. ms and MB (extra memory, with the gradients): for V {main.vocab}. "
        f"Source: {source(link)}. Other run: {other(link)}."
    )


@figure
def gpu_logits(link: Link) -> str:
    """Given logits on a GPU."""
    found, source = _gpu("ours")
    lines = []
    for problem in PROBLEMS.values():
        for what, passes in (("logits", 1.5), ("logits, in place", 1.0)):
            r = found.get(f"{problem.name} {what}")
            if r:
                share = f"{passes * r['of_copy']:.2f}"
                lines.append((str(problem.vocab), f"**{what}**", f"{r['ms']:.2f}", share))
        for what, r in found.items():
            if what.startswith(f"{problem.name} logits: ") and "ms" in r:
                name = f"{what.partition(': ')[2]} ({r['solves']})"
                lines.append((str(problem.vocab), name, f"{r['ms']:.2f}", "-"))
    return (
        f"{machine.table(('V', '', 'ms', 'share of copy bandwidth'), lines)}\n\n"
        "Forward and backward in bfloat16, N 8192. In place, the gradient overwrites the logits, which moves "
        f"at least 4NV bytes; otherwise 6NV bytes. Source: {source(link)}."
    )


@figure
def gpu_peers(link: Link) -> str:
    """Other implementations on a GPU."""
    found, source = _gpu("ours")
    zoo, of_zoo = _gpu("unsloth")
    found = {**zoo, **found}
    cases = [(problem, setting) for problem in ("llama3", "gemma2") for setting in ("frozen", "trainable")]
    rows = {"**ours**": (Solves.PER_TOKEN.value, [found.get(f"{p} {s}, tma", {}) for p, s in cases])}
    for what, r in found.items():
        case, _, name = what.partition(": ")
        if case == "llama3 frozen" and "ms" in r:
            label = name + (f" ({r['license']})" if "license" in r else "")
            rows[label] = (r["solves"], [found.get(f"{p} {s}: {name}", {}) for p, s in cases])

    def shown(r: Row, field: str, form: str) -> str:
        return form.format(r[field]) if field in r else "-"

    lines = [
        (
            name, solves, shown(measured[0], "ms", "{:.1f}"), shown(measured[0], "peak_mb", "{:.0f}"),
            *(shown(r, "of_products", "{:.2f}") for r in measured),
        )
        for name, (solves, measured) in sorted(rows.items(), key=lambda row: row[1][1][0]["of_products"])
    ]  # fmt: skip
    header = ("", "smoothing", "ms", "MB", "x products", "trained", "V 256000", "V 256000, trained")
    sources = dict.fromkeys([source(link), of_zoo(link)])
    return (
        f"{machine.table(header, lines)}\n\n"
        "bfloat16, N 8192. The last two columns are for D 2304 and V 256000, the others for D 4096 and "
        "V 128256. ms and MB (extra memory, with the gradients) are those of a frozen head. The other "
        "numbers are times relative to the bare products. Medians of 7 rounds for ours, of 3 rounds for "
        f"others. Source: {', '.join(sources)}."
    )


@figure
def gpu_backends(link: Link) -> str:
    """Calls outside Triton's main path, with both backends."""
    found, source = _gpu("backends")
    lines = []
    for what, triton in found.items():
        case, _, backend = what.rpartition(": ")
        if backend == "triton":
            problem, _, label = case.partition(" ")
            torch = found.get(f"{case}: torch")
            lines.append((
                label, str(PROBLEMS[problem].vocab), f"{triton['ms']:.1f}", f"{triton['of_products']:.2f}",
                f"{torch['of_products']:.2f}" if torch else "-", f"{triton['peak_mb']:.0f}",
                f"{torch['peak_mb']:.0f}" if torch else "-",
            ))  # fmt: skip
    header = ("", "V", "Triton, ms", "x products", "PyTorch, x products", "Triton, MB", "PyTorch, MB")
    return (
        f"{machine.table(header, lines)}\n\n"
        "Forward and backward, N 8192; a frozen head and bfloat16, unless stated otherwise. Products of "
        "float32 are not rounded to TF32. Medians of 3 rounds. MB: extra memory, with the gradients. "
        f"Source: {source(link)}."
    )


@figure
def gpu_summary(link: Link) -> str:
    """What a GPU measured, in a few sentences."""
    found, source = _gpu("ours")
    frozen, trained = found["llama3 frozen, tma"], found["llama3 trainable, tma"]
    naive, error = found["llama3 frozen: naive"], found["accuracy, tma"]["hidden"]
    own, fused = found["LoRA step, transformers"], found["LoRA step, fused"]
    return (
        "On an H100 in bfloat16 (N 8192, D 4096, V 128256), forward and backward take "
        f"{frozen['of_products']:.2f} times as long\nas the two bare matrix products with a frozen head, and "
        f"{trained['of_products']:.2f} times as long as the three products with a trained\nhead. The naive "
        f"loss takes {naive['of_products']:.2f} times as long with a frozen head, and needs "
        f"{naive['peak_mb'] / 1e3:.1f} GB instead of {frozen['peak_mb'] / 1e3:.1f} GB.\nOn SmolLM2's hidden "
        f"states, the relative gradient error is {error:.1e}. A LoRA step of a Llama of 1B\nparameters takes "
        f"{fused['ms']:.0f} ms instead of {own['ms']:.0f} ms, and {fused['peak_mb'] / 1e3:.1f} GB instead of "
        f"{own['peak_mb'] / 1e3:.1f} GB.\nSource: {source(link)}."
    )


def _study(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the newest committed results of a study."""
    path = max(machine.RESULTS.glob(f"*/{name}/*.json"), key=lambda path: path.name)
    return path, json.loads(path.read_text(encoding="utf-8"))


@figure
def elicited_gsm8k(link: Link) -> str:
    """How well the disagreement of 18 models finds wrong majority answers."""
    path, found = _study("elicitation")
    study = found["studies"]["gsm8k"]
    return (
        f"{elicitation.gsm8k_table(found)}\n\n{study['rows']:,} questions, of whose majority answers "
        f"{study['accuracy']:.1%} are right. Source: {_source(path, found, link)}."
    )


@figure
def elicited_truthfulqa(link: Link) -> str:
    """How well a small model finds false answers, and how confident it is."""
    path, found = _study("elicitation")
    study = found["studies"]["truthfulqa"]
    p_true, stated = study["estimators"]["p_true"], study["estimators"]["p_true"]["calibration"]
    rho = {(p["a"], p["b"]): p["rho"]["value"] for p in study["spearman"]}
    return (
        f"{elicitation.truthfulqa_table(found)}\n\n{study['rows']:,} answers, of which "
        f"{study['accuracy']:.1%} are true. Source: {_source(path, found, link)}.\n\n"
        f"- `p_true` states a mean confidence of {stated['mean_confidence']:.3f} "
        f"(ECE {stated['ece']:.3f}, Brier {stated['brier']:.3f}).\n"
        f"- In bfloat16, `p_true` takes {p_true['distinct']} distinct values. One of them is shared by "
        f"{p_true['commonest_share']:.0%} of the answers.\n"
        f"- `judge` assigns a median of {study['judge_scale_mass']:.2f} of its first token's probability to "
        f"the scale.\n"
        f"- Spearman correlations: `p_true` with `judge` {rho['p_true', 'judge']:.2f}, NLL with `p_true` "
        f"{rho['nll', 'p_true']:.2f}, NLL with `judge` {rho['nll', 'judge']:.2f}."
    )


@figure
def elicited_chaosnli(link: Link) -> str:
    """Whether a small model knows where people disagree."""
    path, found = _study("elicitation")
    return (
        f"{elicitation.chaosnli_table(found)}\n\n{found['studies']['chaosnli']['rows']:,} items. "
        f"Source: {_source(path, found, link)}."
    )


@figure
def elicitation_scale(link: Link) -> str:
    """Throughput, memory and cache of `ual elicit` without a model."""
    from benchmarks.studies.elicitation_scale import scale_table

    path, found = _study("elicitation_scale")
    return f"{scale_table(found)}\n\nSource: {_source(path, found, link)}."


_FOUND = (
    1.96 + 0.84
) / 1.96  # of the interval's half: the difference that a test at 5 % finds four in five times


@figure
def weak_to_strong(link: Link) -> str:
    """What six arms learn from a weak supervisor."""
    from benchmarks.studies.weak_to_strong import arms_table

    path, found = _study("weak_to_strong")
    study = found["study"]
    accuracies = [f"{arm['name']} {arm['accuracy']['value']:.1%}" for arm in study["arms"]]
    half = 100 * study["detectable"]["half_width"]
    return (
        f"![Accuracy of each arm: {', '.join(accuracies)}]({link(path.with_suffix('.png'))})\n\n"
        f"{arms_table(found)}\n\n"
        f"{study['questions']['test']:,} test questions. In brackets: 95 % intervals over questions. "
        f"Guessing gives {study['chance']:.0%}.\nOn average, the intervals of the differences extend "
        f"{half:.1f} points to each side. So a true difference of\n{_FOUND * half:.1f} points would be found "
        f"by four of five such studies, if seeds did not differ.\nSource: {_source(path, found, link)}."
    )


@figure
def weak_to_strong_labels(link: Link) -> str:
    """How often the weak labels are right, before and after the filter, and by entropy."""
    from benchmarks.studies.weak_to_strong import labels_table, levels_table

    path, found = _study("weak_to_strong")
    return f"{labels_table(found)}\n\n{levels_table(found)}\n\nSource: {_source(path, found, link)}."


@figure
def gradient_filter(link: Link) -> str:
    """What `gradient_filter` saves and costs."""
    from benchmarks.studies.gradient_filter import table

    path, found = _study("gradient_filter")
    return (
        f"{table(found)}\n\nN {found['tokens']}, smoothing {found['smoothing']}. "
        f"Source: {_source(path, found, link)}."
    )

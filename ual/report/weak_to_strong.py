"""The page of a weak-to-strong study: arms with intervals, labels, filter, design and origin."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ual.files import write_text, writing
from ual.report import plots
from ual.report.findings import ABSENT, duration
from ual.report.html import Cell, Column, Picture, Table, render

_RULES = {
    "median": "entropy of the answers at most the median",
    "quantile": "entropy of the answers at most its quantile {value:g}",
    "absolute": "entropy of the answers at most {value:g} nats",
}
_UNPARSED = {
    "class": "count as one more distinct answer",
    "drop_question": "drop their question",
}
_ASKED = {
    "order": "each with another order of the options",
    "paraphrase": "each with another paraphrase",
    "sample": "each sampled at temperature {temperature:g}",
}
_LABELS = {
    "first": ("First answer", "before"),
    "majority": ("Majority", "before"),
    "selected": ("Selected", "after the filter"),
    "weighted": ("Weighted", "after re-weighting"),
    "unparsed": ("Unparsed", "of the answers"),
}


def write(summary: Mapping[str, Any], page: Path) -> Path:
    """Write the page of a study: one HTML file without scripts, which fetches nothing.

    Equal summaries give equal bytes. A figure that is null is a dash, with its reason where there is one, so
    an unfinished study has a page as well.

    Args:
        summary: the figures of the study, as its ``report.json`` holds them. Accuracies are shares, entropies
            and losses are in nats.
        page: the file to write.

    Raises:
        UserError: the file cannot be written.
    """
    arms = summary["arms"]
    environment = summary["environment"]
    with writing("the report", page):
        content = render(
            "weak_to_strong.html.j2",
            kind="Weak-to-strong study",
            title=summary["name"],
            status=summary["status"],
            subtitle=f"Task {summary['task']}: a strong model learns from the labels of a weak supervisor",
            facts=list(_overview(summary)),
            arms=_main(summary),
            notes=list(_notes(summary)),
            cautions=summary["cautions"],
            supervisors=_supervisors(summary),
            gains=_gains(summary),
            pictures=[_accuracies(summary), _by_entropy(summary)],
            levels=_levels(summary),
            dropped=_dropped(summary),
            subjects=_subjects(summary),
            design=list(_design(summary)),
            sentences=[(arm["name"], arm["sentence"]) for arm in arms],
            by_seed=_by_seed(summary),
            numbers=summary["kind"] == "number",
            commands="\n".join(_commands(environment)),
            config=summary["config"],
            environment=list(_environment(environment)),
        )
        write_text(page, content)
    return page


# ---- figures as text ----


def _shown(value: float | None, digits: int = 0, *, scale: float = 1, sign: str = "") -> str:
    if value is None:
        return ABSENT
    rounded = round(value * scale, digits) + 0.0  # never -0.0
    return f"{rounded:{sign},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(share: float | None) -> str:
    return _shown(share, 1, scale=100)


def _estimate(
    estimate: Mapping[str, float] | None, digits: int, *, scale: float = 1, sign: str = "", reason: str = ""
) -> Cell:
    """Return the cell of an estimate with its interval below, or a dash with the reason."""
    if estimate is None:
        return Cell(ABSENT, reason)
    ends = (_shown(estimate[key], digits, scale=scale, sign=sign) for key in ("value", "low", "high"))
    value, low, high = ends
    return Cell(value, f"{low} to {high}")


def _points(estimate: Mapping[str, float] | None, reason: str = "") -> Cell:
    return _estimate(estimate, 1, scale=100, sign="+", reason=reason)


def _known(values: Sequence[float | None] | None) -> list[float]:
    return [value for value in values or () if value is not None]


def _count(values: Sequence[float | None] | None) -> Cell:
    """Return the mean over seeds, with the range below if seeds differ."""
    known = _known(values)
    if not known:
        return Cell(ABSENT)
    low, high = (_shown(end) for end in (min(known), max(known)))
    return Cell(_shown(sum(known) / len(known)), f"{low} to {high}" if low != high else "")


def _finished(arm: Mapping[str, Any]) -> bool:
    return bool(arm["status"] == "completed")


# ---- the answer ----


def _overview(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Weak supervisor", summary["models"]["weak"]
    yield "Strong model", summary["models"]["strong"]
    gap = _points(summary["gap"])
    yield "Ceiling minus weak, points", f"{gap.text} ({gap.note})" if gap.note else gap.text
    yield "Chance, %", _percent(summary["chance"])


def _main(summary: Mapping[str, Any]) -> Table:
    """Return the arms with the figures that answer the question."""
    first = summary["arms"][0]
    unfinished = "" if _finished(first) else f"{first['status']} baseline"
    rows = []
    for arm in summary["arms"]:
        pairs = zip(arm["by_seed"] or (), first["by_seed"] or (), strict=False)
        seeds = sum(None not in pair for pair in pairs)
        counted = arm is not first and seeds and arm["better"] is not None
        rows.append(
            (
                Cell(arm["name"], _arm_note(arm, summary)),
                _estimate(arm["accuracy"], 1, scale=100),
                Cell(ABSENT, "baseline") if arm is first else _points(arm["difference"], unfinished),
                Cell(f"{arm['better']} of {seeds}" if counted else ABSENT),
                _estimate(arm["pgr"], 2, reason=_no_pgr(arm, summary)),
                _count(arm["samples"]),
                _count(arm["loss_tokens"]),
            )
        )
    return Table(
        caption=f"Means over seeds, on {_shown(summary['questions']['test'])} test questions. Small figures: "
        "95 % intervals; of samples and loss tokens, the range over seeds. Difference: accuracy minus that "
        f"of {first['name']}.",
        columns=(
            Column("Arm", numeric=False),
            Column("Accuracy", "%"),
            Column("Difference", "points"),
            Column("Better in", "seeds"),
            Column("PGR", "1: the ceiling"),
            Column("Distinct samples"),
            Column("Loss tokens"),
        ),
        rows=tuple(rows),
    )


def _arm_note(arm: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    notes = [arm["arm"]] if arm["arm"] != arm["name"] else []
    seeds, planned = len(_known(arm["by_seed"])), len(summary["seeds"])
    if 0 < seeds < planned:
        notes.append(f"{seeds} of {planned} seeds")
    if not _finished(arm):
        notes.append(arm["status"])
    return ", ".join(notes)


def _no_pgr(arm: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if not _finished(arm):
        return ""
    if arm["arm"] == "ceiling":
        return "the ceiling"
    if arm["against"] != "weak":
        return "other supervisor"
    return "see below" if summary["no_pgr"] else ""


def _notes(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["no_pgr"]:
        yield f"PGR: {summary['no_pgr']}"
    detectable = summary["detectable"] or {}
    if (half := detectable.get("half_width")) is not None:
        yield (
            f"On average, the 95 % intervals of the differences extend {_percent(half)} points to each side, "
            f"with {_shown(detectable['items'])} test questions."
        )


# ---- supervisors and labels ----


def _supervisors(summary: Mapping[str, Any]) -> Table:
    rows = []
    for supervisor in summary["supervisors"]:
        labels = supervisor["labels"] or {}
        model = summary["models"]["weak" if supervisor["name"] == "weak" else "strong"]
        rows.append(
            (
                Cell(supervisor["name"], model),
                _estimate(supervisor["accuracy"], 1, scale=100),
                Cell(", ".join(map(_percent, supervisor["by_seed"] or ())) or ABSENT),
                *(Cell(_percent(labels.get(key))) for key in _LABELS),
            )
        )
    return Table(
        caption="In %. Accuracy: on the test questions, with its 95 % interval. Columns after “By seed”: "
        "accuracy of the labels on the unsupervised questions, before and after, means over seeds.",
        columns=(
            Column("Supervisor", numeric=False),
            Column("Accuracy"),
            Column("By seed", numeric=False),
            *(Column(*names) for names in _LABELS.values()),
        ),
        rows=tuple(rows),
    )


def _gains(summary: Mapping[str, Any]) -> Table:
    """Return what each arm gains over its supervisor, and over the arm that differs in one respect."""
    return Table(
        caption="Accuracy of each arm minus that of its supervisor, and minus that of its control, by test "
        "question, with its 95 % interval. A control differs from its arm in one respect",
        columns=(
            Column("Arm", numeric=False),
            Column("Supervisor", numeric=False),
            Column("Gain", "points"),
            Column("Control", numeric=False),
            Column("Difference", "points"),
        ),
        rows=tuple(
            (
                Cell(arm["name"]),
                Cell(arm["against"] or ABSENT),
                _points(arm["gain"]),
                Cell(arm["control"] or ABSENT),
                _points(arm["over_control"]),
            )
            for arm in summary["arms"]
        ),
    )


# ---- pictures ----


def _accuracies(summary: Mapping[str, Any]) -> Picture:
    """Draw the arms' accuracies, with lines for the weak supervisor, the ceiling and chance."""
    measured = [arm for arm in summary["arms"] if arm["accuracy"] is not None]
    if not measured:
        return Picture("No arm is finished, so there is no plot of accuracies.")
    accuracies = [f"{arm['name']} {_percent(arm['accuracy']['value'])} %" for arm in measured]
    alt = f"Accuracy of each arm: {', '.join(accuracies)}."
    if lines := dict(_lines(summary)):
        named = [f"{name} {_percent(value)} %" for name, value in lines.items()]
        alt += f" Vertical lines: {', '.join(named)}."
    caption = "Dot: mean over seeds. Bar: 95 % interval over test questions. Strokes: single seeds."
    if missing := [arm["name"] for arm in summary["arms"] if arm not in measured]:
        caption += f" Not finished: {', '.join(missing)}."
    return Picture.of(accuracy_figure(summary), alt, caption)


def accuracy_figure(summary: Mapping[str, Any]) -> Figure:
    """Draw the accuracies of the arms that have one; `ValueError` if none has."""
    measured = {arm["name"]: arm for arm in summary["arms"] if arm["accuracy"] is not None}
    return plots.forest(
        {
            name: (arm["accuracy"]["value"], arm["accuracy"]["low"], arm["accuracy"]["high"])
            for name, arm in measured.items()
        },
        seeds={name: _known(arm["by_seed"]) for name, arm in measured.items()},
        lines=dict(_lines(summary)),
        title=f"Accuracy on {_shown(summary['questions']['test'])} test questions",
    )


def _lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for supervisor in summary["supervisors"]:
        if supervisor["name"] == "weak" and supervisor["accuracy"] is not None:
            yield "weak supervisor", supervisor["accuracy"]["value"]
    for arm in summary["arms"]:
        if arm["arm"] == "ceiling" and arm["accuracy"] is not None:
            yield "ceiling", arm["accuracy"]["value"]
    if summary["chance"] is not None:
        yield "chance", summary["chance"]


def _by_entropy(summary: Mapping[str, Any]) -> Picture:
    """Draw label accuracy by entropy of the answers, beside the published curves."""
    levels = [level for level in summary["levels"] or () if level["label_accuracy"] is not None]
    if not levels:
        return Picture("No label accuracy is known, so there is no plot of it by entropy.")
    published = summary["published"]
    figure = plots.entropy_curves(
        [((lv["low"] + lv["high"]) / 2, lv["label_accuracy"], lv["questions"]) for lv in levels], published
    )
    measured = [f"{_percent(lv['label_accuracy'])} % at {_range(lv)} nats" for lv in levels]
    caption = "Solid: the weak supervisor's majority labels, means over seeds. Below: share of questions."
    alt = f"Label accuracy by entropy: {', '.join(measured)}."
    if published:
        caption += " Dashed: published for Llama-2-7B as the weak supervisor, arXiv 2406.19032."
        alt += f" Published curves: {', '.join(published)}."
    return Picture.of(figure, alt, caption)


def _range(level: Mapping[str, float]) -> str:
    low, high = (_shown(level[end], 2) for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def _levels(summary: Mapping[str, Any]) -> Table:
    return Table(
        caption="The weak supervisor's majority labels, means over seeds",
        columns=(
            Column("Entropy", "nats", numeric=False),
            Column("Questions"),
            Column("Label accuracy", "%"),
        ),
        rows=tuple(
            (
                Cell(_range(level)),
                Cell(_shown(level["questions"], 1)),
                Cell(_percent(level["label_accuracy"])),
            )
            for level in summary["levels"] or ()
        ),
    )


# ---- the filter ----


def _dropped(summary: Mapping[str, Any]) -> Table | None:
    """Return how dropped questions differ from selected questions, or None where nothing is filtered."""
    if summary["filter"] is None:
        return None
    groups = [summary["filter"][name] for name in ("selected", "dropped")]
    no_options = "no options" if summary["kind"] == "number" else ""
    measures = (
        ("questions", Cell("Questions"), 0, 1, ""),
        ("prompt_length", Cell("Prompt length", "characters"), 0, 1, ""),
        ("label_accuracy", Cell("Label accuracy", "%"), 1, 100, "no gold answers"),
        (
            "strong_entropy",
            Cell("Entropy over the options", "untrained strong model, nats"),
            3,
            1,
            no_options,
        ),
        ("strong_loss", Cell("Loss of the right option", "untrained strong model, nats"), 3, 1, no_options),
    )
    rows = []
    for key, name, digits, scale, reason in measures:
        cells = []
        for group in groups:
            value = group[key]
            why = reason if group["questions"] else "no questions"
            cells.append(Cell(_shown(value, digits, scale=scale), why if value is None else ""))
        rows.append((name, *cells))
    return Table(
        caption="Means over questions and seeds",
        columns=(Column("Measure", numeric=False), Column("Selected"), Column("Dropped")),
        rows=tuple(rows),
    )


def _subjects(summary: Mapping[str, Any]) -> Table:
    subjects = (summary["filter"] or {}).get("subjects") or ()
    return Table(
        caption="Share of each subject's questions that the filter selects",
        columns=(Column("Subject", numeric=False), Column("Selected", "%"), Column("Questions")),
        rows=tuple(
            (Cell(name), Cell(_percent(share)), Cell(_shown(questions)))
            for name, share, questions in subjects
        ),
    )


# ---- design and origin ----


def _design(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    questions, asked = summary["questions"], summary["asked"]
    reliability, budget = summary["reliability"], summary["budget"]
    count = {name: _shown(questions[name]) for name in ("supervised", "unsupervised", "test")}
    yield "Supervised questions", f"{count['supervised']}: their gold labels train the weak supervisor"
    yield "Unsupervised questions", f"{count['unsupervised']}: the supervisor's labels train the strong model"
    yield "Test questions", count["test"]
    dropped = ", ".join(f"{_shown(number)} ({why})" for why, number in questions["dropped"].items())
    yield "Dropped before the split", f"{dropped}; for every arm alike" if dropped else "none"
    how = _ASKED[asked["by"]].format(temperature=asked.get("temperature"))
    yield "Answers per question", f"{asked['times']}, {how}"
    yield "Filter", _RULES[reliability["rule"]].format(value=reliability["value"])
    softmax = f"softmax of the shares of the answers, temperature {reliability['temperature']:g}"
    yield "Re-weighting", softmax
    yield "Unparsed answers", _UNPARSED[reliability["unparsed"]]
    steps, samples = _shown(budget["steps"]), _shown(budget["samples"])
    said = f"{steps} optimizer steps and {samples} samples drawn, for each arm and seed"
    if budget["by"] == "tokens":
        said = f"{steps} optimizer steps for the first arm; those of the others are scaled to its loss tokens"
    yield "Budget", said
    yield "Seeds", ", ".join(map(str, summary["seeds"])) or ABSENT


def _by_seed(summary: Mapping[str, Any]) -> Table:
    seeds = summary["seeds"]
    rows = []
    for arm in summary["arms"]:
        values = [*(arm["by_seed"] or ()), *[None] * len(seeds)][: len(seeds)]
        mass = Cell(_shown(arm["mass"], 3), "no options" if summary["kind"] == "number" else "")
        accuracies = (Cell(_percent(value)) for value in values)
        rows.append((Cell(arm["name"]), *accuracies, _count(arm["steps"]), mass))
    return Table(
        caption="Accuracy by seed in %, optimizer steps and option mass",
        columns=(
            Column("Arm", numeric=False),
            *(Column(f"Seed {seed}") for seed in seeds),
            Column("Steps"),
            Column("Option mass"),
        ),
        rows=tuple(rows),
    )


def _commands(environment: Mapping[str, Any]) -> Iterator[str]:
    commit = str(environment.get("commit") or "")
    if re.fullmatch(r"[0-9a-f]{7,64}", commit):
        yield f"git checkout {commit}"
    yield str(environment["command"])


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("created", "machine", "packages", "commit"):
        yield name.capitalize(), str(environment.get(name) or ABSENT)
    yield "Time", duration(environment.get("seconds"))

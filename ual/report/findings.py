"""What may be said of runs: tables with their differences, a verdict in plain words, and its limits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ual.runs.read import Run, number, section, text

FEWEST_STEPS = 200
FEWEST_TOKENS = 10_000
FEWEST_SEEDS = 3
ABSENT = "\N{EM DASH}"


Meaning = Literal["better", "worse", "same", ""]


@dataclass(frozen=True, slots=True)
class Metric:
    """How one figure of an evaluation is shown; `scale` multiplies it first."""

    key: str
    name: str
    digits: int
    higher_is_better: bool = False
    scale: float = 1.0
    unit: str = ""

    @property
    def word(self) -> str:
        """The name within a sentence."""
        return self.name if self.name.isupper() else self.name.lower()

    def show(self, value: float | None) -> str:
        return ABSENT if value is None else f"{value * self.scale:,.{self.digits}f}{self.unit}"

    def change(self, value: float | None, baseline: float | None) -> tuple[str, Meaning]:
        """Return the signed difference of the figures as shown, and what it means; empty without both."""
        if value is None or baseline is None:
            return "", ""
        difference = round(value * self.scale, self.digits) - round(baseline * self.scale, self.digits)
        shown = f"{difference:+,.{self.digits}f}"
        if float(shown.replace(",", "")) == 0:
            return "±0", "same"
        meaning: Meaning = "better" if (difference > 0) == self.higher_is_better else "worse"
        return shown.replace("-", "\N{MINUS SIGN}"), meaning


NLL = Metric("nll", "NLL", 4)
ECE = Metric("ece", "ECE", 4)
ACCURACY = Metric("accuracy", "Accuracy", 2, higher_is_better=True, scale=100, unit=" %")
METRICS = (NLL, Metric("perplexity", "Perplexity", 2), ACCURACY, ECE, Metric("brier", "Brier", 4))
SOURCE_METRICS = tuple(m for m in METRICS if m.key != "perplexity")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its text, a smaller line below, and whether it is better or worse than the baseline."""

    text: str
    note: str = ""
    meaning: Meaning = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A table's heading; `hint` says in which direction a figure improves."""

    name: str
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first column names the row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def before_and_after(run: Run) -> Table | None:
    """Return the held-out metrics of one run, or None where nothing was measured."""
    if run.before is None and run.after is None:
        return None
    rows = []
    for metric in METRICS:
        before, after = (number(e or {}, metric.key) for e in (run.before, run.after))
        shown, meaning = metric.change(after, before)
        rows.append(
            (
                Cell(metric.name, note=_direction(metric)),
                Cell(metric.show(before)),
                Cell(metric.show(after)),
                Cell(shown or ABSENT, note=meaning, meaning=meaning),
            )
        )
    measured: Mapping[str, Any] = run.after or run.before or {}
    return Table(
        caption=f"Token level, on {_held_out(measured)}",
        columns=(Column("Metric", numeric=False), Column("Before"), Column("After"), Column("Change")),
        rows=tuple(rows),
    )


def arms(runs: Sequence[Run]) -> Table | None:
    """Return the arms side by side, with differences from the first one, or None where none was measured."""
    measured = [run for run in runs if run.after is not None]
    if not measured:
        return None
    baseline = runs[0].after or {}
    rows = []
    base = _shared_start(runs)
    if base is not None:
        cells = [Cell(metric.show(number(base, metric.key))) for metric in METRICS]
        rows.append((Cell("before training", note="the base model"), *cells))
    best = {
        metric.key: _best(metric, [number(run.after or {}, metric.key) for run in measured])
        for metric in METRICS
    }
    for run in runs:
        cells = []
        for metric in METRICS:
            value, reference = number(run.after or {}, metric.key), number(baseline, metric.key)
            note, meaning = metric.change(value, None if run is runs[0] else reference)
            is_best = len(measured) > 1 and value is not None and metric.show(value) == best[metric.key]
            cells.append(Cell(metric.show(value), note=note, meaning=meaning, best=is_best))
        rows.append((Cell(run.name, note=_arm_note(run, runs)), *cells))
    return Table(
        caption=f"Token level, on {_held_out(measured[0].after or {})}; "
        f"small figures are differences from {runs[0].name}",
        columns=(
            Column("Arm", numeric=False),
            *(Column(metric.name, hint=_direction(metric)) for metric in METRICS),
        ),
        rows=tuple(rows),
    )


def training(runs: Sequence[Run]) -> Table:
    """Return what each arm was trained on and how fast."""
    keys = (
        ("trained_rows", "Rows", 0),
        ("trained_tokens", "Response tokens", 0),
        ("steps", "Steps", 0),
        ("mean_smoothing", "Mean smoothing", 3),
        ("train_loss_first", "First loss", 3),
        ("train_loss_last", "Last loss", 3),
        ("tokens_per_second", "Tokens/s", 0),
    )
    rows = []
    for run in runs:
        values = dict(run.metrics) | {"steps": run.steps}
        cells = [Metric(key, name, digits).show(number(values, key)) for key, name, digits in keys]
        time = duration(number(run.metrics, "seconds"))
        rows.append((Cell(run.name, note=run.status), *map(Cell, cells), Cell(time)))
    columns = [Column(name) for _, name, _ in keys]
    return Table("Training", (Column("Arm", numeric=False), *columns, Column("Time")), tuple(rows))


def by_source(runs: Sequence[Run]) -> Table | None:
    """Return the metrics of each source, or None where no run has any."""
    several = len(runs) > 1
    rows = []
    for source in dict.fromkeys(
        s for run in runs for s in section(run.after or run.before or {}, "by_source")
    ):
        for run in runs:
            after, before = (section(section(e or {}, "by_source"), source) for e in (run.after, run.before))
            reference = section(section(runs[0].after or {}, "by_source"), source) if several else before
            shown = after or ({} if several else before)
            if not shown:
                continue
            cells = []
            for metric in SOURCE_METRICS:
                value, other = number(shown, metric.key), number(reference, metric.key)
                note, meaning = metric.change(value, None if shown is reference else other)
                cells.append(Cell(metric.show(value), note=note, meaning=meaning))
            size = Cell(f"{number(shown, 'rows') or 0:,.0f}"), Cell(f"{number(shown, 'tokens') or 0:,.0f}")
            arm = [Cell(run.name)] if several else []
            rows.append((Cell(source or "(unnamed)"), *arm, *size, *cells))
    if not rows:
        return None
    return Table(
        caption=f"Small figures are differences from {runs[0].name}"
        if several
        else "Small figures are changes by training",
        columns=(
            Column("Source", numeric=False),
            *([Column("Arm", numeric=False)] if several else []),
            Column("Rows"),
            Column("Tokens"),
            *(Column(metric.name, hint=_direction(metric)) for metric in SOURCE_METRICS),
        ),
        rows=tuple(rows),
    )


def differing_settings(runs: Sequence[Run]) -> Table | None:
    """Return the configuration keys in which the runs differ, or None where there is none."""
    settings = [_flat(run.config.model_dump(mode="json")) if run.config else {} for run in runs]
    differing = [
        key
        for key in dict.fromkeys(k for s in settings for k in s)
        if key not in ("name", "output_dir") and len({repr(s.get(key)) for s in settings if s}) > 1
    ]
    if not differing:
        return None
    return Table(
        caption="Settings in which the arms differ",
        columns=tuple(Column(name, numeric=False) for name in ("Setting", *(run.name for run in runs))),
        rows=tuple(
            (Cell(key), *(Cell(_plain(s[key]) if key in s else ABSENT) for s in settings))
            for key in differing
        ),
    )


def verdict(runs: Sequence[Run]) -> str:
    """Return a few sentences on what was seen, without a claim beyond it."""
    seen = " ".join(_of_one(runs[0]) if len(runs) == 1 else _of_several(runs))
    if any(run.after for run in runs) and _shortfalls(runs):
        seen += " A run this small proves the machinery, not the method."
    return seen


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return why the verdict must be read with care, the weightiest first."""
    return [*_too_small(runs), *_unmatched(runs), *_uncontrolled(runs)]


def duration(seconds: float | None) -> str:
    """Return a length of time as people say it.

    >>> duration(4000)
    '1 h 06 min'
    """
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {seconds % 60:02.0f} s"
    )


def _of_one(run: Run) -> Iterator[str]:
    if run.after is None:
        first, last = number(run.metrics, "train_loss_first"), number(run.metrics, "train_loss_last")
        if first is not None and last is not None:
            yield f"Training loss went from {first:.3f} to {last:.3f}."
        yield "The trained model was not measured on held-out rows, so nothing is said of its quality."
        return
    if run.before is None:
        yield (
            f"After training, held-out NLL is {_value(NLL, run.after)} and ECE {_value(ECE, run.after)}; "
            "what they were before was not measured."
        )
        return
    moves = [_moved(metric, run.before, run.after) for metric in (NLL, ACCURACY, ECE)]
    yield f"On {_held_out(run.after)}, {moves[0]}, {moves[1]}, and {moves[2]}."


def _of_several(runs: Sequence[Run]) -> Iterator[str]:
    measured = [run for run in runs if run.after is not None]
    if len(measured) < 2:
        yield "Fewer than two arms were measured on held-out rows, so there is nothing to compare yet."
        return
    nll, ece = _leader(NLL, measured), _leader(ECE, measured)
    rest = "the lowest ECE" if ece == nll else f"{ece} the lowest ECE"
    yield f"Of {len(measured)} arms, {nll} the lowest held-out NLL and {rest}."
    pair = _ual_and_uniform(measured)
    if pair is None:
        return
    ual, uniform = pair
    changes = []
    for metric in (NLL, ACCURACY, ECE):
        value, reference = number(ual.after or {}, metric.key), number(uniform.after or {}, metric.key)
        shown, meaning = metric.change(value, reference)
        changes.append(f"{metric.word} by {shown} ({meaning})")
    yield (
        f"Compared with {uniform.name}, which gives every row the same mean smoothing, {ual.name} changes "
        f"{changes[0]}, {changes[1]} and {changes[2]}."
    )


def _shortfalls(runs: Sequence[Run]) -> list[str]:
    short = []
    steps = [run.steps for run in runs if run.steps is not None]
    if steps and min(steps) < FEWEST_STEPS:
        short.append(f"{min(steps):,} steps ({FEWEST_STEPS} or more are wanted)")
    tokens = [int(number(e, "tokens") or 0) for run in runs if (e := run.after or run.before) is not None]
    if tokens and min(tokens) < FEWEST_TOKENS:
        short.append(f"{min(tokens):,} held-out tokens ({FEWEST_TOKENS:,} or more are wanted)")
    seeds = min(len(_seeds(runs, run.loss_kind)) for run in runs)
    if seeds < FEWEST_SEEDS:
        short.append(f"{'one seed' if seeds == 1 else f'{seeds} seeds'} ({FEWEST_SEEDS} or more are wanted)")
    return short


def _too_small(runs: Sequence[Run]) -> Iterator[str]:
    if short := _shortfalls(runs):
        yield f"Too little for a claim about the method: {'; '.join(short)}. What differs here may be chance."
    accuracy, count = number(runs[0].after or {}, "accuracy"), number(runs[0].after or {}, "tokens")
    if accuracy is not None and count:
        points = 100 * (accuracy * (1 - accuracy) / count) ** 0.5
        yield (
            f"The standard error of the accuracy is at least {points:.2f} points: that of {count:,.0f} "
            "independent tokens, and tokens of one response are not independent."
        )


def _unmatched(runs: Sequence[Run]) -> Iterator[str]:
    """Name what must be equal between arms (rows, tokens, steps, held-out rows, data) and is not."""
    if len(runs) == 1:
        return
    facts = {
        "training rows": [_count(run.metrics, "trained_rows") for run in runs],
        "response tokens": [_count(run.metrics, "trained_tokens") for run in runs],
        "steps": [f"{run.steps:,}" if run.steps is not None else None for run in runs],
        "held-out tokens": [_count(run.after or {}, "tokens") for run in runs],
        "base models": [text(section(run.environment, "model"), "path") or None for run in runs],
    }
    for what, values in facts.items():
        known = list(dict.fromkeys(v for v in values if v is not None))
        if len(known) > 1:
            yield f"The arms are not matched: {what} differ ({', '.join(known)})."
    hashes = {tuple(sorted(map(str, section(run.environment, "data_sha256").values()))) for run in runs}
    if len(hashes - {()}) > 1:
        yield "The arms are not matched: their data files have different hashes."
    if len({_seeds(runs, run.loss_kind) for run in runs}) > 1:
        yield "The arms are not matched: they were trained with different seeds."
    unmeasured = [run.name for run in runs if run.after is None]
    if unmeasured:
        yield f"Not measured after training: {', '.join(unmeasured)}."


def _uncontrolled(runs: Sequence[Run]) -> Iterator[str]:
    if not any(run.loss_kind == "ual" for run in runs):
        return
    if len(runs) == 1:
        yield (
            "One arm alone cannot tell what smoothing by uncertainty adds: compare it with plain fine-tuning "
            "and with uniform smoothing of the same mean, on the same rows and steps."
        )
    elif _ual_and_uniform(runs) is None:
        yield (
            "No arm has uniform smoothing of the same mean as the uncertainty-aware one, so the effect of "
            "smoothing as such is not told apart from that of uncertainty."
        )
    else:
        yield (
            "No arm has the same uncertainties shuffled among the rows, the sharpest control: "
            "a gain over uniform smoothing may come from varied smoothing alone."
        )


def _ual_and_uniform(runs: Sequence[Run]) -> tuple[Run, Run] | None:
    for ual in runs:
        for uniform in runs:
            means = [number(run.metrics, "mean_smoothing") for run in (ual, uniform)]
            if (ual.loss_kind, uniform.loss_kind) != ("ual", "uniform") or None in means:
                continue
            if abs((means[0] or 0) - (means[1] or 0)) < 5e-3:
                return ual, uniform
    return None


def _seeds(runs: Sequence[Run], loss_kind: str) -> frozenset[str]:
    return frozenset(repr(run.environment.get("seed")) for run in runs if run.loss_kind == loss_kind)


def _shared_start(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """Return the evaluation before training where the arms that have one agree on it."""
    starts = [run.before for run in runs if run.before is not None]
    shown = {tuple(metric.show(number(start, metric.key)) for metric in METRICS) for start in starts}
    return starts[0] if len(shown) == 1 else None


def _best(metric: Metric, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return metric.show(max(known) if metric.higher_is_better else min(known))


def _leader(metric: Metric, runs: Sequence[Run]) -> str:
    best = _best(metric, [number(run.after or {}, metric.key) for run in runs])
    names = [run.name for run in runs if metric.show(number(run.after or {}, metric.key)) == best]
    if len(names) == 1:
        return f"{names[0]} has"
    return f"{', '.join(names[:-1])} and {names[-1]} share"


def _moved(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    start, end = number(before, metric.key), number(after, metric.key)
    shown, meaning = metric.change(end, start)
    if meaning == "same":
        return f"{metric.word} stayed at {metric.show(end)}"
    verb = "rose" if shown.startswith("+") else "fell"
    return f"{metric.word} {verb} from {metric.show(start)} to {metric.show(end)} ({meaning})"


def _value(metric: Metric, evaluation: Mapping[str, Any]) -> str:
    return metric.show(number(evaluation, metric.key))


def _direction(metric: Metric) -> str:
    return "higher is better" if metric.higher_is_better else "lower is better"


def _held_out(evaluation: Mapping[str, Any]) -> str:
    rows, tokens = number(evaluation, "rows"), number(evaluation, "tokens")
    return f"{rows or 0:,.0f} held-out rows ({tokens or 0:,.0f} response tokens)"


def _arm_note(run: Run, runs: Sequence[Run]) -> str:
    notes = [run.loss_kind] if run.loss_kind and run.loss_kind != run.name else []
    if run is runs[0]:
        notes.append("baseline")
    if run.status != "completed":
        notes.append(run.status)
    return ", ".join(notes)


def _count(mapping: Mapping[str, Any], key: str) -> str | None:
    value = number(mapping, key)
    return None if value is None else f"{value:,.0f}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)

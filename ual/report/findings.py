"""What the page says of runs: tables of their metrics and differences, and what limits conclusions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ual.methods.statistics import PairedDifference, paired_difference
from ual.report.html import Cell, Column, Meaning, Table
from ual.runs.read import Run, number, section, text

FEWEST_STEPS = 200
FEWEST_TOKENS = 10_000
FEWEST_SEEDS = 3
ABSENT = "\N{EM DASH}"


@dataclass(frozen=True, slots=True)
class Metric:
    """How one figure of an evaluation is shown; `scale` multiplies it first."""

    key: str
    name: str
    digits: int
    higher_is_better: bool = False
    scale: float = 1.0
    unit: str = ""

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
    best = {metric.key: _best(metric, measured) if len(measured) > 1 else "" for metric in METRICS}
    for run in runs:
        after, reference = run.after or {}, {} if run is runs[0] else baseline
        cells = [_cell(metric, after, reference, best=best[metric.key]) for metric in METRICS]
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
        ("trained_rows", "Samples", 0),
        ("trained_tokens", "Loss tokens", 0),
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
            other = {} if shown is reference else reference
            cells = [_cell(metric, shown, other) for metric in SOURCE_METRICS]
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
            Column("Samples"),
            Column("Tokens"),
            *(Column(metric.name, hint=_direction(metric)) for metric in SOURCE_METRICS),
        ),
        rows=tuple(rows),
    )


def not_trained(runs: Sequence[Run]) -> Table | None:
    """Return why samples were not trained, or were cut, or None where all were trained completely."""
    rows = []
    for run in runs:
        counts = dict(section(run.metrics, "not_trained"))
        counts["truncated (data.overlong: truncate)"] = run.metrics.get("truncated")
        for reason in counts:
            if count := number(counts, reason):
                arm = [Cell(run.name)] if len(runs) > 1 else []
                rows.append((*arm, Cell(reason), Cell(f"{count:,.0f}")))
    if not rows:
        return None
    return Table(
        caption="Training samples that were not trained, or were cut",
        columns=(
            *([Column("Arm", numeric=False)] if len(runs) > 1 else []),
            Column("Reason", numeric=False),
            Column("Samples"),
        ),
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against the baseline arm: names of their runs, by seed, and the difference of each metric."""

    arm: tuple[str, ...]
    baseline: tuple[str, ...]
    nll: PairedDifference
    accuracy: PairedDifference


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Compare each arm with the first run's, on the held-out samples and seeds that both have."""
    baseline, *others = _arms(runs)
    found = []
    for arm in others:
        seeds = [seed for seed in arm if seed in baseline]
        measured = [[members[seed].held_out() for seed in seeds] for members in (arm, baseline)]
        sides = [side for members in measured for side in members]
        tokens = {
            name: sample.tokens
            for name, sample in (sides[0].items() if sides else ())
            if all(name in side and side[name].tokens == sample.tokens for side in sides)
        }
        if len(tokens) < 2:
            continue
        names = [tuple(members[seed].name for seed in seeds) for members in (arm, baseline)]
        differences = [
            paired_difference(
                [[getattr(side[name], metric.key) for name in tokens] for side in measured[0]],
                [[getattr(side[name], metric.key) for name in tokens] for side in measured[1]],
                list(tokens.values()),
                higher_is_better=metric.higher_is_better,
            )
            for metric in (NLL, ACCURACY)
        ]
        found.append(Comparison(names[0], names[1], *differences))
    return found


def paired(compared: Sequence[Comparison]) -> Table | None:
    """Return a table of the comparisons, or None without any."""
    if not compared:
        return None
    rows = []
    for found in compared:
        cells = []
        for metric, of in ((NLL, found.nll), (ACCURACY, found.accuracy)):
            value, low, high = (_signed(metric, x) for x in (of.value, of.low, of.high))
            cells += [Cell(value, note=f"{low} to {high}"), Cell(f"{of.better} of {of.seeds}")]
        size = Cell(f"{found.nll.samples:,}"), Cell(f"{found.nll.seeds:,}")
        rows.append((Cell(", ".join(found.arm)), *cells, *size))
    better = Column("Better in", "seeds")
    nll, accuracy = Column("NLL", _direction(NLL)), Column("Accuracy, points", _direction(ACCURACY))
    return Table(
        caption=f"Difference from {', '.join(compared[0].baseline)} per token of the same held-out samples, "
        "with its 95 % interval, which covers the choice of held-out samples and not the randomness of "
        "training",
        columns=(
            Column("Arm", numeric=False),
            nll,
            better,
            accuracy,
            better,
            Column("Samples"),
            Column("Seeds"),
        ),
        rows=tuple(rows),
    )


def differing_settings(runs: Sequence[Run]) -> Table | None:
    """Return the configuration keys in which the runs differ, or None where there is none."""
    settings = [_settings(run, "name", "output_dir") for run in runs]
    differing = [
        key
        for key in dict.fromkeys(k for s in settings for k in s)
        if len({repr(s.get(key)) for s in settings if s}) > 1
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


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return what limits conclusions from these runs, the weightiest first."""
    return [*_notes(runs), *_too_small(runs), *_unmatched(runs), *_uncontrolled(runs)]


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


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what the runs themselves recorded as unusual."""
    for run in runs:
        notes = run.metrics.get("notes")
        for note in notes if isinstance(notes, list) else []:
            yield str(note) if len(runs) == 1 else f"{run.name}: {note}"


def _too_small(runs: Sequence[Run]) -> Iterator[str]:
    short = []
    steps = [run.steps for run in runs if run.steps is not None]
    if steps and min(steps) < FEWEST_STEPS:
        short.append(f"{min(steps):,} steps (fewer than {FEWEST_STEPS})")
    tokens = [int(number(e, "tokens") or 0) for run in runs if (e := run.after or run.before) is not None]
    if tokens and min(tokens) < FEWEST_TOKENS:
        short.append(f"{min(tokens):,} held-out tokens (fewer than {FEWEST_TOKENS:,})")
    seeds = min(len(arm) for arm in _arms(runs))
    if seeds < FEWEST_SEEDS:
        short.append(f"{'one seed' if seeds == 1 else f'{seeds} seeds'} (fewer than {FEWEST_SEEDS})")
    if short:
        yield f"Too small for a claim about the method: {'; '.join(short)}."


def _unmatched(runs: Sequence[Run]) -> Iterator[str]:
    """Name what must be equal between arms, seed by seed, and is not."""
    arms = _arms(runs)
    if len(arms) == 1:
        return
    shared = sorted(set.intersection(*map(set, arms)))
    groups = [[arm[seed] for arm in arms] for seed in shared] or [list(runs)]
    figures: dict[str, Callable[[Run], str | None]] = {
        "training samples": lambda run: _count(run.metrics, "trained_rows"),
        "loss tokens": lambda run: _count(run.metrics, "trained_tokens"),
        "steps": lambda run: None if run.steps is None else f"{run.steps:,}",
        "held-out tokens": lambda run: _count(run.after or {}, "tokens"),
        "base models": lambda run: text(section(run.environment, "model"), "path") or None,
    }
    for what, figure in figures.items():
        for group in groups:
            known = list(dict.fromkeys(value for run in group if (value := figure(run)) is not None))
            if len(known) > 1:
                yield f"The arms are not matched: {what} differ ({', '.join(known)})."
                break
    hashes = {tuple(sorted(map(str, section(run.environment, "data_sha256").values()))) for run in runs}
    if len(hashes - {()}) > 1:
        yield "The arms are not matched: their data files have different hashes."
    if len({frozenset(arm) for arm in arms}) > 1:
        yield "The arms are not matched: they were trained with different seeds."
    unmeasured = [run.name for run in runs if run.after is None]
    if unmeasured:
        yield f"Not measured after training: {', '.join(unmeasured)}."


def _uncontrolled(runs: Sequence[Run]) -> Iterator[str]:
    own, uniform = (
        [number(run.metrics, "mean_smoothing") or math.nan for run in runs if run.smoothing == smoothing]
        for smoothing in ("own", "uniform")
    )
    if not own:
        return
    if len(runs) == 1:
        yield (
            "One run has no baseline: compare it with plain fine-tuning and with uniform smoothing of the "
            "same mean, on the same samples and steps."
        )
    elif not any(math.isclose(a, b, rel_tol=0, abs_tol=5e-3) for a in own for b in uniform):
        yield (
            "No arm has uniform smoothing of the same mean, so the effect of uncertainty cannot be told from "
            "the effect of smoothing."
        )
    else:
        yield (
            "No arm has the same uncertainties shuffled among the samples: a gain over uniform smoothing may "
            "come from varied smoothing alone."
        )


def _arms(runs: Sequence[Run]) -> list[dict[str, Run]]:
    """Group runs whose settings differ only in the seed; each arm maps a seed to its run."""
    arms: list[tuple[str, dict[str, Run]]] = []
    for run in runs:
        settings = _settings(run, "name", "output_dir", "training.seed")
        key, seed = repr(settings) if settings else run.name, repr(run.environment.get("seed"))
        arm = next((members for k, members in arms if k == key and seed not in members), None)
        if arm is None:
            arms.append((key, arm := {}))
        arm[seed] = run
    return [arm for _, arm in arms]


def _shared_start(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """Return the evaluation before training where the arms that have one agree on it."""
    starts = [run.before for run in runs if run.before is not None]
    shown = {tuple(metric.show(number(start, metric.key)) for metric in METRICS) for start in starts}
    return starts[0] if len(shown) == 1 else None


def _best(metric: Metric, runs: Sequence[Run]) -> str:
    known = [value for run in runs if (value := number(run.after or {}, metric.key)) is not None]
    return metric.show(max(known) if metric.higher_is_better else min(known))


def _cell(metric: Metric, figures: Mapping[str, Any], reference: Mapping[str, Any], best: str = "") -> Cell:
    value = number(figures, metric.key)
    note, meaning = metric.change(value, number(reference, metric.key))
    shown = metric.show(value)
    return Cell(shown, note, meaning, best=value is not None and shown == best)


def _signed(metric: Metric, value: float) -> str:
    rounded = round(value * metric.scale, metric.digits) + 0.0  # never -0.0
    return f"{rounded:+,.{metric.digits}f}".replace("-", "\N{MINUS SIGN}")


def _direction(metric: Metric) -> str:
    return "higher is better" if metric.higher_is_better else "lower is better"


def _held_out(evaluation: Mapping[str, Any]) -> str:
    rows, tokens = number(evaluation, "rows"), number(evaluation, "tokens")
    return f"{rows or 0:,.0f} held-out samples ({tokens or 0:,.0f} loss tokens)"


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


def _settings(run: Run, *without: str) -> dict[str, Any]:
    values = _flat(run.config.model_dump(mode="json")) if run.config else {}
    return {key: value for key, value in values.items() if key not in without}


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

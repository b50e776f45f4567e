"""One self-contained page about a run, or about several side by side."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ual.config.objectives import LOSS_KINDS
from ual.errors import UserError
from ual.files import write_json, write_text, writing
from ual.report import findings
from ual.report.findings import ABSENT, METRICS, duration
from ual.report.html import render
from ual.report.pictures import pictures
from ual.runs.folder import File
from ual.runs.read import Row, Run, number, read, section, text

_TAIL = 3  # samples shown from each end of the uncertainties
_TEXT_SHOWN = 700  # characters of a prompt or response on a page
_OPTIONS_SHOWN = 8  # of a sample


def write(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or a comparison of several.

    One run gives ``<run>/report.html`` and ``<run>/plots/*.png``. Several give ``comparison.html`` in the
    folder that holds the first run, ``comparison-plots/*.png``, and the figures of the tables in
    ``comparison.json``; the first run is the baseline. The page needs no other file, no script and no
    network. Equal runs give equal bytes. Whatever a run lacks is named on the page.

    Args:
        run_dirs: folders that `ual train` wrote, at least one.
        output: the page to write; the plots and JSON of a comparison take its stem.

    Raises:
        UserError: a folder is not a run, or a file cannot be written.
    """
    if not run_dirs:
        raise UserError("no run folder was named", remedy="pass at least one folder that `ual train` wrote")
    paths = [Path(path) for path in run_dirs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run folder was named twice", remedy="name each run once")
    with writing("the report", paths[0]):
        runs = _with_unique_names([read(path) for path in paths])
        if len(runs) == 1:
            page = output or paths[0] / File.REPORT
            plot_folder = paths[0] / "plots"
        else:
            page = output or paths[0].parent / "comparison.html"
            plot_folder = page.with_name(f"{page.stem}-plots")
        compared = findings.comparisons(runs)
        write_text(page, _page(runs, compared, page, plot_folder))
        if len(runs) > 1:
            write_json(page.with_suffix(".json"), _summary(runs, compared))
    return page


def _page(runs: Sequence[Run], compared: Sequence[findings.Comparison], page: Path, plot_folder: Path) -> str:
    single = runs[0] if len(runs) == 1 else None
    if single:
        tables = [findings.before_and_after(single)]
    else:
        tables = [
            findings.arms(runs),
            findings.paired(compared),
            findings.training(runs),
            findings.differing_settings(runs),
        ]
    tables.append(findings.not_trained(runs))
    return render(
        "run.html.j2",
        kind="Training run" if single else "Comparison",
        title=single.name if single else " · ".join(run.name for run in runs),
        status=single.status if single else "",
        subtitle=_subtitle(runs),
        facts=_facts(single) if single else (),
        cautions=findings.cautions(runs),
        missing=[(run.name if not single else "", note) for run in runs for note in run.missing],
        tables=[table for table in tables if table],
        pictures=list(pictures(runs, plot_folder)),
        sources=findings.by_source(runs),
        tails=_tails(runs),
        no_tails=_no_tails(runs),
        origins=[_origin(run, page, linked=single is None) for run in runs],
    )


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Name runs of equal names, such as the seeds of an arm, by their folders."""
    names, folders = [run.name for run in runs], [run.path.resolve().name for run in runs]
    unique = len(set(folders)) == len(folders)
    return [
        replace(run, name=folder if unique else f"{run.name} ({run.path})")
        if names.count(run.name) > 1
        else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs side by side; the first, {runs[0].name}, is the baseline"
    run = runs[0]
    kind = LOSS_KINDS.get(run.loss_kind)
    if kind is None:
        return "A training run"
    smoothing = number(run.metrics, "mean_smoothing")
    over = ", spread over each sample's options" * (run.config is not None and run.config.over_options)
    if kind.smoothing == "uniform" and smoothing is not None:
        return f"{kind.sentence}, {smoothing:g}{over}"
    if kind.smoothing != "own" or run.config is None:
        return kind.sentence
    own = int(number(run.metrics, "own_smoothing") or 0)
    column = "the samples' own label_smoothing"
    all_own = own > 0 and own == number(run.metrics, "trained_rows")
    chosen = run.config.smoothing
    if run.is_constant:
        source = column if all_own else f"smoothing.map: {chosen.map}"
        return f"{LOSS_KINDS['uniform'].sentence}, {smoothing or 0:g} ({source}){over}"
    if all_own:
        return f"Fine-tuning with {column}{over}"
    some_own = f"; {own:,} samples have a label_smoothing of their own" if own else ""
    matched = "" if chosen.match_mean is None else f", scaled to a mean of {chosen.match_mean:g}"
    estimator = {"white_box": "the base model's own NLL", "column": "a column of the data"}
    return (
        f"{kind.sentence}. Uncertainty from {estimator[run.config.uncertainty.estimator]}, "
        f"{chosen.sentence}{matched}{over}{some_own}"
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what was trained, and how long it took."""
    model = section(run.environment, "model")
    path = text(model, "path") or (run.config.model.path if run.config else "")
    yield "Model", Path(path).name or ABSENT
    parameters, trainable = number(model, "parameters"), number(model, "trainable_parameters")
    if parameters is not None:
        share = "" if trainable is None else f", {_short(trainable)} trained"
        yield "Parameters", f"{_short(parameters)}{share}"
    yield "Training samples", _whole(run.metrics, "trained_rows")
    yield "Loss tokens", _whole(run.metrics, "trained_tokens")
    yield "Steps", ABSENT if run.steps is None else f"{run.steps:,}"
    yield "Time", duration(number(run.metrics, "seconds"))
    yield "Tokens/s", _whole(run.metrics, "tokens_per_second")
    smoothing = number(run.metrics, "mean_smoothing")
    if run.smoothing == "none":
        yield "Label smoothing", "none"
    else:
        yield "Mean smoothing", ABSENT if smoothing is None else f"{smoothing:.3f}"


def _tails(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the most certain and the most uncertain samples of the first run that has uncertainties."""
    for run in runs:
        known = [(row.uncertainty, i, row) for i, row in enumerate(run.rows) if row.uncertainty is not None]
        if len(known) > 1:
            ordered = [row for *_, row in sorted(known, key=lambda entry: entry[:2])]
            count = min(_TAIL, len(ordered) // 2)
            certain, uncertain = ordered[:count], reversed(ordered[-count:])
            return [
                ("Most certain", [_example(run, row) for row in certain]),
                ("Most uncertain", [_example(run, row) for row in uncertain]),
            ]
    return []


def _no_tails(runs: Sequence[Run]) -> str:
    if all(run.smoothing and run.smoothing != "own" for run in runs):
        return "No run here sets smoothing by uncertainty, so none is recorded."
    return "Fewer than two training samples have an uncertainty."


def _example(run: Run, row: Row) -> dict[str, Any]:
    """Return a training sample, shortened for reading."""
    sample = run.sample(row)
    shown = {
        "uncertainty u": "uncertainty",
        "scaled": "scaled_uncertainty",
        "smoothing s": "label_smoothing",
        "weight w": "sample_weight",
    }
    values = [(name, number(sample, key)) for name, key in shown.items()]
    options = section(sample, "options")
    values += [(f"p({option[:40]})", number(options, option)) for option in [*options][:_OPTIONS_SHOWN]]
    prompt, response = text(sample, "prompt").strip(), text(sample, "response").strip()
    if len(prompt) > _TEXT_SHOWN:
        prompt = f"[{len(prompt) - _TEXT_SHOWN:,} characters before] …" + prompt[-_TEXT_SHOWN:]
    if len(response) > _TEXT_SHOWN:
        response = response[:_TEXT_SHOWN] + f"… [{len(response) - _TEXT_SHOWN:,} characters more]"
    return {
        "source": row.source,
        "values": [(name, f"{round(value, 6):.3g}") for name, value in values if value is not None],
        "prompt": prompt,
        "response": response,
    }


def _origin(run: Run, page: Path, *, linked: bool) -> dict[str, Any]:
    """Return where a run came from, and how to reproduce it."""
    own = run.path / File.REPORT
    return {
        "name": run.name,
        "commands": "\n".join(_commands(run)),
        "config": run.config_text,
        "environment": [(name, value) for name, value in _environment(run) if value],
        "page": quote(os.path.relpath(own, page.parent)) if linked and own.is_file() else "",
    }


def _commands(run: Run) -> Iterator[str]:
    commit = text(run.environment, "git_commit")
    if re.fullmatch(r"[0-9a-f]{7,64}", commit):
        yield f"git checkout {commit}"
    command = run.environment.get("command")
    if isinstance(command, list) and command:
        yield shlex.join(map(str, command))
    if run.config_text:
        yield "# or, from this folder alone:"
        yield shlex.join(["ual", "train", str(run.path / "config.yaml"), f"output_dir={run.path}-again"])


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    recorded, machine = run.environment, section(run.environment, "machine")
    cores, memory = number(machine, "cores"), number(machine, "memory_gib")
    parts = [
        text(machine, "processor"),
        f"{cores:g} cores" if cores else "",
        f"{memory:g} GiB" if memory else "",
        text(machine, "gpu") or ("no GPU" if machine else ""),
    ]
    versions = section(recorded, "versions").items()
    yield "Started", text(recorded, "created")
    yield "Machine", ", ".join(part for part in parts if part)
    yield "Python", text(recorded, "python")
    yield "Packages", ", ".join(f"{name} {version}" for name, version in versions)
    yield "Commit", text(recorded, "git_commit")
    yield "Seed", str(recorded.get("seed", ""))
    yield "Model", text(section(recorded, "model"), "path")
    for path, digest in section(recorded, "data_sha256").items():
        yield f"SHA-256 of {path}", str(digest)


def _summary(runs: Sequence[Run], compared: Sequence[findings.Comparison]) -> dict[str, Any]:
    """Return the figures of a comparison as JSON data; what is not known is null."""
    keys = ("trained_rows", "trained_tokens", "mean_smoothing", "train_loss_first", "train_loss_last")
    return {
        "baseline": runs[0].name,
        "cautions": findings.cautions(runs),
        "arms": [
            {
                "name": run.name,
                "folder": str(run.path),
                "status": run.status,
                "loss_kind": run.loss_kind,
                "seed": run.environment.get("seed"),
                "steps": run.steps,
                **{key: number(run.metrics, key) for key in keys},
                "seconds": number(run.metrics, "seconds"),
                "tokens_per_second": number(run.metrics, "tokens_per_second"),
                "held_out_tokens": number(run.after or {}, "tokens"),
                "eval_before": _figures(run.before),
                "eval": _figures(run.after),
                "difference_from_baseline": _differences(run.after, runs[0].after),
            }
            for run in runs
        ],
        "paired": [asdict(comparison) for comparison in compared],
    }


def _figures(evaluation: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    return None if evaluation is None else {m.key: number(evaluation, m.key) for m in METRICS}


def _differences(
    evaluation: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None
) -> dict[str, float | None] | None:
    if evaluation is None or baseline is None:
        return None
    pairs = {m.key: (number(evaluation, m.key), number(baseline, m.key)) for m in METRICS}
    return {key: None if a is None or b is None else a - b for key, (a, b) in pairs.items()}


def _whole(mapping: Mapping[str, Any], key: str) -> str:
    value = number(mapping, key)
    return ABSENT if value is None else f"{value:,.0f}"


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"

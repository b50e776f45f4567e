"""Report and compare results of `pytest benchmarks/suites`; list what can be measured."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import compare as comparison
from benchmarks import figures, machine
from benchmarks import report as reports

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Report, compare and list what `pytest benchmarks/suites` measures.",
    epilog="\b\n[bold]Examples[/bold]\n  python -m benchmarks list\n  python -m benchmarks report\n"
    "  python -m benchmarks compare before.json after.json",
)
out = Console()
err = Console(stderr=True)
Results = Annotated[
    Path | None,
    typer.Argument(
        help="A results file, or a folder, whose newest file is taken. Default: benchmarks/results.",
        show_default=False,
    ),
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]


def _load(path: Path) -> dict[str, Any]:
    try:
        return reports.load(path)
    except ValueError as error:
        err.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  python -m benchmarks report\n"
    "  python -m benchmarks report .benchmarks/results.json\n"
    "  python -m benchmarks report results/DATE-COMMIT-record.jsonl   of a GPU\n"
    "  python -m benchmarks report --docs"
)
def report(
    results: Results = None,
    docs: Annotated[
        bool, typer.Option("--docs", help="Only renew the figures that README.md and docs/ quote.")
    ] = False,
) -> None:
    """Write tables (.md) and plots (.svg, .png) beside a results file; for a GPU's (.jsonl), plots."""
    try:
        written = _renew_docs() if docs else _write_report(results or machine.RESULTS)
    except (ValueError, OSError) as error:
        err.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    for path in written:
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _write_report(path: Path) -> list[Path]:
    path = reports.newest(path) if path.is_dir() else path
    stem = path.with_suffix("")
    if path.suffix == ".jsonl":  # of a GPU, whose tables are in docs/benchmarks.md
        return reports.plots({"rows": figures.gpu_rows(path)}, stem)
    found = reports.load(path)
    drawn = reports.plots(found, stem)
    page = stem.with_suffix(".md")
    page.write_text(reports.markdown(found, [p.name for p in drawn]), encoding="utf-8")
    return [page, *drawn]


def _renew_docs() -> list[Path]:
    pages = [machine.ROOT / name for name in figures.PAGES]
    for page in pages:
        page.write_text(figures.renewed(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    return pages


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  python -m benchmarks compare before.json after.json --tolerance 0.1"
)
def compare(
    a: Annotated[Path, typer.Argument(help="Results before.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Results after.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option(help="Relative slowdown that does not count as a regression.", min=0.0)
    ] = 0.05,
    every: Annotated[bool, typer.Option("--all", help="Also show what did not regress.")] = False,
    as_json: Json = False,
) -> None:
    """List what became slower (95 % bootstrap interval), larger or less accurate.

    The exit status is 1 if anything did, and 2 if the files have no measurement in common.
    """
    found = comparison.compare(_load(a), _load(b), tolerance)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print_comparison(found, a, b, every)
    if not found.changes and not found.failed:
        err.print("[red]error[/red] no measurement is in both files; compare two runs of the same suite")
        raise typer.Exit(2)
    raise typer.Exit(int(bool(found.failed or any(c.regressed for c in found.changes))))


def _print_comparison(found: comparison.Comparison, a: Path, b: Path, every: bool) -> None:
    table = Table("case", "quantity", "B / A", "95 %", "", title=f"{b.name} / {a.name}", title_justify="left")
    shown = [c for c in found.changes if c.regressed or every]
    for c in shown:
        interval = f"{c.low:.2f} to {c.high:.2f}" if c.what == "time" else ""
        table.add_row(
            c.row, c.what, f"{c.ratio:.2f}", interval, "[red]regressed[/red]" if c.regressed else ""
        )
    if shown:
        out.print(table)
    for title, names in (
        ("only in A", found.only_a),
        ("only in B", found.only_b),
        ("failed in B", found.failed),
    ):
        for name in names:
            out.print(f"{title}: {name}", highlight=False, soft_wrap=True)
    regressed = sum(c.regressed for c in found.changes)
    out.print(f"{len(found.changes)} numbers compared, {regressed} regressed, {len(found.failed)} failed")


@app.command("list", epilog="\b\n[bold]Examples[/bold]\n  python -m benchmarks list")
def list_(as_json: Json = False) -> None:
    """List problems, settings and providers, and whether each provider runs on this machine."""
    from benchmarks.measure import DEVICE
    from benchmarks.problems import PROBLEMS, SETTINGS
    from benchmarks.providers import LOGITS_PROVIDERS, PROVIDERS, MissingError, Provider

    def here(provider: Provider) -> str:
        try:
            provider.load()
        except MissingError as error:
            return f"no: {error}"
        return "accuracy only, interpreted" if provider.how else "yes"

    sizes = [{"problem": p.name, "N": p.rows, "D": p.features, "V": p.vocab} for p in PROBLEMS.values()]
    providers = {
        title: [
            {"provider": p.name, "smoothing": p.solves.value, f"runs here ({DEVICE})": here(p)} for p in of
        ]
        for title, of in (("hidden states and head", PROVIDERS), ("logits", LOGITS_PROVIDERS))
    }
    names = [s.name for s in SETTINGS]
    if as_json:
        print(json.dumps({"problems": sizes, "settings": names, "providers": providers}, indent=1))
        return
    out.print(_table("--problem", sizes))
    out.print("--setting: " + ", ".join(names))
    for title, rows in providers.items():
        out.print(_table(f"--provider: {title}", rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")

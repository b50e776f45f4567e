"""`ual-bench`: reports of results, comparisons of two, and who is there to be measured."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import compare as comparison
from benchmarks import machine
from benchmarks import report as reports

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reports of what `pytest benchmarks/` measured.",
)
out = Console()
err = Console(stderr=True)
Results = Annotated[
    Path | None,
    typer.Argument(
        help="A file, or a folder, whose newest is taken; default: benchmarks/results.", show_default=False
    ),
]


def _load(path: Path) -> dict[str, Any]:
    try:
        return reports.load(path)
    except ValueError as error:
        err.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual-bench report\n  ual-bench report .benchmarks/results.json\n"
    "  ual-bench report --readme README.md      renew the README's table"
)
def report(
    results: Results = None,
    readme: Annotated[
        Path | None, typer.Option("--readme", metavar="FILE", help="Also renew the table between its marks.")
    ] = None,
) -> None:
    """Write tables (.md) and plots (.svg, .png) beside a results file."""
    try:
        path = results or machine.RESULTS
        path = reports.newest(path) if path.is_dir() else path
        found = _load(path)
        stem = path.with_suffix("")
        drawn = reports.plots(found, stem)
        page = stem.with_suffix(".md")
        page.write_text(reports.markdown(found, [p.name for p in drawn]), encoding="utf-8")
        if readme:
            text = readme.read_text(encoding="utf-8")
            readme.write_text(reports.put(text, reports.readme_table(found)), encoding="utf-8")
    except (ValueError, OSError) as error:
        err.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    for written in (page, *drawn, *([readme] if readme else [])):
        out.print(f"wrote {written}", highlight=False, soft_wrap=True)


@app.command(epilog="\b\n[bold]Examples[/bold]\n  ual-bench compare before.json after.json --tolerance 0.1")
def compare(
    a: Annotated[Path, typer.Argument(help="Results before.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Results after.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option(help="How much slower is no regression, as a share.", min=0.0)
    ] = 0.05,
    every: Annotated[bool, typer.Option("--all", help="Show what did not regress, too.")] = False,
) -> None:
    """Say what became slower (95 % interval by bootstrap), larger or less exact; status 1 if anything did."""
    found = comparison.compare(_load(a), _load(b), tolerance)
    table = Table("row", "what", "B / A", "95 %", "", title=f"{b.name} over {a.name}", title_justify="left")
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
    if not found.changes and not found.failed:
        err.print("[red]error[/red] the two files have no row in common that both measured")
        raise typer.Exit(2)
    raise typer.Exit(int(bool(regressed or found.failed)))


@app.command("list")
def list_() -> None:
    """Who and what can be named: problems, settings, providers."""
    from benchmarks.measure import DEVICE
    from benchmarks.problems import PROBLEMS, SETTINGS
    from benchmarks.providers import LOGITS_PROVIDERS, PROVIDERS, MissingError

    problems = Table("problem", "N", "D", "V", title="--problem", title_justify="left")
    for p in PROBLEMS.values():
        problems.add_row(p.name, str(p.rows), str(p.features), str(p.vocab))
    out.print(problems)
    out.print("--setting: " + ", ".join(s.name for s in SETTINGS))
    for title, providers in (("hidden states and head", PROVIDERS), ("logits", LOGITS_PROVIDERS)):
        table = Table(
            "provider",
            "solves",
            f"on this machine ({DEVICE})",
            title=f"--provider: {title}",
            title_justify="left",
        )
        for provider in providers:
            try:
                provider.load()
                here = "only its accuracy, interpreted" if provider.how else "yes"
            except MissingError as error:
                here = f"no: {error}"
            table.add_row(provider.name, provider.solves.value, here)
        out.print(table)

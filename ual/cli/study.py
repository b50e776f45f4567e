"""`ual reliability` and `ual quickstart`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ual.cli import tables
from ual.cli.console import Debug, app, err, errors, out, settle
from ual.errors import UserError
from ual.files import cache_folder


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual reliability answers.jsonl -o rows.jsonl\n"
    "  ual reliability answers.jsonl -o rows.jsonl --method reweight\n"
    "  ual reliability answers.jsonl -o rows.jsonl --rule quantile --value 0.25"
)
def reliability(
    answers: Annotated[
        Path, typer.Argument(help="Several answers per question (JSONL, may be .gz).", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Training rows for `ual train`.")],
    method: Annotated[
        Literal["filter", "reweight", "majority"], typer.Option(help="What becomes of disagreeing answers.")
    ] = "filter",
    rule: Annotated[
        Literal["median", "quantile", "absolute"], typer.Option(help="Which questions a filter keeps.")
    ] = "median",
    value: Annotated[
        float | None, typer.Option(help="The quantile, or the entropy in nats (.5004 for 4 of 5 alike).")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the softmax over answer shares; 0.2 is for 5 answers.")
    ] = 0.2,
    unparsed: Annotated[
        Literal["class", "drop_question"], typer.Option(help="What an answer without a value counts as.")
    ] = "class",
    debug: Debug = False,
) -> None:
    """Filter or re-weight a weak supervisor's labels by how well its answers agree (arXiv 2406.19032)."""
    with errors(debug):
        from ual.pipelines import weak_labels as reading

        if output.exists() and output.samefile(answers):
            raise UserError("--output is the answers' own file", remedy="name another file")
        rows, summary = reading.process(
            answers, method=method, rule=rule, value=value, temperature=temperature, unparsed=unparsed
        )
        reading.write(rows, output)
        out.print(tables.levels(summary))
        out.print(f"{summary.rows} rows of {summary.questions} questions in {output}", highlight=False)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual quickstart\n  ual quickstart --steps 4 --rows 48 --output short"
)
def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for data, runs and report.")
    ] = Path("quickstart-run"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each arm.")] = 36,
    rows: Annotated[int, typer.Option(min=6, help="Training rows; a third as many are held out.")] = 288,
    debug: Debug = False,
) -> None:
    """Fine-tune a real 135M-parameter model three ways on a CPU: plain, uniform smoothing, UAL."""
    with errors(debug):
        settle(output / "tensorboard")
        from ual.pipelines.quickstart.run import run

        command = ["ual", *sys.argv[1:]]
        result = run(
            output, steps=steps, rows=rows, cache=cache_folder(os.environ), command=command, console=err
        )
        out.print(tables.arms(result.metrics))
        out.print(
            f"\n{result.verdict}\n\nopen     {result.report.resolve()}\nnext     {result.next_command}",
            highlight=False,
            soft_wrap=True,
        )

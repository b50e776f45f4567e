"""`ual analyze`: what training has done to a model, beyond its loss."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ual.cli import tables
from ual.cli.console import Debug, Json, TrustRemoteCode, app, err, errors, out, print_json, settle
from ual.files import cache_folder

analyze_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(analyze_app, name="analyze", help="Analyze trained models beyond their loss.")


@analyze_app.command(
    "clusters",
    epilog="\b\n[bold]Examples[/bold]\n  ual analyze clusters runs/sft runs/ual\n"
    "  ual analyze clusters plain=runs/sft ual=runs/ual --data test.jsonl\n"
    "  ual analyze clusters runs/ual -o clusters --classes 40 --json",
)
def clusters(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RUN...",
            help="Run folders, folders of models or names on the hub; NAME=PATH names one.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Samples; may be given several times. By default the first run's held-out samples, or else "
            "its training samples.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("clusters"),
    classes: Annotated[int, typer.Option(min=2, help="Tokens, at most: the most frequent.")] = 20,
    occurrences: Annotated[int, typer.Option(min=2, help="Occurrences of each token, at most.")] = 50,
    least: Annotated[int, typer.Option(min=2, help="Occurrences that a token must have.")] = 30,
    neighbors: Annotated[int, typer.Option(min=1, help="Neighbors of the neighbor purity.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of occurrences, and of intervals.")] = 0,
    resamples: Annotated[int, typer.Option(min=2, help="Draws of documents for the intervals.")] = 200,
    umap: Annotated[
        bool, typer.Option("--umap", help="Draw UMAP beside principal components; needs umap-learn.")
    ] = False,
    base: Annotated[bool, typer.Option(help="Measure the base model of the first run as well.")] = True,
    chat_template: Annotated[
        str | None,
        typer.Option(help="chatml, plain or a Jinja file, in place of the first run's.", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how tightly hidden states cluster by the token that they predict.

    All models are measured on the same tokens. The measures are ours; arXiv 2406.04854 publishes none.
    """
    with errors(debug):
        settle(output)
        from ual.pipelines.clusters import Options, run

        result = run(
            models,
            output,
            data=data or (),
            options=Options(classes, occurrences, least, neighbors, seed, resamples, umap),
            chat_template=chat_template,
            base=base,
            command=["ual", *sys.argv[1:]],
            trust_remote_code=trust_remote_code,
            console=err,
            cache=cache_folder(os.environ),
        )
        if as_json:
            print_json(result.summary | {"report": result.page})
            return
        out.print(tables.clusters(result.summary))
        out.print(f"report   {result.page.resolve()}", highlight=False, soft_wrap=True)

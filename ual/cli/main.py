"""Entry point of `ual` and of `python -m ual`, which launchers start."""

from typing import Annotated

import typer

from ual import __version__
from ual.cli import analyze, elicit, study, train
from ual.cli.console import app, out

__all__ = ["analyze", "app", "elicit", "main", "study", "train"]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    local_rank: Annotated[  # the deepspeed launcher passes it; LOCAL_RANK says the same
        int, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = 0,
) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command that the arguments name."""
    app()

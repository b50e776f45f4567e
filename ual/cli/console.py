"""The application, its two consoles, and what every command does around its work."""

import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ual.errors import Stopped, UserError


class _Commands(TyperGroup):
    """The commands. A leading `~` is resolved where a shell does not, as in ``--output=~/page.html``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [re.sub(r"^(--?[\w-]+=)?(~.*)$", _at_home, word) for word in args])


def _at_home(found: "re.Match[str]") -> str:
    return (found[1] or "") + os.path.expanduser(found[2])  # noqa: PTH111  an unknown user stays


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Uncertainty-aware fine-tuning: each sample has its own label smoothing.",
)


def _console(*, stderr: bool) -> Console:
    """Return a console. Only a terminal has a width; lines in a pipe or a file are not broken."""
    console = Console(stderr=stderr)
    return console if console.file.isatty() else Console(stderr=stderr, width=_UNBROKEN)


_UNBROKEN = 10_000
out = _console(stderr=False)
err = _console(stderr=True)
_PATIENCE = 5.0
"""Seconds that a process other than the first waits before it prints an error."""

_tensorboard = ""  # what `tensorboard_in` has set

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example training.max_steps=10.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]
Page = Annotated[Path | None, typer.Option("--output", "-o", help="The page to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables; progress is on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a user error.")]


def print_json(value: Any) -> None:
    """Print a result, which may contain dataclasses and paths, as one JSON document. NaN becomes null."""
    from pydantic_core import to_json

    out.print_json(to_json(value, inf_nan_mode="null").decode(), indent=1)


@contextmanager
def one_of_several() -> Iterator[None]:
    """Under a launcher, let only the first process print, and exit at once when the work is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    out.quiet = err.quiet = rank() > 0
    code = 0
    try:
        yield
    except typer.Exit as stop:
        code = stop.exit_code
    # threads of gloo and DeepSpeed abort a process that exits in the usual way
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Turn a `UserError` into one screen of text and its exit code, a signal n into exit code 128 + n."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        if rank() > 0:
            # Usually rank 0 has the same error, prints it, and the launcher ends this process meanwhile.
            time.sleep(_PATIENCE)
            err.quiet = False
            err.print(f"rank {rank()}:", end=" ")
        place = f"[bold]{escape(error.place)}[/bold]\n" if error.place else ""
        remedy = f"\n[green]{escape(error.remedy)}[/green]" if error.remedy else ""
        err.print(f"[bold red]error[/bold red] {place}{escape(error.problem)}{remedy}", highlight=False)
        raise typer.Exit(error.exit_code) from error
    except Stopped as error:
        err.print(str(error), highlight=False, markup=False)
        raise typer.Exit(128 + error.number) from error
    except KeyboardInterrupt as error:
        err.print("interrupted")
        raise typer.Exit(130) from error


def settle(folder: Path) -> None:
    """Set the environment before torch is imported: libraries write to the log, not to the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tensorboard_in(folder)
    # threads that spin make a CPU run ten times slower when the machine is shared (DESIGN.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed searches, and warns on stdout
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def tensorboard_in(folder: Path) -> None:
    """Let the next run write its events into its folder, unless the user has named another one."""
    global _tensorboard
    if os.environ.get("TENSORBOARD_LOGGING_DIR", "") == _tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = _tensorboard = str(folder / "tensorboard")


def set_single_process() -> None:
    """Set what a launcher sets: without it DeepSpeed looks for MPI. Port 0 is any free port."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))

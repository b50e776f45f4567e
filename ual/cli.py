"""The command line: the only reader of arguments and environment, and the only printer."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:  # the loss alone was installed
    sys.exit(f"`ual` needs {missing.name}: pip install 'ual-kernels[train]'")

from ual import __version__, tables
from ual.errors import UserError
from ual.files import cache_folder

if TYPE_CHECKING:
    from ual.elicit_config import ElicitConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Uncertainty-aware fine-tuning: every sample carries its own label smoothing.",
)
out = Console()
err = Console(stderr=True)
_PATIENCE = 5.0
"""Seconds that a process other than the first waits before it tells of a mistake."""

_EXAMPLE = """\b
[bold]A configuration[/bold]
  model: HuggingFaceTB/SmolLM2-135M-Instruct  # a folder, or a name on the hub
  data:
    train: rows.jsonl   # messages, prompt/completion or instruction/output
    eval_fraction: 0.1
  uncertainty: white_box          # or column: the rows bring "uncertainty"
  smoothing: {min: 0.0, max: 0.2} # the most uncertain row gets 0.2
  training: {num_train_epochs: 2, learning_rate: 2.0e-4}

\b
[bold]Examples[/bold]
  ual train config.yaml
  ual train config.yaml loss=sft output_dir=runs/sft   plain fine-tuning
  ual train config.yaml loss=uniform                   one smoothing for all
  ual train config.yaml --resume         go on after a stop
  ual train config.yaml --resume auto    go on, or begin if there is nothing
  ual train config.yaml --dry-run        check everything, train nothing

\b
[bold]Several processes[/bold]  (docs/training.md)
  torchrun --nproc_per_node 8 -m ual.train config.yaml deepspeed=zero2
  deepspeed --num_gpus 8 --module ual.train config.yaml deepspeed=zero3
  accelerate launch --num_processes 8 -m ual.train config.yaml
"""

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example training.max_steps=10.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model or its tokenizer.")
]
Page = Annotated[Path | None, typer.Option("--output", "-o", help="The page to write.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a user error.")]


@app.command(epilog=_EXAMPLE)
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the run's last checkpoint; `--resume auto` also begins a new run."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan and a batch, train nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    local_rank: Annotated[  # the deepspeed launcher passes it; LOCAL_RANK says the same
        int, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = 0,
    debug: Debug = False,
) -> None:
    """Fine-tune with per-sample label smoothing; write adapter, figures and report to the run folder.

    Several processes are started by torchrun, deepspeed or accelerate with -m ual.train (docs/training.md).
    """
    with _one_of_several(), _errors(debug):
        from ual.config import load

        words = overrides or []
        auto = resume and "auto" in words
        resolved = load(config, [word for word in words if not (auto and word == "auto")])
        _settle(Path(resolved.output_dir) / "tensorboard")
        if resolved.deepspeed and "RANK" not in os.environ:
            _be_a_world_of_one()
        if dry_run:
            from ual.run import plan

            found = plan(
                resolved,
                resume="auto" if auto else resume,
                trust_remote_code=trust_remote_code,
                console=err,
                cache=cache_folder(os.environ),
            )
            out.print(tables.plan(found))
            return
        from ual.run import run

        result = run(
            resolved,
            command=["ual", *sys.argv[1:]],
            resume="auto" if auto else resume,
            trust_remote_code=trust_remote_code,
            console=err,
            cache=cache_folder(os.environ),
        )
        out.print(tables.arms([result.metrics]))
        out.print(f"report   {result.report}", highlight=False, soft_wrap=True)
        if result.stopped_by is not None:
            err.print(
                f"stopped by a signal after step {result.metrics['steps']}; --resume goes on from there"
            )
            raise typer.Exit(128 + result.stopped_by)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual merge runs/first -o merged\n"
    "  ual merge runs/first --base HuggingFaceTB/SmolLM2-135M-Instruct -o merged"
)
def merge(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, where it is no longer what config.yaml says.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Add a run's adapter to its base model and write one model in safetensors, with its tokenizer."""
    with _errors(debug):
        from ual.config import load

        trained = load(run / "config.yaml")
        if trained.lora is None:
            raise UserError(
                "this run trained all weights: there is no adapter to merge",
                place=str(run),
                remedy=f"its model is in {run / 'model'}",
            )
        _settle(run / "tensorboard")
        from ual.models.merge import merge as merge_weights

        model = trained.model.model_copy(update={"path": base} if base else {})
        merge_weights(model, run / "adapter", output, trust_remote_code=trust_remote_code)
        out.print(f"model    {output}", highlight=False, soft_wrap=True)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual preview config.yaml\n"
    "  ual preview config.yaml -n 10 data.overlong=truncate loss=uniform"
)
def preview(
    config: Config,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--rows", min=0, help="Rows to show.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Show which tokens are trained, with what smoothing and weight, and what is dropped and why."""
    with _errors(debug):
        from ual.config import load

        resolved = load(config, overrides or [])
        _settle(Path(resolved.output_dir) / "tensorboard")
        from ual.preview import preview as look

        found = look(
            resolved, count=count, cache=cache_folder(os.environ), trust_remote_code=trust_remote_code
        )
        for row in found.rows:
            facts, text = tables.preview_row(row, coloured=out.color_system is not None)
            out.print(facts, highlight=False, soft_wrap=True)
            out.print(text, soft_wrap=True)
            out.print()
        out.print(tables.preview(found))
        for note in found.notes:
            out.print(escape(note), highlight=False)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual estimate config.yaml\n"
    "  ual estimate config.yaml --gpus 8 --zero 3 data.max_length=4096"
)
def estimate(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes that ZeRO shards over.")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 0,
    live: Annotated[
        float, typer.Option(help="Share of the tokens that are trained; `ual preview` says.")
    ] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="For training without a GPU.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Print the memory of a run on each GPU, from the model's config.json alone: no weights are loaded."""
    with _errors(debug):
        from ual.config import load

        resolved = load(config, overrides or [])
        _settle(Path(resolved.output_dir) / "tensorboard")
        from ual.train.estimate import estimate as calculate

        found = calculate(
            resolved,
            gpus=gpus,
            zero=zero,  # type: ignore[arg-type]
            live=live,
            device="cpu" if cpu else "cuda",
            trust_remote_code=trust_remote_code,
        )
        out.print(tables.estimate(found))


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual report runs/ual\n"
    "  ual report runs/sft runs/uniform runs/ual -o comparison.html"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; the first is the baseline.", show_default=False)
    ],
    output: Page = None,
    debug: Debug = False,
) -> None:
    """Write the HTML page of a run, or of several side by side."""
    with _errors(debug):
        from ual.report import write

        out.print(str(write(runs, output)), highlight=False, soft_wrap=True)


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
    with _errors(debug):
        from ual.data import answers as reading

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
    with _errors(debug):
        _settle(output / "tensorboard")
        from ual.quickstart.run import run

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


_ELICIT_EXAMPLE = """\b
[bold]A configuration[/bold]
  data: rows.jsonl        # messages, prompt/completion or instruction/output
  backend:
    kind: endpoint                          # or local: a model loaded here
    model: gpt-5-mini
    api_key_env: OPENAI_API_KEY             # the variable's name, no key
    prices: {prompt: 0.25, completion: 2.0} # per million tokens
  estimators: \\[judge, {name: self_consistency, samples: 5}]
  budget: {money: 20}

\b
[bold]Examples[/bold]
  ual elicit config.yaml --dry-run      prompts, tokens, cost; nothing is sent
  ual elicit config.yaml --limit 20     the first rows
  ual elicit config.yaml                all; after a stop, it goes on
  ual elicit report runs/config         how good it is
  ual elicit config.yaml --export-batch files        for OpenAI's Batch
  ual elicit config.yaml --import-batch out.jsonl    or vllm run-batch
"""


class _RunByDefault(TyperGroup):
    """Lets `ual elicit config.yaml` stand for `ual elicit run config.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


elicit_app = typer.Typer(
    cls=_RunByDefault, no_args_is_help=True, rich_markup_mode="rich", epilog=_ELICIT_EXAMPLE
)
app.add_typer(elicit_app, name="elicit", help="Give every row an uncertainty, by asking a model.")


@elicit_app.command("run", epilog=_ELICIT_EXAMPLE)
def elicit(
    config: Annotated[Path, typer.Argument(help="The elicitation's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example budget.money=5.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print prompts, tokens and cost; send nothing.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Answer from the cache alone; ask nobody.")
    ] = False,
    export_batch: Annotated[
        Path | None, typer.Option(help="Write what is not answered into batch files in this new folder.")
    ] = None,
    import_batch: Annotated[
        list[Path] | None, typer.Option(help="Take in a batch's output file; may be given several times.")
    ] = None,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Let data and key go to another machine in the clear.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Give every row an uncertainty; `ual train` reads the rows that this writes."""
    with _errors(debug):
        from ual.config import load_as
        from ual.elicit_config import ElicitConfig

        flags = ["backend.allow_plain_http=true"] if allow_plain_http else []
        example = "data: FILE.jsonl / backend: {kind: endpoint, model: NAME}"
        resolved = load_as(ElicitConfig, config, [*(overrides or []), *flags], example=example)
        if sum(map(bool, (dry_run, replay, export_batch, import_batch))) > 1:
            raise UserError("--dry-run, --replay, --export-batch and --import-batch exclude each other")
        if resolved.backend.kind == "local" or resolved.nli is not None:
            _settle(Path(resolved.output_dir) / "tensorboard")
        if dry_run:
            _dry_run(resolved, limit)
        elif export_batch is not None:
            from ual.elicit.batch import export

            done = export(resolved, export_batch, limit=limit)
            out.print(
                f"{done.requests} requests in {len(done.files)} files; {done.cached} are answered already"
            )
            out.print(*done.files, sep="\n", highlight=False, soft_wrap=True)
        elif import_batch:
            from ual.elicit.batch import import_files

            for what, count in import_files(resolved, import_batch).most_common():
                out.print(f"{count:>9,} {what}", highlight=False, markup=False)
        else:
            _elicit(resolved, limit, replay, trust_remote_code)


@elicit_app.command(
    "report",
    epilog="\b\n[bold]Examples[/bold]\n  ual elicit report runs/judge\n"
    "  ual elicit report runs/judge -o page.html",
)
def elicit_report(
    run: Annotated[Path, typer.Argument(help="A folder that `ual elicit` wrote.", show_default=False)],
    output: Page = None,
    debug: Debug = False,
) -> None:
    """Write the page that shows how good the elicited uncertainties are."""
    with _errors(debug):
        from ual.report.elicitation import write_elicitation

        out.print(str(write_elicitation(run, output)), highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of the `ual` script."""
    app()


def train_module() -> None:
    """Entry point of `python -m ual.train`, which launchers start."""
    sys.argv[1:1] = ["train"]
    app()


@contextmanager
def _one_of_several() -> Iterator[None]:
    """Under a launcher only the first process prints, and all leave at once when the work is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    out.quiet = err.quiet = _rank() > 0
    code = 0
    try:
        yield
    except typer.Exit as stop:
        code = stop.exit_code
    # threads of gloo and DeepSpeed abort a process that ends in the usual way, after all is written
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn a user's mistake into one screen of text and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        if _rank() > 0:
            # The others usually fail alike, rank 0 says so, and the launcher ends this process meanwhile.
            time.sleep(_PATIENCE)
            err.quiet = False
            err.print(f"rank {_rank()}:", end=" ")
        place = f"[bold]{escape(error.place)}[/bold]\n" if error.place else ""
        remedy = f"\n[green]{escape(error.remedy)}[/green]" if error.remedy else ""
        err.print(f"[bold red]error[/bold red] {place}{escape(error.problem)}{remedy}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        err.print("interrupted")
        raise typer.Exit(130) from error


def _settle(tensorboard: Path) -> None:
    """Settle the environment before torch is imported: third parties write to the log, not the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(tensorboard))
    # threads that wait by spinning make a CPU run ten times slower as soon as anything else runs (DESIGN.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed warns on stdout while it looks for one
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _dry_run(config: "ElicitConfig", limit: int | None) -> None:
    from ual.elicit.dry_run import dry_run

    found = dry_run(config, limit=limit)
    for estimate in found.estimates:
        for prompt in estimate.prompts:
            out.print(f"{estimate.label}, its first prompt", style="bold", markup=False)
            out.print(prompt + "\n", highlight=False, markup=False)
    out.print(tables.elicitation_plan(found), highlight=False)


def _elicit(config: "ElicitConfig", limit: int | None, replay: bool, trust_remote_code: bool) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    from ual.elicit.run import Progress, run

    columns = (
        TextColumn("eliciting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Bars(*columns, console=err) as bars:
        bar = bars.add_task("", total=None, said="")

        def advance(p: Progress) -> None:
            if p.done % max(1, p.total // 1000) and p.done != p.total:
                return
            said = f"{p.requests} asked, {p.cached} cached"
            said += f", {p.failed} failed" if p.failed else ""
            said += f", cost {p.cost:.4f} of about {p.projected_cost:.4f}" if p.cost else ""
            bars.update(bar, total=p.total, completed=p.done, said=said)

        result = run(
            config,
            environment=os.environ,
            limit=limit,
            replay=replay,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    out.print(tables.elicitation(result.summary))
    page: Path | str = "needs matplotlib: pip install 'ual-kernels[eval]', then ual elicit report"
    with suppress(ModuleNotFoundError):
        from ual.report.elicitation import write_elicitation

        page = write_elicitation(result.folder)
    summary = result.summary
    out.print(
        f"{summary['requests']['sent']} requests, cost {summary['cost']:.4f}\n"
        f"rows     {result.folder / 'rows.jsonl'}\nreport   {page}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _be_a_world_of_one() -> None:
    """DeepSpeed wants what a launcher sets, or MPI. Port 0 is any that is free."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))

"""`ual train`, and the looks before and after it: preview, estimate, report, merge, publish."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from typer.core import TyperCommand

from ual.cli import tables
from ual.cli.console import (
    Config,
    Debug,
    Json,
    Overrides,
    Page,
    TrustRemoteCode,
    app,
    err,
    errors,
    one_of_several,
    out,
    print_json,
    set_single_process,
    settle,
)
from ual.errors import UserError
from ual.files import cache_folder

_EXAMPLE = """\b
[bold]A configuration[/bold]
  model: HuggingFaceTB/SmolLM2-135M-Instruct  # a folder, or a name on the hub
  data:
    train: rows.jsonl   # messages, prompt/completion or instruction/output
    # columns: {prompt: question, completion: "{{endings\\[label]}}"}
    eval_fraction: 0.1
  uncertainty: white_box          # or column: samples have "uncertainty"
  smoothing: {min: 0.0, max: 0.2} # the most uncertain sample gets 0.2
  training: {num_train_epochs: 2, learning_rate: 2.0e-4}

\b
[bold]Examples[/bold]
  ual train config.yaml
  ual train config.yaml loss=sft output_dir=runs/sft   plain fine-tuning
  ual train config.yaml loss=uniform                   one smoothing for all
  ual train config.yaml smoothing.over=options  over each sample's options
  ual train config.yaml loss=soft_labels        on each label_distribution
  ual train config.yaml loss=confidence         and on own predictions
  ual train config.yaml --resume         continue an interrupted run
  ual train config.yaml --resume auto    continue, or begin a new run
  ual train config.yaml --dry-run        check everything, train nothing

\b
[bold]Several processes[/bold]  (docs/training.md)
  torchrun --nproc_per_node 8 -m ual train config.yaml deepspeed=zero2
  deepspeed --num_gpus 8 --module ual train config.yaml deepspeed=zero3
  accelerate launch --num_processes 8 -m ual train config.yaml
"""


class _MayResume(TyperCommand):
    """Accepts `--resume` alone, `--resume auto` and `--resume=auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            if word == "auto" and words and words[-1] == _RESUME:
                words[-1] = "--resume=auto"
            else:
                words.append(_RESUME if word == "--resume" else word)
        return super().parse_args(ctx, words)


_RESUME = "--resume=last"  # what `--resume` alone means


@app.command(epilog=_EXAMPLE, cls=_MayResume)
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        Literal["last", "auto"] | None,
        typer.Option(
            metavar="[auto]",
            help="Continue from the last checkpoint; `--resume auto` also begins a new run.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, show the size of the run and its first samples; train nothing.",
        ),
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data", help="Resume although data files have changed since the run began."
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    local_rank: Annotated[  # the deepspeed launcher passes it; LOCAL_RANK has the same value
        int, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = 0,
    debug: Debug = False,
) -> None:
    """Fine-tune with per-sample label smoothing; write adapter, metrics and report to the run folder.

    To start several processes, use torchrun, deepspeed or accelerate with -m ual train (docs/training.md).
    """
    with one_of_several(), errors(debug):
        from ual.config.run import load

        resolved = load(config, overrides or [])
        continues: bool | Literal["auto"] = "auto" if resume == "auto" else resume is not None
        settle(Path(resolved.output_dir))
        if resolved.deepspeed and "RANK" not in os.environ:
            set_single_process()
        if dry_run:
            from ual.pipelines.preview import plan

            found = plan(
                resolved,
                accept_changed_data=accept_changed_data,
                resume=continues,
                trust_remote_code=trust_remote_code,
                console=err,
                cache=cache_folder(os.environ),
            )
            print_json(found) if as_json else out.print(tables.plan(found))
            return
        from ual.pipelines.train import run

        result = run(
            resolved,
            command=["ual", *sys.argv[1:]],
            accept_changed_data=accept_changed_data,
            resume=continues,
            trust_remote_code=trust_remote_code,
            console=err,
            cache=cache_folder(os.environ),
        )
        if as_json:
            print_json(result.metrics | {"report": result.report, "stopped_by": result.stopped_by})
        else:
            out.print(tables.arms([result.metrics]))
            out.print(f"report   {result.report}", highlight=False, soft_wrap=True)
        if result.stopped_by is not None:
            err.print(
                f"stopped by a signal after step {result.metrics['steps']}; --resume continues from there"
            )
            raise typer.Exit(128 + result.stopped_by)
        if result.unpublished is not None:
            raise result.unpublished


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual preview config.yaml\n"
    "  ual preview config.yaml -n 10 data.overlong=truncate loss=uniform"
)
def preview(
    config: Config,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--rows", min=0, help="Samples to show.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the loss tokens with their smoothing and weight, and how many samples are dropped and why."""
    with errors(debug):
        from ual.config.run import load

        resolved = load(config, overrides or [])
        settle(Path(resolved.output_dir))
        from ual.pipelines.preview import preview as look

        found = look(
            resolved,
            count=count,
            trust_remote_code=trust_remote_code,
            console=err,
            cache=cache_folder(os.environ),
        )
        if as_json:
            print_json(found)
            return
        for sample in found.shown:
            facts, text = tables.preview_sample(sample, colored=out.color_system is not None)
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
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that ZeRO shards over, one process each.")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 0,
    live: Annotated[float, typer.Option(help="Share of loss tokens; `ual preview` prints it.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Estimate training without a GPU.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the memory of a run on each GPU, from the model's config.json alone: no weights are loaded."""
    with errors(debug):
        from ual.config.run import load

        resolved = load(config, overrides or [])
        settle(Path(resolved.output_dir))
        from ual.pipelines.estimate import estimate as calculate

        found = calculate(
            resolved,
            gpus=gpus,
            zero=zero,  # type: ignore[arg-type]
            live=live,
            device="cpu" if cpu else "cuda",
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            print_json(asdict(found) | {"naive": found.naive, "fused": found.fused})
        else:
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
    with errors(debug):
        from ual.report import write

        out.print(str(write(runs, output)), highlight=False, soft_wrap=True)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual merge runs/first -o merged\n"
    "  ual merge runs/first --base HuggingFaceTB/SmolLM2-135M-Instruct -o merged"
)
def merge(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is no longer at the path in config.yaml.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Add a run's adapter to its base model and write one model in safetensors, with its tokenizer."""
    with errors(debug):
        from ual.config.run import load

        trained = load(run / "config.yaml")
        if trained.lora is None:
            raise UserError(
                "this run trained all weights: there is no adapter to merge",
                place=str(run),
                remedy=f"its model is in {run / 'model'}",
            )
        settle(run)
        from ual.models.merge import merge as merge_weights

        model = trained.model.model_copy(update={"path": base} if base else {})
        merge_weights(model, run / "adapter", output, trust_remote_code=trust_remote_code)
        out.print(f"model    {output}", highlight=False, soft_wrap=True)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual publish runs/first\n"
    "  ual publish runs/first --hub-model-id me/name --private"
)
def publish(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)],
    hub_model_id: Annotated[
        str | None, typer.Option(help="owner/name; by default that of the run, or its name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a finished run's adapter or model to the Hugging Face hub, with its model card.

    Log in with `hf auth login`, or set HF_TOKEN. A failed upload can be repeated.
    """
    with errors(debug):
        settle(run)
        from ual.pipelines.publish import publish as upload

        url = upload(run, repo_id=hub_model_id, private=private or None)
        out.print(f"published {url}", highlight=False, soft_wrap=True)

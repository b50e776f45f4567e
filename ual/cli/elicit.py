"""`ual elicit`: its commands and its progress."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ual.cli import tables
from ual.cli.console import Debug, Json, Page, TrustRemoteCode, app, err, errors, out, print_json, settle
from ual.errors import FailedRequestsError, UserError

if TYPE_CHECKING:
    from ual.config.elicit import ElicitConfig
    from ual.uncertainty.budget import Budget
    from ual.uncertainty.session import Counts

_ELICIT_EXAMPLE = """\b
[bold]A configuration[/bold]
  data: rows.jsonl        # messages, prompt/completion or instruction/output
  backend:
    kind: endpoint                          # or local: a model loaded here
    model: gpt-5-mini                       # reasons: needs four more keys
    api_key_env: OPENAI_API_KEY             # the variable's name, not the key
    max_tokens_field: max_completion_tokens
    omit: \\[temperature, logprobs, top_logprobs]
    reasoning_effort: low
    reasoning_tokens: 4000                  # room before each answer
    prices: {prompt: 0.25, completion: 2.0} # per million tokens
  estimators: \\[judge, {name: self_consistency, samples: 5}]
  # a teacher's probabilities of answers of one token, for loss: soft_labels
  # estimators: \\[{name: answer_distribution, options: \\["yes", "no"]}]
  budget: {money: 20}

\b
[bold]Examples[/bold]
  ual elicit config.yaml --dry-run      prompts, tokens, cost; nothing is sent
  ual elicit config.yaml --limit 20     the first samples
  ual elicit config.yaml                all samples; run it again to resume
  ual elicit report runs/config         how good the uncertainties are
  ual elicit config.yaml --export-batch files        for OpenAI's Batch API
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
app.add_typer(
    elicit_app,
    name="elicit",
    help="Elicit the uncertainty of each sample from a model.\n\n"
    "`ual elicit config.yaml` is short for `ual elicit run config.yaml`.",
)


@elicit_app.command("run", epilog=_ELICIT_EXAMPLE)
def elicit(
    config: Annotated[Path, typer.Argument(help="The elicitation's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example budget.money=5.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Process only the first samples, this many.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print prompts, tokens and cost; send nothing.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Take replies from the cache alone; send nothing.")
    ] = False,
    export_batch: Annotated[
        Path | None,
        typer.Option(help="Write the requests without a cached reply into batch files in this new folder."),
    ] = None,
    import_batch: Annotated[
        list[Path] | None, typer.Option(help="Import a batch's output file; may be given several times.")
    ] = None,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Allow unencrypted HTTP to another machine.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give each sample an uncertainty, and write the samples for `ual train`."""
    with errors(debug):
        from ual.config.base import load_as
        from ual.config.elicit import ElicitConfig

        flags = ["backend.allow_plain_http=true"] if allow_plain_http else []
        resolved = load_as(ElicitConfig, config, [*(overrides or []), *flags])
        if sum(map(bool, (dry_run, replay, export_batch, import_batch))) > 1:
            raise UserError("--dry-run, --replay, --export-batch and --import-batch exclude each other")
        if resolved.backend.kind == "local" or resolved.nli is not None:
            settle(Path(resolved.output_dir))
        if dry_run:
            _dry_run(resolved, limit, as_json)
        elif export_batch is not None:
            from ual.pipelines.elicit_batch import export

            done = export(resolved, export_batch, limit=limit)
            if as_json:
                print_json(done._asdict())
                return
            out.print(
                f"{done.requests} requests in {len(done.files)} files; {done.cached} replies are cached"
            )
            out.print(*done.files, sep="\n", highlight=False, soft_wrap=True)
        elif import_batch:
            from ual.pipelines.elicit_batch import import_files

            outcomes = import_files(resolved, import_batch)
            if as_json:
                print_json(outcomes)
            else:
                for what, count in outcomes.most_common():
                    out.print(f"{count:>9,} {what}", highlight=False, markup=False, soft_wrap=True)
            if not outcomes["imported"]:
                raise FailedRequestsError(
                    "no answer was imported",
                    remedy="correct what the lines say, and export the requests again",
                )
        else:
            _elicit(resolved, limit, replay, trust_remote_code, as_json)


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
    """Write a page that shows how good the elicited uncertainties are."""
    with errors(debug):
        from ual.report.elicitation import write_elicitation

        out.print(str(write_elicitation(run, output)), highlight=False, soft_wrap=True)


def _dry_run(config: "ElicitConfig", limit: int | None, as_json: bool) -> None:
    from ual.pipelines.elicit_dry_run import dry_run

    found = dry_run(config, limit=limit)
    if as_json:
        print_json(found)
        return
    for estimate in found.estimates:
        if estimate.prompt:
            out.print(f"{estimate.label}, its first prompt", style="bold", markup=False)
            out.print(estimate.prompt + "\n", highlight=False, markup=False)
    out.print(tables.elicitation_plan(found), highlight=False)


def _elicit(
    config: "ElicitConfig", limit: int | None, replay: bool, trust_remote_code: bool, as_json: bool
) -> None:
    from ual.pipelines.elicit import check, run
    from ual.runs.progress import Progress

    with Progress(err) as progress:
        task = progress.task("eliciting", total=None)

        def advance(done: int, total: int, counts: "Counts", budget: "Budget") -> None:
            if done % max(1, total // 1000) and done != total:
                return
            cost = budget.cost(budget.spent)
            said = f"{budget.spent.requests:,} sent, {counts.cached:,} cached"
            said += f", {counts.failed:,} failed" if counts.failed else ""
            said += f", cost {cost:.4f} of about {cost * total / done:.4f}" if cost else ""
            task.update(done, total, said)

        summary = run(
            config,
            environment=os.environ,
            limit=limit,
            replay=replay,
            trust_remote_code=trust_remote_code,
            progress=advance,
            notice=lambda said: progress.say(f"notice: {said}"),
        )
    folder = Path(config.output_dir)
    page: Path | str = "needs matplotlib: pip install 'ual-kernels[eval]', then ual elicit report"
    with suppress(ModuleNotFoundError):
        from ual.report.elicitation import write_elicitation

        page = write_elicitation(folder)
    if as_json:
        print_json(summary | {"samples": folder / "rows.jsonl", "report": page})
    else:
        out.print(tables.elicitation(summary))
        for reason, count in summary["dropped"].items():
            number = "1 sample" if count == 1 else f"{count} samples"
            said = f"{number} dropped: {reason} (data.invalid: drop)"
            out.print(said, highlight=False, markup=False)
        out.print(
            f"{summary['requests']['sent']} requests, cost {summary['cost']:.4f}\n"
            f"samples  {folder / 'rows.jsonl'}\nreport   {page}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    check(summary, config)

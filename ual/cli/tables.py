"""What the command line shows of a result. Every function returns what rich can print, and prints nothing."""

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ual.pipelines.elicit_dry_run import DryRun
    from ual.pipelines.estimate import Estimate
    from ual.pipelines.plan import Plan
    from ual.pipelines.preview import Preview, Row
    from ual.pipelines.weak_labels import Group as Questions
    from ual.pipelines.weak_labels import Summary


def _table(*names: str, left: int = 1) -> Table:
    """One with a header, whose first `left` columns hold text and the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(names):
        table.add_column(name, justify="left" if column < left else "right")
    return table


def _facts(*, numbers: bool) -> Table:
    """Two columns without a header."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right" if numbers else "left")
    return table


def arms(found: list[dict[str, Any]]) -> RenderableType:
    """The figures of one run, or of several side by side."""
    table = _table("run", "steps", "mean smoothing", "train loss", "NLL", "accuracy", "ECE", "Brier")
    for arm in found:
        before, after = arm.get("eval_before"), arm.get("eval")
        if before and arm is found[0]:
            table.add_row("base model", "0", "", "", *_figures(before))
        table.add_row(
            escape(arm["name"]),
            str(arm["steps"]),
            f"{arm['mean_smoothing']:.3f}",
            _number(arm["train_loss_last"]),
            *(_figures(after) if after else ["not measured", "", "", ""]),
        )
    return table


def plan(found: "Plan") -> RenderableType:
    """What a run would do, and the first rows of its first batch."""
    steps = "as many as the stream has" if found.steps is None else f"{found.steps:,}"
    sharding = f", ZeRO-{found.zero_stage}" if found.zero_stage else ""
    facts = _facts(numbers=False)
    for name, value in (
        ("loss", found.loss),
        ("rows", f"{found.rows:,} to train, {found.held_out:,} held out"),
        ("tokens", f"{found.tokens:,}, of which {found.trained_tokens:,} are trained"),
        ("parameters", f"{found.parameters:,}, of which {found.trained_parameters:,} are trained"),
        ("processes", f"{found.processes}{sharding}"),
        ("steps", f"{steps}, of {found.rows_per_step} rows each"),
        (
            "checkpoint",
            f"about {found.checkpoint_bytes / 1e6:,.1f} MB; {found.free_bytes / 1e9:,.1f} GB are free",
        ),
    ):
        facts.add_row(name, value)
    batch = _table("row", "tokens", "trained", "smoothing", "weight")
    for row in found.batch:
        smoothing = "asked when it runs" if row["smoothing"] is None else f"{row['smoothing']:.3f}"
        batch.add_row(
            escape(row["id"]), str(row["tokens"]), str(row["trained"]), smoothing, f"{row['weight']:g}"
        )
    return Group(facts, batch, "nothing was loaded, trained or written")


def preview(found: "Preview") -> RenderableType:
    """What was read, dropped, cut and trained, in counts."""
    table = _facts(numbers=True)
    table.add_row("rows read", f"{found.count:,}")
    for why, number in found.dropped.items():
        table.add_row(f"  not trained: {escape(why)}", f"{number:,}")
    table.add_row("rows trained", f"{found.trained_rows:,}")
    if found.truncated:
        table.add_row(f"  cut at {found.max_length} tokens", f"{found.truncated:,}")
    if len(found.sources) > 1:
        for source, number in list(found.sources.items())[:8]:
            table.add_row(f"  from {escape(source or '(unnamed)')}", f"{number:,}")
    if found.sequences is not None:
        table.add_row(f"packed sequences of at most {found.max_length} tokens", f"{found.sequences:,}")
    share = found.trained_tokens / found.tokens if found.tokens else 0.0
    table.add_row("tokens", f"{found.tokens:,}")
    table.add_row("tokens trained", f"{found.trained_tokens:,}  ({share:.0%})")
    if found.held_out:
        table.add_row("rows held out", f"{found.held_out:,}")
    return table


def preview_row(row: "Row", *, coloured: bool) -> tuple[str, Text]:
    """A row's facts, and its text: what is trained in green, or between marks where there is no colour."""
    smoothing = "unknown yet" if row.smoothing is None else f"{row.smoothing:.3f}"
    trained = sum(span.tokens for span in row.spans if span.trained)
    total = sum(span.tokens for span in row.spans)
    cut = ", cut at data.max_length" if row.truncated else ""
    facts = (
        f"[bold]{escape(row.sample.id)}[/bold]  smoothing {smoothing}, weight {row.weight:g}, "
        f"{trained} of {total} tokens trained{cut}"
        f"[dim]  {escape(row.sample.source)}  {escape(row.sample.place)}[/dim]"
    )
    shown = Text()
    for span in row.spans:
        if coloured:
            shown.append(span.text, style="bold green" if span.trained else "dim")
        else:
            shown.append(f"«{span.text}»" if span.trained else span.text)
    return facts, shown


def estimate(found: "Estimate") -> RenderableType:
    """The parts of a step's memory, and their sums under both losses."""
    table = _table("GiB on each GPU", "transformers' loss", "fused loss")
    for name, size in (
        ("weights", found.weights),
        ("layers gathered by ZeRO-3", found.gathered),
        ("gradients", found.gradients),
        ("optimizer", found.optimizer),
        ("activations", found.activations),
    ):
        if size or name != "layers gathered by ZeRO-3":
            table.add_row(name, _gib(size), _gib(size))
    table.add_row("head and loss", _gib(found.naive_head), _gib(found.fused_head))
    table.add_row("together", _gib(found.naive), _gib(found.fused), style="bold")
    return Group(
        table,
        "one micro-batch of full length; not counted: CUDA's context, fragmentation, communication buffers",
    )


def levels(summary: "Summary") -> RenderableType:
    """How often answers are right at each level of disagreement, and what was dropped."""
    table = _table("entropy, nats", "questions", "kept", "answers right", "majority right", left=0)

    def row(name: str, kept: str, group: "Questions") -> None:
        right = (_number(group.answer_accuracy), _number(group.label_accuracy))
        table.add_row(name, str(group.questions), kept, *right)

    for level in summary.levels:
        span = f"{level.low:.3f}" if level.low == level.high else f"{level.low:.3f} to {level.high:.3f}"
        row(span, str(level.kept), level.group)
    row("all kept", str(summary.kept.questions), summary.kept)
    row("all dropped", "0", summary.dropped)
    return table


def elicitation_plan(found: "DryRun") -> RenderableType:
    """The requests that an elicitation would send, with their tokens and cost."""
    table = _table("estimator", "requests", "cached", "prompt tokens", "completion tokens, at most")
    for e in found.estimates:
        figures = (e.requests, e.cached, e.most.prompt_tokens, e.most.completion_tokens)
        table.add_row(escape(e.label), *(f"{figure:,}" for figure in figures))
    how = "counted by the model's tokenizer" if found.counted else "estimated at 4 bytes a token"
    return Group(
        table,
        f"{found.rows:,} rows; prompt tokens {how}; cost at most {found.cost:.4f}. Nothing was sent.",
    )


def elicitation(summary: dict[str, Any]) -> RenderableType:
    """How many values each estimator found, and why the others are missing."""
    table = _table("estimator", "values", "mean", "missing", "because")
    table.columns[-1].justify = "left"
    for name, row in summary["estimators"].items():
        because = ", ".join(f"{reason} {n}" for reason, n in row["missing_because"].items())
        table.add_row(
            escape(name), f"{row['values']:,}", _number(row["mean"]), f"{row['missing']:,}", escape(because)
        )
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _figures(evaluation: dict[str, float]) -> list[str]:
    return [_number(evaluation[name]) for name in ("nll", "accuracy", "ece", "brier")]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

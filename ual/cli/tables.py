"""Tables of the command line. Each function returns what rich prints, and prints nothing."""

import math
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table as Columns
from rich.text import Text

if TYPE_CHECKING:
    from ual.pipelines.elicit_dry_run import DryRun
    from ual.pipelines.estimate import Estimate
    from ual.pipelines.preview import Plan, Preview, Shown
    from ual.pipelines.weak_labels import Group as Questions
    from ual.pipelines.weak_labels import Summary
    from ual.pipelines.weak_to_strong.dry_run import Plan as StudyPlan
    from ual.train.resume import Start


class _Table(Columns):
    """A table that is never cut. Where it is too wide, each table row is a list of names and values."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._needed <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        names = [Text(str(column.header), style="bold") for column in self.columns]
        width = max(len(name) for name in names)
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            for name, cell in zip(names, cells, strict=True):
                yield name + " " * (width - len(name) + 2) + Text.from_markup(str(cell))
            yield ""

    @property
    def _needed(self) -> int:
        """Columns of the terminal: all of a number, and the longest word of a text."""
        longest = []
        for column in self.columns:
            texts = [Text.from_markup(str(cell)).plain for cell in (column.header, *column.cells)]
            parts = texts if column.no_wrap else [word for text in texts for word in text.split()]
            longest.append(max(map(cell_len, parts), default=0))
        return sum(longest) + 2 * (len(longest) - 1)


def _table(*names: str, left: int = 1) -> _Table:
    """Return a table with a header; its first `left` columns hold text, the others numbers."""
    table = _Table(box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(names):
        number = column >= left
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _pairs(*, numbers: bool) -> Columns:
    """Return a table of two columns without a header."""
    table = Columns(box=None, pad_edge=False, show_header=False)
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


def paired(found: list[dict[str, Any]]) -> RenderableType:
    """The arms' differences from the baseline, with their 95 % intervals over held-out samples."""
    table = _table("difference", "metric", "mean", "95 % interval", "samples", "seeds", left=2)
    for pair in found:
        for metric, name in (("nll", "NLL"), ("accuracy", "accuracy")):
            of = pair[metric]
            interval = f"{of['low']:+.4f} to {of['high']:+.4f}"
            size = str(of["samples"]), str(of["seeds"])
            arms = escape(f"{pair['arm']} - {pair['baseline']}")
            table.add_row(arms, name, f"{of['value']:+.4f}", interval, *size)
    return table


def evaluation(summary: dict[str, Any]) -> RenderableType:
    """The main figures of every model by task, and differences from the first model, with 95 % intervals."""
    parts: list[RenderableType] = []
    for name, about in summary["tasks"].items():
        entries = [entry for entry in summary["figures"] if entry["task"] == name]
        known = entries[0]["measures"]
        hidden = {"ece"} if "ece_debiased" in known else set()
        shown = [(key, title) for key, title in _MEASURES if key in known and key not in hidden]
        shown = shown or [(key, key) for key in known]
        fitted = any(entry["version"] == "tempered" for entry in entries)
        table = _table("model", *["temperature"] * fitted, *(title for _, title in shown))
        for entry in entries:
            temperature = [f"{entry['temperature']:.2f}" if entry["version"] == "tempered" else ""] * fitted
            own, minus = entry["measures"], entry["differences"]
            table.add_row(escape(entry["model"]), *temperature, *(_estimate(own[key]) for key, _ in shown))
            if minus:
                cells = (_estimate(minus[key], "+") for key, _ in shown)
                table.add_row(escape(f"{entry['model']} - {entry['minus']}"), *temperature, *cells)
        said = f"{about['measured']:,} items"
        if about["fit"]:
            said += f", {about['fit']:,} others fit the temperature"
        if about["too_long"]:
            said += f", {about['too_long']:,} too long for a model"
        others = {entry["model"]: entry["not_compared"] for entry in entries if entry["not_compared"]}
        notes = [f"{escape(model)}: {why}, so there is no difference" for model, why in others.items()]
        parts += [f"[bold]{escape(name)}[/bold]  {said}", table, *notes, ""]
    if summary["lm_eval"]:
        parts += [_harness(summary["lm_eval"]), ""]
    if summary["judged"]:
        parts += [_judged(summary["judged"]), ""]
    return Group(*parts)


def _harness(found: dict[str, Any]) -> RenderableType:
    """What the lm-evaluation-harness itself computed, and its warnings."""
    table = _table("harness", "model", "shots", "items", "metric", "value", "error", left=2)
    notices = []
    for model, of in found.items():
        for name, task in of["tasks"].items():
            for metric in task["metrics"]:
                error = "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
                items = f"{task['items']:,} of {task['available']:,}"
                label = f"{metric['name']}, {metric['filter']}".removesuffix(", none")
                shots = str(task["shots"])
                table.add_row(
                    escape(name), escape(model), shots, items, label, f"{metric['value']:.4f}", error
                )
        notices += [f"{model}: {escape(text)} ({count} times)" for text, count in of["notices"].items()]
    return Group(table, *notices)


def _judged(found: dict[str, Any]) -> RenderableType:
    """Win rates, and what limits them."""
    names = "win rate", "decided", "without a verdict", "first answer wins", "answers cut off"
    table = _table("judged", "reference", *names, left=2)
    for model, of in found.items():
        table.add_row(
            escape(model),
            escape(of["reference"]),
            _estimate(of["win_rate"]),
            f"{of['decided']} of {of['instructions']}",
            f"{of['missing']} of {2 * of['instructions']}",
            _estimate(of["first_wins"]),
            str(of["cut_off"]),
        )
    return table


_MEASURES = (
    ("nll", "NLL"),
    ("accuracy", "accuracy"),
    ("ece_debiased", "ECE, debiased"),
    ("ece", "ECE"),
    ("reliability", "squared calibration error"),
    ("auroc", "AUROC"),
    ("jsd", "JSD"),
    ("entropy_spearman", "entropy rho"),
)


def _estimate(of: dict[str, float] | None, sign: str = "") -> str:
    if of is None:
        return "-"
    value, low, high = (f"{of[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [dim]({low} to {high})[/dim]"


def plan(found: "Plan | Start") -> RenderableType:
    """The size of a run, and the first samples of its data; or that it is finished."""
    from ual.train.resume import Start

    if isinstance(found, Start):
        return _said(found)
    look = found.preview
    pairs = _pairs(numbers=False)
    pairs.add_row("loss", found.loss)
    if found.smoothing_over != "all":
        where = ", at the decision token" if found.smoothing_over == "options" else ""
        pairs.add_row("smoothing.over", found.smoothing_over + where)
    for name, value in (
        ("samples", f"{look.count:,} read, {look.trained:,} to train, {look.held_out:,} held out"),
        ("tokens", f"{look.tokens:,}, of which {look.loss_tokens:,} are loss tokens"),
        ("parameters", f"{found.parameters:,}, of which {found.trained_parameters:,} are trained"),
        ("processes", f"{found.processes}" + (f", ZeRO-{found.zero_stage}" if found.zero_stage else "")),
        ("steps", f"{found.steps:,}, of {found.samples_per_step} samples each"),
        ("start", _said(found.start)),
        (
            "checkpoint",
            f"about {found.checkpoint_bytes / 1e6:,.1f} MB; {found.free_bytes / 1e9:,.1f} GB are free",
        ),
    ):
        pairs.add_row(name, value)
    batch = _table("sample", "tokens", "loss tokens", "smoothing", "weight")
    for s in look.shown:
        smoothing = "unknown yet" if s.smoothing is None else f"{s.smoothing:.3f}"
        batch.add_row(escape(s.sample.id), str(s.tokens), str(s.loss_tokens), smoothing, f"{s.weight:g}")
    notes = [escape(f"warning: {note}") for note in look.notes]
    return Group(pairs, batch, *notes, "no weights were loaded, nothing was trained or written")


def _said(start: "Start") -> Text:
    return Text("\n".join((start.sentence, *start.notes)))


def preview(found: "Preview") -> RenderableType:
    """How many samples and tokens were read, dropped, cut and trained."""
    table = _pairs(numbers=True)
    table.add_row("samples read", f"{found.count:,}")
    for why, number in found.dropped.items():
        table.add_row(f"  not trained: {escape(why)}", f"{number:,}")
    table.add_row("samples trained", f"{found.trained:,}")
    if found.truncated:
        table.add_row(f"  cut at {found.max_length} tokens", f"{found.truncated:,}")
    if len(found.sources) > 1:
        for source, number in list(found.sources.items())[:8]:
            table.add_row(f"  from {escape(source or '(unnamed)')}", f"{number:,}")
    if found.packed:
        table.add_row(f"packed sequences of at most {found.max_length} tokens", f"{found.sequences:,}")
    share = found.loss_tokens / found.tokens if found.tokens else 0.0
    table.add_row("tokens", f"{found.tokens:,}")
    table.add_row("loss tokens", f"{found.loss_tokens:,}  ({share:.0%})")
    if found.held_out:
        table.add_row("samples held out", f"{found.held_out:,}")
    return table


def preview_sample(shown: "Shown", *, colored: bool) -> tuple[str, Text]:
    """A sample's figures and its text; loss tokens are green, or without color between « and ».

    If the sample has options, their tokens and probabilities at the decision token follow the figures.
    """
    smoothing = "unknown yet" if shown.smoothing is None else f"{shown.smoothing:.3f}"
    cut = ", cut at data.max_length" if shown.truncated else ""
    figures = (
        f"[bold]{escape(shown.sample.id)}[/bold]  smoothing {smoothing}, weight {shown.weight:g}, "
        f"{shown.loss_tokens} of {shown.tokens} are loss tokens{cut}"
        f"[dim]  {escape(shown.sample.source)}  {escape(shown.sample.place)}[/dim]"
    )
    if shown.decision is not None:
        from ual.data.schema import show

        target = ", ".join(
            escape(f"{show(option.text)} {option.probability:.3f} by {option.token!r}")
            for option in shown.decision.options
        )
        unknown = " without smoothing" if shown.smoothing is None else ""
        figures += f"\ndecision at token {shown.decision.position}{unknown}: {target}"
    text = Text()
    for span in shown.spans:
        if colored:
            text.append(span.text, style="bold green" if span.trained else "dim")
        else:
            text.append(f"«{span.text}»" if span.trained else span.text)
    return figures, text


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
    table.add_row("total", _gib(found.naive), _gib(found.fused), style="bold")
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


def study(summary: dict[str, Any]) -> RenderableType:
    """The arms of a weak-to-strong study: accuracy, difference from the first arm, recovered gap."""
    table = _table("arm", "accuracy, %", "95 % interval", "difference", "PGR", "samples")
    for of in summary["supervisors"]:
        table.add_row(f"supervisor {of['name']}", *_interval(of["accuracy"], 100, ".1f"), "", "", "")
    for arm in summary["arms"]:
        samples = arm["samples"]
        table.add_row(
            escape(arm["name"]),
            *_interval(arm["accuracy"], 100, ".1f"),
            " ".join(_interval(arm["difference"], 100, "+.1f")),
            " ".join(_interval(arm["pgr"], 1, ".2f")),
            f"{sum(samples) / len(samples):,.0f}" if samples else "",
        )
    notes = [escape(text) for text in (summary["no_pgr"], *summary["cautions"]) if text]
    return Group(table, *notes)


def _interval(estimate: dict[str, float] | None, scale: float, form: str) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    value, low, high = (f"{estimate[key] * scale:{form}}" for key in ("value", "low", "high"))
    return value, f"{low} to {high}"


def study_plan(found: "StudyPlan") -> RenderableType:
    """The questions, training steps and memory of a weak-to-strong study."""
    pairs = _pairs(numbers=False)
    pairs.add_row("task", escape(found.task))
    pairs.add_row(
        "questions",
        f"{found.supervised:,} supervised, {found.unsupervised:,} unsupervised, {found.test:,} to test",
    )
    for why, number in found.dropped.items():
        pairs.add_row("  dropped", f"{number:,}: {escape(why)}")
    for model in found.models:
        size = escape(model.absent) or (
            f"{model.parameters:,} parameters, of which {model.trained_parameters:,} are trained; "
            f"a step takes {_gib(model.gpu_bytes or 0)} GiB on a GPU"
        )
        pairs.add_row(f"{model.who} model", f"{escape(model.path)}: {size}")
    for of in found.training:
        steps = "steps by its epochs" if of.steps is None else f"{of.steps:,} steps"
        pairs.add_row(f"training, {of.who}", f"{of.runs} runs of {steps}, {of.samples_per_step} samples each")
    if found.paraphrases:
        pairs.add_row("paraphrases", f"{found.paraphrases:,} requests to ask.backend")
    pairs.add_row("supervisors answer", f"{found.answered:,} questions, all wordings and seeds")
    pairs.add_row("evaluation", f"{found.tested:,} questions")
    return Group(pairs, "no weights were loaded, nothing was trained or written")


def elicitation_plan(found: "DryRun") -> RenderableType:
    """The requests that an elicitation would send, with their tokens and cost."""
    table = _table("estimator", "requests", "cached", "prompt tokens", "completion tokens, at most")
    for e in found.estimates:
        figures = (e.requests, e.cached, e.most.prompt_tokens, e.most.completion_tokens)
        table.add_row(escape(e.label), *(f"{figure:,}" for figure in figures))
    how = "counted by the model's tokenizer" if found.counted else "estimated at 4 bytes per token"
    return Group(
        table,
        f"{found.rows:,} samples; prompt tokens {how}; cost at most {found.cost:.4f}. Nothing was sent.",
    )


def clusters(summary: dict[str, Any]) -> RenderableType:
    """The measures of token clusters by model, and the differences of models, with their intervals."""
    from ual.evaluate.clusters import MEASURES

    def filled(columns: dict[str, dict[str, dict[str, float]]], form: str) -> RenderableType:
        table = _table("measure", "tighter", *map(escape, columns), left=2)
        for key, measure in MEASURES.items():
            cells = [_with_interval(found[key], form) for found in columns.values()]
            table.add_row(measure.name, measure.tighter, *cells)
        return table

    count = f"{len(summary['tokens'])} tokens, {summary['occurrences']} occurrences of each"
    parts = [filled({model["name"]: model["measures"] for model in summary["models"]}, ".3f")]
    if pairs := summary["differences"]:
        named = {f"{pair['model']} - {pair['baseline']}": pair["measures"] for pair in pairs}
        parts += ["", filled(named, "+.3f")]
    notes = [escape(note) for note in summary["notes"]]
    return Group(*parts, f"{count}, {summary['documents']} documents; 95 % intervals over documents", *notes)


def _with_interval(estimate: dict[str, float], form: str) -> str:
    if not math.isfinite(estimate["value"]):
        return ""
    value, low, high = (f"{estimate[key]:{form}}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if math.isfinite(estimate["low"]) else value


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

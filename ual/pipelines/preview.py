"""A look before training, without weights: which tokens are trained, with what smoothing, for how many steps.

`ual preview` shows the samples; `ual train --dry-run` shows the plan, and a batch of them.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ual.config.run import RunConfig
from ual.data import TokenizedSample, decision, pack, training_set
from ual.data.render import IGNORE_INDEX
from ual.pipelines import samples
from ual.records import Elicited, Sample, Scored
from ual.runs.folder import File, RunFolder
from ual.runs.progress import Progress
from ual.train import distributed
from ual.train.arguments import checked, training_arguments
from ual.train.deepspeed import stage
from ual.train.resume import Resume, Start, decide

STREAMED = 1000  # samples of a stream that are looked at


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens that are all loss tokens, or all not, and their text."""

    text: str
    tokens: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Option:
    """A text that the response could be, its token at the decision, and its probability as the target."""

    text: str
    token: str
    token_id: int
    probability: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The token at which a sample's options differ: its position among the tokens, from 0."""

    position: int
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample as it is trained; `smoothing` is None if a model has yet to be asked.

    The decision's probabilities are then those without smoothing.
    """

    sample: Sample
    spans: tuple[Span, ...]
    smoothing: float | None
    weight: float
    truncated: bool
    decision: Decision | None = None

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def loss_tokens(self) -> int:
        return sum(span.tokens for span in self.spans if span.trained)


@dataclass(frozen=True, slots=True)
class Preview:
    """The first samples, and counts of all of them.

    `dropped` counts samples that are not trained, by the reason. `sequences` are what a step is made of:
    samples, or under `data.packing` packed sequences.
    """

    shown: tuple[Shown, ...]
    count: int
    trained: int
    tokens: int
    loss_tokens: int
    truncated: int
    dropped: Mapping[str, int]
    sources: Mapping[str, int]
    held_out: int
    sequences: int
    packed: bool
    max_length: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a run."""

    preview: Preview
    loss: str
    smoothing_over: str
    parameters: int
    trained_parameters: int
    processes: int
    zero_stage: int
    samples_per_step: int
    steps: int
    checkpoint_bytes: int
    free_bytes: int
    start: Start


def preview(
    config: RunConfig,
    *,
    count: int = 3,
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
    check: Callable[[samples.Rendered], None] = lambda _: None,
) -> Preview:
    """Read and render all samples (of a stream, the first thousand) as training would.

    Args:
        config: of the run. Smoothing by the base model's own uncertainty is known only if the run folder
            already holds it.
        count: samples to show.
        trust_remote_code, console, cache: as those of `ual.pipelines.train.run`.
        check: called with the rendered samples; it may refuse them.

    Raises:
        UserError: a key of `training` is wrong; a sample is wrong, or cannot be rendered.
    """
    checked(config)
    notes = []
    config = config.on(RunFolder(config.output_dir).date())
    if config.data.train_on == "each":
        notes.append("every assistant turn is a sample of its own (data.train_on: each)")
    if config.data.streaming:
        read = training_set.first(config, STREAMED)
        notes.append(
            f"a stream: the first {len(read.train)} samples are shown, with their ranks among themselves"
        )
    else:
        read = training_set.read(config)
    with Progress(console) as progress:
        rendered = samples.render(
            config,
            read,
            trust_remote_code=trust_remote_code,
            cache=cache,
            advance=progress.task("rendering", len(read.train) + len(read.held_out)),
        )
    check(rendered)
    scored, of_smoothing = _scored(rendered)
    by_id = {s.sample.id: s for s in scored or ()}
    kept = [s for s in rendered.train if scored is None or s.id in by_id]
    trained = [s for s in kept if s.sample_weight > 0]
    lengths = [len(rendered.tokens[s.id].input_ids) for s in kept]
    made_by = rendered.renderer
    dropped = samples.not_trained(rendered, {s.id for s in kept})
    return Preview(
        shown=tuple(_show(s, rendered, by_id.get(s.id)) for s in kept[:count]),
        count=len(trained) + sum(dropped.values()),
        trained=len(trained),
        tokens=sum(lengths),
        loss_tokens=sum(rendered.tokens[s.id].loss_tokens for s in trained),
        truncated=made_by.counts["truncated"],
        dropped=dropped,
        sources=dict(Counter(s.source for s in kept).most_common()),
        held_out=len(rendered.held_out),
        sequences=len(pack(lengths, made_by.max_length)) if config.data.packing else len(kept),
        packed=config.data.packing,
        max_length=made_by.max_length,
        notes=(*read.notes, *notes, *of_smoothing),
    )


def plan(
    config: RunConfig,
    *,
    resume: Resume = False,
    accept_changed_data: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
) -> Plan | Start:
    """Do everything that `ual.pipelines.train.run` does before it loads weights, and write nothing.

    Of a finished run, which loads none, only the decision is returned.

    Args: as those of `run`.

    Raises:
        UserError: as `run`.
    """
    model = samples.check_model(config, trust_remote_code=trust_remote_code)
    folder = RunFolder(config.output_dir)
    config = config.on(folder.date())
    arguments = training_arguments(config, folder.checkpoints)
    samples.check_training(config, arguments, model)
    start = decide(folder, config, arguments, resume=resume, accept_changed_data=accept_changed_data)
    if start.action == "finished":
        return start
    found = preview(
        config,
        count=arguments.per_device_train_batch_size,
        trust_remote_code=trust_remote_code,
        console=console,
        cache=cache,
        check=lambda rendered: samples.check_rendered(rendered, arguments, model),
    )
    if not found.trained:
        samples.check_left(config, [])
    micro = arguments.per_device_train_batch_size * distributed.world_size()
    per_epoch = math.ceil(math.ceil(found.sequences / micro) / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Plan(
        preview=found,
        loss=config.loss.kind,
        smoothing_over=config.smoothing_over,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        processes=distributed.world_size(),
        zero_stage=stage(arguments.hf_deepspeed_config.config if arguments.deepspeed else None),
        samples_per_step=micro * arguments.gradient_accumulation_steps,
        steps=steps,
        checkpoint_bytes=sum(p.numel() * (p.element_size() + 12) for p in trained),
        free_bytes=shutil.disk_usage(_existing(Path(config.output_dir))).free,
        start=start,
    )


def _scored(rendered: samples.Rendered) -> tuple[list[Scored] | None, list[str]]:
    """Return the samples with their smoothing, None if a model must be asked, and what is to say of it."""
    config = rendered.config
    elicited = samples.own_uncertainties(config, rendered.train)
    if elicited is None:
        elicited = _recorded(config, rendered.train)
    if elicited is None:
        return None, [
            "smoothing is set from the base model's uncertainty, which `ual train` asks for: between "
            f"{config.smoothing.min:g} and {config.smoothing.max:g}"
        ]
    found = training_set.score(rendered.train, elicited, config, complete=not config.data.streaming)
    return found.samples, list(found.notes)


def _recorded(config: RunConfig, train: list[Sample]) -> list[Elicited] | None:
    """Return the uncertainties that the run folder holds for all of these samples, if it does."""
    written = [Elicited(**row) for row in RunFolder(config.output_dir).read_rows(File.UNCERTAINTY)]
    return written if {s.id for s in train} <= {e.sample_id for e in written} else None


def _show(sample: Sample, rendered: samples.Rendered, scored: Scored | None) -> Shown:
    tokens = rendered.tokens[sample.id]
    return Shown(
        sample=sample,
        spans=tuple(_spans(tokens, rendered.tokenizer)),
        smoothing=None if scored is None else scored.label_smoothing,
        weight=sample.sample_weight,
        truncated=tokens.truncated,
        decision=None if tokens.decision < 0 else _decision(sample, rendered, scored),
    )


def _decision(sample: Sample, rendered: samples.Rendered, scored: Scored | None) -> Decision:
    tokens, smoothing = rendered.tokens[sample.id], 0.0 if scored is None else scored.label_smoothing
    target = decision.spread(sample.options, smoothing, rendered.config.smoothing_over)
    before = tokens.input_ids[: tokens.decision].tolist()
    start = len(_text(rendered.tokenizer, before))
    return Decision(
        tokens.decision,
        tuple(
            Option(text, _text(rendered.tokenizer, [*before, token])[start:], token, p)
            for (text, p), token in zip(target.items(), tokens.option_ids, strict=True)
        ),
    )


def _spans(tokens: TokenizedSample, tokenizer: Any) -> Iterator[Span]:
    start, shown = 0, 0
    # no token precedes the first one, so it has no loss
    trained = [False, *(bool(label != IGNORE_INDEX) for label in tokens.labels[1:])]
    for i in range(1, len(trained) + 1):
        if i == len(trained) or trained[i] != trained[start]:
            text = _text(tokenizer, tokens.input_ids[:i])
            yield Span(text[shown:], i - start, trained[start])
            start, shown = i, len(text)


def _text(tokenizer: Any, ids: Any) -> str:
    """Return the text of tokens, which some tokenizers strip of a first space: begin with the first token."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _existing(path: Path) -> Path:
    """Return the path, or the nearest existing folder above it."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())

"""What a configuration would train, before anything is: `ual preview`. No weights are loaded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ual.config.run import RunConfig
from ual.data import Renderer, Tokenised, pack, stream, tokenise
from ual.data import training_set as rows
from ual.data.render import IGNORE_INDEX
from ual.models import load_config, load_tokenizer
from ual.records import Elicited, Sample, Scored
from ual.runs.folder import RunFolder

STREAMED = 1000  # rows of a stream that are looked at


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens that are all trained, or all not; `text` is how they read."""

    text: str
    tokens: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is trained; `smoothing` is None where only the base model will know it."""

    sample: Sample
    spans: tuple[Span, ...]
    smoothing: float | None
    weight: float
    truncated: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """The first rows, and what becomes of all of them."""

    rows: tuple[Row, ...]
    count: int
    trained_rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: Mapping[str, int]
    """Rows that are not trained, by the reason."""
    sources: Mapping[str, int]
    held_out: int
    sequences: int | None
    """Packed sequences, where rows are packed."""
    max_length: int
    notes: tuple[str, ...] = field(default=())


def preview(
    config: RunConfig, *, count: int = 3, cache: Path | None = None, trust_remote_code: bool = False
) -> Preview:
    """Read and render all rows (of a stream, the first thousand) as training would.

    Args:
        config: of the run. Smoothing by the base model's own uncertainty is known only where the run folder
            already holds it.
        count: rows to show.
        cache: where tokenised rows are kept.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        UserError: a row is wrong, or cannot be rendered.
    """
    notes = []
    samples, held_out = rows.read(config)
    if config.data.streaming:
        found = stream(config.data.train, format=config.data.format, split=config.data.train_split)
        samples = [sample for _, sample in islice(found, STREAMED)]
        notes.append(f"a stream: these are its first {len(samples)} rows, and ranks are among them")
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    renderer = rows.renderer(
        config, tokenizer, load_config(config.model, trust_remote_code=trust_remote_code)
    )
    tokenised = tokenise(samples, renderer, None if cache is None else cache / "tokenised")
    left = [s for s in samples if s.id in tokenised]
    elicited, unknown = _elicited(config, left)
    scored = {} if unknown else {s.sample.id: s for s in rows.score_rows(left, elicited, config)}
    if unknown:
        notes.append(
            f"smoothing comes from the base model's uncertainty, which `ual train` asks for: between "
            f"{config.smoothing.min:g} and {config.smoothing.max:g}"
        )
    dropped: Counter[str] = Counter()
    for sample in samples:
        if sample.id not in tokenised:
            dropped[_why(config, renderer)] += 1
        elif not unknown and sample.id not in scored:
            dropped["no uncertainty (uncertainty.missing: drop)"] += 1
        elif sample.sample_weight == 0:
            dropped["sample_weight 0: read, never trained"] += 1
    kept = [s for s in left if unknown or s.id in scored]
    lengths = [len(tokenised[s.id].input_ids) for s in kept]
    trained = [s for s in kept if s.sample_weight > 0]
    return Preview(
        rows=tuple(_row(s, tokenised[s.id], scored.get(s.id), tokenizer, renderer) for s in kept[:count]),
        count=len(samples),
        trained_rows=len(trained),
        tokens=sum(lengths),
        trained_tokens=sum(tokenised[s.id].live_tokens for s in trained),
        truncated=renderer.counts["truncated"],
        dropped=dict(dropped),
        sources=dict(Counter(s.source for s in kept).most_common()),
        held_out=len(held_out),
        sequences=len(pack(lengths, renderer.max_length)) if config.data.packing else None,
        max_length=renderer.max_length,
        notes=tuple(notes),
    )


def _elicited(config: RunConfig, samples: Sequence[Sample]) -> tuple[dict[str, Elicited], bool]:
    """What is known of uncertainties without asking a model, and whether that is too little to smooth by."""
    if not config.loss.about.needs_uncertainty or all(s.label_smoothing is not None for s in samples):
        return {}, False
    if config.uncertainty.estimator == "column":
        return {s.id: Elicited(s.id, "column", s.uncertainty) for s in samples}, False
    written = [Elicited(**row) for row in RunFolder(config.output_dir).read_rows("uncertainty.jsonl")]
    known = {e.sample_id: e for e in written}
    return known, not all(s.id in known for s in samples)


def _why(config: RunConfig, renderer: Renderer) -> str:
    if config.data.overlong == "drop":
        return f"longer than {renderer.max_length} tokens (data.overlong: drop)"
    return f"no trained token among the first {renderer.max_length} (data.overlong: truncate)"


def _row(sample: Sample, row: Tokenised, scored: Scored | None, tokenizer: Any, renderer: Renderer) -> Row:
    return Row(
        sample=sample,
        spans=tuple(_spans(row, tokenizer)),
        smoothing=None if scored is None else scored.label_smoothing,
        weight=sample.sample_weight,
        truncated=len(row.input_ids) == renderer.max_length and row.input_ids[-1] != tokenizer.eos_token_id,
    )


def _spans(row: Tokenised, tokenizer: Any) -> Iterator[Span]:
    start, shown = 0, 0
    # the first token is predicted by nothing, whatever its label
    trained = [False, *(label != IGNORE_INDEX for label in row.labels[1:])]
    for i in range(1, len(trained) + 1):
        if i == len(trained) or trained[i] != trained[start]:
            # from the beginning, for some tokenizers strip what stands there
            text = tokenizer.decode(row.input_ids[:i], clean_up_tokenization_spaces=False)
            yield Span(text[shown:], i - start, trained[start])
            start, shown = i, len(text)

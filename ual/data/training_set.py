"""The rows of a run: each with its smoothing, weight and groups; packed, or streamed."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.config.run import RunConfig
from ual.data import Groups, Renderer, Stream, TokenizedSample, hold_out, load, pack, stream
from ual.data.groups import assign
from ual.data.streaming import survey
from ual.errors import UserError
from ual.methods import smoothing
from ual.records import Elicited, Sample, Scored

log = logging.getLogger(__name__)

_SHOWN = 10_000  # rows of a stream that are described one by one


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What is trained.

    `shown` are all rows, or the first of a stream, and `loss_tokens` their trained tokens by id; `count`,
    `tokens` (of an epoch) and `mean_smoothing` speak of all, `tokens` being None where rows are tokenized as
    they are read.
    """

    dataset: list[dict[str, Any]] | Stream
    groups: Groups
    shown: list[Scored]
    loss_tokens: Mapping[str, int]
    count: int
    tokens: int | None
    mean_smoothing: float


def read(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    """Load the training rows (none of a stream) and the held-out rows.

    Raises:
        UserError: a row is wrong, or the same ids are on both sides.
    """
    data = config.data
    train = [] if data.streaming else load(data.train, format=data.format, split=data.train_split)
    if data.eval is not None:
        held_out = load(data.eval, format=data.format, split=data.eval_split)
    else:
        train, held_out = hold_out(train, data.eval_fraction) if data.eval_fraction else (train, [])
    shared = {s.id for s in train} & {s.id for s in held_out}
    if shared:
        raise UserError(
            f"{len(shared)} ids are in both the training and the held-out rows, such as {min(shared)!r}",
            place=f"{data.train} and {data.eval}",
            remedy="remove them from one of the files",
        )
    return train, held_out


def check_weights(samples: Sequence[Sample], config: RunConfig) -> None:
    """Refuse rows whose weights and `loss.kind` exclude each other; a stream is checked as it comes.

    Raises:
        UserError: "weighted" without weights, or weights beside a loss that makes its own.
    """
    kind = config.loss.kind
    weighted = next((s for s in samples if s.sample_weight != 1), None)
    if config.loss.about.weights == "required" and weighted is None and samples:
        raise UserError(
            f'loss {kind} wants weights in the rows, and none has a "sample_weight" other than 1',
            place=config.data.train,
            remedy="set loss: sft, or bring weights (`ual reliability --method reweight` makes them)",
        )
    if config.loss.about.makes_weights and weighted is not None:
        raise UserError(
            f'loss {kind} makes weights itself, and this row has "sample_weight" {weighted.sample_weight:g}',
            place=weighted.place,
            remedy="remove the weights, or set loss: weighted",
        )


def renderer(config: RunConfig, tokenizer: Any, model_config: Any) -> Renderer:
    """Return the renderer that a run of this configuration uses."""
    data = config.data
    return Renderer(
        tokenizer,
        chat_template=data.chat_template,
        max_length=data.max_length,
        context_length=getattr(model_config.get_text_config(), "max_position_embeddings", None),
        overlong=data.overlong,
        system_prompt=data.system_prompt,
        train_on=data.train_on,
    )


def features(row: TokenizedSample, **values: Any) -> dict[str, Any]:
    """A row as collators want it: without smoothing and of weight 1 unless `values` say otherwise."""
    plain = {"label_smoothing": 0.0, "sample_weight": 1.0}
    return {"id": row.id, "input_ids": row.input_ids, "labels": row.labels, **plain, **values}


def in_memory(
    config: RunConfig, scored: Sequence[Scored], tokens: Mapping[str, TokenizedSample], pack_length: int
) -> TrainingSet:
    """Return the features of all samples, packed to at most `pack_length` tokens under `data.packing`."""
    groups = assign(
        [s.sample.source for s in scored],
        [_or_nan(s.sample.uncertainty if s.uncertainty is None else s.uncertainty) for s in scored],
    )
    rows = [
        features(
            tokens[s.sample.id],
            label_smoothing=s.label_smoothing,
            sample_weight=s.sample_weight,
            groups=of_row,
        )
        for s, of_row in zip(scored, groups.of_samples.tolist(), strict=True)
    ]
    if config.data.packing:
        packs = pack([len(row["input_ids"]) for row in rows], pack_length)
        rows = [{"rows": [rows[i] for i in indices]} for indices in packs]
    loss_tokens = {s.sample.id: tokens[s.sample.id].loss_tokens for s in scored}
    return TrainingSet(
        dataset=rows,
        groups=groups,
        shown=list(scored),
        loss_tokens=loss_tokens,
        count=len(scored),
        tokens=sum(loss_tokens.values()),
        mean_smoothing=float(np.mean([s.label_smoothing for s in scored])),
    )


def streamed(
    config: RunConfig, renderer: Renderer, advance: Callable[[int], None] = lambda _: None
) -> TrainingSet:
    """Read all rows once, to check and to score them, and again as they are trained.

    Raises:
        UserError: a row is wrong, or none of the first ten thousand is left to train.
    """
    data = config.data

    def samples() -> Iterator[Sample]:
        return (sample for _, sample in stream(data.train, format=data.format, split=data.train_split))

    found = survey(samples(), advance)
    keep, scaled, smoothings = _smoothings(found.label_smoothing, found.uncertainty, config)
    groups = assign(found.sources, found.uncertainty)
    shown, loss_tokens = [], {}
    for i, sample in enumerate(islice(samples(), _SHOWN)):
        if keep[i] and (row := renderer.render(sample)) is not None:
            u = _or_none(scaled[i])
            shown.append(Scored(sample, sample.uncertainty, u, float(smoothings[i]), sample.sample_weight))
            loss_tokens[sample.id] = row.loss_tokens
    if not shown:
        raise UserError(
            f"none of the first {min(_SHOWN, len(keep))} rows is left to train",
            place=data.train,
            remedy="`ual preview` shows what is dropped and why",
        )
    return TrainingSet(
        dataset=Stream(
            samples,
            renderer,
            np.where(keep, smoothings, np.nan),
            groups,
            buffer=data.shuffle_buffer,
            seed=config.training.get("seed", 42),
            pack_length=renderer.max_length if data.packing else None,
        ),
        groups=groups,
        shown=shown,
        loss_tokens=loss_tokens,
        count=int(keep.sum()),
        tokens=None,
        mean_smoothing=float(smoothings[keep].mean()),
    )


def score(samples: Sequence[Sample], elicited: Iterable[Elicited], config: RunConfig) -> list[Scored]:
    """Turn uncertainties into each sample's smoothing and weight.

    Args:
        samples: training samples. If the loss smooths by uncertainty, a sample's own `label_smoothing`
            takes precedence.
        elicited: the samples' uncertainties, in any order; other losses need none.
        config: `loss.kind`, `uncertainty.missing` and `smoothing` decide.
    """
    own = np.array([_or_nan(s.label_smoothing) for s in samples])
    by_id = {e.sample_id: e.value for e in elicited}
    values = np.array([_or_nan(by_id.get(s.id)) for s in samples])
    keep, scaled, derived = _smoothings(own, values, config)
    return [
        Scored(
            sample=sample,
            uncertainty=_or_none(values[i]),
            scaled_uncertainty=_or_none(scaled[i]),
            label_smoothing=float(derived[i]),
            sample_weight=sample.sample_weight,
        )
        for i, sample in enumerate(samples)
        if keep[i]
    ]


def _smoothings(
    own: NDArray[np.float64], values: NDArray[np.float64], config: RunConfig
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Which rows are kept, their scaled uncertainty and their smoothing, each [n]; NaN where missing."""
    n = len(own)
    keep, scaled, derived = np.ones(n, dtype=np.bool_), np.full(n, np.nan), np.zeros(n)
    if config.loss.about.smoothing == "uniform":
        derived[:] = _uniform(config)
    elif config.loss.about.smoothing == "own" and np.isnan(own).any():
        filled, keep, missing = smoothing.fill_missing(values, config.uncertainty.missing)
        if missing:
            log.warning("%d of %d rows have no uncertainty: %s", missing, n, config.uncertainty.missing)
        scaled[keep], derived[keep] = smoothing.from_config(filled[keep], config.smoothing)
    if config.loss.about.smoothing == "own":
        keep = keep | ~np.isnan(own)
        derived = np.where(np.isnan(own), derived, own)
    return keep, scaled, derived


def _uniform(config: RunConfig) -> float:
    matched = config.smoothing.match_mean
    return (config.smoothing.min + config.smoothing.max) / 2 if matched is None else matched


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

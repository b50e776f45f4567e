"""The samples of a run with their smoothing, weights and groups; in memory, packed, or streamed."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.config.run import RunConfig
from ual.data import Groups, Renderer, Stream, TokenizedSample, hold_out, load, pack, stream
from ual.data.groups import assign
from ual.data.streaming import survey
from ual.data.turns import each_turn
from ual.errors import UserError
from ual.methods import smoothing
from ual.records import Elicited, Sample, Scored

log = logging.getLogger(__name__)

_SHOWN = 10_000  # samples of a stream that are described one by one


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A data set for the trainer, and its description.

    `shown` has all samples, or the first of a stream, and `loss_tokens` their numbers of loss tokens by id.
    `count`, `tokens` (loss tokens of an epoch) and `mean_smoothing` describe all samples. A stream, which is
    tokenized during training, has no `tokens`.
    """

    dataset: list[dict[str, Any]] | Stream
    groups: Groups
    shown: list[Scored]
    loss_tokens: Mapping[str, int]
    count: int
    tokens: int | None
    mean_smoothing: float


def read(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    """Load the training samples (none of a stream) and the held-out samples.

    Raises:
        UserError: a sample is wrong, or the two sets share ids.
    """
    data = config.data
    apart = _each_turn if data.train_on == "each" else iter
    train = [] if data.streaming else load(data.train, format=data.format, split=data.train_split)
    if data.eval is not None:
        held_out = load(data.eval, format=data.format, split=data.eval_split)
    else:
        train, held_out = hold_out(train, data.eval_fraction) if data.eval_fraction else (train, [])
    shared = {s.id for s in train} & {s.id for s in held_out}
    if shared:
        raise UserError(
            f"{len(shared)} ids are in both the training and the held-out samples, such as {min(shared)!r}",
            place=f"{data.train} and {data.eval}",
            remedy="remove them from one of the files",
        )
    return list(apart(train)), list(apart(held_out))


def _each_turn(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Yield a sample for each assistant turn; raise an error if two get the same id."""
    ids: set[str] = set()
    for sample in each_turn(samples):
        if sample.id in ids:
            raise UserError(
                f'two samples have the id {sample.id!r}, since data.train_on is "each"',
                place=sample.place,
                remedy="rename one of the samples",
            )
        ids.add(sample.id)
        yield sample


def streamed_samples(config: RunConfig) -> Iterator[Sample]:
    """Yield the training samples of a stream.

    Raises:
        UserError: a sample is wrong.
    """
    data = config.data
    found = (sample for _, sample in stream(data.train, format=data.format, split=data.train_split))
    return each_turn(found) if data.train_on == "each" else found


def check_weights(samples: Sequence[Sample], config: RunConfig) -> None:
    """Refuse samples whose weights do not suit `loss.kind`. A stream is checked during training.

    Raises:
        UserError: the loss needs weights and there are none, or it computes its own and there are some.
    """
    kind = config.loss.kind
    weighted = next((s for s in samples if s.sample_weight != 1), None)
    if config.loss.about.weights == "required" and weighted is None and samples:
        raise UserError(
            f'loss {kind} needs weights, and no sample has a "sample_weight" other than 1',
            place=config.data.train,
            remedy="set loss: sft, or add weights (`ual reliability --method reweight` computes them)",
        )
    if config.loss.about.makes_weights and weighted is not None:
        raise UserError(
            f'loss {kind} computes weights, but this sample has "sample_weight" {weighted.sample_weight:g}',
            place=weighted.place,
            remedy="remove the weights, or set loss: weighted",
        )


def renderer(
    config: RunConfig, tokenizer: Any, model_config: Any, stop_ids: Collection[int] = ()
) -> Renderer:
    """Return the renderer that a run of this configuration uses. The model stops at `stop_ids`."""
    data = config.data
    return Renderer(
        tokenizer,
        chat_template=data.chat_template,
        chat_template_kwargs=data.chat_template_kwargs,
        date=data.date,
        stop_ids=stop_ids,
        max_length=data.max_length,
        context_length=getattr(model_config.get_text_config(), "max_position_embeddings", None),
        overlong=data.overlong,
        system_prompt=data.system_prompt,
        train_on="last" if data.train_on == "each" else data.train_on,
    )


def features(sample: TokenizedSample, **values: Any) -> dict[str, Any]:
    """Return a sample as collators take it: without smoothing and of weight 1, unless `values` override."""
    plain = {"label_smoothing": 0.0, "sample_weight": 1.0}
    return {"id": sample.id, "input_ids": sample.input_ids, "labels": sample.labels, **plain, **values}


def in_memory(
    config: RunConfig, scored: Sequence[Scored], tokens: Mapping[str, TokenizedSample], pack_length: int
) -> TrainingSet:
    """Return the features of all samples, packed to at most `pack_length` tokens under `data.packing`."""
    groups = assign(
        [s.sample.source for s in scored],
        [_or_nan(s.sample.uncertainty if s.uncertainty is None else s.uncertainty) for s in scored],
    )
    dataset = [
        features(
            tokens[s.sample.id],
            label_smoothing=s.label_smoothing,
            sample_weight=s.sample_weight,
            groups=of_sample,
        )
        for s, of_sample in zip(scored, groups.of_samples.tolist(), strict=True)
    ]
    if config.data.packing:
        packs = pack([len(sample["input_ids"]) for sample in dataset], pack_length)
        dataset = [{"rows": [dataset[i] for i in indices]} for indices in packs]
    loss_tokens = {s.sample.id: tokens[s.sample.id].loss_tokens for s in scored}
    return TrainingSet(
        dataset=dataset,
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
    """Read all samples once, to check and score them; they are read again during training.

    Raises:
        UserError: a sample is wrong, or all of the first ten thousand are dropped.
    """
    data = config.data
    samples = partial(streamed_samples, config)
    found = survey(samples(), advance)
    keep, scaled, smoothings = _smoothings(found.label_smoothing, found.uncertainty, config)
    groups = assign(found.sources, found.uncertainty)
    shown, loss_tokens = [], {}
    for i, sample in enumerate(islice(samples(), _SHOWN)):
        if keep[i] and (tokenized := renderer.render(sample)) is not None:
            u = _or_none(scaled[i])
            shown.append(Scored(sample, sample.uncertainty, u, float(smoothings[i]), sample.sample_weight))
            loss_tokens[sample.id] = tokenized.loss_tokens
    if not shown:
        raise UserError(
            f"all of the first {min(_SHOWN, len(keep))} samples are dropped",
            place=data.train,
            remedy="`ual preview` prints the reasons",
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
    """Return the mask of samples to train, scaled uncertainty and smoothing, each [n]; NaN if missing."""
    n = len(own)
    keep, scaled, derived = np.ones(n, dtype=np.bool_), np.full(n, np.nan), np.zeros(n)
    if config.loss.about.smoothing == "uniform":
        derived[:] = _uniform(config)
    elif config.loss.about.smoothing == "own" and np.isnan(own).any():
        filled, keep, missing = smoothing.fill_missing(values, config.uncertainty.missing)
        if missing:
            log.warning("%d of %d samples have no uncertainty: %s", missing, n, config.uncertainty.missing)
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

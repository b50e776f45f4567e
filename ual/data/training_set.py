"""The samples of a run with their smoothing, weights and groups; in memory, packed, or streamed."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ual.config.run import DataConfig, RunConfig, named
from ual.data import Groups, Renderer, Stream, TokenizedSample, hold_out, load, pack, stream
from ual.data.groups import assign
from ual.data.overlap import Overlap
from ual.data.streaming import survey
from ual.data.turns import each_turn
from ual.errors import UserError
from ual.methods import smoothing
from ual.records import Elicited, Sample, Scored

log = logging.getLogger(__name__)

_SHOWN = 10_000  # samples of a stream that are described one by one
_MANY_MISSING = 0.1  # of the uncertainties; more are a warning


@dataclass(frozen=True, slots=True)
class Read:
    """The samples that were read (no training samples of a stream), and sentences about what is unusual.

    `dropped` counts wrong samples, of training and held out, by the reason.
    """

    train: list[Sample]
    held_out: list[Sample]
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


class Scores(NamedTuple):
    """The samples to train, the number of missing uncertainties, and sentences about what is unusual."""

    samples: list[Scored]
    missing: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A data set for the trainer, and its description.

    `shown` has all samples, or the first of a stream, and `loss_tokens` their numbers of loss tokens by id.
    `count`, `tokens` (loss tokens of an epoch), `smoothing`, `own_smoothing` (samples with a
    `label_smoothing`) and `notes` (sentences about what is unusual) describe all samples. `dropped` counts
    the wrong samples of a stream, by the reason. A stream, which is tokenized during training, has no
    `tokens`.
    """

    dataset: list[dict[str, Any]] | Stream
    groups: Groups
    shown: list[Scored]
    loss_tokens: Mapping[str, int]
    count: int
    tokens: int | None
    smoothing: NDArray[np.float64]  # [count]
    own_smoothing: int
    notes: tuple[str, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def mean_smoothing(self) -> float:
        return float(self.smoothing.mean())


def read(config: RunConfig) -> Read:
    """Load the training samples (none of a stream) and the held-out samples.

    Raises:
        UserError: a sample is wrong, or a held-out conversation is also a training sample.
    """
    data = config.data
    apart = _each_turn if data.train_on == "each" else iter
    dropped = Counter[str]()
    train = [] if data.streaming else load(data.train, split=data.train_split, **_decided(config, dropped))
    if data.eval is not None:
        of_held_out = Counter[str]()
        held_out = load(data.eval, split=data.eval_split, **_how(data, of_held_out))
        dropped.update({f"held out, {reason}": count for reason, count in of_held_out.items()})
    else:
        train, held_out = hold_out(train, data.eval_fraction) if data.eval_fraction else (train, [])
    held_out = [replace(sample, options={}) for sample in held_out]  # measured by their responses
    overlap = Overlap(held_out if data.eval is not None else [])
    for sample in train:
        overlap.add(sample)
    return Read(list(apart(train)), list(apart(held_out)), tuple(overlap.check(data)), _named(dropped))


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


def streamed_samples(config: RunConfig, dropped: Counter[str] | None = None) -> Iterator[Sample]:
    """Yield the training samples of a stream; `dropped` counts wrong ones.

    Raises:
        UserError: a sample is wrong.
    """
    data, dropped = config.data, Counter() if dropped is None else dropped
    how = _decided(config, dropped)
    found = (sample for _, sample in stream(data.train, split=data.train_split, **how))
    return each_turn(found) if data.train_on == "each" else found


def first(config: RunConfig, count: int) -> Read:
    """Return the first samples of a stream, and the held-out samples.

    Raises:
        UserError: as `read`.
    """
    known, dropped = read(config), Counter[str]()
    overlap = Overlap(known.held_out)
    train = [overlap.add(sample) for sample in islice(streamed_samples(config, dropped), count)]
    notes = tuple(overlap.check(config.data))
    return replace(known, train=train, notes=notes, dropped={**known.dropped, **_named(dropped)})


def _how(data: DataConfig, dropped: Counter[str]) -> dict[str, Any]:
    return {"format": data.format, "columns": data.columns, "invalid": data.invalid, "dropped": dropped}


def _decided(config: RunConfig, dropped: Counter[str]) -> dict[str, Any]:
    """Return how training samples are read; held-out samples need no options."""
    return _how(config.data, dropped) | {"decided_by": config.decided_by}


def _named(dropped: Counter[str]) -> dict[str, int]:
    return {f"{reason} (data.invalid: drop)": count for reason, count in dropped.most_common()}


def weighed(samples: Iterable[Sample], config: RunConfig) -> Iterator[Sample]:
    """Yield the samples, and refuse weights that do not suit `loss.kind`.

    Raises:
        UserError: every weight is 0, the loss needs weights that differ and they are equal, or it computes
            weights and there are some.
    """
    lowest, highest, count = np.inf, 0.0, 0
    for sample in samples:
        weight = sample.sample_weight
        if config.loss.about.makes_weights and weight != 1:
            raise UserError(
                f'loss {config.loss.kind} computes weights, but this sample has "sample_weight" {weight:g}',
                place=sample.place,
                remedy="remove the weights, or set loss: weighted",
            )
        lowest, highest, count = min(lowest, weight), max(highest, weight), count + 1
        yield sample
    if count and not highest:
        raise UserError(
            f'all {count} samples have "sample_weight" 0, so nothing would be trained',
            place=named(config.data.train),
            remedy='remove "sample_weight", or give the samples to train a weight above 0',
        )
    if config.loss.about.weights == "required" and lowest == highest and (count > 1 or highest == 1):
        raise UserError(
            f'loss {config.loss.kind} needs weights that differ, and every "sample_weight" is {highest:g}',
            place=named(config.data.train),
            remedy="set loss: sft, or add weights (`ual reliability --method reweight` computes them)",
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
        undecided=data.invalid,
    )


def features(sample: TokenizedSample, **values: Any) -> dict[str, Any]:
    """Return a sample as collators take it: without smoothing and of weight 1, unless `values` override."""
    plain = {"label_smoothing": 0.0, "sample_weight": 1.0}
    return {"id": sample.id, "input_ids": sample.input_ids, "labels": sample.labels, **plain, **values}


def in_memory(
    config: RunConfig, scores: Scores, tokens: Mapping[str, TokenizedSample], pack_length: int
) -> TrainingSet:
    """Return the features of all samples, packed to at most `pack_length` tokens under `data.packing`."""
    scored = scores.samples
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
            **tokens[s.sample.id].deciding(s.sample.options),
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
        shown=scored,
        loss_tokens=loss_tokens,
        count=len(scored),
        tokens=sum(loss_tokens.values()),
        smoothing=np.array([s.label_smoothing for s in scored]),
        own_smoothing=sum(s.sample.label_smoothing is not None for s in scored),
        notes=scores.notes,
    )


def streamed(
    config: RunConfig,
    renderer: Renderer,
    held_out: Sequence[Sample] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> TrainingSet:
    """Read all samples once, to check and score them; they are read again during training.

    Raises:
        UserError: a sample is wrong, a held-out conversation is among the samples, or all of the first ten
            thousand are dropped.
    """
    data = config.data
    samples = partial(streamed_samples, config)
    overlap, dropped = Overlap(held_out), Counter[str]()
    found = survey(map(overlap.add, weighed(samples(dropped), config)), advance)
    shared = overlap.check(data)
    keep, scaled, smoothings, missing = _smoothings(found.label_smoothing, found.uncertainty, config)
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
            place=named(data.train),
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
        smoothing=smoothings[keep],
        own_smoothing=int((~np.isnan(found.label_smoothing)).sum()),
        notes=(*shared, *_notes(missing, len(keep), smoothings[keep], config)),
        dropped=_named(dropped),
    )


def score(
    samples: Sequence[Sample], elicited: Iterable[Elicited], config: RunConfig, *, complete: bool = True
) -> Scores:
    """Turn uncertainties into each sample's smoothing and weight.

    Args:
        samples: training samples. If the loss smooths by uncertainty, a sample's own `label_smoothing`
            takes precedence.
        elicited: the samples' uncertainties, in any order; other losses need none.
        config: `loss.kind`, `uncertainty.missing` and `smoothing` decide.
        complete: False if there are more samples than these, so that equal uncertainties are no error.

    Raises:
        UserError: all uncertainties are equal, or one is missing and `uncertainty.missing` is "refuse".
    """
    own = np.array([_or_nan(s.label_smoothing) for s in samples])
    by_id = {e.sample_id: e.value for e in elicited}
    values = np.array([_or_nan(by_id.get(s.id)) for s in samples])
    keep, scaled, derived, missing = _smoothings(own, values, config, complete=complete)
    scored = [
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
    return Scores(scored, missing, tuple(_notes(missing, len(samples), derived[keep], config)))


class _Smoothings(NamedTuple):
    """The mask of samples to train, scaled uncertainty and smoothing, each [n]; NaN if missing."""

    keep: NDArray[np.bool_]
    scaled: NDArray[np.float64]
    derived: NDArray[np.float64]
    missing: int = 0


def _smoothings(
    own: NDArray[np.float64], values: NDArray[np.float64], config: RunConfig, *, complete: bool = True
) -> _Smoothings:
    n = len(own)
    keep, scaled, derived = np.ones(n, dtype=np.bool_), np.full(n, np.nan), np.zeros(n)
    if config.loss.about.smoothing != "own":
        derived[:] = _uniform(config) if config.loss.about.smoothing == "uniform" else 0.0
        return _Smoothings(keep, scaled, derived)
    values = _assigned(values, config)
    asked = np.isnan(own)  # whose smoothing depends on the uncertainty
    ranked = asked | ~np.isnan(values)
    missing = 0
    if asked.any():
        filled = values.copy()
        filled[ranked], keep[ranked], missing = smoothing.fill_missing(
            values[ranked], config.uncertainty.missing
        )
        if missing:
            log.warning("%d of %d samples have no uncertainty: %s", missing, n, config.uncertainty.missing)
        if complete:
            _check_varied(filled[asked & keep], missing, config)
        ranked &= keep
        scaled[ranked], derived[ranked] = smoothing.from_config(filled[ranked], config.smoothing)
    return _Smoothings(keep, scaled, np.where(asked, derived, own), missing)


def _assigned(values: NDArray[np.float64], config: RunConfig) -> NDArray[np.float64]:
    """Return the uncertainties [n] that decide smoothing; what is missing stays missing."""
    how, seed = config.uncertainty.assignment, config.training.get("seed", 42)
    if how == "own":
        return values
    known = ~np.isnan(values)
    assigned = values.copy()
    drawn = (
        smoothing.shuffled(values[known], seed) if how == "shuffled" else smoothing.random(known.sum(), seed)
    )
    assigned[known] = drawn
    return assigned


def _check_varied(values: NDArray[np.float64], missing: int, config: RunConfig) -> None:
    chosen = config.smoothing
    if chosen.map == "constant" or chosen.min == chosen.max or not smoothing.is_constant(values):
        return
    filled = f" ({missing} of them missing)" if missing and config.uncertainty.missing == "median" else ""
    raise UserError(
        f"all {len(values)} uncertainties{filled} are {values[0]:g}, so there is nothing to rank, and every "
        "sample would have the same smoothing",
        place=named(config.data.train),
        remedy="set loss: uniform, which is one smoothing for all samples, or give the samples uncertainties "
        "that differ",
    )


def _notes(missing: int, count: int, derived: NDArray[np.float64], config: RunConfig) -> Iterator[str]:
    """Yield what a reader of the run should know of its uncertainties and smoothing."""
    if missing > _MANY_MISSING * count:
        policy = config.uncertainty.missing
        done = "each has the median of the others" if policy == "median" else "they are not trained"
        yield f"{missing} of {count} samples have no uncertainty: {done} (uncertainty.missing: {policy})."
    if config.loss.about.smoothing == "own" and smoothing.is_constant(derived):
        yield (
            f"Every sample has the same label smoothing, {derived[0]:g}: it does not depend on uncertainty."
        )


def _uniform(config: RunConfig) -> float:
    matched = config.smoothing.match_mean
    return (config.smoothing.min + config.smoothing.max) / 2 if matched is None else matched


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

"""Tokenized samples to a batch of tensors: one sample per sequence, or several with their boundaries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from ual.data.render import IGNORE_INDEX
from ual.errors import UserError

_NUMBERS = ("label_smoothing", "sample_weight")
Average = Literal["weights", "tokens", "samples"]
SmoothingOver = Literal["all", "others", "options"]


@dataclass(frozen=True)
class Collator:
    """Pad on the right and stack; called with a list of features, as `torch.utils.data.DataLoader` does.

    Args:
        pad_token_id: fills `input_ids`. Padding is neither attended to nor trained, so the EOS token will do.
        pad_to_multiple_of: T is rounded up to a multiple of this number, for tensor cores.
        average: ``samples`` divides each sample's weight by its number of loss tokens, so that samples of any
            length count equally. Loss tokens are those of ``labels[1:]`` that are not -100. Other values keep
            the weights.
        smoothing_over: ``others`` or ``options`` add `smoothing_over` to the batch, so that a fused model
            spreads smoothing over all classes but the target, or over a sample's options.

    Calling it takes features with `input_ids` and `labels` (lists of int of one length), `label_smoothing`
    and `sample_weight` (floats; further keys are left out) and returns `input_ids`, `attention_mask` and
    `labels` [B, T] int64, `label_smoothing` and `sample_weight` [B] float32, and `max_loss_tokens`, the
    number of labels that are not ignored, counted on the host to avoid a device synchronization. If the
    features have `groups` (a list of K ints each), `groups` is [B, K] int64.

    A feature may have a decision (`TokenizedSample.deciding`): its position, and the tokens and probabilities
    of its options there. If some have one, or smoothing is spread over options, `option_ids` is [B, T, K]
    int64 and `option_probabilities` [B, T, K] float32. K is the largest number of options in the batch.
    `option_ids` is -100 beyond a token's options.

    Raises:
        UserError: a feature has lost its `label_smoothing` or `sample_weight`.

    >>> sample = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    >>> sample |= {"label_smoothing": 0.1, "sample_weight": 1.0}
    >>> batch = Collator(0, pad_to_multiple_of=4, average="samples")([sample])
    >>> batch["labels"].tolist(), batch["sample_weight"].tolist()
    ([[-100, 6, 7, -100]], [0.5])
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8
    average: Average = "weights"
    smoothing_over: SmoothingOver = "all"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        _check(features)
        longest = max(len(feature["input_ids"]) for feature in features)
        shape = (len(features), _round_up(longest, self.pad_to_multiple_of))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, feature in enumerate(features):
            n = len(feature["input_ids"])
            input_ids[i, :n] = torch.tensor(feature["input_ids"])
            labels[i, :n] = torch.tensor(feature["labels"])
            attention_mask[i, :n] = 1
        loss_tokens = (labels[:, 1:] != IGNORE_INDEX).sum(1)
        smoothing, weight = _numbers(features)
        if self.average == "samples":
            weight = weight / loss_tokens.clamp(min=1)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "label_smoothing": smoothing,
            "sample_weight": weight,
            "max_loss_tokens": int(loss_tokens.sum()),
        }
        if "groups" in features[0]:
            batch["groups"] = torch.tensor([feature["groups"] for feature in features])
        placed = [(i, 0, feature) for i, feature in enumerate(features)]
        return batch | _over(self.smoothing_over, placed, shape)


@dataclass(frozen=True)
class PackedCollator:
    """Put several samples into one sequence, without attention between them.

    It is called with a list of ``{"rows": features}``. Single features, as for evaluation, are collated as by
    `Collator`.

    `position_ids` begin at 0 with every sample. transformers builds block-diagonal attention from them, but
    only if no attention mask is given, so the batch has none (`ual.models.check_isolation` tests the model).
    No sample's first token is predicted from the sample before it.

    Args:
        pad_token_id, pad_to_multiple_of, average, smoothing_over: as in `Collator`. A sequence's padding is
            a sample of its own, without labels.
        padding_free: one sequence [1, T] of all samples, unpadded, for flash attention's variable-length
            kernels, which need a batch of one.

    Returns `input_ids`, `position_ids`, `labels` [B, T] int64, `label_smoothing` and `sample_weight` [B, T]
    float32 (every token has its sample's), `max_loss_tokens`, `groups` [B, T, K] if the features have them,
    and the options of decisions as `Collator` does.

    Raises:
        UserError: as `Collator`.

    >>> sample = {"input_ids": [5, 6], "labels": [5, 6], "label_smoothing": 0.1, "sample_weight": 1.0}
    >>> batch = PackedCollator(0)([{"rows": [sample, sample, sample]}])
    >>> batch["position_ids"].tolist(), batch["labels"].tolist()
    ([[0, 1, 0, 1, 0, 1, 0, 1]], [[-100, 6, -100, 6, -100, 6, -100, -100]])
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8
    average: Average = "weights"
    smoothing_over: SmoothingOver = "all"
    padding_free: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "rows" not in features[0]:
            alone = Collator(self.pad_token_id, self.pad_to_multiple_of, self.average, self.smoothing_over)
            return alone(features)
        packs = [list(feature["rows"]) for feature in features]
        if self.padding_free:
            packs = [[sample for pack in packs for sample in pack]]
        _check([sample for pack in packs for sample in pack])
        longest = max(sum(len(sample["input_ids"]) for sample in pack) for pack in packs)
        length = longest if self.padding_free else _round_up(longest, self.pad_to_multiple_of)
        sequences = [self._sequence(pack, length) for pack in packs]
        batch: dict[str, Any] = {
            name: torch.stack([sequence[name] for sequence in sequences]) for name in sequences[0]
        }
        batch["max_loss_tokens"] = int((batch["labels"] != IGNORE_INDEX).sum())
        placed = []
        for i, pack in enumerate(packs):
            starts = accumulate((len(sample["input_ids"]) for sample in pack), initial=0)
            placed += [(i, start, sample) for start, sample in zip(starts, pack, strict=False)]
        return batch | _over(self.smoothing_over, placed, (len(packs), length))

    def _sequence(self, samples: Sequence[Mapping[str, Any]], length: int) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        padding = length - sum(lengths)
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        for of_sample in labels:
            of_sample[0] = IGNORE_INDEX
        smoothing, weight = _numbers(samples)
        if self.average == "samples":
            loss_tokens = torch.stack([(of_sample != IGNORE_INDEX).sum() for of_sample in labels])
            weight = weight / loss_tokens.clamp(min=1)
        spread = torch.tensor([*lengths, padding])
        sequence = {
            "input_ids": torch.cat(
                [
                    *(torch.tensor(sample["input_ids"]) for sample in samples),
                    torch.full((padding,), self.pad_token_id),
                ]
            ),
            "position_ids": torch.cat([torch.arange(n) for n in (*lengths, padding)]),
            "labels": torch.cat([*labels, torch.full((padding,), IGNORE_INDEX)]),
            "label_smoothing": torch.cat([smoothing, torch.zeros(1)]).repeat_interleave(spread),
            "sample_weight": torch.cat([weight, torch.zeros(1)]).repeat_interleave(spread),
        }
        if "groups" in samples[0]:
            groups = torch.tensor([sample["groups"] for sample in samples])
            sequence["groups"] = torch.cat([groups, groups[-1:]]).repeat_interleave(spread, dim=0)
        return sequence


def _check(features: Sequence[Mapping[str, Any]]) -> None:
    for name in _NUMBERS:
        if any(name not in feature for feature in features):
            raise UserError(
                f'a sample reached the collator without "{name}"',
                remedy="set remove_unused_columns=False in TrainingArguments, which drops the column",
            )


def _numbers(features: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    smoothing, weight = (
        torch.tensor([float(feature[name]) for feature in features], dtype=torch.float32) for name in _NUMBERS
    )
    return smoothing, weight


def _over(
    smoothing_over: SmoothingOver,
    placed: Sequence[tuple[int, int, Mapping[str, Any]]],
    shape: tuple[int, int],
) -> dict[str, Any]:
    """What tells a fused model the options of decisions, and over which classes smoothing spreads.

    Args:
        smoothing_over: the model's default is all classes.
        placed: for each feature, its sequence in the batch, and the position there of its first token.
        shape: of the labels.
    """
    batch: dict[str, Any] = {} if smoothing_over == "all" else {"smoothing_over": smoothing_over}
    decided = [(i, start + of["decision"], of) for i, start, of in placed if "decision" in of]
    if decided or smoothing_over == "options":
        most = max((len(of["option_ids"]) for *_, of in decided), default=1)
        batch["option_ids"] = torch.full((*shape, most), IGNORE_INDEX, dtype=torch.int64)
        batch["option_probabilities"] = torch.zeros((*shape, most), dtype=torch.float32)
        for i, position, of in decided:
            count = len(of["option_ids"])
            batch["option_ids"][i, position, :count] = torch.tensor(of["option_ids"])
            batch["option_probabilities"][i, position, :count] = torch.tensor(of["option_probabilities"])
    return batch


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple

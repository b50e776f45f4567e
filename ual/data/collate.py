"""Tokenised rows to a batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ual.data.render import IGNORE_INDEX
from ual.errors import UserError

_NUMBERS = ("label_smoothing", "sample_weight")


@dataclass(frozen=True)
class Collator:
    """Pad on the right and stack; called with a list of features, as `torch.utils.data.DataLoader` does.

    Args:
        pad_token_id: fills `input_ids`; where it stands nothing is attended to and nothing trained, so it may
            be the EOS token.
        pad_to_multiple_of: T is rounded up to a multiple of it, for tensor cores.
        average: ``samples`` divides each row's weight by its live tokens, so that every row counts alike
            however long it is. Token t predicts token t + 1, so the live tokens are those of
            ``labels[1:]`` that are not -100. Any other value leaves the weights alone.

    Calling it takes features with `input_ids` and `labels` (lists of int of one length), `label_smoothing`
    and `sample_weight` (floats; further keys are left out) and returns `input_ids`, `attention_mask` and
    `labels` [B, T] int64, `label_smoothing` and `sample_weight` [B] float32, and `live_rows`: how many labels
    are trained, counted here so that no loss has to wait for a device to know it.

    Raises:
        UserError: a feature has lost its `label_smoothing` or `sample_weight`.

    >>> row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "label_smoothing": 0.1, "sample_weight": 1.0}
    >>> batch = Collator(0, pad_to_multiple_of=4, average="samples")([row])
    >>> batch["labels"].tolist(), batch["sample_weight"].tolist()
    ([[-100, 6, 7, -100]], [0.5])
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8
    average: Literal["weights", "tokens", "samples"] = "weights"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for name in _NUMBERS:
            if any(name not in feature for feature in features):
                raise UserError(
                    f'a row reached the collator without "{name}"',
                    remedy="set remove_unused_columns=False in TrainingArguments, which drops the column",
                )
        longest = max(len(feature["input_ids"]) for feature in features)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, feature in enumerate(features):
            n = len(feature["input_ids"])
            input_ids[i, :n] = torch.as_tensor(feature["input_ids"])
            labels[i, :n] = torch.as_tensor(feature["labels"])
            attention_mask[i, :n] = 1
        smoothing, weight = (
            torch.tensor([float(feature[name]) for feature in features], dtype=torch.float32)
            for name in _NUMBERS
        )
        live_tokens = (labels[:, 1:] != IGNORE_INDEX).sum(1)
        if self.average == "samples":
            weight = weight / live_tokens.clamp(min=1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "label_smoothing": smoothing,
            "sample_weight": weight,
            "live_rows": int(live_tokens.sum()),
        }

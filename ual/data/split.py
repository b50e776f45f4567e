"""A held-out share of the samples that depends on their prompts alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ual.data.overlap import contents
from ual.errors import UserError
from ual.records import Sample


def hold_out(samples: Sequence[Sample], eval_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Return training samples and held-out samples, both in their original order.

    Samples with equal prompts form a group, and groups are ordered by a hash of the prompt. The first groups
    are held out, until they have round(eval_fraction * n) samples, and at least one. So the split depends
    neither on the order of samples nor on a seed. No prompt is on both sides, and few samples change sides if
    others are added.

    Args:
        samples: [n].
        eval_fraction: in [0, 1); 0 holds out nothing.

    Raises:
        ValueError: `eval_fraction` is outside [0, 1).
        UserError: all samples have the same prompt.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be in [0, 1), got {eval_fraction}")
    if eval_fraction == 0:
        return list(samples), []
    keys = [_prompt_hash(sample) for sample in samples]
    sizes = Counter(keys)
    if len(sizes) < 2:
        raise UserError(
            f"cannot hold out samples: {len(samples)} samples have {len(sizes)} different prompt(s)",
            remedy="set data.eval to a file, or data.eval_fraction to 0",
        )
    wanted = max(1, round(eval_fraction * len(samples)))
    held: set[str] = set()
    count = 0
    for key in sorted(sizes)[:-1]:  # the last group is always trained
        if count >= wanted:
            break
        held.add(key)
        count += sizes[key]
    train = [sample for sample, key in zip(samples, keys, strict=True) if key not in held]
    return train, [sample for sample, key in zip(samples, keys, strict=True) if key in held]


def _prompt_hash(sample: Sample) -> str:
    said: list[Any] = [contents(message) for message in sample.prompt]
    text = json.dumps([*said, sample.tools] if sample.tools else said)
    return hashlib.sha256(text.encode()).hexdigest()

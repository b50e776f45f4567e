"""A held-out share of the rows, fixed by what the rows say."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ual.errors import UserError
from ual.records import Sample


def hold_out(samples: Sequence[Sample], eval_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split into training and held-out rows, each in its original order.

    Rows are grouped by their prompt and the groups ordered by its hash; groups are held out from the
    front until round(eval_fraction * rows) rows are, and at least one. So the split depends neither on the
    order of the rows nor on a seed, no prompt is on both sides, and more rows move few old ones.

    Args:
        samples: the rows.
        eval_fraction: in [0, 1); 0 holds out nothing.

    Raises:
        ValueError: `eval_fraction` is outside [0, 1).
        UserError: all rows share one prompt.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be in [0, 1), got {eval_fraction}")
    if eval_fraction == 0:
        return list(samples), []
    keys = [_prompt_hash(sample) for sample in samples]
    sizes = Counter(keys)
    if len(sizes) < 2:
        raise UserError(
            f"cannot hold out rows: {len(samples)} rows have {len(sizes)} different prompt(s)",
            remedy="set data.eval to a file, or data.eval_fraction to 0",
        )
    wanted = max(1, round(eval_fraction * len(samples)))
    held: set[str] = set()
    count = 0
    for key in sorted(sizes)[:-1]:  # the last group stays, so that something is left to train on
        if count >= wanted:
            break
        held.add(key)
        count += sizes[key]
    train = [sample for sample, key in zip(samples, keys, strict=True) if key not in held]
    return train, [sample for sample, key in zip(samples, keys, strict=True) if key in held]


def _prompt_hash(sample: Sample) -> str:
    said: list[Any] = [[message.role, message.content, *message.tool_calls] for message in sample.prompt]
    text = json.dumps([*said, sample.tools] if sample.tools else said)
    return hashlib.sha256(text.encode()).hexdigest()

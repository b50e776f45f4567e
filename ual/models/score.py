"""Per-token scores of given responses under a fused model: no logits held, no gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ual_kernels import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the model says of one sample's response tokens; every array is [tokens], in order."""

    sample_id: str
    log_prob: NDArray[np.float64]
    """log p of each token, nats."""
    entropy: NDArray[np.float64]
    """Entropy of the prediction, nats."""
    top1_prob: NDArray[np.float64]
    """The largest probability."""
    margin: NDArray[np.float64]
    """Largest logit minus the second largest, nats."""
    correct: NDArray[np.bool_]
    """Whether no logit exceeds the token's."""


@torch.no_grad()
def score(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[TokenScores]:
    """Yield the scores of every feature, longest first (batches of like length waste the least padding).

    Args:
        model: fused by `ual.models.fuse`, on any device; left in the mode in which it came.
        features: tokenized samples with `id`, `input_ids` and `labels` (-100 outside the response).
        collate: makes a batch of tensors of them.
        batch_size: samples a forward pass.
        advance: called with the number of samples done, for a progress bar.
        share: (rank, world size) of a process among several that share the batches out. All make equally many
            forward passes, which partitioned weights need; what a superfluous pass computes is not yielded.
    """
    rank, world_size = share
    device = next(model.parameters()).device
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    was_training = model.training
    model.eval()
    try:
        starts = range(0, len(order), batch_size)
        for turn in range(-(-len(starts) // world_size)):
            mine = turn * world_size + rank
            start = starts[min(mine, len(starts) - 1)]
            rows = [features[i] for i in order[start : start + batch_size]]
            batch = collate(rows)
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "labels")}
            statistics = model(**inputs, return_statistics=True).statistics
            if mine >= len(starts):
                continue
            live = (inputs["labels"][:, 1:] != IGNORE_INDEX).cpu()
            columns = {
                name: getattr(statistics, name)[:, :-1].double().cpu()
                for name in ("log_prob", "entropy", "top1_prob", "margin")
            }
            correct = statistics.correct[:, :-1].cpu()
            for i, row in enumerate(rows):
                yield TokenScores(
                    sample_id=row["id"],
                    correct=correct[i][live[i]].numpy(),
                    **{name: column[i][live[i]].numpy() for name, column in columns.items()},
                )
            advance(len(rows))
    finally:
        model.train(was_training)

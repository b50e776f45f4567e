"""Per-token scores of given responses under a fused model, without logits or gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ual.models.fuse import at_temperature
from ual_kernels import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of one sample's loss tokens; every array is [tokens], in order."""

    sample_id: str
    log_prob: NDArray[np.float64]
    """Log-probability of each token, nats."""
    entropy: NDArray[np.float64]
    """Entropy of the prediction, nats."""
    top1_prob: NDArray[np.float64]
    """Largest probability."""
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
    temperature: float = 1.0,
) -> Iterator[TokenScores]:
    """Yield the scores of every sample, longest first: batches of like length have the least padding.

    Args:
        model: fused by `ual.models.fuse`, on any device; its mode (train or eval) is restored.
        features: tokenized samples with `id`, `input_ids` and `labels` (-100 outside the response).
        collate: makes a batch of tensors from features.
        batch_size: samples per forward pass.
        advance: called with the number of samples done, for a progress bar.
        share: (rank, world size) of processes that divide the batches. Every process makes equally many
            forward passes, because partitioned weights are gathered by all; surplus passes yield nothing.
        temperature: > 0; divides the logits.
    """
    rank, world_size = share
    device = next(model.parameters()).device
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    try:
        for turn in range(-(-len(batches) // world_size)):
            index = turn * world_size + rank
            samples = [features[i] for i in batches[min(index, len(batches) - 1)]]
            batch = collate(samples)
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "labels")}
            with at_temperature(model, temperature) if temperature != 1 else nullcontext():
                statistics = model(**inputs, return_statistics=True).statistics
            if index >= len(batches):
                continue
            is_loss_token = (inputs["labels"][:, 1:] != IGNORE_INDEX).cpu()
            names = ("log_prob", "entropy", "top1_prob", "margin")
            columns = {name: getattr(statistics, name)[:, :-1].double().cpu() for name in names}
            columns["correct"] = statistics.correct[:, :-1].cpu()
            for i, sample in enumerate(samples):
                scores: dict[str, Any] = {k: v[i][is_loss_token[i]].numpy() for k, v in columns.items()}
                yield TokenScores(sample_id=sample["id"], **scores)
            advance(len(samples))
    finally:
        model.train(was_training)

"""Measure a fused model on held-out rows: token NLL, accuracy and calibration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ual.evaluate.calibration import Evaluation, TokenMetrics
from ual.models import TokenScores, score


def evaluate(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    sources: Mapping[str, str],
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    bins: int = 15,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
    score: Callable[..., Iterable[TokenScores]] = score,
) -> Evaluation:
    """Score every response token of the features, without logits in memory.

    Args:
        model: fused by `ual.models.fuse`.
        features: tokenized rows with `id`, `input_ids` and `labels`.
        sources: each row's group, by id.
        collate: makes a batch of tensors of features.
        bins: bins of equal mass for the calibration error.
        batch_size: rows a forward pass.
        advance: called with the number of rows done.
        score: in place of `ual.models.score`, where several processes share the rows.

    Raises:
        UserError: no live token, or probabilities that are not finite.
    """
    metrics = TokenMetrics(bins)
    for scores in score(model, features, collate, batch_size=batch_size, advance=advance):
        live = [[True] * len(scores.log_prob)]
        metrics.update(
            -scores.log_prob[None],
            scores.top1_prob[None],
            scores.correct[None],
            live,
            [sources[scores.sample_id]],
        )
    return metrics.result()

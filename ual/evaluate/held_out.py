"""Measure a fused model on held-out samples: token NLL, accuracy and calibration.

`ual.pipelines.train` evaluates before and after training. Both `Evaluation`s become evaluation.json. The
samples measured after training become held_out.jsonl, one per line, so that runs can be compared sample by
sample (`ual.methods.statistics`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import nn

from ual.evaluate.calibration import Evaluation, TokenMetrics
from ual.models.score import TokenScores, score


class SampleEvaluation(TypedDict):
    """One held-out sample, as a line of held_out.jsonl holds it; means are over its loss tokens."""

    id: str
    source: str
    tokens: int
    nll: float
    accuracy: float
    confidence: float


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
) -> tuple[Evaluation, list[SampleEvaluation]]:
    """Return the metrics of all loss tokens, and those of each sample in the order of `features`.

    Logits are not kept in memory. A sample without loss tokens is left out.

    Args:
        model: fused by `ual.models.fuse`.
        features: tokenized samples with `id`, `input_ids` and `labels`.
        sources: each sample's group, by id.
        collate: makes a batch of tensors from features.
        bins: bins of equal mass for the calibration error.
        batch_size: samples per forward pass.
        advance: called with the number of samples done.
        score: replaces `ual.models.score` where several processes share the samples.

    Raises:
        UserError: there is no loss token, or a probability is not finite.
    """
    metrics = TokenMetrics(bins)
    samples: dict[str, SampleEvaluation] = {}
    for scores in score(model, features, collate, batch_size=batch_size, advance=advance):
        name, nll = scores.sample_id, -scores.log_prob
        if not nll.size:
            continue
        metrics.update(sources[name], nll, scores.top1_prob, scores.correct)
        samples[name] = SampleEvaluation(
            id=name,
            source=sources[name],
            tokens=nll.size,
            nll=float(nll.mean()),
            accuracy=float(scores.correct.mean()),
            confidence=float(scores.top1_prob.mean()),
        )
    return metrics.result(), [samples[feature["id"]] for feature in features if feature["id"] in samples]

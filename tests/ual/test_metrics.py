"""Training logs the statistics of its batches, packed or not."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ual.data.groups import assign
from ual.train.callbacks import describe
from ual.train.metrics import BatchStatistics, spread
from ual_kernels import TokenStatistics

NAMES = ("source/a", "source/b", "uncertainty/q1")
GROUPS = ([0, 2], [1, -1], [0, -1])
LENGTHS = (4, 3, 5)
SMOOTHING, WEIGHT = (0.1, 0.2, 0.0), (1.0, 2.0, 0.5)


def token_statistics(shape: tuple[int, ...], seed: int = 0) -> TokenStatistics:
    generator = torch.Generator().manual_seed(seed)
    log_prob, entropy, margin = (-torch.rand(shape, generator=generator) for _ in range(3))
    nothing = torch.full(shape, torch.nan)
    correct, predicted = nothing > 0, torch.zeros(shape, dtype=torch.int64)
    return TokenStatistics(
        nothing, log_prob, -entropy, nothing, -margin, nothing, correct, predicted, nothing
    )


def batch(packed: bool) -> tuple[torch.Tensor, Any, Any, Any]:
    """Mask of loss tokens [B, T - 1], smoothing, weight and groups of three samples."""
    if not packed:
        mask = torch.zeros(3, 5, dtype=torch.bool)
        for i, n in enumerate(LENGTHS):
            mask[i, 1 : n - 1] = True
        return mask, torch.tensor(SMOOTHING), torch.tensor(WEIGHT), torch.tensor(GROUPS)
    mask, columns = [], [[], [], []]
    for i, n in enumerate(LENGTHS):
        mask += [j not in (0, n - 1) for j in range(n)]
        for column, values in zip(columns, (SMOOTHING, WEIGHT, GROUPS), strict=True):
            column += [values[i]] * n
    return (torch.tensor([mask[:-1]]), *(torch.tensor([column]) for column in columns))


@pytest.mark.kills("ual/train/metrics.py", "else groups[:, :-1]", "else groups[:, :1]")
@pytest.mark.kills("ual/train/metrics.py", "torch.where(groups < 0, nowhere, groups)", "groups.clamp(min=0)")
@pytest.mark.kills("ual/train/metrics.py", "mask.numel() + len(mask)", "mask.numel()")
@pytest.mark.parametrize("packed", [False, True])
def test_sums_by_hand(packed: bool) -> None:
    mask, smoothing, weight, groups = batch(packed)
    metrics = BatchStatistics(NAMES)
    assert metrics.is_empty
    expected: dict[int, list[float]] = {0: [], 1: [], 2: []}
    every: list[tuple[float, float, float]] = []
    for step in range(2):
        statistics = token_statistics((mask.shape[0], mask.shape[1] + 1), step)
        metrics.count(mask, smoothing, weight)
        metrics.observe(mask, statistics, groups)
        for b, t in mask.nonzero().tolist():
            for group in groups[b, t].tolist() if packed else groups[b].tolist():
                if group >= 0:
                    expected[group].append(-statistics.log_prob[b, t].item())
            every.append((*tuple(x[b, t].item() for x in statistics[1:3]), statistics.margin[b, t].item()))
    logs = metrics.read()
    assert metrics.is_empty
    tokens = 2 * (2 + 1 + 3)
    assert logs["live_tokens"] == tokens
    assert logs["live_fraction"] == tokens / (2 * (mask.numel() + len(mask)))
    of_tokens = np.repeat(SMOOTHING, (2, 1, 3))
    assert logs["mean_smoothing"] == pytest.approx(of_tokens.mean())
    assert logs["std_smoothing"] == pytest.approx(of_tokens.std())
    assert logs["mean_weight"] == pytest.approx(np.repeat(WEIGHT, (2, 1, 3)).mean())
    log_prob, entropy, margin = np.array(every).T
    assert logs["token_nll"] == pytest.approx(-log_prob.mean())
    assert logs["token_p"] == pytest.approx(np.exp(log_prob).mean())
    assert logs["token_entropy"] == pytest.approx(entropy.mean())
    assert logs["token_margin"] == pytest.approx(margin.mean())
    for group, name in enumerate(NAMES):
        assert logs[f"nll/{name}"] == pytest.approx(np.mean(expected[group])), name


def test_steps_without_statistics_and_dropped_samples() -> None:
    mask, smoothing, weight, groups = batch(packed=False)
    metrics = BatchStatistics(NAMES)
    metrics.count(mask, smoothing, weight)
    assert "token_nll" not in metrics.read()
    metrics.count(mask, smoothing, weight)
    statistics = token_statistics((3, 6))
    statistics.log_prob[1] = torch.nan  # a sample of weight 0 is dropped before the pass
    metrics.observe(mask, statistics, groups)
    logs = metrics.read()
    assert "nll/source/b" not in logs
    assert all(np.isfinite(value) for value in logs.values())
    nothing = torch.zeros_like(mask)
    metrics.count(nothing, smoothing, weight)
    assert metrics.read()["mean_smoothing"] == 0


def test_sums_over_processes() -> None:
    mask, smoothing, weight, _ = batch(packed=False)
    metrics = BatchStatistics()
    metrics.count(mask, smoothing, weight)
    logs = metrics.read(lambda totals: 2 * totals)
    assert logs["live_tokens"] == 12
    assert logs["mean_smoothing"] == pytest.approx(np.repeat(SMOOTHING, (2, 1, 3)).mean())


@pytest.mark.kills(
    "ual/train/metrics.py",
    "if values.ndim == 1 else values[:, :-1]",
    "if values.ndim == 1 else values[:, 1:]",
)
def test_spread() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    assert spread(torch.tensor([2.0, 3.0]), mask).tolist() == [[2, 0], [3, 3]]
    assert spread(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), mask).tolist() == [[1, 0], [4, 5]]


def test_the_line_below_the_progress_bar() -> None:
    assert describe({"loss": 2.0}) == "loss 2.000"
    assert describe({"train_runtime": 2.0}) == ""


values = st.lists(st.floats(-5, 5) | st.just(float("nan")), min_size=1, max_size=40)


@given(values)
def test_quarters_are_ordered_and_ties_stay_together(uncertainty: list[float]) -> None:
    groups = assign(["x"] * len(uncertainty), uncertainty)
    assert (groups.of_samples[:, 0] == -1).all()  # one source is no group
    known = [(u, q) for u, q in zip(uncertainty, groups.of_samples[:, 1].tolist(), strict=True) if u == u]
    assert all(q == -1 for u, q in zip(uncertainty, groups.of_samples[:, 1].tolist(), strict=True) if u != u)
    assert all(0 <= q < 4 for _, q in known)
    for u, q in known:
        for v, r in known:
            assert q <= r or u > v
    if len({u for u, _ in known}) >= 4 == len(known):
        assert {q for _, q in known} == {0, 1, 2, 3}


def test_small_sources_share_one_group() -> None:
    sources = [f"s{i}" for i in range(12) for _ in range(20 - i)]
    groups = assign(sources, [float("nan")] * len(sources))
    assert groups.names == (*(f"source/s{i}" for i in range(8)), "source/(others)")
    named = [groups.names[i] for i in groups.of_samples[:, 0]]
    assert named[0] == "source/s0"
    assert named[-1] == "source/(others)"

"""Statistics of the batches since the last log entry: summed on the device, read back when logged."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_COUNTS = ("tokens", "positions", "smoothing", "smoothing_squared", "weight")
_STATISTICS = ("observed", "nll", "entropy", "margin", "p")


class BatchStatistics:
    """Sums over loss tokens, and unsmoothed losses by group.

    Args:
        groups: names of the groups that batches refer to by index.
    """

    def __init__(self, groups: Sequence[str] = ()) -> None:
        self._groups = tuple(groups)
        self._totals: Tensor | None = None  # counts, statistics, then each group's tokens and nll

    @property
    def is_empty(self) -> bool:
        return self._totals is None

    def count(self, mask: Tensor, smoothing: Tensor, weight: Tensor) -> None:
        """Add a batch's loss tokens, their smoothing and their weights.

        Args:
            mask: [B, T - 1] bool, the loss tokens; position t predicts token t + 1.
            smoothing, weight: [B], one number a sample; or [B, T] if a sequence contains several samples.
        """
        smooth = spread(smoothing, mask)
        positions = mask.new_full((), mask.numel() + len(mask), dtype=torch.int64)
        self._add(0, [mask, positions, smooth, smooth.square(), spread(weight, mask)])

    def observe(self, mask: Tensor, statistics: Any, groups: Tensor | None) -> None:
        """Add the loss's statistics of a batch.

        Args:
            mask: as in `count`.
            statistics: `TokenStatistics` with fields [B, T]; NaN for tokens that the loss dropped.
            groups: [B, K] or [B, T, K], indices of group names; -1 for no group.
        """
        known = mask & ~statistics.log_prob[:, :-1].isnan()
        log_prob, entropy, margin = (
            torch.where(known, field[:, :-1], 0.0)
            for field in (statistics.log_prob, statistics.entropy, statistics.margin)
        )
        p = torch.where(known, log_prob.exp(), 0.0)
        self._add(len(_COUNTS), [known, -log_prob, entropy, margin, p])
        if groups is None or not self._groups:
            return
        groups = groups[:, None] if groups.ndim == 2 else groups[:, :-1]
        shape = *known.shape, groups.shape[-1]
        nowhere = len(self._groups)  # an extra bin for tokens in no group
        bins = torch.where(groups < 0, nowhere, groups).expand(shape).reshape(-1)
        sums: list[Tensor] = []
        for values in (known, -log_prob):
            of_groups = torch.zeros(nowhere + 1, dtype=_dtype(mask), device=mask.device)
            values = values.to(of_groups.dtype)[..., None].expand(shape).reshape(-1)
            sums += of_groups.index_add_(0, bins, values)[:-1].unbind()
        self._add(len(_COUNTS) + len(_STATISTICS), sums)

    def read(self, reduce: Callable[[Tensor], Any] = lambda totals: totals) -> dict[str, float]:
        """Return the log entry and clear the sums.

        Args:
            reduce: sums the totals over all processes.
        """
        assert self._totals is not None
        totals = reduce(self._totals).tolist()
        self._totals = None
        counts = dict(zip((*_COUNTS, *_STATISTICS), totals, strict=False))
        tokens, observed = max(counts["tokens"], 1), counts["observed"]
        mean = counts["smoothing"] / tokens
        logs = {
            "live_tokens": counts["tokens"],
            "live_fraction": counts["tokens"] / counts["positions"],
            "mean_smoothing": mean,
            "std_smoothing": max(counts["smoothing_squared"] / tokens - mean**2, 0.0) ** 0.5,
            "mean_weight": counts["weight"] / tokens,
        }
        if observed:
            logs |= {f"token_{name}": counts[name] / observed for name in _STATISTICS[1:]}
            of_groups = totals[len(_COUNTS) + len(_STATISTICS) :]
            n = len(self._groups)
            for name, known, nll in zip(self._groups, of_groups[:n], of_groups[n:], strict=True):
                if known:
                    logs[f"nll/{name}"] = nll / known
        return logs

    def _add(self, start: int, values: Sequence[Tensor]) -> None:
        sums = torch.stack([value.detach().sum(dtype=_dtype(value)) for value in values])
        if self._totals is None:
            size = len(_COUNTS) + len(_STATISTICS) + 2 * len(self._groups)
            self._totals = sums.new_zeros(size)
        self._totals[start : start + len(sums)] += sums


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T - 1]: each loss token's value, and 0 for other tokens.

    Args:
        values: [B], one number a sample; or [B, T], one number a position.
        mask: [B, T - 1] bool, the loss tokens; position t predicts token t + 1, which is in the same sample.
    """
    return (values[:, None] if values.ndim == 1 else values[:, :-1]) * mask


def _dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64

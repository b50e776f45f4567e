"""What the batches since the last log held: counted on the device, read back only when it is logged."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_COUNTS = ("tokens", "positions", "smoothing", "smoothing_squared", "weight")
_FACTS = ("observed", "nll", "entropy", "margin", "p")


class BatchStatistics:
    """Sums over live tokens, and plain losses by group.

    Args:
        groups: names of the groups that batches speak of.
    """

    def __init__(self, groups: Sequence[str] = ()) -> None:
        self._groups = tuple(groups)
        self._totals: Tensor | None = None  # counts, facts, then tokens and nll of each group

    @property
    def is_empty(self) -> bool:
        return self._totals is None

    def count(self, live: Tensor, smoothing: Tensor, weight: Tensor) -> None:
        """Count a batch.

        Args:
            live: [B, T - 1] bool; position t predicts token t + 1.
            smoothing, weight: [B], or [B, T] where several rows share a sequence.
        """
        smooth = spread(smoothing, live)
        positions = live.new_full((), live.numel() + len(live), dtype=torch.int64)
        self._add(0, [live, positions, smooth, smooth.square(), spread(weight, live)])

    def observe(self, live: Tensor, statistics: Any, groups: Tensor | None) -> None:
        """Add what the loss found out about its tokens.

        Args:
            live: as in `count`.
            statistics: `TokenStatistics` of fields [B, T]; NaN where a row took no part.
            groups: [B, K], or [B, T, K], indices of group names, -1 for none.
        """
        known = live & ~statistics.log_prob[:, :-1].isnan()
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
        nowhere = len(self._groups)  # one bin more, for those in no group
        bins = torch.where(groups < 0, nowhere, groups).expand(shape).reshape(-1)
        sums: list[Tensor] = []
        for values in (known, -log_prob):
            of_groups = torch.zeros(nowhere + 1, dtype=_dtype(live), device=live.device)
            values = values.to(of_groups.dtype)[..., None].expand(shape).reshape(-1)
            sums += of_groups.index_add_(0, bins, values)[:-1].unbind()
        self._add(len(_COUNTS) + len(_FACTS), sums)

    def read(self, reduce: Callable[[Tensor], Any] = lambda totals: totals) -> dict[str, float]:
        """Return what is logged, and forget it.

        Args:
            reduce: adds up the totals of all processes.
        """
        assert self._totals is not None
        totals = reduce(self._totals).tolist()
        self._totals = None
        counts = dict(zip((*_COUNTS, *_FACTS), totals, strict=False))
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
            logs |= {f"token_{name}": counts[name] / observed for name in _FACTS[1:]}
            of_groups = totals[len(_COUNTS) + len(_FACTS) :]
            n = len(self._groups)
            for name, seen, nll in zip(self._groups, of_groups[:n], of_groups[n:], strict=True):
                if seen:
                    logs[f"nll/{name}"] = nll / seen
        return logs

    def _add(self, start: int, values: Sequence[Tensor]) -> None:
        sums = torch.stack([value.detach().sum(dtype=_dtype(value)) for value in values])
        if self._totals is None:
            size = len(_COUNTS) + len(_FACTS) + 2 * len(self._groups)
            self._totals = sums.new_zeros(size)
        self._totals[start : start + len(sums)] += sums


def spread(values: Tensor, live: Tensor) -> Tensor:
    """Give each live token its number, and the others 0.

    Args:
        values: [B], one number a row; or [B, T], one a position.
        live: [B, T - 1] bool; position t predicts token t + 1, which is of the same row.
    """
    return (values[:, None] if values.ndim == 1 else values[:, :-1]) * live


def _dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # which has no float64

"""Data larger than memory: rows are read, rendered and batched as they are trained."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ual.data.groups import Groups
from ual.data.pack import pack
from ual.data.render import Renderer
from ual.errors import UserError
from ual.records import Sample


class Survey(NamedTuple):
    """What a first pass over the rows keeps of each: about 40 bytes, whatever its length."""

    uncertainty: NDArray[np.float64]  # [n], NaN where missing
    label_smoothing: NDArray[np.float64]  # [n], NaN where the row has none of its own
    sources: list[str]  # [n], each name in memory once


def survey(samples: Iterable[Sample], advance: Callable[[int], None] = lambda _: None) -> Survey:
    """Read every row once: a wrong one is found before training, and scales by rank need all uncertainties.

    Raises:
        UserError: a row is wrong.
    """
    numbers: list[tuple[float, float]] = []
    sources: list[str] = []
    names: dict[str, str] = {}
    for sample in samples:
        numbers.append((_or_nan(sample.uncertainty), _or_nan(sample.label_smoothing)))
        sources.append(names.setdefault(sample.source, sample.source))
        advance(1)
    columns = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    return Survey(columns[:, 0].copy(), columns[:, 1].copy(), sources)


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Features of rows that are read again in every epoch, shuffled within blocks of consecutive rows.

    Args:
        samples: starts reading anew, in the order of the `Survey`.
        renderer: makes tokens; rows that it drops are passed over.
        label_smoothing: [n], by the row's place in that order; NaN leaves the row out.
        groups: as the survey's rows have them.
        buffer: rows of a block.
        seed: of the shuffling; an epoch's order depends on nothing else, so a resumed run finds it again.
        pack_length: tokens of a packed sequence; None leaves rows by themselves.
    """

    def __init__(
        self,
        samples: Callable[[], Iterator[Sample]],
        renderer: Renderer,
        label_smoothing: NDArray[np.float64],
        groups: Groups,
        *,
        buffer: int,
        seed: int,
        pack_length: int | None = None,
    ) -> None:
        self._samples, self._renderer = samples, renderer
        self._smoothing, self._groups = label_smoothing, groups
        self._buffer, self._seed, self._pack_length = buffer, seed, pack_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; trainers call it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng([self._seed, self._epoch])
        rows = self._rows()
        while block := list(islice(rows, self._buffer)):
            if self._pack_length is None:
                yield from (block[i] for i in random.permutation(len(block)))
            else:
                packs = pack([len(row["input_ids"]) for row in block], self._pack_length)
                for i in random.permutation(len(packs)):
                    yield {"rows": [block[j] for j in packs[i]]}

    def _rows(self) -> Iterator[dict[str, Any]]:
        count = 0
        for count, sample in enumerate(self._samples(), start=1):
            if count > len(self._smoothing):
                break
            i = count - 1
            if np.isnan(self._smoothing[i]) or (row := self._renderer.render(sample)) is None:
                continue
            yield {
                "id": sample.id,
                "input_ids": row.input_ids,
                "labels": row.labels,
                "label_smoothing": float(self._smoothing[i]),
                "sample_weight": sample.sample_weight,
                "groups": self._groups.of_samples[i].tolist(),
            }
        if count != len(self._smoothing):
            more_or_less = "more" if count > len(self._smoothing) else "fewer"
            raise UserError(
                f"the rows changed while they were trained: {len(self._smoothing)}, now {more_or_less}",
                place="configuration, data.train",
                remedy="restore the file, then pass --resume to go on from the last checkpoint",
            )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value

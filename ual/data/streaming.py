"""Data larger than memory: samples are read, rendered and packed while they are trained."""

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
    """What a first pass over the data keeps of each sample: some numbers, not its text."""

    uncertainty: NDArray[np.float64]  # [n], NaN if missing
    label_smoothing: NDArray[np.float64]  # [n], NaN if the sample has none of its own
    sources: list[str]  # [n], one string object per name


def survey(samples: Iterable[Sample], advance: Callable[[int], None] = lambda _: None) -> Survey:
    """Read every sample once.

    A wrong sample is found before training, and scales by rank need all uncertainties.

    Raises:
        UserError: a sample is wrong.
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
    """Features of samples that are read in every epoch, and shuffled within blocks of consecutive samples.

    Args:
        samples: starts a new pass, in the order of the `Survey`.
        renderer: samples that it drops are skipped.
        label_smoothing: [n], in that order; NaN drops the sample.
        groups: in that order.
        buffer: samples of a block.
        seed: of the shuffling. An epoch's order depends on the seed and the epoch alone, so a resumed run has
            the same order.
        pack_length: tokens of a packed sequence; None does not pack.
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
        """Select the epoch whose order is used; trainers call it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng([self._seed, self._epoch])
        samples = self._features()
        while block := list(islice(samples, self._buffer)):
            if self._pack_length is None:
                yield from (block[i] for i in random.permutation(len(block)))
            else:
                packs = pack([len(sample["input_ids"]) for sample in block], self._pack_length)
                for i in random.permutation(len(packs)):
                    yield {"rows": [block[j] for j in packs[i]]}

    def _features(self) -> Iterator[dict[str, Any]]:
        count = 0
        for count, sample in enumerate(self._samples(), start=1):
            if count > len(self._smoothing):
                break
            i = count - 1
            if np.isnan(self._smoothing[i]) or (rendered := self._renderer.render(sample)) is None:
                continue
            yield {
                "id": sample.id,
                "input_ids": rendered.input_ids,
                "labels": rendered.labels,
                "label_smoothing": float(self._smoothing[i]),
                "sample_weight": sample.sample_weight,
                "groups": self._groups.of_samples[i].tolist(),
                **rendered.deciding(sample.options),
            }
        if count != len(self._smoothing):
            found = "more" if count > len(self._smoothing) else "fewer"
            raise UserError(
                f"the data changed during training: expected {len(self._smoothing)} samples, got {found}",
                place="configuration, data.train",
                remedy="restore the file, then continue from the last checkpoint with --resume",
            )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value

"""One sample per assistant turn."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ual.records import Sample


def each_turn(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield a sample for each assistant turn: the conversation through this turn.

    The samples of a conversation with several assistant turns have its uncertainty, smoothing, weight and
    source. Their ids are ``ID/1``, ``ID/2`` and so on. Other samples are unchanged. Options are those of the
    final turn; the turns before it are then not smoothed, as within one sequence.
    """
    for sample in samples:
        ends = [k for k, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
        if len(ends) < 2:
            yield sample
            continue
        for number, end in enumerate(ends, start=1):
            final = end == len(sample.messages)
            yield replace(
                sample if final or not sample.options else replace(sample, options={}, label_smoothing=0.0),
                id=f"{sample.id}/{number}",
                messages=sample.messages[:end],
                place=f"{sample.place}, assistant turn {number}",
            )

"""Packing: the samples of each sequence, chosen so that a batch has little padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into few sequences by best fit decreasing; no sample is cut.

    The longest sample is first. Each is added to the sequence with the least room that suffices, as in "Fewer
    Truncations Improve Language Modeling" (arXiv 2404.10830). The result has at most 11/9 of the fewest
    possible sequences, plus 1.

    Args:
        lengths: tokens of each sample, in [1, capacity].
        capacity: tokens of a sequence.

    Returns:
        Indices into `lengths`, each once, ascending within a sequence; sequences are ordered by their first
        index.

    Raises:
        ValueError: a sample is longer than a sequence.

    >>> pack([5, 3, 2, 6], 8)
    [[0, 1], [2, 3]]
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths must be in [1, {capacity}], got {min(lengths)} to {max(lengths)}")
    packs: list[list[int]] = []
    rooms: list[int] = []  # the distinct free capacities of sequences, ascending
    with_room: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            room, target = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            target = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        packs[target].append(i)
        if left := room - lengths[i]:
            others = with_room.setdefault(left, [])
            if not others:
                insort(rooms, left)
            others.append(target)
    return sorted(sorted(indices) for indices in packs)

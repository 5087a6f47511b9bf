"""Which examples share a sample: best-fit decreasing (Johnson, 1973, "Near-optimal bin packing algorithms")."""

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in ``lengths`` by bin: the longest first, each into the fullest bin that has room for it.

    Args:
        lengths: each at most ``capacity``.
    """
    bins: list[list[int]] = []
    # Bins by the room they have left; bit r of ``rooms`` is set where there is one with r.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(position)
        left = room - length
        if left:
            by_room[left].append(number)
            rooms |= 1 << left
    return bins

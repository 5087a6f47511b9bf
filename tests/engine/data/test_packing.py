"""Which examples share a sample."""

import random

import pytest

from narrowgauge.engine.data.packing import best_fit_decreasing


def tried_one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Every bin is looked at for every length; of equally full ones the youngest is taken."""
    bins: list[list[int]] = []
    changed: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = {n: capacity - sum(lengths[i] for i in one) for n, one in enumerate(bins)}
        fitting = [n for n, room in rooms.items() if room >= lengths[position]]
        if not fitting:
            bins.append([])
            fitting, rooms = [len(bins) - 1], {len(bins) - 1: capacity}
        best = min(fitting, key=lambda n: (rooms[n], -changed.index(n) if n in changed else 0))
        bins[best].append(position)
        changed = [n for n in changed if n != best] + [best]
    return bins


@pytest.mark.parametrize(("count", "capacity"), [(0, 8), (1, 8), (40, 8), (60, 31), (150, 200)])
def test_the_fullest_bin_with_room_is_taken(count: int, capacity: int) -> None:
    draw = random.Random(count)
    lengths = [draw.randint(1, capacity) for _ in range(count)]
    bins = best_fit_decreasing(lengths, capacity)
    assert bins == tried_one_by_one(lengths, capacity)
    assert sorted(position for one in bins for position in one) == list(range(count))
    assert all(sum(lengths[i] for i in one) <= capacity for one in bins)


def test_little_room_is_left() -> None:
    draw = random.Random(0)
    lengths = [min(2048, int(draw.lognormvariate(5.5, 0.9)) + 8) for _ in range(20_000)]
    bins = best_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.995

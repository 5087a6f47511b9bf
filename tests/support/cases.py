"""Which cases of a parametrised test are quick: named ones, or enough of a product to hold every combination once."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def cases(of: Mapping[str, Sequence[Any]], *, slow: Collection[str]) -> list[Any]:
    """The cases for ``parametrize``, by name; those named in ``slow`` repeat others in another combination."""
    assert of.keys() >= set(slow)
    return [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, case in of.items()]


def covering(rows: Sequence[Mapping[str, object]], strength: int) -> set[int]:
    """Positions of rows that together hold every combination of ``strength`` values that is there; greedy.

    Args:
        rows: per case the value on each axis.
    """
    held = [set(combinations(sorted(row.items()), min(strength, len(row)))) for row in rows]
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(range(len(rows)), key=lambda i: len(held[i] & missing))
        chosen.add(best)
        missing -= held[best]
    return chosen


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Carries out ``@pytest.mark.cover(strength)`` on the cases of each test that has it."""
    tests: dict[tuple[str, int], list[Any]] = {}
    for item in items:
        marker = item.get_closest_marker("cover")
        if marker is not None:
            tests.setdefault((item.nodeid.partition("[")[0], marker.args[0]), []).append(item)
    for (_, strength), members in tests.items():
        quick = covering([_axes(member) for member in members], strength)
        for position, member in enumerate(members):
            if position not in quick:
                member.add_marker(pytest.mark.slow)


def mark_others_slow(items: Sequence[pytest.Item]) -> None:
    """Carries out ``@pytest.mark.quick(*names)``: of a parametrised test the cases of other names are slow.

    Raises:
        ValueError: a name is none of the cases', where all of them are there.
    """
    tests: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("quick") is not None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, members in tests.items():
        quick = {name for mark in members[0].iter_markers("quick") for name in mark.args}
        found = {member.callspec.id for member in members}
        if len(found) > 1 and quick - found:
            raise ValueError(f"{test}: no case is named {sorted(quick - found)[0]!r}; there are {sorted(found)}")
        for member in members:
            if member.callspec.id not in quick:
                member.add_marker(pytest.mark.slow)


def _axes(item: Any) -> dict[str, str]:
    """The value on each axis; arguments that one ``parametrize`` sets together are one axis."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [[name.strip() for name in part.split(",")] if isinstance(part, str) else part for part in names]
    return {axis[0]: repr([item.callspec.params[name] for name in axis]) for axis in axes}

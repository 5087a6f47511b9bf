"""The quick part of a product holds every combination once, and is small."""

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.cases import cases, covering, mark_others_slow


@pytest.mark.parametrize(("sizes", "strength", "at_most"), [((2, 2, 3, 2), 2, 7), ((4, 3), 1, 4), ((3, 3, 2), 2, 9)])
def test_every_combination_is_covered(sizes: tuple[int, ...], strength: int, at_most: int) -> None:
    rows = [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]

    def held(chosen: set[int]) -> set[object]:
        return {c for i in chosen for c in combinations(sorted(rows[i].items()), strength)}

    quick = covering(rows, strength)
    assert held(quick) == held(set(range(len(rows))))
    assert len(quick) <= at_most


def test_slow_cases_are_named() -> None:
    first, second = cases({"a": (1, 2), "b": (3, 4)}, slow={"b"})
    assert (first.id, first.values, first.marks) == ("a", (1, 2), [])
    assert (second.id, second.values, second.marks) == ("b", (3, 4), [pytest.mark.slow])
    with pytest.raises(AssertionError):
        cases({"a": (1,)}, slow={"renamed"})


@pytest.mark.cover(1)
@pytest.mark.parametrize("x", [1, 2])
@pytest.mark.parametrize(("y", "z"), [(1, 1), (2, 2), (3, 3)])
def test_the_mark_leaves_three_of_six(request: pytest.FixtureRequest, x: int, y: int, z: int) -> None:
    same = [item for item in request.session.items if item.nodeid.startswith(request.node.nodeid.partition("[")[0])]
    quick = [item for item in same if item.get_closest_marker("slow") is None]
    assert len(quick) == 3


class Case:
    """As far as it is asked for, an item that pytest has collected."""

    def __init__(self, test: str, name: str, *quick: str) -> None:
        self.nodeid, self.callspec = f"{test}[{name}]", SimpleNamespace(id=name)
        self._quick, self.added = pytest.mark.quick(*quick).mark, list[str]()

    def get_closest_marker(self, name: str) -> Any:
        return self._quick if name == "quick" else None

    def iter_markers(self, name: str) -> Any:
        return [self._quick] if name == "quick" else []

    def add_marker(self, mark: Any) -> None:
        self.added.append(mark.name)


def test_cases_that_are_not_named_quick_are_slow() -> None:
    items: Any = [Case("t.py::test", name, "b", "c") for name in "abc"]
    mark_others_slow(items)
    assert [item.added for item in items] == [["slow"], [], []]
    mark_others_slow([items[0]])
    renamed: Any = [Case("t.py::test", name, "gone") for name in "ab"]
    with pytest.raises(ValueError, match="no case is named 'gone'"):
        mark_others_slow(renamed)

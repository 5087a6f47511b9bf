"""The order in which the forwards and backwards of a step follow each other, where a loop knows it."""

import weakref
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .errors import OffloadError
from .saving.graph import ForwardGraph


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch in one chunk of a model: one forward and one backward.

    Attributes:
        number: of the micro-batch in its step.
        chunk: of the pieces of layers that one process has.
    """

    number: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"micro-batch {self.number} of chunk {self.chunk}"


Pass = tuple[Literal["forward", "backward"], MicroBatch]


class Schedule:
    """A step's passes in their order.

    Attributes:
        passes: as given.
        forwards: the micro-batches in the order of their forwards.
        kept: those whose tensors stay in memory under ``keep_resident="auto"``.
        groups: what is planned alike: the chunk, and how many passes there are from forward to backward. Those that
            wait longest come first.
    """

    def __init__(self, passes: Sequence[Pass], *, kept: Collection[MicroBatch] = ()) -> None:
        """
        Raises:
            ValueError: a micro-batch has not one forward and one backward after it.
        """
        places = [
            {of: place for place, (name, of) in enumerate(passes) if name == kind} for kind in ("forward", "backward")
        ]
        began, ended = places
        if len(began) + len(ended) != len(passes) or began.keys() != ended.keys():
            raise ValueError("passes: expected one forward and one backward of each micro-batch")
        for of, place in began.items():
            if ended[of] < place:
                raise ValueError(f"passes: {of}: expected its forward before its backward")
        self.passes, self.forwards, self.kept = list(passes), list(began), frozenset(kept)
        self._group = {of: (of.chunk, ended[of] - place) for of, place in began.items()}
        groups = sorted(set(self._group.values()), key=lambda group: (-group[1], group[0]))
        self.groups: list[Hashable] = list(groups)
        backwards = list(ended)
        self._before = dict(zip(backwards[1:], backwards, strict=False))
        self._after = dict(pairwise(backwards))
        follows = pairwise(passes)
        self._follows = {of: other for (name, of), (kind, other) in follows if (name, kind) == ("forward", "backward")}

    def group_of(self, micro_batch: MicroBatch) -> Hashable:
        return self._group[micro_batch]

    def backward_before(self, micro_batch: MicroBatch) -> MicroBatch | None:
        """Whose backward comes just before this one's."""
        return self._before.get(micro_batch)

    def backward_after(self, micro_batch: MicroBatch) -> MicroBatch | None:
        """Whose backward comes just after this one's."""
        return self._after.get(micro_batch)

    def backward_that_follows(self, micro_batch: MicroBatch) -> MicroBatch | None:
        """Whose backward is the next pass after this forward."""
        return self._follows.get(micro_batch)


class Step:
    """The forwards of one step, as far as it has come."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.graphs: dict[MicroBatch, ForwardGraph] = {}

    def check(self, micro_batch: MicroBatch) -> None:
        """
        Raises:
            OffloadError: it is not this one's turn.
        """
        number, forwards = len(self.graphs), self.schedule.forwards
        expected = str(forwards[number]) if number < len(forwards) else "the end of the step"
        if number == len(forwards) or micro_batch != forwards[number]:
            raise OffloadError(f"activation offload: expected {expected}, got a forward of {micro_batch}")

    def add(self, micro_batch: MicroBatch, graph: ForwardGraph) -> None:
        """A forward begins: what the backward after it asks for first is read meanwhile."""
        schedule, graphs = self.schedule, self.graphs
        following = schedule.backward_that_follows(micro_batch)
        if following in graphs:
            graphs[following].read_ahead()
        before, after = schedule.backward_before(micro_batch), schedule.backward_after(micro_batch)
        if before in graphs:
            graphs[before].then = weakref.ref(graph)
        if after in graphs:
            graph.then = weakref.ref(graphs[after])
        graphs[micro_batch] = graph

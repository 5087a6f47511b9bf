"""Which part of experts' stacked matrices a process rank holds, and where it lies in their linears."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowgauge.optimizers.sharding.box import Box

from ..parts import LocalParameter, Part


@dataclass(frozen=True)
class ExpertsCut:
    """The part of stacked matrices ``(E, a, b)`` that is here: the same of each expert that is here.

    Attributes:
        shape: ``(E, a, b)``, of all.
        experts: those that are here.
        rows: ranges (first, number) of a matrix's rows, ascending, as they follow each other in the expert's linear.
        columns: the range of its columns.
        size: number of process ranks that share a matrix.
    """

    shape: tuple[int, int, int]
    experts: range
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    size: int

    @classmethod
    def of(cls, described: Sequence[LocalParameter]) -> "ExpertsCut":
        """
        Args:
            described: the weights of the experts' linears, in order.
        """
        first = described[0].parts
        num, a, b = first[0].box.shape
        rows: list[tuple[int, int]] = []
        for part in first:
            start, size = part.box.offsets[1], part.box.local[1]
            if rows and sum(rows[-1]) == start:
                start, size = rows[-1][0], rows.pop()[1] + size
            rows.append((start, size))
        columns = (first[0].box.offsets[2], first[0].box.local[2])
        lowest = first[0].box.offsets[0]
        shares = a * b // (sum(size for _, size in rows) * columns[1])
        return cls((num, a, b), range(lowest, lowest + len(described)), tuple(rows), columns, shares)

    @property
    def split(self) -> int | None:
        """The dimension of a matrix that process ranks share; None where each holds all of it."""
        return None if self.size == 1 else 1 if self.columns[1] < self.shape[2] else 0

    @property
    def local(self) -> tuple[int, int]:
        """The shape of an expert's linear."""
        return sum(size for _, size in self.rows), self.columns[1]

    def ranges(self, dim: int) -> tuple[tuple[int, int], ...]:
        return self.rows if dim == 0 else (self.columns,)

    def own(self, dim: int, of_whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that has one for each of a matrix's rows (``dim`` 0) or columns."""
        if self.split != dim:
            return of_whole
        return torch.cat([of_whole.narrow(0, first, size) for first, size in self.ranges(dim)])

    def local_of(self, dim: int, index: Tensor) -> Tensor:
        """Those of the selected rows (``dim`` 0) or columns, ascending, that lie here, as numbered in a linear."""
        if self.split != dim:
            return index
        found, before = [], 0
        for first, size in self.ranges(dim):
            inside = index[(index >= first) & (index < first + size)]
            found.append(inside - first + before)
            before += size
        return torch.cat(found)

    def boxes(self, expert: int, height: int, width: int, rows: Sequence[tuple[int, int]]) -> list[Box]:
        """Of an expert's rows of a matrix ``(E * height, width)``: the weights, or what stands for them.

        Args:
            rows: ranges of its ``height`` rows.
        """
        first, size = 0, width
        if self.split == 1:
            first, size = self.columns
            if width != self.shape[2]:
                # Selected columns, as many on each rank.
                first, size = first // size * (width // self.size), width // self.size
        whole = (self.shape[0] * height, width)
        return [Box(whole, (expert * height + start, first), (number, size)) for start, number in rows]

    def weight_positions(self, expert: int, device: torch.device) -> Tensor:
        """The positions of an expert's linear's elements in the flattened matrix ``(E * a, b)``, int64."""
        boxes = self.boxes(expert, self.shape[1], self.shape[2], self.rows)
        return torch.cat([box.positions(0, box.local[0] * box.local[1], device) for box in boxes])


def parts_of(name: str, boxes: Sequence[Box]) -> tuple[Part, ...]:
    """A parameter that these boxes lie in one after the other."""
    found, offset = [], 0
    for box in boxes:
        found.append(Part(name, box, offset))
        offset += found[-1].numel
    return tuple(found)

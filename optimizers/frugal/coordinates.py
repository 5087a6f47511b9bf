"""Which coordinates of a parameter keep optimizer state, and which of those lie in a shard that was cut anywhere.

A selection is derived from a seed and answers for any shard, so that nothing but the
chosen lines of a matrix (a few kilobytes) is ever kept.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..numerics.rounding import hash_positions
from ..sharding.blocks import Block, blocks_of
from ..sharding.box import Box
from ..sharding.shards import Shard

# Small enough for a CPU's cache, large enough not to be many kernels on a GPU.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Part:
    """Chosen coordinates of one rectangle of a shard: all of it, or lines of it.

    Attributes:
        index: chosen lines along ``dim`` (0 rows, 1 columns), counted within the block, ascending; None means all.
    """

    block: Block
    dim: int = 0
    index: Tensor | None = None

    def take(self, piece: Tensor) -> Tensor:
        """The chosen ones of a 1-D tensor shaped like the shard, ascending: a view if all are chosen, else a copy."""
        matrix = self.block.of(piece)
        return (matrix if self.index is None else matrix.index_select(self.dim, self.index)).view(-1)

    def put_(self, piece: Tensor, chosen: Tensor) -> None:
        """Write what :meth:`take` gave, changed, into ``piece``; where it was a view it is there already."""
        if self.index is not None:
            shape = (self.block.num_rows, -1) if self.dim == 1 else (-1, self.block.num_columns)
            self.block.of(piece).index_copy_(self.dim, self.index, chosen.view(shape))

    def numel(self) -> int:
        """How many coordinates are chosen."""
        if self.index is None:
            return self.block.num_rows * self.block.num_columns
        return self.index.numel() * (self.block.num_rows if self.dim == 1 else self.block.num_columns)


def take(parts: Sequence[Part], piece: Tensor) -> Tensor:
    """The chosen ones of a 1-D tensor shaped like the shard, in ascending order; a view if one part is all of it."""
    taken = [part.take(piece) for part in parts]
    return taken[0] if len(taken) == 1 else torch.cat(taken) if taken else piece.new_empty(0)


def put_(parts: Sequence[Part], piece: Tensor, chosen: Tensor) -> None:
    """Write what :func:`take` gave, changed, into ``piece``."""
    for part, own in zip(parts, chosen.split([part.numel() for part in parts]), strict=True):
        part.put_(piece, own)


@dataclass(frozen=True)
class Place:
    """Where the chosen coordinates of a shard lie among all chosen ones of the parameter: those are its state.

    Attributes:
        start: of the first within the flattened state, or its ``box``.
        count: how many there are.
        shape: of the state of the whole parameter.
        box: the part of the state that the shard's process has, where that is not all of it.
    """

    start: int
    count: int
    shape: tuple[int, ...]
    box: Box | None = None


class Selection(Protocol):
    """The chosen coordinates of one parameter."""

    def place(self, shard: Shard) -> Place:
        """Where the shard's are among all."""
        ...

    def parts(self, shard: Shard) -> list[Part]:
        """The chosen coordinates of a shard, in ascending order."""
        ...


class Everything:
    """All coordinates."""

    def place(self, shard: Shard) -> Place:
        return Place(shard.local_start, shard.length, shard.shape, shard.box)

    def parts(self, shard: Shard) -> list[Part]:
        return [Part(_one_row(shard))]


class Nothing:
    """No coordinate."""

    def place(self, shard: Shard) -> Place:
        return Place(0, 0, (0,))

    def parts(self, shard: Shard) -> list[Part]:
        return []


class Lines:
    """Whole rows (``dim`` 0) or columns (``dim`` 1) of a matrix of ``width`` columns.

    Args:
        index: int64, ascending, on the CPU.
        shape: of the matrix.
        device: where the shards lie.
    """

    def __init__(self, index: Tensor, dim: int, shape: tuple[int, int], device: torch.device) -> None:
        self._lines: list[int] = index.tolist()
        self._index = index.to(device)
        self._dim, self._shape = dim, shape

    def place(self, shard: Shard) -> Place:
        box = shard.box or Box.whole(shard.shape)
        (row, column), (num_rows, num_columns) = box.offsets, box.local
        first = (row, column)[self._dim]
        low, high = (bisect_left(self._lines, edge) for edge in (first, first + box.local[self._dim]))
        if self._dim == 1:
            shape, offsets, local = (self._shape[0], len(self._lines)), (row, low), (num_rows, high - low)
        else:
            shape, offsets, local = (len(self._lines), self._shape[1]), (low, column), (high - low, num_columns)
        start, end = (
            self._before(position, box, low) for position in (shard.local_start, shard.local_start + shard.length)
        )
        return Place(start, end - start, shape, Box(shape, offsets, local) if shard.box is not None else None)

    def _before(self, position: int, box: Box, low: int) -> int:
        """How many of the first ``position`` coordinates of a box are chosen, ``low`` being its first line."""
        row, column = divmod(position, box.local[1])
        if self._dim == 1:
            first, edge = box.offsets[1], box.offsets[1] + box.local[1]
            num_lines = bisect_left(self._lines, edge) - low
            return row * num_lines + bisect_left(self._lines, first + column) - low
        found = bisect_left(self._lines, box.offsets[0] + row)
        inside = found < len(self._lines) and self._lines[found] == box.offsets[0] + row
        return (found - low) * box.local[1] + (column if inside else 0)

    def parts(self, shard: Shard) -> list[Part]:
        found = []
        for block in blocks_of(shard):
            first, count = (block.column, block.num_columns) if self._dim == 1 else (block.row, block.num_rows)
            low, high = bisect_left(self._lines, first), bisect_left(self._lines, first + count)
            if low < high:
                found.append(Part(block, self._dim, self._index[low:high] - first))
        return found


class Scattered:
    """Exactly ``count`` of ``numel`` coordinates, pseudo-random: those with the smallest hashes.

    The hash permutes 32-bit integers, so that there are no ties, and membership is computed where it is needed: no
    index is kept, and every shard of every rank finds its own, with about ten integer operations per position.

    Args:
        numel: below 2**31.
        device: where the shards lie.
    """

    def __init__(self, numel: int, count: int, seed: int, device: torch.device) -> None:
        self._seed, self._count = seed, count
        self._device = device
        hashes = torch.cat([self._hash(start, length) for start, length in _chunks(0, numel)])
        self._largest = hashes.kthvalue(count).values

    def _hash(self, start: int, length: int) -> Tensor:
        positions = torch.arange(start, start + length, dtype=torch.int32, device=self._device)
        # Without the multiplication the sets of two seeds would be each other's translates.
        return hash_positions(positions * (self._seed >> 32 | 1), self._seed)

    def place(self, shard: Shard) -> Place:
        start, count = (
            sum(int((self._hash(*chunk) <= self._largest).sum()) for chunk in _chunks(first, length))
            for first, length in ((0, shard.start), (shard.start, shard.length))
        )
        return Place(start, count, (self._count,))

    def parts(self, shard: Shard) -> list[Part]:
        index = [
            (self._hash(first, count) <= self._largest).nonzero().view(-1) + (first - shard.start)
            for first, count in _chunks(shard.start, shard.length)
        ]
        return [Part(_one_row(shard), 1, torch.cat(index))]


def _one_row(shard: Shard) -> Block:
    return Block(0, 0, 1, shard.length, 0)


def _chunks(start: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, start + length, _CHUNK):
        yield first, min(_CHUNK, start + length - first)

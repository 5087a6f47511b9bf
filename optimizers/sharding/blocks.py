"""A shard of a matrix as rectangles."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .shards import Shard


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix that lies in one piece within a shard.

    Attributes:
        row, column: of its first element in the matrix.
        num_rows, num_columns: its size; it spans all columns that the shard's process has unless it has one row.
        offset: of its first element in the shard.
    """

    row: int
    column: int
    num_rows: int
    num_columns: int
    offset: int

    def of(self, piece: Tensor) -> Tensor:
        """This rectangle of a 1-D tensor shaped like the shard, as a 2-D view."""
        size = self.num_rows * self.num_columns
        return piece.narrow(0, self.offset, size).view(self.num_rows, self.num_columns)


def blocks_of(shard: Shard) -> Iterator[Block]:
    """The shard of a matrix as one to three blocks: what it has of its first row, whole rows, what it has of its last.

    Rows and columns are those of the whole matrix, also where the process has only a box of it.

    So a flat partition, cut anywhere, is multiplied as matrices without copies.
    """
    (first_row, first_column), (_, width) = (shard.box.offsets, shard.box.local) if shard.box else ((0, 0), shard.shape)
    position, end = shard.local_start, shard.local_start + shard.length
    while position < end:
        row, column = divmod(position, width)
        whole_rows = (end - position) // width if column == 0 else 0
        num_columns = width if whole_rows else min(width - column, end - position)
        place = (first_row + row, first_column + column)
        block = Block(*place, max(1, whole_rows), num_columns, position - shard.local_start)
        yield block
        position += block.num_rows * block.num_columns

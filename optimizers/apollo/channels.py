"""The channels of matrices: indices along the longer side, which have moments and scaling factors of their own."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..sharding.blocks import Block
from ..sharding.shards import Shard

ScaleType = Literal["channel", "tensor"]


def sides_of(block: Block, *, tall: bool) -> tuple[slice, slice]:
    """The block's extent along the projected side and along the channels.

    Args:
        tall: the channels are the rows; they are the longer side.
    """
    rows = slice(block.row, block.row + block.num_rows)
    columns = slice(block.column, block.column + block.num_columns)
    return (columns, rows) if tall else (rows, columns)


def own_channels(shard: Shard) -> range:
    """The channels, indices along the longer side of the matrix, whose state is kept with this shard.

    The longer side is cut where the shards cut the flattened matrix, or its boxes in a row, in proportion: every
    channel belongs to one shard, whatever the number of ranks, and a shard's channels take its share of the memory.
    """
    shorter = min(shard.shape)
    return range(-(-shard.place // shorter), -(-(shard.place + shard.length) // shorter))


class Layout:
    """Where each matrix's channels and factors lie in the vectors that are summed over the ranks.

    Attributes:
        channels: slices of the vectors with one entry per channel.
        factors: slices of those with one entry per scaling factor: per channel or per matrix.
    """

    def __init__(self, members: Mapping[str, tuple[int, ...]], scale_type: ScaleType) -> None:
        self.channels = _consecutive({name: max(shape) for name, shape in members.items()})
        self.factors = self.channels if scale_type == "channel" else _consecutive(dict.fromkeys(members, 1))

    @property
    def num_channels(self) -> int:
        return max(part.stop for part in self.channels.values())

    @property
    def num_factors(self) -> int:
        return max(part.stop for part in self.factors.values())

    def part(self, vector: Tensor, shard: Shard, channels: range) -> Tensor:
        """These channels of the shard's matrix in a vector or matrix with one row per channel."""
        first = self.channels[shard.name].start
        return vector[first + channels.start : first + channels.stop]

    def split(self, vector: Tensor, slices: Mapping[str, slice]) -> Iterator[Tensor]:
        """The matrices' parts of a vector, as views."""
        return (vector[part] for part in slices.values())

    def total(self, vector: Tensor, slices: Mapping[str, slice]) -> Tensor:
        """The matrices' sums, (matrices,)."""
        return torch.stack([part.sum() for part in self.split(vector, slices)])


def _consecutive(lengths: Mapping[str, int]) -> dict[str, slice]:
    found, start = {}, 0
    for name, length in lengths.items():
        found[name] = slice(start, start + length)
        start += length
    return found

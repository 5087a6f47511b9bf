"""Shards of parameters that are stacks of matrices, as experts are kept: every matrix by itself."""

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from .shards import Shard, ShardMap


def matrix_name(parameter: str, position: int) -> str:
    """What a matrix of a stack is called."""
    return f"{parameter}[{position}]"


class StackedShards:
    """A :class:`~.shards.ShardMap` in which each matrix of a stack ``(k, a, b)`` is a parameter ``(a, b)``.

    A shard of the stack, cut anywhere, becomes the end of one matrix, whole ones, and the beginning of another.

    Args:
        inner: how the parameters themselves are cut; without boxes.
        stacks: names of the parameters that are stacks.
    """

    def __init__(self, inner: ShardMap, stacks: Collection[str]) -> None:
        self._inner, self._stacks = inner, frozenset(stacks)
        self._shards: dict[Tensor, list[Shard]] = {}

    @property
    def num_process_ranks(self) -> int:
        return self._inner.num_process_ranks

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        if flat not in self._shards:
            self._shards[flat] = [part for shard in self._inner.shards_of(flat) for part in self._split(shard)]
        return self._shards[flat]

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._inner.members_of(flat).items():
            found |= (
                {matrix_name(name, i): shape[1:] for i in range(shape[0])} if name in self._stacks else {name: shape}
            )
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._inner.sum_(tensor)

    def _split(self, shard: Shard) -> list[Shard]:
        if shard.name not in self._stacks:
            return [shard]
        assert shard.box is None
        found, size, done = [], math.prod(shard.shape[1:]), 0
        while done < shard.length:
            position, start = divmod(shard.local_start + done, size)
            length = min(size - start, shard.length - done)
            name = matrix_name(shard.name, position)
            found.append(Shard(name, shard.shape[1:], start, length, shard.flat, shard.offset + done))
            done += length
        return found

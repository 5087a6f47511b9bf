"""Shards of parameters that are stacks of matrices, as experts are kept: every matrix by itself."""

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from .box import Box
from .shards import Shard, ShardMap

Members = Mapping[str, tuple[int, ...]]


def matrix_name(parameter: str, position: int) -> str:
    """What a matrix of a stack is called."""
    return f"{parameter}[{position}]"


class StackedShards:
    """A :class:`~.shards.ShardMap` in which each matrix of a stack ``(k, a, b)`` is a parameter ``(a, b)``.

    A shard of the stack, cut anywhere, becomes the end of one matrix, whole ones, and the beginning of another.

    Args:
        inner: how the parameters themselves are cut.
        stacks: names of the parameters that are stacks.
    """

    def __init__(self, inner: ShardMap, stacks: Collection[str]) -> None:
        self._inner, self._stacks = inner, frozenset(stacks)
        self._shards: dict[Tensor, list[Shard]] = {}
        # The inner map's, and ours of them: the same object for the same.
        self._members: dict[Tensor, tuple[Members, Members]] = {}

    @property
    def is_cut(self) -> bool:
        return self._inner.is_cut

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        if flat not in self._shards:
            self._shards[flat] = [part for shard in self._inner.shards_of(flat) for part in self._split(shard)]
        return self._shards[flat]

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        if flat not in self._members:
            inner = self._inner.members_of(flat)
            same = next((own for of, own in self._members.values() if of is inner), None)
            self._members[flat] = inner, same if same is not None else self._split_members(inner)
        return self._members[flat][1]

    def _split_members(self, members: Members) -> Members:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in members.items():
            is_stack = name in self._stacks
            found |= {matrix_name(name, i): shape[1:] for i in range(shape[0])} if is_stack else {name: shape}
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._inner.sum_(tensor)

    def _split(self, shard: Shard) -> list[Shard]:
        if shard.name not in self._stacks:
            return [shard]
        box = shard.box or Box.whole(shard.shape)
        of_matrix = Box(shard.shape[1:], box.offsets[1:], box.local[1:]) if shard.box is not None else None
        found, size, done = [], math.prod(box.local[1:]), 0
        while done < shard.length:
            number, start = divmod(shard.local_start + done, size)
            length = min(size - start, shard.length - done)
            name, offset = matrix_name(shard.name, box.offsets[0] + number), shard.offset + done
            found.append(Shard(name, shard.shape[1:], start, length, shard.flat, offset, of_matrix, shard.is_counted))
            done += length
        return found

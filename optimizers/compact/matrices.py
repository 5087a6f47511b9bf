"""The matrices in what a compact optimizer trains, and which process rank updates those that ZeRO has cut."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..sharding.shards import ShardMap


@dataclass(frozen=True)
class Matrices:
    """What a parameter holds: one matrix, or several below each other.

    Attributes:
        rows, columns: of each, as it is stored.
        transposed: stored as inputs times outputs.
    """

    count: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def size(self) -> int:
        """Elements of each."""
        return self.rows * self.columns

    @property
    def outputs_and_inputs(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


@dataclass(frozen=True)
class Key:
    """A matrix: the name of its parameter, and its number in it."""

    name: str
    number: int


@dataclass(frozen=True)
class Piece:
    """What this process rank steps of a matrix.

    Attributes:
        start: position of the first element in the flattened matrix.
        offset: in the flat tensor that is stepped.
    """

    start: int
    length: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """This piece of a tensor shaped like the one that is stepped, 1-D."""
        return flat.detach().view(-1).narrow(0, self.offset, self.length)


@runtime_checkable
class CutShards(ShardMap, Protocol):
    """Shards on several process ranks that can send pieces to each other."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """Number of process ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank computes; what is stepped may lie elsewhere."""
        ...

    def exchange(self, tensor: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send ``sent[i]`` elements of a 1-D tensor, one part after the other, to each rank ``i``, and return what
        comes, ``received[i]`` from each. Collective; nothing is sent to itself.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """Who updates the matrices in a flat tensor.

    Attributes:
        own: of this rank, by matrix, ascending: what it steps of each.
        whole: the matrices that are whole on this rank.
        cut: those that lie on several, the same on all ranks; by matrix, the rank that puts it together and updates it.
        held: by cut matrix, what each rank has of it: start and length.
    """

    own: Mapping[Key, Piece]
    whole: Sequence[Key]
    cut: Mapping[Key, int]
    held: Mapping[Key, Sequence[tuple[int, int]]]


def pieces_of(flat: Tensor, matrices: Mapping[str, Matrices], shards: ShardMap) -> Iterator[tuple[Key, Piece]]:
    """This rank's pieces of matrices in a flat tensor."""
    for shard in shards.shards_of(flat):
        size, position = matrices[shard.name].size, shard.start
        end, offset = shard.start + shard.length, shard.offset
        while position < end:
            number, start = divmod(position, size)
            length = min(size - start, end - position)
            yield Key(shard.name, number), Piece(start, length, offset)
            position, offset = position + length, offset + length


def make_plan(flat: Tensor, matrices: Mapping[str, Matrices], shards: ShardMap) -> Plan:
    """Find who updates what. Collective where parameters are cut.

    A cut matrix is updated by the rank with the most of it; of several, by the one that has the least to do so far.

    Raises:
        RuntimeError: parameters are cut by an engine that cannot bring their pieces together.
    """
    own = dict(pieces_of(flat, matrices, shards))
    if not shards.is_cut:
        return Plan(own, list(own), {}, {})
    if not isinstance(shards, CutShards):
        raise RuntimeError(f"matrices are cut by {type(shards).__name__}, which cannot bring their pieces together")
    keys = [Key(name, number) for name in shards.members_of(flat) for number in range(matrices[name].count)]
    table = torch.zeros(shards.size, len(keys), 2, dtype=torch.int64)
    for position, key in enumerate(keys):
        if key in own:
            table[shards.rank, position] = torch.tensor([own[key].start, own[key].length])
    held = shards.sum_(table).tolist()
    cut, of_key, load = {}, {}, [0] * shards.size
    for position, key in enumerate(keys):
        parts = [tuple(of_rank[position]) for of_rank in held]
        most = max(length for _, length in parts)
        if most < matrices[key.name].size:
            updater = min((r for r, (_, length) in enumerate(parts) if length == most), key=lambda r: load[r])
            cut[key], of_key[key] = updater, parts
            load[updater] += matrices[key.name].size
    return Plan(own, [key for key in own if key not in cut], cut, of_key)

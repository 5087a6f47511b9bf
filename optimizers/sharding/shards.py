"""Which pieces of which parameters a process rank updates, and sums over the ranks that hold the other pieces.

Optimizers that need the whole averaged gradient (norms, projections, signs) see only this: one description of plain
tensors, of FSDP2's row shards and of ZeRO's flat partitions, which are cut anywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .box import Box


@dataclass(frozen=True)
class Shard:
    """A piece of a parameter that this process rank updates.

    Attributes:
        name: the parameter's name in the model.
        shape: of the whole parameter.
        local_start: position of the first element within the flattened ``box``, or parameter where there is none.
        length: number of elements.
        flat: the tensor that the optimizer steps; the key of its state.
        offset: position of the first element within ``flat``.
        box: the part of the parameter that the process's tensor is, where that is not all of it.
        is_counted: of the process ranks that hold the same elements, this one adds them to sums over all.
    """

    name: str
    shape: tuple[int, ...]
    local_start: int
    length: int
    flat: Tensor
    offset: int
    box: Box | None = None
    is_counted: bool = True

    @property
    def start(self) -> int:
        """Position of the first element within the flattened parameter, in which all are neighbours.

        Raises:
            ValueError: they are not, as in a row-parallel slice.
        """
        runs = list(self.runs())
        if len(runs) > 1:
            raise ValueError(
                f"{self.name}: expected elements that are neighbours in the {self.shape} parameter, got a slice"
                f" of shape {self.box and self.box.local}, which this optimizer does not work on"
            )
        return runs[0][0] if runs else 0

    @property
    def is_one_run(self) -> bool:
        """Whether all its elements are neighbours in the flattened parameter: it has a :attr:`start` then."""
        runs = self.runs()
        next(runs, None)
        return next(runs, None) is None

    @property
    def holds_first(self) -> bool:
        """Whether the first element of the parameter is here."""
        return self.local_start == 0 and (self.box is None or not any(self.box.offsets))

    @property
    def place(self) -> int:
        """Where its elements begin if each box of the parameter, all of one size, follows the one before: over all
        shards together every number below the parameter's is there once, however it was cut.
        """
        if self.box is None or self.box.is_one_run:
            return self.start
        number = 0
        for offset, size, whole in zip(self.box.offsets, self.box.local, self.shape, strict=True):
            number = number * (whole // size) + offset // size
        return number * math.prod(self.box.local) + self.local_start

    @property
    def position(self) -> int | Tensor:
        """The position of the first element within the flattened parameter; of every element, int64 ``(length,)``,
        where they are not neighbours in it. What hashes positions (rounding) takes either.
        """
        if self.box is None:
            return self.local_start
        runs = list(self.runs())
        if len(runs) == 1:
            return runs[0][0]
        return self.box.positions(self.local_start, self.length, self.flat.device)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """The shard as runs of the flattened parameter: position in it, position in the shard, length."""
        if self.box is None:
            return iter([(self.local_start, 0, self.length)])
        return self.box.runs(self.local_start, self.length)

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of ``flat``, or of a tensor shaped like it (gradient, state), as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


@dataclass(frozen=True)
class StatePiece:
    """A run of elements of a parameter's state that is not shaped like the parameter.

    Attributes:
        name: the parameter's.
        key: the state's, such as ``exp_avg``.
        start: position of the first element within the state of the whole parameter, flattened in an order that does
            not depend on how the parameter was cut, or within the ``box``.
        tensor: 1-D view of the live state, to save it or to write to it.
        shape: of the state of the whole parameter.
        box: the part of that state that the process has, where its elements are no neighbours in it.
    """

    name: str
    key: str
    start: int
    tensor: Tensor
    shape: tuple[int, ...]
    box: Box | None = None

    @property
    def shard(self) -> Shard:
        """As a shard of the state."""
        return Shard(self.name, self.shape, self.start, self.tensor.numel(), self.tensor, 0, self.box)


class ShardMap(Protocol):
    """How the parameters are cut. Everything is the same on all ranks but the shards themselves."""

    @property
    def is_cut(self) -> bool:
        """Whether a member may lie in several tensors, here or on other ranks: all of a group are updated together,
        and what is summed over a member is summed over the ranks.
        """
        ...

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        """This rank's shards in ``flat``, in ascending offset; padding belongs to none."""
        ...

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        """Name and whole shape of each parameter that lies in ``flat`` on some rank, in the same order on all."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place. Collective: all ranks call it in the same order with equal shapes."""
        ...


def all_members(shards: ShardMap, flats: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """The members of all these tensors, in order; many may have the same ones."""
    found: dict[str, tuple[int, ...]] = {}
    for members in {id(members): members for members in map(shards.members_of, flats)}.values():
        found |= members
    return found


class LocalShards:
    """Every parameter is one whole shard: one process, or DDP."""

    is_cut = False

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        return [Shard(self._name_of(flat), tuple(flat.shape), 0, flat.numel(), flat, 0)]

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        return {self._name_of(flat): tuple(flat.shape)}

    def _name_of(self, flat: Tensor) -> str:
        if id(flat) not in self._names:
            raise RuntimeError(
                "the optimizer was given a parameter that is not its model's: another library replaced them (ZeRO and"
                " FSDP do; under ZeRO let this package's initialize make the engine), or the optimizer was copied"
            )
        return self._names[id(flat)]

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

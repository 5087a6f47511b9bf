"""The pieces of the model's weights that this process rank steps, and sums over those that hold the others."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from narrowgauge.optimizers.sharding.communicator import Communicator
from narrowgauge.optimizers.sharding.shards import Shard

from .layout import Place
from .masters import MasterCopies
from .parts import LocalParameter

Members = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeldShard(Shard):
    """A shard with the parameter it is of."""

    parameter: LocalParameter | None = None


def held_shards(
    held: Iterable[tuple[LocalParameter, nn.Parameter]], masters: MasterCopies, place: Place, *, distributed: bool
) -> Iterator[HeldShard]:
    """What of the parameters' masters is of which weight.

    Args:
        place: of this process rank.
        distributed: masters are cut over the data-parallel ranks.
    """
    for parameter, tensor in held:
        master = masters.of(tensor)
        if master is None:
            continue
        first, end = master.start, master.start + master.tensor.numel()
        is_counted = parameter.is_counted_by(place) and (distributed or parameter.copy_on(place) == 0)
        for part in parameter.parts:
            begin, stop = max(first, part.offset), min(end, part.offset + part.numel)
            if begin < stop:
                yield HeldShard(
                    part.name,
                    part.box.shape,
                    begin - part.offset,
                    stop - begin,
                    master.tensor,
                    begin - first,
                    part.box,
                    is_counted,
                    parameter,
                )


class StageShards:
    """The shards of a stage of the pipeline as :class:`narrowgauge.optimizers.sharding.shards.ShardMap`.

    Args:
        shards: of this process rank.
        members: of each tensor that is stepped, by ``id``, those of its parameter group on all ranks of the stage.
        ranks: of the stage.
    """

    def __init__(self, shards: Iterable[Shard], members: Mapping[int, Members], ranks: Communicator) -> None:
        self._shards: dict[int, list[Shard]] = {}
        for shard in shards:
            self._shards.setdefault(id(shard.flat), []).append(shard)
        self._members, self._ranks = members, ranks

    @property
    def is_cut(self) -> bool:
        """Experts of one weight lie in parameters of their own, also on one rank."""
        return True

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        return self._shards.get(id(flat), [])

    def members_of(self, flat: Tensor) -> Members:
        return self._members[id(flat)]

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum_(tensor)

"""What DeepSpeed steps: a flat fp32 tensor for each group, with this process rank's pieces of the parameters."""

from collections.abc import Callable

from torch import Tensor, nn

from narrowgauge.optimizers.sharding.shards import Shard

from ..masters import Master


class ZeroMasters:
    """The masters of a model under ZeRO, once it has an engine.

    Attributes:
        flats: by ``id`` of a master's tensor, the flat one that it is a piece of, and its place there.
    """

    def __init__(self) -> None:
        self._by_parameter: dict[int, Master] = {}
        self._gather: Callable[[], None] = lambda: None
        self.flats: dict[int, tuple[Tensor, int]] = {}

    def bind(self, shards: list[tuple[nn.Parameter, Shard]], gather: Callable[[], None]) -> None:
        """
        Args:
            shards: this rank's, with the parameters that they are of.
            gather: makes the parameters what all ranks' pieces of them are.
        """
        self._gather = gather
        for parameter, shard in shards:
            piece = shard.flat.detach().view(-1).narrow(0, shard.offset, shard.length)
            self._by_parameter[id(parameter)] = Master(piece, shard.local_start)
            self.flats[id(piece)] = (shard.flat, shard.offset)

    def of(self, parameter: nn.Parameter) -> Master | None:
        return self._by_parameter.get(id(parameter))

    def gather(self, *, now: bool = False) -> None:
        """Nothing where it is not asked for ``now``: DeepSpeed gathers after each step."""
        if now:
            self._gather()

"""What a compact optimizer needs from whoever holds the tensors, and the plain-torch answer."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers.targets import CompactLayer
from ..numerics.seeds import derive_seed
from ..sharding.communicator import Communicator, CommunicatorOf, GroupCommunicator, one_for_all
from ..sharding.shards import ShardMap


class SubspaceBackend(Protocol):
    """Access to the compact values, the weights and the optimizer state, wherever they are sharded.

    All methods are collective: every process rank calls them at the same step with the same arguments.
    """

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        """The layer's full weight is readable inside; used once, to fill ``compact`` after the conversion."""
        ...

    def fold(self, layers: Sequence[CompactLayer]) -> None:
        """Make the weights that the next forward reads hold the compact values of the last step."""
        ...

    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        """Scale the weights by ``decay``, add the changes that the compact values stand for, and set these to zero.

        A bf16 weight is rounded stochastically with ``seed``: a change far below its precision is kept on average.

        Args:
            decay_last: scale what has been changed.
        """
        ...

    def communicator(self, name: str) -> Communicator:
        """The process ranks that average the gradient of the layer of this name; one object for each group."""
        ...

    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        """Put the compact values back for good, scale the entries that were not selected by ``decay``, and select anew.

        Where masters are more precise than the weights, what is written back is rounded stochastically with ``seed``.
        """
        ...

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        """The tensors that key the optimizer state of a parameter group."""
        ...

    def shards(self) -> ShardMap | None:
        """How the state tensors are cut; None where every rank holds one for each parameter."""
        ...


class LocalBackend:
    """One process, or DDP: every rank holds every tensor and they agree.

    Args:
        communicator_of: the ranks that average a layer's gradient, by its name; by default those of
            ``torch.distributed``'s default group.
    """

    def __init__(self, communicator_of: CommunicatorOf | None = None) -> None:
        self._communicator_of = communicator_of or one_for_all(GroupCommunicator())

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def fold(self, layers: Sequence[CompactLayer]) -> None:
        for layer in layers:
            layer.module.apply_(layer.module.weight, layer.module.compact)

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        for layer, index, decay in zip(layers, indices, decays, strict=True):
            module = layer.module
            module.apply_(module.weight, module.compact, decay, seed=derive_seed(seed, "decay", layer.name))
            module.set_subspace({"index": index})
            module.compact.copy_(module.compact_of(module.weight))

    @torch.no_grad()
    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        for layer, decay in zip(layers, decays, strict=True):
            module, fold_seed = layer.module, derive_seed(seed, "fold", layer.name)
            module.apply_(module.weight, module.compact, decay, seed=fold_seed, decay_last=decay_last)
            module.compact.zero_()

    def communicator(self, name: str) -> Communicator:
        return self._communicator_of(name)

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        return group["params"]

    def shards(self) -> ShardMap | None:
        return None

"""What a compact optimizer needs from whoever holds the tensors, and the plain-torch answer."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .conversion import CompactLayer
from .rounding import stochastic_round_
from .selection import derive_seed


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


class LocalBackend:
    """One process, or DDP: every rank holds every tensor and they agree."""

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def fold(self, layers: Sequence[CompactLayer]) -> None:
        for layer in layers:
            layer.module.write_(layer.module.weight, layer.module.compact)

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        for layer, index, decay in zip(layers, indices, decays, strict=True):
            module = layer.module
            decay_(module.weight, decay, seed=derive_seed(seed, "decay", layer.name))
            module.write_(module.weight, module.compact)
            module.set_index(index)
            module.compact.copy_(module.read(module.weight))

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        return group["params"]


def decay_(weight: Tensor, factor: float, *, seed: int, offset: int = 0) -> None:
    """Scale ``weight`` in place; in bf16 with stochastic rounding, where a factor near 1 would else be lost.

    Args:
        offset: position of the first element within the whole tensor, for a shard.
    """
    if factor == 1.0:
        return
    if weight.dtype is torch.bfloat16:
        stochastic_round_(weight, weight.float() * factor, seed=seed, offset=offset)
    else:
        weight.mul_(factor)

"""What a compact optimizer adds to the engine."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from narrowgauge.optimizers import CompactOptimizer
from narrowgauge.optimizers.sharding.shards import Shard

from ..masters import MasterCopies
from ..own_part import Made, OwnPart, of_all_ranks
from .backend import MegatronBackend
from .tree import compact_units_of


class CompactPart(OwnPart):
    """What a compact optimizer trains of a model: conversion before Megatron's DDP.

    Args:
        made: as of the base class.
        overlaps: as of :class:`.MegatronBackend`.
    """

    own: CompactOptimizer[Any]

    def __init__(self, made: Made, masters: MasterCopies, *, overlaps: bool) -> None:
        super().__init__(made)
        own = self.own
        shapes = {held.name: held.parts[0].box.shape for held, _ in self.parameters}
        self._shapes = {name: shape for found in of_all_ranks(shapes) for name, shape in found.items()}
        self._backend = MegatronBackend(own.layers, masters, overlaps=overlaps)
        own.defer_to_engine(self._backend)

    def trainable_shapes(self, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return super().trainable_shapes(weights) | self._shapes

    def take_shards(self, shards: Iterable[Shard]) -> None:
        self._backend.take_shards(shards)

    def before_step(self) -> None:
        super().before_step()
        self._backend.sum_replicated()

    def before_save(self) -> None:
        self._backend.bring_up_to_date()
        super().before_save()

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        names = {f"{layer.name}.{key}" for layer in self.own.layers for key in layer.module.subspace()}
        tensors = {name: tensor for name, tensor in state.get("tensors", {}).items() if name in names}
        self.own.load_subspace_state({**state, "tensors": tensors})

    @torch.no_grad()
    def rebuild(self) -> None:
        """Take the compact values from the weights."""
        for unit in compact_units_of(self.own):
            unit.compact.copy_(unit.compact_of(unit.weight))
            for linear in unit.linears:
                linear.is_stale = False

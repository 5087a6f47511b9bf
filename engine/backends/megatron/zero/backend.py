"""Where ZeRO keeps what compact layers of Megatron train, and how a subspace changes there."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.optimizers.layers.targets import CompactLayer
from narrowgauge.optimizers.numerics.rounding import stochastic_round_
from narrowgauge.optimizers.numerics.seeds import derive_seed

from ...deepspeed.model_parallel import gathered_shards, master_shard, rewritten
from ...deepspeed.privates import gather_again, own_shard, state_of_stage_3
from ..compact.backend import MegatronBackend
from ..compact.engine_part import CompactPart
from ..compact.parallel_weight import ParallelUnit, SelectedParallelWeight
from ..own_part import Made
from .masters import ZeroMasters
from .mpu import sum_over_tensor_parallel_ranks


class WholeBackend(MegatronBackend):
    """ZeRO-1 and 2: the weights and compact values of this process rank are whole here, masters and moments in flat
    pieces.
    """

    def __init__(self, layers: Sequence[CompactLayer], masters: ZeroMasters) -> None:
        super().__init__(layers, masters, overlaps=False)

    def sum_replicated(self) -> None:
        """They are summed in backward."""

    def bring_up_to_date(self) -> None:
        """After each step they are."""


class CutBackend(WholeBackend):
    """ZeRO-3: they are in shards, too.

    After each step the shards of the weights take over the compact values, which are gathered for that: backward
    gathers the weights again and reads them, and a packed layer cannot tell who used it last.

    Args:
        wrapper: DeepSpeed's, around the optimizer.
    """

    def __init__(self, layers: Sequence[CompactLayer], masters: ZeroMasters, wrapper: Any) -> None:
        super().__init__(layers, masters)
        self._wrapper = wrapper

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        return state_of_stage_3(self._wrapper, group)

    @torch.no_grad()
    def fold(self, layers: Sequence[CompactLayer]) -> None:
        weights: dict[int, Tensor] = {}
        for unit in map(_unit, layers):
            assert isinstance(unit, SelectedParallelWeight)
            weight: Tensor = unit.layer.weight
            values, (shard, start) = gathered_shards(unit.compact), own_shard(weight)
            places = unit.places().view(-1) - start
            is_here = (places >= 0) & (places < shard.numel())
            shard[places[is_here]] = values[is_here]
            weights[id(weight)] = weight
        gather_again(list(weights.values()))

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        for layer, index, decay in zip(layers, indices, decays, strict=True):
            self._round_master(layer, seed)
            with _whole(_unit(layer)):
                super().change_subspace([layer], [index], [decay], seed=seed)
        self._renew(layers)

    @torch.no_grad()
    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        for layer, decay in zip(layers, decays, strict=True):
            with _whole(_unit(layer)):
                super().add_changes([layer], [decay], seed=seed, decay_last=decay_last)
        self._renew(layers)

    def rebuild(self, units: Iterable[ParallelUnit]) -> None:
        """Take the compact values from the weights. Collective."""
        for unit in units:
            with _whole(unit):
                unit.compact.copy_(unit.compact_of(unit.weight))

    def _take(self, compact: nn.Parameter) -> None:
        """When it is cut again its master follows."""

    def _round_masters(self, layers: Sequence[CompactLayer], seed: int) -> None:
        """Before the compact values were whole."""

    def _round_master(self, layer: CompactLayer, seed: int) -> None:
        """Round this rank's shard of the fp32 master stochastically into that of the bf16 compact values."""
        unit = _unit(layer)
        shard, start = own_shard(unit.compact)
        if shard.dtype is torch.bfloat16:
            positions = unit.positions(start, shard.numel(), shard.device)
            master, round_seed = master_shard(unit.compact), derive_seed(seed, "round", layer.name)
            stochastic_round_(shard, master, seed=round_seed, offset=positions)
            gather_again([unit.compact])

    def _renew(self, layers: Sequence[CompactLayer]) -> None:
        gather_again([p for unit in map(_unit, layers) for p in (*unit.stored_weights, unit.compact)])


def _whole(unit: ParallelUnit) -> Any:
    return rewritten([*unit.stored_weights, unit.compact])


def _unit(layer: CompactLayer) -> ParallelUnit:
    module: Any = layer.module
    assert isinstance(module, ParallelUnit)
    return module


class ZeroCompactPart(CompactPart):
    """What a compact optimizer trains of a model under ZeRO; made before DeepSpeed has taken its parameters."""

    def __init__(self, made: Made, masters: ZeroMasters) -> None:
        super().__init__(made, masters, overlaps=False)
        self._masters = masters
        units = [_unit(layer) for layer in self.own.layers]
        sum_over_tensor_parallel_ranks(unit.compact for unit in units if unit.is_replicated)

    def engine_is_made(self, wrapper: Any, *, stage: int) -> None:
        """
        Args:
            wrapper: DeepSpeed's, around the optimizer.
        """
        layers = self.own.layers
        self._backend = (
            CutBackend(layers, self._masters, wrapper) if stage == 3 else WholeBackend(layers, self._masters)
        )
        self.own.backend = self._backend

    @torch.no_grad()
    def rebuild(self) -> None:
        if isinstance(self._backend, CutBackend):
            self._backend.rebuild(map(_unit, self.own.layers))
        else:
            super().rebuild()

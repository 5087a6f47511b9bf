"""Where DeepSpeed ZeRO keeps the compact values, the weights and the moments, and how a subspace changes there.

Masters and moments are reached through DeepSpeed's own parameter-to-fragment maps. Its ``safe_set_full_*`` helpers
are not used: they need the optimizer state of every group to be linked, which happens one group at a time, and
ZeRO-3's fails when a size is not divisible by the number of ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor

from narrowgauge.optimizers.compact.backend import LocalBackend
from narrowgauge.optimizers.layers.targets import CompactLayer
from narrowgauge.optimizers.layers.unit import CompactUnit
from narrowgauge.optimizers.numerics.rounding import stochastic_round_
from narrowgauge.optimizers.numerics.seeds import derive_seed
from narrowgauge.optimizers.sharding.communicator import one_for_all
from narrowgauge.optimizers.sharding.shards import ShardMap

from .privates import flat_bit16, fragment_of, gather_again, own_shard, state_of_stage_3


class DeepSpeedCommunicator:
    """DeepSpeed's process ranks, by its own collectives, whose bytes are counted."""

    @property
    def rank(self) -> int:
        return comm.get_rank()

    @property
    def size(self) -> int:
        return comm.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        comm.all_reduce(tensor)
        return tensor

    def average_(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor).div_(self.size)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        comm.broadcast(tensor, 0)
        return tensor


class PartitionedStateBackend(LocalBackend):
    """ZeRO-1 and ZeRO-2: weights and compact values whole on every rank, masters and moments in flat partitions.

    After a step every rank has the compact values of all ranks, so folding needs no traffic.
    """

    def __init__(self, zero_optimizer: Any, shards: Callable[[], ShardMap]) -> None:
        super().__init__(one_for_all(DeepSpeedCommunicator()))
        self._zero, self._make_shards = zero_optimizer, shards
        self._flat, self._partitions = flat_bit16(zero_optimizer)

    def shards(self) -> ShardMap:
        return self._make_shards()

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        if layers[0].module.compact.dtype is torch.bfloat16:
            self._round_masters(layers, seed)
        super().change_subspace(layers, indices, decays, seed=seed)
        for layer in layers:
            mapping = fragment_of(layer.module.compact)
            if mapping is not None:
                mapping.update_hp()

    @torch.no_grad()
    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        super().add_changes(layers, decays, seed=seed, decay_last=decay_last)
        for layer in layers:
            mapping = fragment_of(layer.module.compact)
            if mapping is not None:
                mapping.hp_fragment.zero_()

    def _round_masters(self, layers: Sequence[CompactLayer], seed: int) -> None:
        """Round this rank's fp32 masters stochastically into the bf16 compact values, and gather all ranks'."""
        for layer in layers:
            mapping = fragment_of(layer.module.compact)
            if mapping is not None:
                stochastic_round_(
                    mapping.lp_fragment,
                    mapping.hp_fragment.to(mapping.lp_fragment.device),
                    seed=derive_seed(seed, "round", layer.name),
                    offset=mapping.lp_fragment_address.start,
                )
        compact_groups = [i for i, g in enumerate(self._zero.optimizer.param_groups) if g["kind"] == "compact"]
        all_gather_dp_groups(
            groups_flat=[self._flat[i] for i in compact_groups],
            partitioned_param_groups=[self._partitions[i] for i in compact_groups],
            dp_process_group=[self._zero.real_dp_process_group[i] for i in compact_groups],
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )


class GatherOnceBackend(LocalBackend):
    """For the conversion of a model built under ``deepspeed.zero.Init``, before there is an engine."""

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        return _FillUnderZeroInit(layer)


class _FillUnderZeroInit:
    """Gather one weight; on exit shard the compact parameter that was filled from it, so only one layer is whole at a
    time.
    """

    def __init__(self, layer: CompactLayer) -> None:
        self._module = layer.module
        self._gather = deepspeed.zero.GatheredParameters([layer.module.weight])

    def __enter__(self) -> None:
        self._gather.__enter__()
        weight = self._module.weight
        self._module.compact.data = torch.empty(self._module.compact.shape, dtype=weight.dtype, device=weight.device)
        for key, value in self._module.subspace().items():
            setattr(self._module, key, value.to(weight.device))

    def __exit__(self, *exc: Any) -> None:
        self._gather.__exit__(*exc)
        if exc[0] is None:
            self._module.weight.convert_to_zero_parameters(param_list=[self._module.compact])  # pyright: ignore


class PartitionedWeightBackend:
    """ZeRO-3: weights, compact values, masters and moments all in flat shards.

    Between changes of subspace nothing is folded: DeepSpeed gathers ``compact`` together with ``weight`` in forward
    and again in backward, and the layer writes the one over the other (``CompactUnit.folds_at_use``). The shards of
    ``weight`` are brought up to date when the subspace changes and before a save.
    """

    def __init__(self, zero_optimizer: Any, layers: Sequence[CompactLayer], shards: Callable[[], ShardMap]) -> None:
        self._zero, self._make_shards = zero_optimizer, shards
        self._communicator = DeepSpeedCommunicator()
        for layer in layers:
            layer.module.folds_at_use = not layer.module.is_delta
            layer.module.weight_stays = False
            if layer.module.watch is not None:
                # Both tensors are put together anew for each use.
                layer.module.watch.is_on = False

    def communicator(self, name: str) -> DeepSpeedCommunicator:
        return self._communicator

    def shards(self) -> ShardMap:
        return self._make_shards()

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        raise NotImplementedError("compact values are filled before the engine is made")

    def fold(self, layers: Sequence[CompactLayer]) -> None:
        pass

    @torch.no_grad()
    def write_back(self, layers: Sequence[CompactLayer]) -> None:
        """Bring the shards of the weights up to date, for a save."""
        layers = [layer for layer in layers if not layer.module.is_delta]
        for layer in layers:
            _apply_to_shard(layer.module, _gather_compact(layer.module, _compact(layer).ds_tensor), 1.0, seed=0)
        gather_again([layer.module.weight for layer in layers])

    @torch.no_grad()
    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        for layer, decay in zip(layers, decays, strict=True):
            module, compact = layer.module, _compact(layer)
            fold_seed = derive_seed(seed, "fold", layer.name)
            whole = _gather_compact(module, compact.ds_tensor)
            _apply_to_shard(module, whole, decay, seed=fold_seed, decay_last=decay_last)
            compact.ds_tensor.zero_()
            safe_set_local_fp32_param(compact, compact.ds_tensor)
        gather_again([p for layer in layers for p in (layer.module.weight, layer.module.compact)])

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        for layer, index, decay in zip(layers, indices, decays, strict=True):
            module, compact = layer.module, _compact(layer)
            own = compact.ds_tensor
            if own.dtype is torch.bfloat16:
                _, start = own_shard(compact)
                master = safe_get_local_fp32_param(compact).to(own.device)
                own = torch.empty_like(own)
                stochastic_round_(own, master, seed=derive_seed(seed, "round", layer.name), offset=start)
            decay_seed = derive_seed(seed, "decay", layer.name)
            _apply_to_shard(module, _gather_compact(module, own), decay, seed=decay_seed)
            module.set_subspace({"index": index})
            _fill_compact_shard(module)
        gather_again([p for layer in layers for p in (layer.module.weight, layer.module.compact)])

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        return state_of_stage_3(self._zero, group)


def _compact(layer: CompactLayer) -> Any:
    """The compact parameter with the attributes DeepSpeed adds to it."""
    return layer.module.compact


def _gather_compact(module: CompactUnit, shard: Tensor) -> Tensor:
    """All ranks' shards of the compact values, flat, on this rank's device."""
    compact: Any = module.compact
    shard = shard.to(next(iter(module.subspace().values())).device)
    whole = shard.new_empty(shard.numel() * comm.get_world_size(group=compact.ds_process_group))
    comm.all_gather_into_tensor(whole, shard.contiguous(), group=compact.ds_process_group)
    return whole.narrow(0, 0, compact.ds_numel)


def _apply_to_shard(module: CompactUnit, compact: Tensor, decay: float, *, seed: int, decay_last: bool = False) -> None:
    """Bring this rank's shard of the weight up to date with the flat, whole compact values."""
    shard, start = own_shard(module.weight)
    module.apply_to_run_(shard, start, compact, decay, seed=seed, decay_last=decay_last)


def _fill_compact_shard(module: CompactUnit) -> None:
    """Take this rank's shard of the compact values, and its masters, from the weight's shards of all ranks."""
    compact: Any = module.compact
    # Every entry comes from exactly one rank: the sum is a copy.
    whole = module.compact_of_run(*own_shard(module.weight))
    comm.all_reduce(whole, group=compact.ds_process_group)
    own, start = own_shard(compact)
    own.copy_(whole.narrow(0, min(start, compact.ds_numel), own.numel()))
    safe_set_local_fp32_param(compact, compact.ds_tensor)

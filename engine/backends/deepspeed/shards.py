"""Which shard of which parameter this process rank's masters and moments belong to, for every ZeRO stage.

The one description that does not depend on how the parameters were cut, so a checkpoint written by some number of
ranks at some stage can be read by another number at another stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from narrowgauge.optimizers.layers.shape import whole_shape
from narrowgauge.optimizers.sharding.shards import Shard

from ...errors import UserError
from .privates import fragment_of, groups_and_masters, stage_3_masters_to_model, stage_3_position


def local_shards(engine: DeepSpeedEngine) -> list[Shard]:
    """This rank's shards of all trainable parameters of a DeepSpeed engine, in a fixed order.

    Raises:
        UserError: the engine's optimizer keeps its masters in a form that is not known here.
    """
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if isinstance(optimizer, torch.optim.Optimizer):
        return [
            Shard(engine.param_names[p], tuple(p.shape), 0, p.numel(), p, 0)
            for group in optimizer.param_groups
            for p in group["params"]
        ]
    shards = _stage_3 if stage == 3 else _stage_1_2
    return list(shards(engine))


def _groups(engine: DeepSpeedEngine) -> list[tuple[list[Any], Tensor]]:
    """The parameters of each group, or sub-group at stage 3, and the flat tensor that holds this rank's part of them.

    Raises:
        UserError: the engine's optimizer keeps its masters in a form that is not known here.
    """
    found = groups_and_masters(engine.optimizer)
    if found is None:
        name = type(engine.optimizer).__name__
        raise UserError(f"checkpoints of DeepSpeed's {name} are not supported; use ZeRO stage 1, 2 or 3")
    return found


def _stage_1_2(engine: DeepSpeedEngine) -> Iterator[Shard]:
    for parameters, flat in _groups(engine):
        for parameter in parameters:
            mapping = fragment_of(parameter)
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                shape = tuple(parameter.shape)
                yield Shard(engine.param_names[parameter], shape, low.start, high.numel, flat, high.start)


def _stage_3(engine: DeepSpeedEngine) -> Iterator[Shard]:
    optimizer = engine.optimizer
    for parameters, flat in _groups(engine):
        for parameter in parameters:
            offset, size = stage_3_position(optimizer, parameter)
            start = size * parameter.ds_zero_partition_rank
            length = max(0, min(size, parameter.ds_numel - start))
            if length:
                yield Shard(engine.param_names[parameter], whole_shape(parameter), start, length, flat, offset)


class EngineShards:
    """The shards of a DeepSpeed engine at ZeRO stage 1, 2 or 3, for optimizers that work on shards."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        own: Any = engine
        self.device: torch.device = torch.device(own.device)
        self._shards: dict[int, list[Shard]] = {}
        for shard in local_shards(engine):
            self._shards.setdefault(id(shard.flat), []).append(shard)
        self._members = {
            id(flat): {engine.param_names[p]: whole_shape(p) for p in parameters}
            for parameters, flat in _groups(engine)
        }

    @property
    def is_cut(self) -> bool:
        return comm.get_world_size() > 1

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        return sorted(self._shards.get(id(flat), []), key=lambda shard: shard.offset)

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        return self._members[id(flat)]

    @property
    def rank(self) -> int:
        return comm.get_rank()

    @property
    def size(self) -> int:
        return comm.get_world_size()

    def exchange(self, tensor: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :class:`~narrowgauge.optimizers.compact.matrices.CutShards`; what comes is on the engine's device."""
        came = torch.empty(sum(received), dtype=tensor.dtype, device=self.device)
        comm.all_to_all_single(came, tensor.to(self.device), list(received), list(sent))
        return came

    def sum_(self, tensor: Tensor) -> Tensor:
        on_device = tensor.to(self.device)
        comm.all_reduce(on_device)
        return tensor.copy_(on_device) if on_device is not tensor else tensor


@torch.no_grad()
def masters_to_model(engine: DeepSpeedEngine) -> None:
    """Make the model's parameters, on all ranks, the rounded copies of the masters. Collective."""
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    stage_3_masters_to_model(optimizer)

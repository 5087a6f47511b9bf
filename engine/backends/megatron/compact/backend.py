"""Where Megatron keeps the compact values, the weights and the moments, and how a subspace changes there."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from narrowgauge.optimizers.layers.targets import CompactLayer
from narrowgauge.optimizers.numerics.rounding import stochastic_round_
from narrowgauge.optimizers.numerics.seeds import derive_seed
from narrowgauge.optimizers.sharding.communicator import Communicator
from narrowgauge.optimizers.sharding.shards import Shard, ShardMap

from ..masters import MasterCopies
from ..shards import StageShards
from .linear import CompactParallelLinear
from .parallel_weight import ParallelUnit


class ParallelCommunicator:
    """The process ranks that share a weight's gradient: those that hold its other parts, and its copies.

    Args:
        tensor: ranks that hold other parts of it, among which parts add up.
        data: ranks among which gradients are averaged; those of experts are parts and copies to each other.
    """

    def __init__(self, tensor: dist.ProcessGroup, data: dist.ProcessGroup) -> None:
        self._tensor, self._data = tensor, data

    @property
    def rank(self) -> int:
        return self._tensor.rank() + self._tensor.size() * self._data.rank()

    @property
    def size(self) -> int:
        return self._tensor.size() * self._data.size()

    def sum_(self, tensor: Tensor) -> Tensor:
        for group in (self._tensor, self._data):
            if group.size() > 1:
                dist.all_reduce(tensor, group=group)
        return tensor

    def average_(self, tensor: Tensor) -> Tensor:
        """The sum of all parts, the mean of all copies."""
        return self.sum_(tensor).div_(self._data.size())

    def broadcast_(self, tensor: Tensor) -> Tensor:
        for group in (self._data, self._tensor):
            if group.size() > 1:
                dist.broadcast(tensor, group=group, group_src=0)
        return tensor


def communicator() -> ParallelCommunicator:
    """Of the stage: over all its ranks together every part of every weight adds up, experts' too, once for each
    data-parallel rank's data.
    """
    data: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    tensor: Any = parallel_state.get_tensor_model_parallel_group()
    return ParallelCommunicator(tensor, data)


class MegatronBackend:
    """Weights and compact values in parts on the tensor-parallel ranks; masters and moments whole, or in pieces on the
    data-parallel ranks.

    Args:
        layers: the optimizer's.
        overlaps: parameters are gathered while the next forward goes on: what a step has changed is here only then.
    """

    def __init__(self, layers: Sequence[CompactLayer], masters: MasterCopies, *, overlaps: bool) -> None:
        self._layers, self._masters, self._overlaps = list(layers), masters, overlaps
        self._communicator = communicator()
        self._shards: StageShards | None = None
        self._replicated: list[Any] = [unit.compact for unit in map(_unit, layers) if unit.is_replicated]

    def gathered(self, layer: CompactLayer) -> AbstractContextManager[Any]:
        return nullcontext()

    def communicator(self, name: str) -> Communicator:
        return self._communicator

    def state_tensors(self, group: dict[str, Any]) -> Iterable[Tensor]:
        return group["params"]

    def take_shards(self, shards: Iterable[Shard]) -> None:
        """What this process rank steps."""
        self._shards = StageShards(shards, {}, self._communicator)

    def shards(self) -> ShardMap | None:
        return self._shards

    def fold(self, layers: Sequence[CompactLayer]) -> None:
        for linear in _linears(layers):
            linear.is_stale = True
            if not self._overlaps:
                linear.fold()

    def bring_up_to_date(self) -> None:
        """Have the parameters and weights hold what the last step made of them, here and now. Collective."""
        self._masters.gather(now=True)
        for linear in _linears(self._layers):
            if linear.is_stale:
                linear.fold()

    @torch.no_grad()
    def sum_replicated(self) -> None:
        """Before gradients are used: sum those of compact values that all tensor-parallel ranks hold, each of which has
        seen its part of the weight only. Collective.
        """
        if not self._replicated:
            return
        gradients = [parameter.main_grad for parameter in self._replicated]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def change_subspace(
        self, layers: Sequence[CompactLayer], indices: Sequence[Tensor], decays: Sequence[float], *, seed: int
    ) -> None:
        if layers and layers[0].module.compact.dtype is torch.bfloat16:
            self._round_masters(layers, seed)
        elif self._overlaps:
            self._masters.gather(now=True)
        for layer, index, decay in zip(layers, indices, decays, strict=True):
            own = _unit(layer)
            own.apply_(own.weight, own.compact, decay, seed=derive_seed(seed, "decay", layer.name))
            own.set_subspace({"index": index})
            own.compact.copy_(own.compact_of(own.weight))
            self._take(own.compact)
        for linear in _linears(layers):
            linear.is_stale = False

    @torch.no_grad()
    def add_changes(
        self, layers: Sequence[CompactLayer], decays: Sequence[float], *, seed: int, decay_last: bool = False
    ) -> None:
        if self._overlaps:
            self._masters.gather(now=True)
        for layer, decay in zip(layers, decays, strict=True):
            own, fold_seed = _unit(layer), derive_seed(seed, "fold", layer.name)
            own.apply_(own.weight, own.compact, decay, seed=fold_seed, decay_last=decay_last)
            own.compact.zero_()
            self._take(own.compact)

    def _take(self, compact: nn.Parameter) -> None:
        """Make the master a copy of the compact values."""
        master = self._masters.of(compact)
        if master is not None and master.tensor is not compact:
            flat = master.tensor.detach().view(-1)
            flat.copy_(compact.detach().view(-1).narrow(0, master.start, flat.numel()))

    def _round_masters(self, layers: Sequence[CompactLayer], seed: int) -> None:
        """Round the fp32 masters stochastically into the bf16 compact values, and gather all ranks'."""
        for layer in layers:
            own = _unit(layer)
            master = self._masters.of(own.compact)
            if master is not None:
                flat = master.tensor.detach().view(-1)
                target = own.compact.detach().view(-1).narrow(0, master.start, flat.numel())
                positions = own.positions(master.start, flat.numel(), flat.device)
                stochastic_round_(target, flat, seed=derive_seed(seed, "round", layer.name), offset=positions)
        self._masters.gather(now=True)


def _unit(layer: CompactLayer) -> ParallelUnit:
    module: Any = layer.module
    assert isinstance(module, ParallelUnit)
    return module


def _linears(layers: Sequence[CompactLayer]) -> list[CompactParallelLinear]:
    return list({id(linear): linear for layer in layers for linear in _unit(layer).linears}.values())

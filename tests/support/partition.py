"""Flat partitions of parameter groups over real process ranks, cut at any places, as ZeRO makes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.optimizers import ShardedOptimizer
from narrowgauge.optimizers.sharding.shards import Shard

PADDING = 3


class Partition:
    """This rank's part of every parameter group of an optimizer, one flat tensor per group, with padding at its end.

    The optimizer's groups are replaced. Gradients and weights go between the model and the flat tensors in
    :meth:`step`, so that a test can compare whole weights.

    Attributes:
        num_sums: calls of :meth:`sum_` so far.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer, cuts: Sequence[float]) -> None:
        """
        Args:
            cuts: where the ranks' parts end, as shares of a group, for all ranks but the last.
        """
        self.is_cut = dist.get_world_size() > 1
        self.num_sums = 0
        self._optimizer = optimizer
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shards: dict[int, list[Shard]] = {}
        self._members: dict[int, dict[str, tuple[int, ...]]] = {}
        names = {id(p): name for name, p in self._parameters.items()}
        rank = dist.get_rank()
        for group in optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            ends = [0, *(round(cut * size) for cut in cuts), size]
            begin, end = ends[rank], ends[rank + 1]
            flat = nn.Parameter(torch.zeros(end - begin + PADDING, dtype=group["params"][0].dtype))
            shards, position = [], 0
            for parameter in group["params"]:
                first, last = max(begin, position), min(end, position + parameter.numel())
                if first < last:
                    shape = tuple(parameter.shape)
                    name = names[id(parameter)]
                    shards.append(Shard(name, shape, first - position, last - first, flat, first - begin))
                position += parameter.numel()
            self._shards[id(flat)] = shards
            self._members[id(flat)] = {names[id(p)]: tuple(p.shape) for p in group["params"]}
            group["params"] = [flat]
        for shard in self.all_shards():
            shard.of(shard.flat).copy_(self._part(self._parameters[shard.name], shard))
        optimizer.defer_to_engine(self)

    def shards_of(self, flat: Tensor) -> Sequence[Shard]:
        return self._shards[id(flat)]

    def members_of(self, flat: Tensor) -> Mapping[str, tuple[int, ...]]:
        return self._members[id(flat)]

    def sum_(self, tensor: Tensor) -> Tensor:
        self.num_sums += 1
        dist.all_reduce(tensor)
        return tensor

    def all_shards(self) -> list[Shard]:
        return [shard for shards in self._shards.values() for shard in shards]

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step from the model's gradients, which are the same on all ranks."""
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                flat.grad = torch.zeros_like(flat)
        for shard in self.all_shards():
            gradient = self._parameters[shard.name].grad
            assert gradient is not None
            assert shard.flat.grad is not None
            shard.of(shard.flat.grad).copy_(self._part(gradient, shard))
        rates = self._optimizer.learning_rates()
        self._optimizer.step()
        self._optimizer.after_step(rates)
        whole = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        for shard in self.all_shards():
            self._part(whole[shard.name], shard).copy_(shard.of(shard.flat))
        for name, parameter in self._parameters.items():
            dist.all_reduce(whole[name])
            parameter.copy_(whole[name])
            parameter.grad = None

    @staticmethod
    def _part(whole: Tensor, shard: Shard) -> Tensor:
        return whole.detach().view(-1)[shard.start : shard.start + shard.length]


def gather_pieces(optimizer: ShardedOptimizer) -> dict[tuple[str, str], Tensor]:
    """The state that is not shaped like the parameters, whole, by parameter and key; it must be covered once."""
    own = [
        (piece.name, piece.key, piece.start, piece.tensor.clone())
        for group in optimizer.param_groups
        for flat in group["params"]
        for piece in optimizer.state_pieces(flat)
    ]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    pieces: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for name, key, start, tensor in (entry for part in parts for entry in part):
        pieces.setdefault((name, key), []).append((start, tensor))
    found = {}
    for place, entries in pieces.items():
        entries.sort(key=lambda entry: entry[0])
        expected = 0
        for start, tensor in entries:
            assert start == expected, (place, start, expected)
            expected += tensor.numel()
        found[place] = torch.cat([tensor for _, tensor in entries])
    return found


def scatter_pieces(optimizer: ShardedOptimizer, whole: Mapping[tuple[str, str], Tensor]) -> None:
    """Write this rank's pieces of what :func:`gather_pieces` returned."""
    for group in optimizer.param_groups:
        for flat in group["params"]:
            for piece in optimizer.state_pieces(flat):
                saved = whole[piece.name, piece.key]
                piece.tensor.copy_(saved[piece.start : piece.start + piece.tensor.numel()])

"""FRUGAL's low-rank subspaces over shards: bases, projected gradients, and the updates' way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.precision import compute_dtype, widen
from ..sharding.blocks import blocks_of
from ..sharding.shards import ShardMap, all_members
from .low_rank import LowRank
from .subspaces import Slot, Subspaces


@dataclass(frozen=True)
class Compact:
    """Projected gradients of many parameters in one buffer, and Adam's updates of them in another.

    Attributes:
        offsets: where each parameter's projection begins.
    """

    offsets: dict[str, int]
    gradient: Tensor
    update: Tensor

    def whole(self, tensor: Tensor, slot: Slot) -> Tensor:
        """The projection of the slot's whole parameter, 1-D, in one of the two."""
        return tensor.narrow(0, self.offsets[slot.shard.name], slot.low_rank.numel)

    def own(self, tensor: Tensor, slot: Slot) -> Tensor:
        """The slot's part of it, which has its state on this rank."""
        return self.whole(tensor, slot).narrow(0, slot.place.start, slot.count)


class Projections:
    """The bases of the current low-rank subspaces, the same on every rank, and what is done with them.

    Attributes:
        bases: ``P`` by parameter, as far as found; emptied by the optimizer at a refresh.
    """

    def __init__(self, subspaces: Subspaces) -> None:
        self.bases: dict[str, Tensor] = {}
        self._subspaces = subspaces

    def project(self, shards: ShardMap, flats: Sequence[Tensor], slots: Sequence[Slot], *, refresh: int) -> Compact:
        """The whole projected gradients of all parameters that lie in ``flats`` on some rank. Collective.

        Args:
            slots: those of this rank's shards that have a low-rank selection.
        """
        projected = {*self._subspaces.projected}
        members = {name: self._subspaces.low_rank_of(name) for name in all_members(shards, flats) if name in projected}
        offsets, total = {}, 0
        for name, low_rank in members.items():
            offsets[name] = total
            total += low_rank.numel
        buffers = [torch.zeros(total, dtype=compute_dtype(flats[0]), device=flats[0].device) for _ in range(2)]
        compact = Compact(offsets, *buffers)
        self._find_bases(shards, members, slots, refresh, like=buffers[0])
        for slot in slots:
            if not slot.shard.is_counted:
                continue
            target, basis = compact.whole(compact.gradient, slot), self.bases[slot.shard.name]
            slot.low_rank.add_projection_(target, slot.shard, gradient_of(slot), basis)
        _sum_(shards, compact.gradient)
        return compact

    def expand(self, compact: Compact, slot: Slot) -> tuple[Tensor, Tensor]:
        """The slot's shard of the projected gradient and of Adam's update, in the parameter's space."""
        basis = self.bases[slot.shard.name]
        first, second = (
            slot.low_rank.expand(compact.whole(tensor, slot), slot.shard, basis)
            for tensor in (compact.gradient, compact.update)
        )
        return first, second

    def sum_updates(self, shards: ShardMap, slots: Sequence[Slot], compact: Compact) -> None:
        """Bring the updates of all ranks' parts together. Collective."""
        for slot in slots:
            if not slot.shard.is_counted:
                compact.own(compact.update, slot).zero_()
        _sum_(shards, compact.update)

    def _find_bases(
        self, shards: ShardMap, members: dict[str, LowRank], slots: Sequence[Slot], refresh: int, *, like: Tensor
    ) -> None:
        """Find the missing bases; each of ``svd``'s by the rank that holds the parameter's first element."""
        self.bases.update({name: self.bases[name].to(like) for name in members if name in self.bases})
        missing = {name: low_rank for name, low_rank in members.items() if name not in self.bases}
        if self._subspaces.selection == "random":
            seeds = {name: self._subspaces.seed_of(name, refresh) for name in missing}
            self.bases.update({name: r.random_basis(seeds[name], like) for name, r in missing.items()})
            return
        own: dict[str, list[Slot]] = {}
        for slot in slots:
            if slot.shard.is_counted:
                own.setdefault(slot.shard.name, []).append(slot)
        found = {}
        for name, low_rank in missing.items():
            whole, here = like.new_zeros(low_rank.shape), own.get(name, [])
            for slot in here:
                gradient = gradient_of(slot)
                for block in blocks_of(slot.shard):
                    rows = whole.narrow(0, block.row, block.num_rows)
                    rows.narrow(1, block.column, block.num_columns).copy_(block.of(gradient))
            _sum_(shards, whole)
            if not bool(torch.isfinite(whole).all()):
                raise RuntimeError(f"Frugal: the gradient of {name} is not finite at a refresh, it has no basis")
            if not any(slot.shard.holds_first for slot in here):
                found[name] = like.new_zeros(low_rank.basis_shape)
            elif bool(whole.any()):
                found[name] = low_rank.basis_of(whole)
            else:
                # An expert without tokens: a zero has no directions.
                found[name] = low_rank.random_basis(self._subspaces.seed_of(name, refresh), like).contiguous()
        if found and shards.is_cut:
            together = torch.cat([basis.view(-1) for basis in found.values()])
            _sum_(shards, together)
            summed = together.split([basis.numel() for basis in found.values()])
            found = {name: s.view_as(basis).clone() for (name, basis), s in zip(found.items(), summed, strict=True)}
        self.bases.update(found)

    def bytes_summed(self, itemsize: int) -> dict[str, int]:
        """As :meth:`~.frugal.Frugal.bytes_summed`, for parameters that are cut over ranks."""
        geometries = [self._subspaces.low_rank_of(name) for name in self._subspaces.projected]
        each_step = sum(2 * geometry.numel for geometry in geometries)
        whole = sum(math.prod(geometry.shape) + math.prod(geometry.basis_shape) for geometry in geometries)
        return {"step": itemsize * each_step, "refresh": itemsize * whole if self._subspaces.selection == "svd" else 0}


def gradient_of(slot: Slot) -> Tensor:
    """The slot's shard of the gradient, 1-D, in fp32 or fp64."""
    gradient = slot.shard.flat.grad
    assert gradient is not None
    return widen(slot.shard.of(gradient))


def _sum_(shards: ShardMap, tensor: Tensor) -> None:
    if shards.is_cut:
        shards.sum_(tensor)

"""Moments of a compact parameter across a change of its selection."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compact.muon import MOMENTUM
from ..layers.targets import CompactLayer
from ..sharding.shards import Shard, ShardMap

ADAM = ("exp_avg", "exp_avg_sq")
# Whether new entries get the mean of the kept ones, or zero.
_MOMENTS = {"exp_avg": False, "exp_avg_sq": True, MOMENTUM: False}


def carry_moments(
    layers: Sequence[CompactLayer],
    old: Sequence[Tensor],
    *,
    moments: Collection[str],
    flats: Iterable[Tensor],
    state: dict[Tensor, dict[str, Any]],
    shards: ShardMap,
) -> None:
    """Give moments the places that their columns or rows have in the new selection. Collective.

    Entries that were selected before keep ``m`` and ``v``. New ones get ``m = 0`` and for ``v`` the mean of the layer's
    kept ones, or of all old ones where none was kept. Each layer is put together on every rank in turn.

    Args:
        old: the index that each layer had, int64 ``(r,)``; it has the new one.
        moments: the keys of what is carried, of Adam or Muon.
        flats: the keys in ``state`` of the parameter groups that hold the layers.
    """
    by_name: dict[str, list[tuple[Shard, dict[str, Tensor]]]] = {}
    for flat in flats:
        for shard in shards.shards_of(flat) if state.get(flat) else ():
            by_name.setdefault(shard.name, []).append((shard, state[flat]))
    for layer, old_index in zip(layers, old, strict=True):
        own = by_name.get(layer.compact_name, [])
        module, source = layer.module, _source(layer, old_index.to(layer.module.selected().device))
        for key in moments:
            whole = _whole(layer, [(shard, m[key]) for shard, m in own], shards)
            stacked = whole.view(module.num_matrices, -1, whole.shape[1])
            new = _rearranged(stacked, source, dim=1 + module.dim, fill=_MOMENTS[key]).reshape(-1)
            for shard, values in own:
                shard.of(values[key]).copy_(new[_places(shard)])


def _source(layer: CompactLayer, old: Tensor) -> Tensor:
    """Where in ``old`` each newly selected entry was, -1 where it was not."""
    module = layer.module
    position = torch.full((module.num_choices,), -1, device=old.device)
    position[old] = torch.arange(old.numel(), device=old.device)
    return position[module.selected()]


def _whole(layer: CompactLayer, own: Sequence[tuple[Shard, Tensor]], shards: ShardMap) -> Tensor:
    """A moment of the layer from all ranks' shards of it, shaped like its compact values."""
    module = layer.module
    dtype = torch.promote_types(module.compact.dtype, torch.float32)
    whole = torch.zeros(module.compact_shape, dtype=dtype, device=module.selected().device)
    for shard, values in own:
        if shard.is_counted:
            whole.view(-1)[_places(shard)] = shard.of(values).to(dtype)
    return shards.sum_(whole)


def _places(shard: Shard) -> slice | Tensor:
    position = shard.position
    return position if isinstance(position, Tensor) else slice(position, position + shard.length)


def _rearranged(values: Tensor, source: Tensor, *, dim: int, fill: bool) -> Tensor:
    """Entries of a ``(matrices, rows, columns)`` tensor along ``dim``."""
    kept = source >= 0
    new = values.index_select(dim, source.clamp_min(0))
    if fill:
        background = (new.index_select(dim, kept.nonzero().squeeze(1)) if kept.any() else values).mean()
    else:
        background = torch.zeros((), dtype=values.dtype, device=values.device)
    mask = kept if dim == 2 else kept[:, None]
    return torch.where(mask, new, background)

"""The optimizer's part of a checkpoint: masters and moments by parameter, whatever they were cut into.

A tensor's key is ``parameter|place|what``. The place of elements that are neighbours in the flattened parameter is the
position of the first; that of others is their box, ``offsets/sizes``, and the position of the first in it,
``0,32/64,32/128``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from narrowgauge.optimizers import ShardedOptimizer
from narrowgauge.optimizers.sharding.box import Box
from narrowgauge.optimizers.sharding.shards import Shard, StatePiece

from ..errors import CheckpointError
from ..protocol import TrainingEngine
from .contents import check_finite, write_tensors
from .files import Checkpoint

_MASTER = "master"
# Elements whose positions are worked out at once.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _SavedPiece:
    """Where a saved piece of a parameter's state lies.

    Attributes:
        start: of its first element in the flattened parameter, or box.
        box: offsets and sizes, where its elements are no neighbours in the parameter.
    """

    start: int
    length: int
    path: Path
    key: str
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def write_optimizer(engine: TrainingEngine, folder: Path) -> str | None:
    """Write this rank's masters and moments; returns the file's name, None where another rank writes the same."""
    if engine.state_is_replicated and engine.data_parallel.rank > 0:
        return None
    shards = [*filter(engine.saves, engine.shards())]
    own_pieces = _own_pieces(engine, shards)
    pieces = [piece for found in own_pieces.values() for piece in found if piece.tensor.numel()]
    tensors = {f"{p.name}|{_place(p.shard)}|{p.key}": p.tensor.cpu().clone() for p in pieces}
    flat, state = None, {}
    for shard in shards:
        if shard.flat is not flat:
            flat, state = shard.flat, _dense_state(engine, shard.flat)
        prefix = f"{shard.name}|{_place(shard)}|"
        tensors[prefix + _MASTER] = shard.of(shard.flat).cpu().clone()
        own_keys = {piece.key for piece in own_pieces.get(shard.flat, ())}
        for key, value in state.items():
            if key in own_keys or isinstance(value, int | float) or (torch.is_tensor(value) and value.dim() == 0):
                continue
            if not torch.is_tensor(value) or value.shape != shard.flat.shape:
                raise CheckpointError(f"optimizer state {key!r} is neither shaped like its parameter nor a number")
            tensors[prefix + key] = shard.of(value).cpu().clone()
    for key, tensor in tensors.items():
        name, _, what = key.split("|")
        check_finite(f"{name} ({what})", tensor)
    name = f"optimizer-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    write_tensors(tensors, folder / name)
    return name


def _place(shard: Shard) -> str:
    """See above."""
    if shard.is_one_run:
        return str(shard.start)
    assert shard.box is not None
    offsets, sizes = (",".join(map(str, numbers)) for numbers in (shard.box.offsets, shard.box.local))
    return f"{offsets}/{sizes}/{shard.local_start}"


def _dense_state(engine: TrainingEngine, flat: Tensor) -> Mapping[str, Any]:
    """The state of a flat tensor; 8-bit moments in fp32."""
    own = engine.own_optimizer
    return own.dense_state(flat) if own is not None else engine.optimizer.state.get(flat, {})


def _own_pieces(engine: TrainingEngine, shards: Sequence[Shard]) -> dict[Tensor, list[StatePiece]]:
    """By flat tensor that the shards lie in, the state that is not shaped like it."""
    own = engine.own_optimizer
    return {flat: list(own.state_pieces(flat)) for flat in _flats(shards)} if own is not None else {}


def _flats(shards: Sequence[Shard]) -> list[Tensor]:
    return list({id(shard.flat): shard.flat for shard in shards}.values())


def write_subspace(engine: TrainingEngine, folder: Path) -> list[str]:
    """Write what describes the subspaces; returns the names of the files."""
    tensors = (engine.subspace_state() or {}).get("tensors")
    if not tensors:
        return []
    write_tensors(tensors, folder / "subspace.safetensors")
    return ["subspace.safetensors"]


def optimizer_numbers(engine: TrainingEngine) -> dict[str, Any]:
    """The optimizer's entries of ``state.json``: everything but tensors."""
    subspace = engine.subspace_state()
    return {
        "scalars": _scalars(engine),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups],
        "subspace": {k: v for k, v in subspace.items() if k != "tensors"} if subspace is not None else None,
    }


def _scalars(engine: TrainingEngine) -> dict[str, dict[str, Any]]:
    """The numbers in the optimizer's state (Adam's step), by parameter; equal on all ranks that share a parameter's
    group.
    """
    found: dict[str, dict[str, Any]] = {}
    groups = engine.parameter_groups()
    by_group: dict[int, dict[str, Any]] = {}
    for shard in engine.shards():
        numbers = {}
        for key, value in engine.optimizer.state.get(shard.flat, {}).items():
            if torch.is_tensor(value) and value.dim() == 0:
                numbers[key] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            elif isinstance(value, int | float):
                numbers[key] = {"value": value, "dtype": None}
        found[shard.name] = numbers
        by_group.setdefault(groups[shard.name], numbers)
    # A parameter that lies wholly on other ranks has the numbers of its group.
    return {name: found.get(name, by_group.get(group, {})) for name, group in groups.items()}


def load_subspace(engine: TrainingEngine, checkpoint: Checkpoint) -> None:
    """Restore what :func:`write_subspace` wrote.

    Raises:
        CheckpointError: it is another optimizer's; nothing has changed then.
    """
    state, folder, own = checkpoint.state, checkpoint.folder, engine.own_optimizer
    if (state["subspace"] is None) != (own is None):
        kind = "an optimizer that is not narrowgauge's" if own is not None else "one of narrowgauge's optimizers"
        raise CheckpointError(f"{folder}: saved with {kind}")
    if own is None:
        return
    tensors = {}
    for path in checkpoint.tensors("subspace"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        engine.load_subspace_state({**state["subspace"], "tensors": tensors})
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


@torch.no_grad()
def load_optimizer(engine: TrainingEngine, checkpoint: Checkpoint) -> None:
    """Read this rank's pieces of masters and moments from whatever pieces were saved.

    Raises:
        CheckpointError: a part is missing; the engine is partly restored then.
    """
    saved, state, folder = _index_pieces(checkpoint), checkpoint.state, checkpoint.folder
    for group, values in zip(engine.optimizer.param_groups, state["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()})
    shards, own = engine.shards(), engine.own_optimizer
    own_pieces, flats = _own_pieces(engine, shards), _flats(shards)
    if own is not None:
        for flat in flats:
            own.expect_dense_state(flat)
    for shard in shards:
        if _MASTER not in saved.get(shard.name, {}):
            raise CheckpointError(f"{folder}: no state of {shard.name}; the engine is partly restored")
        own_keys = {piece.key for piece in own_pieces.get(shard.flat, ())}
        for key, pieces in saved[shard.name].items():
            if key not in own_keys:
                tensor = shard.flat if key == _MASTER else _state_tensor(engine.optimizer, shard, key)
                _read_shard(shard.of(tensor), shard, pieces)
        for key, number in state["scalars"][shard.name].items():
            _set_scalar(engine.optimizer, shard, key, number)
    for piece in (piece for pieces in own_pieces.values() for piece in pieces):
        _read_shard(piece.tensor, piece.shard, saved.get(piece.name, {}).get(piece.key, []))
    if own is not None:
        for flat in flats:
            own.accept_dense_state(flat)


def _index_pieces(checkpoint: Checkpoint) -> dict[str, dict[str, list[_SavedPiece]]]:
    pieces: dict[str, dict[str, list[_SavedPiece]]] = {}
    for path in checkpoint.tensors("optimizer-"):
        with safe_open(path, framework="pt") as file:
            for full_key in file.keys():  # noqa: SIM118 (not a dict)
                name, place, key = full_key.rsplit("|", 2)
                length = file.get_slice(full_key).get_shape()[0]
                *box, start = place.split("/")
                offsets, sizes = (tuple(map(int, part.split(","))) for part in box) if box else ((), ())
                piece = _SavedPiece(int(start), length, path, full_key, (offsets, sizes) if box else None)
                pieces.setdefault(name, {}).setdefault(key, []).append(piece)
    return pieces


def _read_shard(target: Tensor, shard: Shard, pieces: Sequence[_SavedPiece]) -> None:
    """Fill ``target``, shaped like a shard, from the saved pieces that overlap it."""
    if shard.is_one_run and all(piece.box is None for piece in pieces):
        _read_into(target, shard.name, shard.start, pieces)
        return
    own, filled = shard.box or Box.whole(shard.shape), 0
    for piece in pieces:
        box = Box(shard.shape, *piece.box) if piece.box is not None else Box.whole(shard.shape)
        if own.overlaps(box):
            with safe_open(piece.path, framework="pt") as file:
                values = file.get_tensor(piece.key)
            filled += _copy_common(target, own, shard.local_start, values, box, piece.start)
    if filled != target.numel():
        raise CheckpointError(
            f"{shard.name}: expected {target.numel()} elements, got {filled}; the engine is partly restored"
        )


def _copy_common(target: Tensor, own: Box, own_start: int, values: Tensor, box: Box, start: int) -> int:
    """Copy the elements that two runs within boxes have in common; returns their number."""
    copied = 0
    for first in range(0, target.numel(), _CHUNK):
        part = target[first : first + _CHUNK]
        found, is_inside = box.locate(own.positions(own_start + first, part.numel()))
        found -= start
        is_inside &= (found >= 0) & (found < values.numel())
        where = is_inside.nonzero().view(-1)
        part.index_copy_(0, where.to(part.device), values[found[where]].to(part))
        copied += where.numel()
    return copied


def _read_into(target: Tensor, name: str, start: int, pieces: Sequence[_SavedPiece]) -> None:
    """Fill ``target``, the elements of a parameter's state from ``start`` on, from the saved pieces that overlap it."""
    filled = 0
    for piece in pieces:
        first = max(start, piece.start)
        last = min(start + target.numel(), piece.start + piece.length)
        if first < last:
            with safe_open(piece.path, framework="pt") as file:
                values = file.get_slice(piece.key)[first - piece.start : last - piece.start]
            target[first - start : last - start].copy_(values)
            filled += last - first
    if filled != target.numel():
        raise CheckpointError(
            f"{name}: expected {target.numel()} elements, got {filled}; the engine is partly restored"
        )


def _state_tensor(optimizer: torch.optim.Optimizer, shard: Shard, key: str) -> Tensor:
    state = optimizer.state[shard.flat]
    if key not in state:
        # Optimizers on full gradients keep moments of 16-bit parameters in fp32.
        is_wide = isinstance(optimizer, ShardedOptimizer) and shard.flat.element_size() < 4
        dtype = torch.float32 if is_wide else shard.flat.dtype
        state[key] = torch.zeros_like(shard.flat, dtype=dtype, requires_grad=False)
    return state[key]


def _set_scalar(optimizer: torch.optim.Optimizer, shard: Shard, key: str, number: Mapping[str, Any]) -> None:
    value, dtype = number["value"], number["dtype"]
    if dtype is None and key == "step" and isinstance(optimizer, torch.optim.Adam):
        # DeepSpeed's Adam counts in plain numbers, torch's in tensors only.
        dtype = "float32"
    if dtype is not None:
        groups = optimizer.param_groups
        group = next((g for g in groups if any(p is shard.flat for p in g["params"])), optimizer.defaults)
        on_device = group.get("fused") or group.get("capturable")
        device = shard.flat.device if on_device else "cpu"
        value = torch.tensor(value, dtype=getattr(torch, dtype), device=device)
    optimizer.state[shard.flat][key] = value

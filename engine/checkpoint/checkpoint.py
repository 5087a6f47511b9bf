"""Checkpoints: a folder that is either whole and checked, or not there.

``model*.safetensors`` hold the plain weights under the model's own names, as Hugging Face writes them.
``optimizer-R-of-N.safetensors`` hold rank R's masters and moments, cut by parameter and not by rank, so any number of
ranks, at any ZeRO stage, reads them. ``state.json`` holds the rest, ``manifest.json`` every file's size and checksum
(safetensors does not notice a flipped byte). Nothing is pickled. Everything is written aside and renamed once all
ranks have succeeded.
"""

import json
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowgauge.optimizers import OwnOptimizer
from narrowgauge.optimizers.sharding.shards import Shard, StatePiece

from ..backends.deepspeed.shards import local_shards, masters_to_model
from ..backends.deepspeed.subspace import gather_again
from ..errors import CheckpointError
from ..files import replace_folder, write_json
from ..ranks.together import together
from .weights import load_weights, save_weights

FORMAT_VERSION = 1
MASTER = "master"
_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class _Piece:
    """Where a saved piece of a parameter's state lies."""

    start: int
    length: int
    path: Path
    key: str


def save_checkpoint(engine: Any, folder: Path, client_state: dict[str, Any]) -> None:
    """Write a checkpoint of the engine. Collective; either all ranks return or all raise.

    Args:
        folder: the checkpoint's own; replaced if it exists.
        client_state: JSON values of the caller, returned by :func:`load_checkpoint`.

    Raises:
        CheckpointError: a rank could not write; what was there before is untouched.
    """
    aside = folder.with_name(folder.name + ".tmp")
    rank = dist.get_rank()

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> list[str]:
        written = [_write_optimizer(engine, aside)]
        if rank == 0:
            write_json(aside / "state.json", {**_engine_state(engine), "client_state": client_state})
            written += ["state.json", *_write_subspace(engine, aside)]
        return [name for name in written if name is not None]

    together("save", prepare)
    if hasattr(engine, "write_back"):
        engine.write_back()
    # The weights are gathered by all ranks and written by the first, which takes part to the end even if its disk is
    # full.
    weight_files, failure = save_weights(engine, aside if rank == 0 else None)
    own = weight_files + together("save", write, failure)
    entries = _gather_manifest(together("save", lambda: {name: _checksum(aside / name) for name in own}))

    def finish() -> None:
        if rank == 0:
            write_json(aside / "manifest.json", {"format": FORMAT_VERSION, "files": entries})
            replace_folder(aside, folder)

    together("save", finish)


def load_checkpoint(
    engine: Any, folder: Path, *, optimizer_states: bool = True, scheduler_state: bool = True
) -> dict[str, Any]:
    """Restore an engine from a checkpoint written by any number of ranks. Collective.

    Args:
        optimizer_states: also moments, step counts, subspace and counters; without them the masters are taken from
            the weights.
        scheduler_state: also the learning-rate schedule's.

    Returns:
        The ``client_state`` it was saved with.

    Raises:
        CheckpointError: it is damaged or belongs to another model; the engine is as it was unless the message says
            otherwise.
    """
    state = together("load", lambda: _verify(folder, engine))
    if optimizer_states:
        together("load", lambda: _load_subspace(_own_optimizer(engine), folder, state))
    together("load", lambda: load_weights(engine, folder, rebuild_compact=not optimizer_states))
    if optimizer_states:
        together("load", lambda: _load_optimizer(engine, folder, state))
        masters_to_model(engine)
        _restore_engine_state(engine, state)
    if scheduler_state and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    gather_again(list(engine.module.parameters()))
    return state["client_state"]


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The finished ``step-N`` checkpoints in a folder, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / "manifest.json").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def verify_files(folder: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check every ``parts``-th file of a checkpoint against its manifest and read its ``state.json``.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of another content.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint (manifest.json, state.json): {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{folder}: format {found} found, {FORMAT_VERSION} is read")
    if "state.json" not in manifest["files"] or not any(name.startswith("model") for name in manifest["files"]):
        raise CheckpointError(f"{folder / 'manifest.json'}: damaged: it names no state.json or no model")
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
        if found != expected:
            raise CheckpointError(f"{folder / name}: damaged: {found} found, {expected} was written")
    return state


def _verify(folder: Path, engine: Any) -> dict[str, Any]:
    state = verify_files(folder, part=dist.get_rank(), parts=dist.get_world_size())
    saved, own = state["trainable"], _trainable_shapes(engine)
    if odd := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        name = odd[0]
        raise CheckpointError(
            f"{folder}: it holds {name} of shape {saved.get(name)}, this model has {own.get(name)}"
            f" ({len(odd)} parameters differ); was the optimizer or the model changed?"
        )
    if len(state["groups"]) != len(_state_of(engine).param_groups):
        raise CheckpointError(
            f"{folder}: {len(state['groups'])} parameter groups found, this optimizer has"
            f" {len(_state_of(engine).param_groups)}"
        )
    return state


def _trainable_shapes(engine: Any) -> dict[str, list[int]]:
    return {
        name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters() if p.requires_grad
    }


def _state_of(engine: Any) -> Any:
    """The optimizer that holds moments and groups, below DeepSpeed's wrapper."""
    return engine.basic_optimizer


def _own_optimizer(engine: Any) -> OwnOptimizer | None:
    return getattr(engine, "own_optimizer", None)


def _write_optimizer(engine: Any, folder: Path) -> str | None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if engine.zero_optimization_stage() == 0 and rank > 0:
        return None
    own_pieces = _own_pieces(engine)
    tensors = {f"{p.name}|{p.start}|{p.key}": p.tensor.cpu().clone() for pieces in own_pieces.values() for p in pieces}
    flat, state = None, {}
    for shard in local_shards(engine):
        if shard.flat is not flat:
            flat, state = shard.flat, _dense_state(engine, shard.flat)
        prefix = f"{shard.name}|{shard.start}|"
        tensors[prefix + MASTER] = shard.of(shard.flat).cpu().clone()
        own_keys = {piece.key for piece in own_pieces.get(shard.flat, ())}
        for key, value in state.items():
            if key in own_keys or isinstance(value, int | float) or (torch.is_tensor(value) and value.dim() == 0):
                continue
            if not torch.is_tensor(value) or value.shape != shard.flat.shape:
                raise CheckpointError(f"optimizer state {key!r} is neither shaped like its parameter nor a number")
            tensors[prefix + key] = shard.of(value).cpu().clone()
    name = f"optimizer-{rank:05d}-of-{size:05d}.safetensors"
    save_file(tensors, folder / name)
    return name


def _dense_state(engine: Any, flat: Tensor) -> dict[str, Any]:
    """The state of a flat tensor; 8-bit moments in fp32."""
    own = _own_optimizer(engine)
    return own.dense_state(flat) if own is not None else _state_of(engine).state.get(flat, {})


def _own_pieces(engine: Any) -> dict[Tensor, list[StatePiece]]:
    """By flat tensor, the state that is not shaped like it."""
    own = _own_optimizer(engine)
    if own is None:
        return {}
    flats = {id(shard.flat): shard.flat for shard in local_shards(engine)}
    return {flat: list(own.state_pieces(flat)) for flat in flats.values()}


def _write_subspace(engine: Any, folder: Path) -> list[str]:
    own = _own_optimizer(engine)
    tensors = own.subspace_state().get("tensors") if own is not None else None
    if not tensors:
        return []
    save_file(tensors, folder / "subspace.safetensors")
    return ["subspace.safetensors"]


def _engine_state(engine: Any) -> dict[str, Any]:
    own = _own_optimizer(engine)
    subspace = {k: v for k, v in own.subspace_state().items() if k != "tensors"} if own is not None else None
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "trainable": _trainable_shapes(engine),
        "scalars": _scalars(engine),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in _state_of(engine).param_groups],
        "subspace": subspace,
        "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "counters": {key: getattr(engine, key) for key in _COUNTERS},
        "loss_scaler": _numbers(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {},
    }


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def _numbers(holder: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(holder).items() if isinstance(v, int | float)}


def _scalars(engine: Any) -> dict[str, dict[str, Any]]:
    """The numbers in the optimizer's state (Adam's step), by parameter; equal on all ranks that share a parameter's
    group.
    """
    found: dict[str, dict[str, Any]] = {}
    states, groups = _state_of(engine).state, _group_of_parameters(engine)
    by_group: dict[int, dict[str, Any]] = {}
    for shard in local_shards(engine):
        numbers = {}
        for key, value in states.get(shard.flat, {}).items():
            if torch.is_tensor(value) and value.dim() == 0:
                numbers[key] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            elif isinstance(value, int | float):
                numbers[key] = {"value": value, "dtype": None}
        found[shard.name] = numbers
        by_group.setdefault(groups[shard.name], numbers)
    # A parameter that lies wholly on other ranks has the numbers of its group.
    return {name: found.get(name, by_group.get(group, {})) for name, group in groups.items()}


def _group_of_parameters(engine: Any) -> dict[str, int]:
    optimizer = engine.optimizer
    for attribute in ("bit16_groups", "bf16_groups"):
        if hasattr(optimizer, attribute):
            groups = getattr(optimizer, attribute)
            break
    else:
        groups = (
            optimizer.fp16_groups
            if hasattr(optimizer, "fp16_groups")
            else [g["params"] for g in optimizer.param_groups]
        )
    return {engine.param_names[p]: number for number, group in enumerate(groups) for p in group}


def _load_subspace(own: OwnOptimizer | None, folder: Path, state: dict[str, Any]) -> None:
    if (state["subspace"] is None) != (own is None):
        kind = "one of DeepSpeed's or torch's optimizers" if own is not None else "one of narrowgauge's optimizers"
        raise CheckpointError(f"{folder}: saved with {kind}")
    if own is None:
        return
    tensors, path = {}, folder / "subspace.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        own.load_subspace_state({**state["subspace"], "tensors": tensors})
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _load_optimizer(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    saved = _index_pieces(folder)
    base = _state_of(engine)
    for group, values in zip(base.param_groups, state["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()})
    own_pieces, own = _own_pieces(engine), _own_optimizer(engine)
    flats = {id(shard.flat): shard.flat for shard in local_shards(engine)}.values()
    with torch.no_grad():
        if own is not None:
            for flat in flats:
                own.expect_dense_state(flat)
        for shard in local_shards(engine):
            if MASTER not in saved.get(shard.name, {}):
                raise CheckpointError(f"{folder}: no state of {shard.name}; the engine is partly restored")
            own_keys = {piece.key for piece in own_pieces.get(shard.flat, ())}
            for key, pieces in saved[shard.name].items():
                if key not in own_keys:
                    tensor = shard.flat if key == MASTER else _state_tensor(base, shard, key)
                    _read_into(shard.of(tensor), shard.name, shard.start, pieces)
            for key, number in state["scalars"][shard.name].items():
                _set_scalar(base, shard, key, number)
        for piece in (piece for pieces in own_pieces.values() for piece in pieces):
            _read_into(piece.tensor, piece.name, piece.start, saved.get(piece.name, {}).get(piece.key, []))
        if own is not None:
            for flat in flats:
                own.accept_dense_state(flat)


def _index_pieces(folder: Path) -> dict[str, dict[str, list[_Piece]]]:
    pieces: dict[str, dict[str, list[_Piece]]] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for full_key in file.keys():  # noqa: SIM118 (not a dict)
                name, start, key = full_key.rsplit("|", 2)
                length = file.get_slice(full_key).get_shape()[0]
                pieces.setdefault(name, {}).setdefault(key, []).append(_Piece(int(start), length, path, full_key))
    return pieces


def _read_into(target: Tensor, name: str, start: int, pieces: list[_Piece]) -> None:
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
        raise CheckpointError(f"{name}: {filled} of {target.numel()} elements found; the engine is partly restored")


def _state_tensor(base: Any, shard: Shard, key: str) -> Tensor:
    state = base.state[shard.flat]
    if key not in state:
        state[key] = torch.zeros_like(shard.flat, requires_grad=False)
    return state[key]


def _set_scalar(base: Any, shard: Shard, key: str, number: dict[str, Any]) -> None:
    value = number["value"]
    if number["dtype"] is not None:
        group = next((g for g in base.param_groups if any(p is shard.flat for p in g["params"])), base.defaults)
        on_device = group.get("fused") or group.get("capturable")
        device = shard.flat.device if on_device else "cpu"
        value = torch.tensor(value, dtype=getattr(torch, number["dtype"]), device=device)
    base.state[shard.flat][key] = value


def _restore_engine_state(engine: Any, state: dict[str, Any]) -> None:
    for key in _COUNTERS:
        setattr(engine, key, state["counters"][key])
    # Where the next step ends is counted from here, and the number of micro-batches in a step may have changed.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(state["loss_scaler"])


def _gather_manifest(own: dict[str, Any]) -> dict[str, Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: entry for part in parts for name, entry in part.items()}


def _checksum(path: Path) -> dict[str, int]:
    checksum = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"bytes": size, "crc32": checksum}

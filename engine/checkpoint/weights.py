"""The plain weights as Hugging Face safetensors, written and read at any ZeRO stage, one parameter at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import CompactWeight
from narrowgauge.optimizers.layers.plain import plain_parameters

from ..backends.deepspeed.subspace import own_shard

_SHARD_BYTES = 4 << 30
INDEX_NAME = "model.safetensors.index.json"


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = model.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


@torch.no_grad()
def save_weights(engine: Any, folder: Path | None) -> tuple[list[str], str | None]:
    """Write the folded weights. Collective: parameters sharded by ZeRO-3 are gathered in turn.

    Args:
        folder: on the rank that writes; None on the others.

    Returns:
        The names of the files written, and what went wrong if anything did: the gathering goes on to the end on all
            ranks.
    """
    writer = _ShardWriter(folder) if folder is not None else None
    failure = None
    for name, parameter in plain_parameters(engine.module):
        with deepspeed.zero.GatheredParameters([parameter]):
            failure = failure or _attempt(writer, name, parameter)
    for name, buffer in _buffers(engine.module):
        failure = failure or _attempt(writer, name, buffer)
    if writer is None:
        return [], None
    try:
        return (writer.finish(), None) if failure is None else ([], failure)
    except Exception as error:
        return [], str(error)


def _attempt(writer: "_ShardWriter | None", name: str, tensor: Tensor) -> str | None:
    if writer is None:
        return None
    try:
        writer.add(name, tensor)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


class _ShardWriter:
    """Collects tensors and writes a file whenever enough have come together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        save_file(self._pending, self._folder / f"part-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> list[str]:
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            (self._folder / "part-0").rename(self._folder / "model.safetensors")
            return ["model.safetensors"]
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            (self._folder / f"part-{number}").rename(self._folder / name)
        weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
        return [*names, INDEX_NAME]


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each weight in a folder written by :func:`save_weights`."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


@torch.no_grad()
def load_weights(engine: Any, folder: Path, *, rebuild_compact: bool) -> None:
    """Read the weights a rank holds, whole or its shards; no communication.

    Args:
        rebuild_compact: also take the compact values, and all masters, from the weights read.

    Raises:
        ValueError: a weight is missing or has another shape; nothing has been read then.
    """
    files, model = weight_files(folder), engine.module
    targets = [*plain_parameters(model), *_buffers(model)]
    for name, tensor in targets:
        shape = list(getattr(tensor, "ds_shape", tensor.shape))
        found = _shape_in(files[name], name) if name in files else None
        if found != shape:
            raise ValueError(f"{folder}: {name}: shape {shape} is needed, {found or 'nothing'} found")
    for name, tensor in targets:
        with safe_open(files[name], framework="pt") as file:
            values = file.get_tensor(name)
        if hasattr(tensor, "ds_tensor"):
            _fill_shard(tensor, values)
        else:
            tensor.copy_(values)
    if not rebuild_compact:
        return
    names = {id(tensor): name for name, tensor in targets}
    for module in model.modules():
        if isinstance(module, CompactWeight):
            name = names[id(module.weight)]
            with safe_open(files[name], framework="pt") as file:
                values = module.compact_of(file.get_tensor(name).to(module.weight.device))
            if hasattr(module.compact, "ds_tensor"):
                _fill_shard(module.compact, values)
            else:
                module.compact.copy_(values)
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def _shape_in(path: Path, name: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name).get_shape()


def _fill_shard(parameter: Any, values: Tensor) -> None:
    shard, start = own_shard(parameter)
    shard.copy_(values.reshape(-1)[start : start + shard.numel()])

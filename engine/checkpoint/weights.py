"""The plain weights as Hugging Face safetensors, written and read in any engine, one parameter at a time."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.layers.plain import plain_parameters

from ..files import naming
from ..lora.adapters import frozen_base
from ..protocol import TrainingEngine, WeightSource
from .contents import check_finite, write_tensors
from .files import Checkpoint

_SHARD_BYTES = 4 << 30
INDEX_NAME = "model.safetensors.index.json"


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = model.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


@torch.no_grad()
def whole_weights(engine: TrainingEngine) -> Iterator[tuple[str, Tensor]]:
    """``TrainingEngine.whole_weights`` of an engine whose model has Hugging Face's names and layout; with adapters
    only what is trained.
    """
    left_out = frozen_base(engine.module)
    for name, parameter in plain_parameters(engine.module):
        if name not in left_out:
            with engine.gathered([parameter]):
                yield name, parameter
    yield from ((name, buffer) for name, buffer in _buffers(engine.module) if name not in left_out)


def save_weights(engine: TrainingEngine, folder: Path | None) -> tuple[list[str], str | None]:
    """Write the folded weights. Collective: sharded parameters are gathered in turn.

    Args:
        folder: on the rank that writes; None on the others.

    Returns:
        The names of the files written, and what went wrong if anything did: the gathering goes on to the end on all
            ranks.
    """
    writer = _ShardWriter(folder, {name for name, _ in _buffers(engine.module)}) if folder is not None else None
    failure = None
    for name, tensor in engine.whole_weights():
        failure = failure or _attempt(writer, name, tensor)
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

    def __init__(self, folder: Path, buffers: Collection[str]) -> None:
        """
        Args:
            buffers: names of tensors that may hold infinities, as masks do.
        """
        self._folder, self._buffers = folder, buffers
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if name not in self._buffers:
            check_finite(name, tensor.detach())
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        write_tensors(self._pending, self._folder / f"part-{len(self._shards)}", metadata={"format": "pt"})
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
        with naming(self._folder / INDEX_NAME):
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
        return [*names, INDEX_NAME]


class WeightFiles:
    """The weights written by :func:`save_weights`, as a :class:`WeightSource`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path_of: dict[str, Path] = {}
        for path in checkpoint.tensors("model"):
            with safe_open(path, framework="pt") as file:
                self._path_of.update(dict.fromkeys(file.keys(), path))

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._path_of:
            return None
        with safe_open(self._path_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with safe_open(self._path_of[name], framework="pt") as file:
            return file.get_tensor(name)


@torch.no_grad()
def load_weights(engine: TrainingEngine, source: WeightSource, *, rebuild_compact: bool) -> None:
    """``TrainingEngine.load_weights`` of an engine whose model has Hugging Face's names and layout."""
    left_out = frozen_base(engine.module)
    everything = [*plain_parameters(engine.module), *_buffers(engine.module)]
    targets = [(name, tensor) for name, tensor in everything if name not in left_out]
    for name, tensor in targets:
        expected, found = engine.shape_of(tensor), source.shape(name)
        if found != expected:
            got = "nothing" if found is None else list(found)
            raise ValueError(f"{name}: expected shape {list(expected)}, got {got}")
    for name, tensor in targets:
        _fill(engine, tensor, source.read(name))
    if not rebuild_compact:
        return
    names = {id(tensor): name for name, tensor in targets}
    for unit in compact_units(engine.module):
        whole = source.read(names[id(unit.weight)]).to(unit.weight.device)
        _fill(engine, unit.compact, unit.compact_of(whole))
    engine.model_to_masters()


def _fill(engine: TrainingEngine, tensor: Tensor, values: Tensor) -> None:
    part, start = engine.local_part(tensor)
    part.copy_(values.reshape(-1)[start : start + part.numel()].view(part.shape))

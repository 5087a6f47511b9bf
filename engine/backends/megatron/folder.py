"""The weights of a Hugging Face folder, of which a process rank reads no more than the boxes that it holds."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .parts import LocalParameter, Part

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# How files name what the model holds stacked: the block's name there, and each expert's gate, up and down.
_EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
Slices = tuple[slice | int, ...]


class FolderWeights:
    """The safetensors of a folder under the names of the model's weights.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, folder: Path, model_type: str) -> None:
        self._model_type = model_type
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for path in _paths(folder):
            self._files[path] = file = safe_open(path, framework="pt")
            self._file_of.update(dict.fromkeys(file.keys(), path))
        self.bytes_read = 0

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether all weights are there, by their own names or by those of single experts, in their shapes."""
        return all(self._holds(name, shape) for name, shape in shapes.items())

    def _holds(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self._file_of:
            return self._shape(name) == shape
        pieces = list(self._pieces(name, shape, (0,) * len(shape), shape))
        return bool(pieces) and all(
            source in self._file_of and self._shape(source) == tuple(part.stop - part.start for part in slices)
            for source, slices, _ in pieces
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def fill(self, parameter: LocalParameter, tensor: Tensor) -> None:
        """Read a process rank's parameter."""
        for part in parameter.parts:
            self._read(part, part.of_tensor(tensor))

    def _read(self, part: Part, target: Tensor) -> None:
        box = part.box
        if part.name in self._file_of:
            slices = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.local, strict=True))
            target.copy_(self._slice(part.name, slices))
            return
        for source, slices, place in self._pieces(part.name, box.shape, box.offsets, box.local):
            target[place].copy_(self._slice(source, slices))

    def _slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        found = self._files[self._file_of[name]].get_slice(name)[slices]
        self.bytes_read += found.numel() * found.element_size()
        return found

    def _pieces(
        self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[slice, ...], Slices]]:
        """A box of a weight that files hold under other names: their names, what of each, and where in the box."""
        if self._model_type not in _EXPERTS:
            return
        block, gate, up, down = _EXPERTS[self._model_type]
        if name.endswith(".mlp.gate.weight"):
            own = tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
            yield name.replace(".mlp.gate.", f".{block}.gate."), own, (slice(None),)
        if not name.endswith((_UP, _DOWN)):
            return
        is_up = name.endswith(_UP)
        prefix = name.removesuffix(_UP if is_up else _DOWN)
        halves, rows = ((gate, up), shape[1] // 2) if is_up else ((down,), shape[1])
        columns = slice(offsets[2], offsets[2] + sizes[2])
        for place in range(sizes[0]):
            for number, letter in enumerate(halves):
                first = max(offsets[1], number * rows)
                end = min(offsets[1] + sizes[1], (number + 1) * rows)
                if first < end:
                    source = f"{prefix}.{block}.experts.{offsets[0] + place}.{letter}.weight"
                    inside = slice(first - offsets[1], end - offsets[1])
                    yield source, (slice(first - number * rows, end - number * rows), columns), (place, inside)


def _paths(folder: Path) -> list[Path]:
    """Files in which every tensor can be found by its name; none where the weights are kept otherwise."""
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if not (folder / _INDEX).is_file():
        return []
    names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
    return sorted({folder / name for name in names})

"""What a checkpoint must consist of, and what its tensors may hold."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OPTIMIZER = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
VALUES = "values.safetensors"
# Not every optimizer, and not every caller, has something to put there.
_OPTIONAL = ("subspace.safetensors", VALUES)


def check_listed(folder: Path, listed: Collection[str], state: Mapping[str, Any]) -> None:
    """Check that a manifest lists all that makes a checkpoint.

    Raises:
        CheckpointError: naming what is missing in the list.
    """
    manifest = folder / "manifest.json"
    if odd := [name for name in listed if Path(name).name != name]:
        raise CheckpointError(f"{manifest}: damaged: expected names of files, got {odd[0]!r}")
    expected = {"state.json", *_expected_model(listed), *_expected_optimizer(listed, state)}
    expected.update(name for name in _OPTIONAL if (folder / name).exists())
    if missing := sorted(expected - set(listed)):
        raise CheckpointError(f"{manifest}: damaged: it lacks {', '.join(missing)}")


def _expected_model(listed: Collection[str]) -> set[str]:
    """One file, or as many as the names of the shards say."""
    counts = {int(match[2]) for name in listed if (match := _SHARD.fullmatch(name))}
    if not counts or _SINGLE in listed:
        return {_SINGLE}
    return {_INDEX, *(f"model-{number + 1:05d}-of-{max(counts):05d}.safetensors" for number in range(max(counts)))}


def _expected_optimizer(listed: Collection[str], state: Mapping[str, Any]) -> set[str]:
    """One file of each process rank, or of the first where all hold the same."""
    size = state.get("world_size")
    if not isinstance(size, int):
        raise CheckpointError(f"state.json: damaged: expected a number as world_size, got {size!r}")
    numbers = {int(match[1]) for name in listed if (match := _OPTIMIZER.fullmatch(name))}
    replicated = state.get("zero_stage") == 0 and numbers == {0}
    return {f"optimizer-{rank:05d}-of-{size:05d}.safetensors" for rank in range(1 if replicated else size)}


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse numbers that nothing can be trained or continued from.

    Raises:
        CheckpointError: the tensor holds NaN or infinities.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{name}: expected finite numbers, got {bad:,} of {tensor.numel():,} that are NaN or Inf")


def check_finite_file(path: Path) -> None:
    """:func:`check_finite` of every tensor in a file of weights or of masters and moments; others pass."""
    if path.suffix != ".safetensors" or not path.name.startswith(("model", "optimizer-")):
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            check_finite(f"{path}: {key}", file.get_tensor(key))


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the mode that any new file has here: safetensors makes it readable to its owner
    only.

    Raises:
        CheckpointError: naming the file; safetensors says only that there is no space.
    """
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata=metadata)
        path.chmod(mode)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error

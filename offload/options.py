"""Checks of what :class:`~.activation_offload.ActivationOffload` is given."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from .backends import BackendName
from .errors import OffloadError

MAX_LANES = 64
Granularity = Literal["saved_tensors", "layer_inputs"]
_REQUIRED = ("min_tensor_bytes", "num_lanes", "host_memory_bytes", "io_timeout")
_MAY_BE_ZERO = ("min_tensor_bytes", "host_memory_bytes")
_MAY_BE_FRACTIONS = ("io_timeout", "rated_tbw", "max_drive_writes_per_day")


def to_folders(path: Any) -> list[Path]:
    """The folders that ``path`` names, with ``~`` and environment variables expanded; each exists.

    Raises:
        TypeError, ValueError: it is not a path or a sequence of paths, or names none.
        OffloadError: one is missing, or is no folder.
    """
    parts = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(parts, Sequence) or not all(isinstance(part, str | os.PathLike) for part in parts):
        raise TypeError(f"path: {path!r} found; a folder or a list of folders is needed")
    if not parts or not all(os.fspath(part) for part in parts):
        raise ValueError(f"path: {path!r} found; at least one folder, and no empty name, is needed")
    folders = []
    for part in parts:
        try:
            folder = Path(os.path.expandvars(part)).expanduser()
            is_folder, exists = folder.is_dir(), folder.exists()
        except OSError as error:
            raise OffloadError(f"{part}: cannot be used: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:
            # No such user's home; a null byte.
            raise OffloadError(f"{part}: cannot be used: {error}") from error
        if not is_folder:
            raise OffloadError(f"{folder}: {'not a folder' if exists else 'no such folder'}")
        folders.append(folder)
    return folders


def check_arguments(
    numbers: Mapping[str, Any], *, granularity: Any, keep_resident: Any, backend: Any, model: Any, layers: Any
) -> None:
    """
    Args:
        numbers: the arguments that are numbers, by name.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what is allowed.
    """
    for name, value in numbers.items():
        _check_number(name, value)
    if numbers["num_lanes"] > MAX_LANES:
        raise ValueError(f"num_lanes: {numbers['num_lanes']} found; at most {MAX_LANES} is allowed")
    if granularity not in get_args(Granularity):
        allowed = " or ".join(map(repr, get_args(Granularity)))
        raise ValueError(f"granularity: {granularity!r} found; {allowed} is allowed")
    if isinstance(backend, str) and backend not in get_args(BackendName):
        allowed = ", ".join(map(repr, get_args(BackendName)))
        raise ValueError(f"backend: {backend!r} found; one of {allowed} or an IOBackend is allowed")
    if not isinstance(backend, str) and not hasattr(backend, "lane"):
        raise TypeError(f"backend: {backend!r} found; a name or an IOBackend is needed")
    if not is_auto_or_share(keep_resident):
        raise ValueError(f"keep_resident: {keep_resident!r} found; 'auto' or a number from 0 to 1 is allowed")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: a {type(model).__name__} found; a torch.nn.Module is needed")
    if granularity == "layer_inputs" and model is None:
        raise ValueError("granularity: 'layer_inputs' needs model=, whose layers it makes recompute")
    if layers is not None:
        _check_layers(layers, granularity, model)


def is_auto_or_share(value: Any) -> bool:
    """What ``keep_resident`` may be."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value == "auto" or (is_number and 0 <= value <= 1)


def _check_number(name: str, value: Any) -> None:
    if value is None and name not in _REQUIRED:
        return
    kind = int | float if name in _MAY_BE_FRACTIONS else int
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name}: {value!r} found; {'a number' if name in _MAY_BE_FRACTIONS else 'an int'} is needed")
    if name in _MAY_BE_ZERO:
        if value < 0:
            raise ValueError(f"{name}: {value} found; 0 or more is needed")
    elif not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: {value} found; a number above 0 is needed")


def _check_layers(layers: Any, granularity: str, model: nn.Module | None) -> None:
    if granularity != "layer_inputs" or model is None:
        raise ValueError("layers: only granularity 'layer_inputs' recomputes layers")
    if not isinstance(layers, Sequence | nn.ModuleList):
        raise TypeError(f"layers: a {type(layers).__name__} found; a list of modules is needed")
    if not layers:
        raise ValueError("layers: none found; at least one is needed")
    known = set(model.modules())
    for place, layer in enumerate(layers):
        if layer not in known:
            raise ValueError(f"layers[{place}]: a {type(layer).__name__} found that is not a module of model")

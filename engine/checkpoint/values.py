"""Values of the caller's and of schedules as JSON, and back as they were; nothing is pickled."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

_TAG = "__type__"
_PLAIN = (str, int, bool, type(None))
# NumPy's long double, real and complex: no number of Python's holds it.
_LONG = "gG"


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """:func:`_encode`, of what is nested as deep as JSON can be read back.

    Raises:
        ValueError: also for what holds itself.
    """
    try:
        return _encode(value, tensors, path)
    except RecursionError:
        raise ValueError(f"{path}: expected values that are not nested so deep, or in themselves") from None


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """What a value becomes in ``state.json``: itself, or an object that says what it was.

    Tuples, sets, mappings whose keys are not strings, numbers that are not finite and NumPy's keep their type; tensors
    and arrays are added to ``tensors`` under the name of their place.

    Raises:
        ValueError: ``path: expected ..., got ...`` for anything else.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if isinstance(value, Tensor | np.ndarray):
        return _encode_array(value, tensors, path)
    if isinstance(value, np.generic):
        if value.dtype.char in _LONG:
            raise ValueError(f"{path}: expected a number of 64 bits at most, got numpy.{type(value).__qualname__}")
        return {_TAG: "numpy", "dtype": value.dtype.str, "value": _encode(value.item(), tensors, path)}
    if type(value) is list:
        return [_encode(child, tensors, f"{path}[{i}]") for i, child in enumerate(value)]
    if type(value) in (tuple, set, frozenset):
        return {_TAG: type(value).__name__, "value": [_encode(v, tensors, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, path)
    raise ValueError(
        f"{path}: expected numbers, text, None, tensors, arrays, or lists, tuples, sets and mappings of them, got"
        f" {type(value).__module__}.{type(value).__qualname__}"
    )


def _encode_array(value: Tensor | np.ndarray, tensors: dict[str, Tensor], path: str) -> dict[str, Any]:
    is_tensor = isinstance(value, Tensor)
    if unfit := _unfit_tensor(value) if is_tensor else _unfit_array(value):
        raise ValueError(f"{path}: expected {'a dense tensor' if is_tensor else 'an array'} of numbers, got {unfit}")
    tensor = value.detach() if is_tensor else torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    name = path
    while name in tensors:  # a key with a dot in it, or 1 beside "1"
        name += "'"
    tensors[name] = tensor.to("cpu", copy=True).contiguous()
    return {_TAG: "tensor" if is_tensor else "array", "value": name}


def _unfit_tensor(tensor: Tensor) -> str | None:
    """Why it cannot be stored as it is; None if it can."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout is not torch.strided:
        return f"one of the layout {tensor.layout}"
    if tensor.is_meta:
        return "one on the device meta, which has no values"
    try:
        save({"": torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, SafetensorError, RuntimeError):
        return f"one of {tensor.dtype}"
    return None


def _unfit_array(array: np.ndarray) -> str | None:
    if type(array) not in (np.ndarray, np.memmap):
        return f"a {type(array).__module__}.{type(array).__qualname__}"
    if array.dtype.kind not in "biuf" or not array.dtype.isnative or array.dtype.char in _LONG:
        return f"one of {array.dtype}"
    return None


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], path: str) -> dict[str, Any]:
    if all(type(key) is str for key in value) and _TAG not in value:
        return {key: _encode(child, tensors, f"{path}.{key}") for key, child in value.items()}
    pairs = [
        [_encode(key, tensors, f"{path}, the key {key!r}"), _encode(child, tensors, f"{path}.{key}")]
        for key, child in value.items()
    ]
    return {_TAG: "Counter" if isinstance(value, Counter) else "dict", "value": pairs}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given, tensors on the CPU."""
    if isinstance(value, list):
        return [decode(child, tensors) for child in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(child, tensors) for key, child in value.items()}
    kind, held = value[_TAG], value["value"]
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        return tensors[held].numpy()
    if kind == "numpy":
        return np.dtype(value["dtype"]).type(decode(held, tensors))
    if kind in ("dict", "Counter"):
        pairs = {decode(key, tensors): decode(child, tensors) for key, child in held}
        return pairs if kind == "dict" else Counter(pairs)
    makers = {"float": float, "tuple": tuple, "set": set, "frozenset": frozenset}
    return makers[kind](decode(held, tensors))


def read_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Those of all files."""
    found: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found

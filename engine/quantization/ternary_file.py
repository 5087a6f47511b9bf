"""Ternary weights as a file, and an exported folder whose weights are those that a quantised run computed with.

``ternary.safetensors`` holds for each quantised weight ``NAME`` of shape ``(m, n)``:

* ``NAME.packed``: uint8 ``(m, ceil(n / 4))``; byte ``j`` of a row has columns ``4 j`` to ``4 j + 3``, the first in the
  lowest two bits, each as value + 1 (0, 1, 2); columns beyond ``n`` are 0 (1);
* ``NAME.scale``: fp32, a scalar: the weight is ``value * scale``;

and the number of columns of each as JSON in its metadata, under ``columns``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from narrowgauge.optimizers.numerics.ternary import ScaleName, pack_ternary, ternary, unpack_ternary

from ..checkpoint.contents import write_tensors
from ..errors import UserError

TERNARY = "ternary.safetensors"


def make_ternary(folder: Path, layers: Sequence[str], scale: ScaleName) -> None:
    """Replace the weights of the layers in an exported folder by the rounded ones, and write them packed beside.

    Raises:
        UserError: a weight is not there.
    """
    missing = {f"{name}.weight" for name in layers}
    packed: dict[str, Tensor] = {}
    columns: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(path)
        for name in sorted(missing & tensors.keys()):
            weight = tensors[name]
            values, found = ternary(weight, scale)
            tensors[name] = (values * found).to(weight.dtype)
            packed[f"{name}.packed"], packed[f"{name}.scale"] = pack_ternary(values), found.float()
            columns[name] = weight.shape[1]
            missing.discard(name)
        path.unlink()
        write_tensors(tensors, path, metadata={"format": "pt"})
    if missing:
        raise UserError(f"{folder}: expected the weight {min(missing)}, which was quantised, got none")
    write_tensors(packed, folder / TERNARY, metadata={"columns": json.dumps(columns)})


def read_ternary(path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The weights of a ``ternary.safetensors``: name, values int8 ``(m, n)`` and scale; the weight is their product.

    Raises:
        UserError: the file is none.
    """
    with safe_open(path, framework="pt") as file:
        columns: Mapping[str, int] = json.loads((file.metadata() or {}).get("columns", "null"))
        if columns is None:
            raise UserError(f"{path}: expected ternary weights, got a file without their columns")
        for name, number in columns.items():
            yield name, unpack_ternary(file.get_tensor(f"{name}.packed"), number), file.get_tensor(f"{name}.scale")


def dense_weights(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of a ``ternary.safetensors`` as a model computes with them."""
    return {name: (values.float() * scale).to(dtype) for name, values, scale in read_ternary(path)}

"""Statistics of the full gradient that are linear in it, so that micro-batches and process ranks add up.

The full gradient ``G`` is never formed: with random directions ``Omega`` from a seed that all ranks share, ``G Omega``
and ``Omega^T G`` follow from what backward has at hand (see :class:`~..layers.compact.CompactLinear`).
"""

import torch
from torch import Tensor

from ..layers.targets import CompactLayer
from ..numerics.seeds import derive_seed


def directions(layer: CompactLayer, *, side: str, size: int, seed: int, of_each: bool = False) -> Tensor:
    """Gaussian directions, ``(n, size)`` for a sketch of the rows, ``(m, size)`` for one of the columns, fp32, CPU.

    Args:
        of_each: of stacked matrices, the same ``(m / num_matrices, size)`` for a sketch of each.
    """
    m, n = layer.module.weight_shape
    m = m // layer.module.num_matrices if of_each else m
    generator = torch.Generator().manual_seed(derive_seed(seed, "sketch", side, layer.name))
    return torch.randn(n if side == "rows" else m, size, generator=generator)

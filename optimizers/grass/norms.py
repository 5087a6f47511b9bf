"""Norms of the columns or rows of the full gradient, for the selections that go by them.

With ``s`` orthonormal directions ``Omega``, times ``sqrt(n / s)``, the sum over them of ``(G Omega)_is^2`` has the
expectation ``|G_i|^2`` and the relative standard deviation ``sqrt(2 / s (n - s) / (n + 2))``: always below that of
Gaussian ones, and exact at ``s = n``. Columns likewise, with ``Omega^T G``.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..compact.backend import SubspaceBackend
from ..compact.sketches import directions
from ..layers.targets import CompactLayer
from ..sharding.communicator import Communicator

Statistics = Literal["sketch", "exact", "local"]


class NormStatistics:
    """Observes the full gradients of one optimizer step."""

    def __init__(self, kind: Statistics, size: int) -> None:
        """
        Args:
            kind: ``sketch`` reduces ``size`` numbers per row or column over the process ranks; ``exact`` forms and
                reduces the whole gradients; ``local`` forms those of the first rank and reduces nothing.
        """
        self._kind: Statistics = kind
        self._size = size

    def start(self, layers: Sequence[CompactLayer], *, seed: int) -> None:
        """Observe the coming backward passes; forgets what was observed before."""
        for layer in layers:
            if self._kind == "sketch":
                side = layer.module.side
                size = min(self._size, layer.module.weight_shape[0 if side == "columns" else 1])
                omega = torch.linalg.qr(directions(layer, side=side, size=size, seed=seed)).Q
                layer.module.start_probe(side, omega * math.sqrt(omega.shape[0] / size))
            elif self._kind == "exact" or _is_first_rank():
                layer.module.start_probe("full")

    def finish(self, layers: Sequence[CompactLayer], backend: SubspaceBackend) -> list[Tensor]:
        """The squared norms of each layer's columns or rows, fp64 on the CPU, bit-equal on all ranks. Collective."""
        found = []
        for layer in layers:
            if layer.module.probe is None:
                size = layer.module.num_choices
                found.append(torch.zeros(size, dtype=torch.float64, device=layer.module.weight.device))
                continue
            observed = layer.module.end_probe()
            if self._kind != "local":
                backend.communicator(layer.name).average_(observed)
            squares = torch.linalg.vector_norm(observed, dim=1 - layer.module.dim, dtype=torch.float64).square()
            # Stacked matrices share the choice.
            found.append(squares.view(-1, layer.module.num_choices).sum(0))
        # One message to each group of ranks.
        members: dict[Communicator, list[int]] = {}
        for position, layer in enumerate(layers):
            members.setdefault(backend.communicator(layer.name), []).append(position)
        for communicator, positions in members.items():
            whole = communicator.broadcast_(torch.cat([found[position] for position in positions]))
            parts = whole.cpu().nan_to_num(posinf=0.0).split([found[position].numel() for position in positions])
            for position, squares in zip(positions, parts, strict=True):
                found[position] = squares
        return found


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0

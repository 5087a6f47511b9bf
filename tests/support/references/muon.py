"""Grass with Muon and NorMuon written down a second time: matrices by their equations, the rest as in Grass's."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.support.references.grass import ReferenceGrass


def newton_schulz(matrix: Tensor) -> Tensor:
    """Always on the side of the rows; the iteration gives the same from either."""
    x = matrix / max(1e-7, float(matrix.pow(2).sum().sqrt()))
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


class ReferenceMuon:
    """The change of one matrix, outputs x inputs, per step."""

    def __init__(self, *, adjust: str, nesterov: bool, neuron_beta: float | None, momentum: float = 0.95) -> None:
        self.adjust, self.nesterov, self.neuron_beta, self.mu = adjust, nesterov, neuron_beta, momentum
        self.m: Tensor | None = None
        self.v: Tensor | None = None

    def change(self, g: Tensor) -> Tensor:
        outputs, inputs = g.shape
        m = torch.zeros_like(g) if self.m is None else self.m
        v = torch.zeros(outputs, dtype=g.dtype) if self.v is None else self.v
        self.m = self.mu * m + (1 - self.mu) * g
        if not g.any():
            return torch.zeros_like(g)
        o = newton_schulz(self.mu * self.m + (1 - self.mu) * g if self.nesterov else self.m)
        keller, moonshot = math.sqrt(max(1, outputs / inputs)), 0.2 * math.sqrt(max(outputs, inputs))
        if self.neuron_beta is None:
            return o * (keller if self.adjust == "original" else moonshot)
        self.v = self.neuron_beta * v + (1 - self.neuron_beta) * (o * o).sum(1) / inputs
        hat = o / (self.v.sqrt() + 1e-10).view(-1, 1)
        if self.adjust == "original":
            return hat / hat.norm() * o.norm() * keller
        return 0.2 * math.sqrt(outputs * inputs) / hat.norm() * hat


class ReferenceMuonGrass(ReferenceGrass):
    """``muon`` has the keywords of :class:`ReferenceMuon`; ``carry`` is of momentum, and of the outputs' moments."""

    def __init__(self, model: Any, *, muon: dict[str, Any], carry: bool = False, **options: Any) -> None:
        self.muon, self.carry = muon, carry
        self.of: dict[str, list[ReferenceMuon]] = {}
        super().__init__(model, **options)

    def select(self) -> None:
        old = {name: index.tolist() for name, index in getattr(self, "index", {}).items()}
        super().select()
        for name in self.matrices:
            count = self.params[name].shape[0] if self.params[name].dim() == 3 else 1
            if not self.carry or name not in self.of:
                self.of[name] = [ReferenceMuon(**self.muon) for _ in range(count)]
                continue
            is_last = self.side == "columns"
            for muon in self.of[name]:
                assert muon.m is not None
                m = muon.m if is_last else muon.m.t()
                new = [
                    m[:, old[name].index(i)] if i in old[name] else torch.zeros_like(m[:, 0])
                    for i in self.index[name].tolist()
                ]
                muon.m = torch.stack(new, dim=1) if is_last else torch.stack(new, dim=0)

    def direction(self, name: str, g: Tensor) -> Tensor:
        if name not in self.matrices:
            return super().direction(name, g)
        matrices = g if g.dim() == 3 else g[None]
        if self.is_transposed(name):
            found = [m.change(one.t()).t() for m, one in zip(self.of[name], matrices, strict=True)]
        else:
            found = [m.change(one) for m, one in zip(self.of[name], matrices, strict=True)]
        return torch.stack(found).view_as(g)

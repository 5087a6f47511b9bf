"""Adam in a selected subspace, written with dense projections and the full gradient, sharing no code with the package.

The reference is told which subspace to use, as a matrix ``P``: ``(n, r)`` for columns, ``(m, r)`` for rows.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.layers.projected_linear import ProjectedLinear
from narrowgauge.optimizers.layers.selected_weight import SelectedWeight
from narrowgauge.optimizers.layers.unit import CompactUnit


def projection(module: CompactUnit) -> Tensor:
    """``P`` of a compact layer, dense."""
    if isinstance(module, SelectedWeight):
        index, scales, dim = module.index, torch.ones(module.index.numel()), module.weight_shape[module.dim]
    else:
        assert isinstance(module, ProjectedLinear)
        columns = module.right is not None
        index, scales = (module.right_index, module.right) if columns else (module.left_index, module.left)
        dim = module.weight_shape[1 if columns else 0]
    assert index is not None
    assert scales is not None
    p = torch.zeros(dim, index.numel(), dtype=torch.float64)
    p[index, torch.arange(index.numel())] = scales.double()
    return p


def projections(optimizer: Grass) -> dict[str, Tensor]:
    return {f"{layer.name}.weight": projection(layer.module) for layer in optimizer.layers}


class SelectedReference:
    """AdamW on ``G P`` (or ``P^T G``), the change of which is lifted back with the same ``P``; on the others, AdamW."""

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, Tensor],
        sides: Mapping[str, str | None],
        *,
        lr: float,
        matrix_lr_scale: float = 1.0,
        weight_decay: float = 0.0,
        decays_whole_weight: bool = False,
        dense_rate: Collection[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.params = dict(model.named_parameters())
        self.sides, self.lr, self.scale = sides, lr, matrix_lr_scale
        self.weight_decay, self.whole, self.betas, self.eps = weight_decay, decays_whole_weight, betas, eps
        self.dense_rate = dense_rate
        self.p: dict[str, Tensor] = {}
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.count = dict.fromkeys(self.params, 0)
        self.select(projections)

    def project(self, name: str, full: Tensor) -> Tensor:
        if name not in self.p:
            return full
        p = self.p[name].to(full.dtype)
        return full @ p if self.sides[name] == "columns" else p.T @ full

    def lift(self, name: str, small: Tensor) -> Tensor:
        if name not in self.p:
            return small
        p = self.p[name].to(small.dtype)
        return small @ p.T if self.sides[name] == "columns" else p @ small

    @torch.no_grad()
    def select(self, projections: dict[str, Tensor], carry: bool = False) -> None:
        for name, p in projections.items():
            old = self.p.get(name)
            self.p[name] = p
            small = self.project(name, self.params[name])
            m, v = torch.zeros_like(small), torch.zeros_like(small)
            if carry and old is not None:
                m, v = self.carried(name, old, p, m, v)
            else:
                self.count[name] = 0
            self.m[name], self.v[name] = m, v
        for name, parameter in self.params.items():
            self.m.setdefault(name, torch.zeros_like(parameter))
            self.v.setdefault(name, torch.zeros_like(parameter))

    def carried(self, name: str, old: Tensor, new: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before, after = ([int(column.nonzero()) for column in p.T] for p in (old, new))
        columns = self.sides[name] == "columns"
        kept = {after.index(entry): before.index(entry) for entry in after if entry in before}
        for target, source in ((m, self.m[name]), (v, self.v[name])):
            for position, previous in kept.items():
                if columns:
                    target[:, position] = source[:, previous]
                else:
                    target[position] = source[previous]
        old_v = [self.v[name][:, i] if columns else self.v[name][i] for i in (kept.values() or range(len(before)))]
        mean = torch.stack(old_v).mean()
        for position in set(range(len(after))) - set(kept):
            if columns:
                v[:, position] = mean
            else:
                v[position] = mean
        return m, v

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        for name, parameter in self.params.items():
            assert parameter.grad is not None
            g = self.project(name, parameter.grad)
            lr = self.lr * (self.scale if name in self.p and name not in self.dense_rate else 1.0)
            self.count[name] += 1
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g * g
            m_hat = self.m[name] / (1 - beta1 ** self.count[name])
            v_hat = self.v[name] / (1 - beta2 ** self.count[name])
            update = self.lift(name, m_hat / (v_hat.sqrt() + self.eps))
            decayed = parameter
            if name in self.p and not self.whole:
                decayed = self.lift(name, self.project(name, parameter))
            parameter.sub_(lr * self.weight_decay * decayed + lr * update)

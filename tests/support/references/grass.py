"""Grass written down a second time, from the paper and the documented choices, sharing no code with the package.

It forms the full gradient, takes the selected entries of it, and runs Adam's equations on them in the model's own
dtype.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def reference_index(dim: int, rank: int, seed: int, refresh: int, name: str, block: bool = False) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{refresh}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if block:
        start = rank * int(torch.randint(math.ceil(dim / rank), (1,), generator=generator))
        start = min(start, dim - rank)
        return torch.tensor(range(start, start + rank))
    return torch.randperm(dim, generator=generator)[:rank].sort().values


class ReferenceGrass:
    def __init__(
        self,
        model: nn.Module,
        *,
        is_matrix: Callable[[str], bool],
        density: float,
        side: str,
        lr: float,
        matrix_lr_scale: float = 1.0,
        refresh_interval: int,
        weight_decay: float = 0.0,
        decay: str = "active",
        options_of: Callable[[str], dict[str, float]] = lambda name: {},
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        block: bool = False,
        is_transposed: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.params = dict(model.named_parameters())
        self.matrices = {n for n in self.params if is_matrix(n)}
        self.density, self.side, self.lr, self.scale = density, side, lr, matrix_lr_scale
        self.interval, self.weight_decay, self.decay = refresh_interval, weight_decay, decay
        self.options_of, self.betas, self.eps, self.seed = options_of, betas, eps, seed
        self.block, self.is_transposed = block, is_transposed
        self.steps = self.refreshes = 0
        self.pending = dict.fromkeys(self.matrices, 1.0)
        self.count = dict.fromkeys(self.params, 0)
        self.select()

    def select(self) -> None:
        """New indices for the matrices, and their moments from zero; at the first call everything's."""
        first = self.steps == 0
        self.index: dict[str, Tensor] = {} if first else self.index
        if first:
            self.m: dict[str, Tensor] = {}
            self.v: dict[str, Tensor] = {}
        for name, parameter in self.params.items():
            if name in self.matrices:
                dim = parameter.shape[-1 if self.selects_last(name) else -2]
                rank = max(1, round(self.density * dim))
                # Stacked experts go by the parameter's name, of which a module may have several.
                own = name if parameter.dim() == 3 else name.removesuffix(".weight")
                self.index[name] = reference_index(dim, rank, self.seed, self.refreshes, own, self.block)
            if first or name in self.matrices:
                self.m[name] = torch.zeros_like(self.take(name, parameter))
                self.v[name] = torch.zeros_like(self.m[name])
                self.count[name] = 0

    def selects_last(self, name: str) -> bool:
        """Columns are inputs, which a transposed matrix has first."""
        return (self.side == "columns") != self.is_transposed(name)

    def take(self, name: str, full: Tensor) -> Tensor:
        if name not in self.matrices:
            return full.clone()
        # Of stacked matrices, the same of each.
        return full[..., self.index[name]] if self.selects_last(name) else full[..., self.index[name], :]

    def put(self, name: str, full: Tensor, values: Tensor) -> None:
        if name not in self.matrices:
            full.copy_(values)
        elif self.selects_last(name):
            full[..., self.index[name]] = values
        else:
            full[..., self.index[name], :] = values

    def direction(self, name: str, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        self.count[name] += 1
        self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
        self.v[name] = beta2 * self.v[name] + (1 - beta2) * g * g
        m_hat = self.m[name] / (1 - beta1 ** self.count[name])
        v_hat = self.v[name] / (1 - beta2 ** self.count[name])
        return m_hat / (v_hat.sqrt() + self.eps)

    @torch.no_grad()
    def step(self, clip: float | None = None) -> float:
        grads = {n: self.take(n, p.grad) for n, p in self.params.items() if p.grad is not None}
        norm = torch.sqrt(sum(g.pow(2).sum() for g in grads.values()))  # type: ignore[arg-type]
        if clip is not None:
            factor = min(1.0, float(clip / (norm + 1e-6)))
            grads = {n: g * factor for n, g in grads.items()}
        for name, g in grads.items():
            option = self.options_of(name)
            lr = option.get("lr", self.lr) * (self.scale if name in self.matrices else 1.0)
            decay = option.get("weight_decay", self.weight_decay)
            values = self.take(name, self.params[name]) * (1 - lr * decay) - lr * self.direction(name, g)
            self.put(name, self.params[name], values)
            if name in self.matrices and self.decay == "all":
                self.pending[name] *= 1 - lr * decay
        self.steps += 1
        if self.steps % self.interval == 0:
            for name in self.matrices:
                active = self.take(name, self.params[name])
                self.params[name].mul_(self.pending[name])
                self.put(name, self.params[name], active)
                self.pending[name] = 1.0
            self.refreshes += 1
            self.select()
        return float(norm)

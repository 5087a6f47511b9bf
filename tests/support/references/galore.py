"""GaLore written down a second time, from the paper and the documented choices, sharing no code with the package.

It forms the full gradient, projects it, runs Adam's equations on the projection and projects the result back, all in
the model's own dtype.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.references.frugal import orthonormal


def first_basis(dim: int, rank: int, key: str, seed: int, layer: str) -> Tensor:
    """The seeded random basis of the first step, ``(dim, rank)`` in fp64."""
    digest = hashlib.sha256(f"{seed}/basis/{key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return orthonormal(torch.randn(dim, rank, generator=generator, dtype=torch.float64))


class ReferenceGaLore:
    def __init__(
        self,
        model: nn.Module,
        *,
        is_matrix: Callable[[str], bool],
        rank: int,
        side: str = "std",
        lr: float,
        scale: float,
        matrix_lr_scale: float = 1.0,
        refresh_interval: int,
        weight_decay: float = 0.0,
        moments: str = "keep",
        options_of: Callable[[str], dict[str, float]] = lambda name: {},
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        is_transposed: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.params = dict(model.named_parameters())
        self.matrices = [name for name in self.params if is_matrix(name)]
        self.rank, self.lr, self.scale, self.matrix_lr_scale = rank, lr, scale, matrix_lr_scale
        self.interval, self.weight_decay, self.moments = refresh_interval, weight_decay, moments
        self.options_of, self.betas, self.eps = options_of, betas, eps
        self.steps = 0
        self.count = dict.fromkeys(self.params, 0)
        self.state: dict[str, tuple[Tensor, Tensor]] = {}
        self.bases: dict[str, dict[str, Tensor]] = {}
        for name in self.matrices:
            *stack, m, n = self.params[name].shape
            swapped = {"left": "right", "right": "left"} if is_transposed(name) else {}
            m, n = (n, m) if swapped else (m, n)
            keys = {"std": ["left" if m < n else "right"], "full": ["left", "right"]}.get(side, [side])
            self.bases[name] = {}
            for key in keys:
                own = name.removesuffix(".weight")
                names = [f"{own}.{expert}" for expert in range(*stack)] if stack else [own]
                bases = [first_basis(m if key == "left" else n, rank, key, seed, each) for each in names]
                basis = torch.stack(bases) if stack else bases[0]
                self.bases[name][swapped.get(key, key)] = basis.to(self.params[name].dtype)

    def project(self, name: str, gradient: Tensor) -> Tensor:
        for key, basis in self.bases.get(name, {}).items():
            gradient = basis.mT @ gradient if key == "left" else gradient @ basis
        return gradient

    def project_back(self, name: str, change: Tensor) -> Tensor:
        for key, basis in self.bases[name].items():
            change = basis @ change if key == "left" else change @ basis.mT
        return change

    @torch.no_grad()
    def step(self, clip: float | None = None) -> float:
        full = {n: p.grad for n, p in self.params.items() if p.grad is not None}
        grads = {name: self.project(name, gradient) for name, gradient in full.items()}
        norm = torch.sqrt(sum(g.pow(2).sum() for g in grads.values()))  # type: ignore[arg-type]
        factor = 1.0 if clip is None else min(1.0, float(clip / (norm + 1e-6)))
        beta1, beta2 = self.betas
        for name, gradient in grads.items():
            g = gradient * factor
            m, v = self.state.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            self.state[name] = m, v
            self.count[name] += 1
            direction = m / (1 - beta1 ** self.count[name])
            direction = direction / ((v / (1 - beta2 ** self.count[name])).sqrt() + self.eps)
            option = self.options_of(name)
            lr = option.get("lr", self.lr) * (self.matrix_lr_scale if name in self.matrices else 1.0)
            if name in self.matrices:
                direction = self.scale * self.project_back(name, direction)
            self.params[name].mul_(1 - lr * option.get("weight_decay", self.weight_decay)).sub_(lr * direction)
        if self.steps % self.interval == 0:
            for name in self.matrices:
                u, _, vh = torch.linalg.svd(full[name], full_matrices=False)
                for key, former in self.bases[name].items():
                    found = u[..., : self.rank] if key == "left" else vh[..., : self.rank, :].mT
                    found = found * torch.einsum("...dr,...dr->...r", found, former).sign()[..., None, :]
                    for expert, own in enumerate(full[name] if full[name].dim() == 3 else ()):
                        if not own.any():
                            found[expert] = former[expert]
                    self.bases[name][key] = found
                if self.moments == "reset" or self.steps == 0:
                    self.state.pop(name)
                    self.count[name] = 0
        self.steps += 1
        return float(norm)

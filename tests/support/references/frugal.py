"""FRUGAL written down a second time, from the paper and the documented choices, sharing no code with the package.

Every parameter is whole. The state-full coordinates are a mask over it, or a projection; Adam's equations are evaluated
for all coordinates and masked.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.references.grass import reference_index

MASK = 0xFFFFFFFF


def seed_of(seed: int, refresh: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{refresh}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def scrambled(position: int, seed: int) -> int:
    """A 32-bit hash of a position, as a signed number: an odd multiplier, then MurmurHash3's finalizer."""
    h = position * ((seed >> 32) | 1) & MASK
    h ^= (seed ^ (seed >> 31)) & 0x7FFFFFFF
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    h ^= h >> 16
    return h - (1 << 32) if h >> 31 else h


def orthonormal(normal: Tensor) -> Tensor:
    """Gram-Schmidt of the columns, by Cholesky."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(normal.T @ normal).T, normal, upper=True, left=False)


class ReferenceFrugal:
    def __init__(
        self,
        model: nn.Module,
        *,
        rule_of: Callable[[str], str],
        is_matrix: Callable[[str], bool],
        density: float,
        selection: str,
        block_order: str = "random",
        state_free: str = "signSGD",
        state_free_lr_scale: float = 1.0,
        refresh_interval: int,
        lr: float,
        matrix_lr_scale: float = 1.0,
        weight_decay: float = 0.0,
        options_of: Callable[[str], dict[str, float]] = lambda name: {},
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        self.params = dict(model.named_parameters())
        self.rules = {name: rule_of(name) for name in self.params}
        self.projected = [name for name, rule in self.rules.items() if rule == "projected"]
        self.is_matrix, self.options_of = is_matrix, options_of
        self.density, self.selection, self.block_order = density, selection, block_order
        self.state_free, self.free_scale = state_free, state_free_lr_scale
        self.interval, self.lr, self.scale, self.weight_decay = refresh_interval, lr, matrix_lr_scale, weight_decay
        self.betas, self.eps, self.seed = betas, eps, seed
        self.steps = 0
        self.count = dict.fromkeys(self.params, 0)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.basis: dict[str, Tensor] = {}

    @property
    def refresh(self) -> int:
        return self.steps // self.interval

    def share(self, number: int) -> int:
        return max(1, round(self.density * number))

    def mask(self, name: str) -> Tensor:
        shape, rule = self.params[name].shape, self.rules[name]
        mask = torch.zeros(shape, dtype=torch.bool)
        layer = name.removesuffix(".weight")
        if rule == "full" or (rule == "projected" and self.density == 1.0):
            mask[:] = True
        elif rule == "free" or self.density == 0.0:
            pass
        elif self.selection == "columns":
            mask[:, reference_index(shape[1], self.share(shape[1]), self.seed, self.refresh, layer)] = True
        elif self.selection == "rows":
            mask[reference_index(shape[0], self.share(shape[0]), self.seed, self.refresh, layer), :] = True
        elif self.selection == "randk":
            seed = seed_of(self.seed, self.refresh, layer)
            order = sorted(range(mask.numel()), key=lambda position: scrambled(position, seed))
            mask.view(-1)[order[: self.share(mask.numel())]] = True
        else:
            mask[:] = self.projected.index(name) in self.blocks()
        return mask

    def blocks(self) -> list[int]:
        number, total = self.share(len(self.projected)), len(self.projected)
        if self.block_order == "random":
            return reference_index(total, number, self.seed, self.refresh, "blocks").tolist()
        positions = [self.refresh * number + i for i in range(number)]
        return [p % total if self.block_order == "ascending" else total - 1 - p % total for p in positions]

    def new_basis(self, name: str, gradient: Tensor) -> Tensor:
        """Columns that span the subspace, on the shorter side of the matrix."""
        rows, columns = gradient.shape
        rank = self.share(min(rows, columns))
        # A gradient of zero has no directions.
        if self.selection == "random" or not gradient.any():
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.refresh, name.removesuffix(".weight")))
            size = (min(rows, columns), rank)
            return orthonormal(torch.randn(size, generator=generator, dtype=gradient.dtype))
        gram = gradient.T @ gradient if rows >= columns else gradient @ gradient.T
        return torch.linalg.eigh(gram.double()).eigenvectors[:, -rank:].to(gradient.dtype)

    def adam(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's direction; the moments live in the space that the gradient is given in."""
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        (beta1, beta2), (m, v) = self.betas, self.moments[name]
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient * gradient
        self.moments[name] = m, v
        t = self.count[name]
        return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.eps)

    @torch.no_grad()
    def step(self, clip: float | None = None) -> None:
        grads = {n: p.grad.clone() for n, p in self.params.items() if p.grad is not None}
        if clip is not None:
            norm = torch.sqrt(sum(g.pow(2).sum() for g in grads.values()))  # type: ignore[arg-type]
            grads = {n: g * min(1.0, float(clip / (norm + 1e-6))) for n, g in grads.items()}
        fresh = self.steps % self.interval == 0
        for name, gradient in grads.items():
            projected = self.rules[name] == "projected" and self.density < 1.0
            if fresh and projected:
                self.moments.pop(name, None)
                self.count[name] = 0
            self.count[name] += 1
            option = self.options_of(name)
            lr = option.get("lr", self.lr) * (self.scale if self.is_matrix(name) else 1.0)
            if projected and self.density > 0.0 and self.selection in ("svd", "random"):
                full, rest = self.in_subspace(name, gradient, fresh)
            else:
                mask = self.mask(name)
                full = torch.where(mask, self.adam(name, gradient), 0.0)
                rest = torch.where(mask, 0.0, gradient)
            free = rest.sign() if self.state_free == "signSGD" else rest
            parameter = self.params[name]
            parameter.mul_(1 - lr * option.get("weight_decay", self.weight_decay))
            parameter.sub_(lr * full + lr * self.free_scale * free)
        self.steps += 1

    def in_subspace(self, name: str, gradient: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        """Adam's direction in the whole space, and the gradient outside the subspace."""
        if fresh:
            self.basis[name] = self.new_basis(name, gradient)
        basis = self.basis[name]
        if gradient.shape[0] >= gradient.shape[1]:
            return self.adam(name, gradient @ basis) @ basis.T, gradient - gradient @ basis @ basis.T
        return basis @ self.adam(name, basis.T @ gradient), gradient - basis @ (basis.T @ gradient)

"""APOLLO written down a second time, from the paper, with full matrices, sharing no code with the package."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PaperApollo:
    """Algorithm 1 of arXiv 2412.05270. Where the projection is zero, the factor is, and the limiter begins again.

    Attributes:
        seeds: of the projections, by parameter; the optimizer's own, to be set before each step.
    """

    def __init__(self, model: nn.Module, *, is_matrix: Callable[[str], bool], **options: Any) -> None:
        self.params, self.is_matrix, self.options = dict(model.named_parameters()), is_matrix, options
        self.seeds: dict[str, int] = {}
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.norms: dict[str, float] = {}
        self.t = 0

    def draw(self, name: str, rank: int, side: int, tall: bool) -> Tensor:
        """P of shape (rank, side); drawn transposed for wide matrices."""
        generator = torch.Generator().manual_seed(self.seeds[name])
        shape = (rank, side) if tall else (side, rank)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float32) / math.sqrt(rank)).to(
            self.params[name].dtype
        )
        return drawn if tall else drawn.T

    def adam(self, name: str, g: Tensor) -> Tensor:
        (beta1, beta2), eps = self.options["betas"], self.options["eps"]
        self.m[name] = beta1 * self.m.get(name, torch.zeros_like(g)) + (1 - beta1) * g
        self.v[name] = beta2 * self.v.get(name, torch.zeros_like(g)) + (1 - beta2) * g * g
        return self.m[name] / (1 - beta1**self.t) / ((self.v[name] / (1 - beta2**self.t)).sqrt() + eps)

    def zero_grad(self) -> None:
        for parameter in self.params.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        limit = self.options.get("norm_growth_limit", 1.01)
        for name, w in self.params.items():
            g = w.grad
            assert g is not None
            lr = self.options["lr"] * (self.options["matrix_lr_scale"] if self.is_matrix(name) else 1.0)
            if not self.is_matrix(name):
                w.copy_(w - lr * self.adam(name, g) - lr * self.options["weight_decay"] * w)
                continue
            tall = g.shape[0] >= g.shape[1]
            g = g.T if tall else g
            r = self.draw(name, self.options["rank"], g.shape[0], tall) @ g
            d = self.adam(name, r)
            per_matrix = self.options.get("scale_type") == "tensor"
            alpha = self.options.get("scale", math.sqrt(128) if per_matrix else 1.0)
            lengths = (d.norm(), r.norm()) if per_matrix else (d.norm(dim=0), r.norm(dim=0))
            factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
            update = g * factor if per_matrix else g @ torch.diag(factor)
            norm = float(update.norm())
            if limit is not None and self.norms.get(name, 0.0) > 0.0 and norm / self.norms[name] > limit:
                update = update / norm * limit * self.norms[name]
                norm = limit * self.norms[name]
            self.norms[name] = norm
            w.copy_(w - lr * alpha * (update.T if tall else update) - lr * self.options["weight_decay"] * w)

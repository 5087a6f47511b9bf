"""What the methods are compared with, beside AdamW: matrices that do not train, Muon, and columns of the gradient
without state. Embeddings, head and norms are AdamW's in all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.optimizers.numerics.adam import adam_directions

Groups = tuple[dict[str, Any], dict[str, Any]]


class Both(torch.optim.Optimizer):
    """Two optimizers that step together, with the groups of both."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for part in self._parts:
            part.step()
            self.state.update(part.state)


class NormalisedColumns(torch.optim.Optimizer):
    """``W -= lr G / |G|``, each column of the gradient by its own norm, and no state: the rule of SCALE for matrices
    (Glentis et al. 2025, arXiv 2506.16659, Section 3; the momentum that it keeps for the head is AdamW's here). A
    column is the gradient of one input; its norm is 1, as the root of a mean over the outputs is in AdamW.
    """

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                scale = p.shape[0] ** 0.5 / p.grad.norm(dim=0, keepdim=True).clamp(min=1e-12)
                p.add_(p.grad * scale, alpha=-group["lr"])


class SketchedResidual(torch.optim.Optimizer):
    """Grass on ``density`` of the columns, and a step without state on the others from a sketch of the gradient.

    Each step takes ``Y = G Omega`` with a new ``Omega``, ``(n, s)`` with ``s = share * n``, of normal entries
    of variance ``1 / s``: ``Y Omega^T`` has ``G`` as its expectation. The columns that are not selected go along it,
    each brought to a root mean square of 1, at ``scale`` times the rate. It is tried on the whole gradient; a layer
    that never forms it would add ``m s`` numbers to what it reduces.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        *,
        density: float,
        share: float,
        scale: float,
        interval: int,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._density, self._share, self._scale = density, share, scale
        self._interval, self._betas, self._number = interval, betas, 0
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, p.grad, group["lr"])
        self._number += 1

    def _update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        state, n = self.state[p], p.shape[1]
        if self._number % self._interval == 0:
            state["index"] = torch.randperm(n, generator=self._generator)[: round(self._density * n)]
            chosen = gradient[:, state["index"]]
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(chosen), torch.zeros_like(chosen)
        chosen = gradient[:, state["index"]]
        directions = adam_directions(
            [chosen],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            steps=[self._number % self._interval + 1],
            betas=self._betas,
            eps=1e-8,
        )
        size = round(self._share * n)
        omega = torch.randn(n, size, generator=self._generator) / size**0.5
        residual = (gradient @ omega) @ omega.t()
        residual *= p.shape[0] ** 0.5 / residual.norm(dim=0, keepdim=True).clamp(min=1e-12)
        residual *= self._scale
        residual[:, state["index"]] = directions[0]
        p.add_(residual, alpha=-lr)


def frozen(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The matrices stay as they were drawn: what a task gives without them."""
    matrices, others = groups
    for p in matrices["params"]:
        p.requires_grad_(False)
    return torch.optim.AdamW([others], betas=betas, weight_decay=0.0)


def beside_adamw(make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]) -> Callable[..., Both]:
    """``make(matrices, lr)`` for the matrices."""

    def both(groups: Groups, betas: tuple[float, float]) -> Both:
        matrices, others = groups
        adamw = torch.optim.AdamW([others], betas=betas, weight_decay=0.0)
        return Both(make(matrices["params"], matrices["lr"]), adamw)

    return both


def muon(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """PyTorch's, with the scale at which rates are AdamW's."""
    return torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

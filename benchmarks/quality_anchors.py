"""What the methods are compared with, beside AdamW: matrices that do not train, Muon, and columns of the gradient
without state. Embeddings, head and norms are AdamW's in all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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

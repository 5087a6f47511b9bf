"""Gradients of single examples, estimated along random directions and normalised as Adam does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EPS = 1e-8


@dataclass
class Vectors:
    """CoLM's view of examples (Nguyen et al. 2024, arXiv:2407.19580), on one parameter of ``n`` elements.

    Example ``i`` has the gradient ``g_i = 1/D sum_d c_id z_d`` (SPSA), where ``c_id`` is the slope of its loss along
    the direction ``z_d``. It stands at ``m_i / (sqrt(v_i) + 1e-8)``, with ``m_i`` and ``v_i`` what Adam's moments, with
    their correction of bias, would be after a step with ``g_i`` alone. The moments go on with the means over the
    examples that were chosen.

    Attributes:
        first, second: the moments, float32 ``(n,)``.
        steps: choices so far.
    """

    first: Tensor
    second: Tensor
    betas: tuple[float, float]
    steps: int = 0

    def places(self, slopes: Tensor, directions: Tensor, num_coordinates: int) -> Tensor:
        """Where the examples of one source stand, in the coordinates whose mean over them is largest in size.

        Args:
            slopes: ``(examples, D)``.
            directions: ``(D, n)``.

        Returns:
            float32 ``(examples, coordinates)``.
        """
        if num_coordinates >= directions.shape[1]:
            return torch.stack([self._place(own, directions, self.first, self.second) for own in slopes])
        total = torch.zeros_like(self.first)
        for own in slopes:
            total += self._place(own, directions, self.first, self.second)
        kept = total.abs().topk(num_coordinates).indices.sort().values
        part = directions[:, kept], self.first[kept], self.second[kept]
        return torch.stack([self._place(own, *part) for own in slopes])

    def _place(self, slopes: Tensor, directions: Tensor, first: Tensor, second: Tensor) -> Tensor:
        gradient = slopes.to(directions.dtype) @ directions / len(directions)
        beta1, beta2 = self.betas
        first = (beta1 * first + (1 - beta1) * gradient) / (1 - beta1 ** (self.steps + 1))
        second = (beta2 * second + (1 - beta2) * gradient.square()) / (1 - beta2 ** (self.steps + 1))
        return first / (second.sqrt() + _EPS)

    def update(self, slopes: Tensor, directions: Tensor) -> None:
        """Take the chosen examples' gradients into the moments."""
        beta1, beta2 = self.betas
        slopes = slopes.to(directions.dtype) / len(directions)
        self.first.mul_(beta1).add_(slopes.mean(0) @ directions, alpha=1 - beta1)
        # The mean of (sum_d c_d z_d)^2 over examples is z' C z with C their mean of c c'.
        products = slopes.T @ slopes / len(slopes)
        self.second.mul_(beta2).add_(((products @ directions) * directions).sum(0).clamp_(min=0.0), alpha=1 - beta2)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = state["steps"]


def draw_directions(seeds: Sequence[int], elements: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float32 ``(len(seeds), elements)``, the same on every rank."""
    found = []
    for seed in seeds:
        found.append(torch.randn(elements, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(found).to(device)


def distances(places: Tensor) -> Tensor:
    """L1 distances between examples, float64 ``(examples, examples)``."""
    return torch.cdist(places.double(), places.double(), p=1.0)

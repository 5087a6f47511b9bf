"""Products with ternary weights and 8-bit inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.ternary import ScaleName, rounded_activations, ternary


class TernaryQuantizer:
    """A :class:`.Quantizer` of BitNet b1.58; both are rounded anew at each use.

    Args:
        scale: of the weight's magnitudes.
    """

    def __init__(self, scale: ScaleName = "mean") -> None:
        self._scale: ScaleName = scale

    def activations(self, x: Tensor) -> Tensor:
        return rounded_activations(x)

    def product(self, x: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        return F.linear(x, self._rounded(weight, x.dtype))

    def input_gradient(self, grad_y: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        return grad_y.matmul(self._rounded(weight, grad_y.dtype))

    def weight_gradient(self, grad_y: Tensor, x: Tensor) -> Tensor:
        return grad_y.t().mm(x)

    def _rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        values, scale = ternary(weight, self._scale)
        return (values * scale).to(weight.dtype).to(dtype)

    def __repr__(self) -> str:
        return f"ternary, scale={self._scale}"

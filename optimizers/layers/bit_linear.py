"""Linear layers that compute with ternary weights and 8-bit activations, and train the weights behind them.

``y = Q(x) T(W)^T + b``, with the gradients of ``y = x W^T + b`` at ``Q(x)`` and ``T(W)``: straight through the rounding
of both (Bengio et al. 2013, arXiv 1308.3432). The ternary weight is made again in backward and never kept. The scale is
one of the whole weight: an engine that cuts weights puts them together for each use.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics.ternary import ScaleName, rounded_activations, ternary
from .projected_linear import ProjectedLinear
from .registry import register
from .selected_linear import SelectedLinear
from .targets import find_targets


class TernaryWeight:
    """A :class:`.WeightQuantizer` of BitNet b1.58.

    Args:
        scale: of the weight's magnitudes.
    """

    def __init__(self, scale: ScaleName) -> None:
        self.scale: ScaleName = scale

    def weight(self, weight: Tensor) -> Tensor:
        values, scale = ternary(weight, self.scale)
        return (values * scale).to(weight.dtype)

    def activations(self, x: Tensor) -> Tensor:
        return rounded_activations(x)


class _BitLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: TernaryWeight, dtype: torch.dtype
    ) -> Tensor:
        ctx.quantizer, ctx.x_dtype, ctx.bias_dtype = quantizer, x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, quantizer.weight(weight).to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_y_2d = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.matmul(ctx.quantizer.weight(weight).to(grad_y.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y_2d.t().mm(x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_2d.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class BitLinear(nn.Linear):
    """An ``nn.Linear`` that computes so; made from one in place by :func:`to_bit_linears`, and may become compact."""

    quantizer: TernaryWeight

    def forward(self, input: Tensor) -> Tensor:
        kind, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        x = self.quantizer.activations(input)
        return _BitLinearFunction.apply(x, self.weight, self.bias, self.quantizer, dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.quantizer.scale}"


register(BitLinear, selected=SelectedLinear.convert, projected=ProjectedLinear.convert)


def to_bit_linears(model: nn.Module, target_modules: Sequence[str] | None, scale: ScaleName) -> list[str]:
    """Turn plain linear layers of a model into :class:`BitLinear` in place, before an optimizer is made of it.

    Args:
        target_modules: globs over names of modules; None takes every linear layer within the blocks. Stacked experts
            are left alone, and layers whose weight is inputs times outputs.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the globs name no such layer.
    """
    found = {name: m for name, m in find_targets(model, target_modules, {}).items() if isinstance(m, nn.Linear)}
    if not found:
        raise ValueError("target_modules: expected globs that match an nn.Linear, got none that do")
    quantizer = TernaryWeight(scale)
    for linear in found.values():
        linear.__class__ = BitLinear
        assert isinstance(linear, BitLinear)
        linear.quantizer = quantizer
    return list(found)

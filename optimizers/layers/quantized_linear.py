"""Linear layers that compute with fewer bits than are trained: what :class:`.Quantizer` makes of weight and input.

``y = Q(x) T(W)^T + b``, with the gradients of ``y = x W^T + b`` at ``Q(x)`` and ``T(W)``: straight through the rounding
of both (Bengio et al. 2013, arXiv 1308.3432). What is made of the weight is made again in backward and never kept. It
is made of the whole weight: an engine that cuts weights puts them together for each use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compact import Quantizer, linear
from .projected_linear import ProjectedLinear
from .registry import register
from .selected_linear import SelectedLinear
from .targets import find_linears
from .unit import autocast_dtype


class _QuantizedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: Quantizer, dtype: torch.dtype
    ) -> Tensor:
        ctx.quantizer, ctx.x_dtype, ctx.bias_dtype = quantizer, x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias, quantizer=quantizer, transposed=False, keeps=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_y_2d = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = ctx.quantizer.input_gradient(grad_y, weight, keeps=False).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.quantizer.weight_gradient(grad_y_2d, x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_2d.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class QuantizedLinear(nn.Linear):
    """An ``nn.Linear`` that computes so; made from one in place by :func:`quantize_linears`, and may become compact."""

    quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input) or input.dtype
        x = self.quantizer.activations(input)
        return _QuantizedLinearFunction.apply(x, self.weight, self.bias, self.quantizer, dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantizer}"


register(QuantizedLinear, selected=SelectedLinear.convert, projected=ProjectedLinear.convert)


def quantize_linears(
    model: nn.Module, target_modules: Sequence[str] | None, make: Callable[[], Quantizer]
) -> list[str]:
    """Turn plain linear layers of a model into :class:`QuantizedLinear` in place, before an optimizer is made of it.

    Args:
        target_modules: globs over names of modules; None takes every linear layer within the blocks. Stacked experts
            are left alone, and layers whose weight is inputs times outputs.
        make: of a quantizer for each layer.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the globs name no such layer.
    """
    found = find_linears(model, target_modules)
    for layer in found.values():
        layer.__class__ = QuantizedLinear
        assert isinstance(layer, QuantizedLinear)
        layer.quantizer = make()
    return list(found)

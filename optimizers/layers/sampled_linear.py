"""Linear layers whose weight gradient is estimated from less than their whole input; see :mod:`.sampling`."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kept import as_activation
from .other_readers import OtherReaders
from .projected_linear import ProjectedLinear
from .registry import register
from .sampling import Kept, SampledInputs, Sampler, gradient_of
from .selected_linear import SelectedLinear
from .targets import block_prefixes, find_linears
from .unit import autocast_dtype


class _SampledLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        rows: Tensor | None,
        kept: Kept,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.projection, ctx.x_dtype = kept.projection, x.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(as_activation(values), rows, weight)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        values, rows, weight = ctx.saved_tensors
        grad_y_2d = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.matmul(weight.to(grad_y.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of(grad_y_2d, values, rows, ctx.projection).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_2d.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 4


class SampledLinear(nn.Linear):
    """An ``nn.Linear`` that keeps less of its input; made from one in place by :func:`sample_linears`, and may become
    compact: then it is what the compact layer would keep that is sampled.
    """

    sampled: SampledInputs

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or torch.is_grad_enabled()) or not self.weight.requires_grad:
            return super().forward(input)
        dtype = autocast_dtype(input) or input.dtype
        kept = self.sampled.keep(input, dtype, lambda: input.reshape(-1, input.shape[-1]).to(dtype))
        return _SampledLinearFunction.apply(input, self.weight, self.bias, kept.values, kept.rows, kept, dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.sampled.sampler}"


register(SampledLinear, selected=SelectedLinear.convert, projected=ProjectedLinear.convert)


def sample_linears(model: nn.Module, target_modules: Sequence[str] | None, make: Callable[[], Sampler]) -> list[str]:
    """Turn plain linear layers of a model into :class:`SampledLinear` in place, before an optimizer is made of it.

    Layers of one block share what they keep of one input.

    Args:
        target_modules: globs over names of modules; None takes every linear layer within the blocks. Stacked experts
            are left alone, and layers whose weight is inputs times outputs.
        make: of a sampler.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the globs name no such layer.
    """
    found = find_linears(model, target_modules)
    others = OtherReaders(model, found)
    blocks = sorted(block_prefixes(model), key=len)
    block_of = {name: next((prefix for prefix in blocks if name.startswith(prefix)), name) for name in found}
    sizes = Counter(block_of.values())
    groups = {block: SampledInputs(make(), size, others.note_sampled) for block, size in sizes.items()}
    for name, layer in found.items():
        layer.__class__ = SampledLinear
        assert isinstance(layer, SampledLinear)
        layer.sampled = groups[block_of[name]]
    return list(found)

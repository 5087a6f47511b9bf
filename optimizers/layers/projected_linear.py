"""A compact linear layer that trains its weight's change within a subspace.

For ``y = x W^T + b`` with ``W`` of shape ``(m, n)``, the change of ``W`` in one step is ``scale * A C B^T`` with the
trained ``C``, a left basis ``A`` ``(m, r)`` and a right basis ``B`` ``(n, r)``, either of which may be absent (then it
is the identity). The gradient of ``C`` is ``A^T G B = (dY A)^T (X B)``; with a right basis only the small ``X B`` is
kept for backward. This is the projection of GaLore (Zhao et al., 2024, arXiv 2403.03507, Section 3).

A basis is dense, or a selection: an index and a scale for each selected entry, which may repeat (the projection of
Grass with rho).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compact import CompactLinear, Quantizer, compact_class, keep_dtypes, linear, other_gradients
from .kept import as_activation
from .projected_weight import BASES, ProjectedWeight, lift_rows, project
from .registry import register
from .sampling import Projection, gradient_of
from .selected_linear import SelectedLinear
from .unit import ProbeKind


class _ProjectedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compact: Tensor,
        left: Tensor | None,
        left_index: Tensor | None,
        right: Tensor | None,
        right_index: Tensor | None,
        transposed: bool,
        keeps: bool,
        compute_dtype: torch.dtype,
        probe: Tensor | None,
        probe_kind: ProbeKind | None,
        probe_input: Tensor | None,
        omega: Tensor | None,
        kept_x: Tensor | None,
        rows: Tensor | None,
        projection: Projection | None,
        quantizer: Quantizer | None,
    ) -> Tensor:
        keep_dtypes(ctx, x, bias, compact, probe, probe_kind, transposed, quantizer, keeps)
        x = x.to(compute_dtype)
        y = linear(x, weight, bias, quantizer=quantizer, transposed=transposed, keeps=keeps)
        projected = kept_x if kept_x is not None else project(x.reshape(-1, x.shape[-1]), right, right_index)
        ctx.save_for_backward(as_activation(projected), weight, left, left_index, probe_input, omega, rows)
        ctx.projection = projection
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        projected, weight, left, left_index, probe_input, omega, rows = ctx.saved_tensors
        grad_y_2d, grad_compact = grad_y.reshape(-1, grad_y.shape[-1]), None
        grad_x, grad_bias, grad_probe = other_gradients(ctx, grad_y, grad_y_2d, weight, probe_input, omega)
        if ctx.needs_input_grad[3]:
            projected_y = project(grad_y_2d, left, left_index)
            grad_compact = gradient_of(projected_y, projected, rows, ctx.projection, transposed=ctx.transposed)
            grad_compact = grad_compact.to(ctx.compact_dtype)
        return grad_x, None, grad_bias, grad_compact, *(None,) * 7, grad_probe, *(None,) * 7


class ProjectedLinear(ProjectedWeight, CompactLinear):
    """A compact ``nn.Linear`` whose ``compact``, ``(m or r, n or r)``, holds a change of ``weight``.

    Attributes:
        left, right: the bases, ``(m, r)`` and ``(n, r)``, or the scales ``(r,)`` of a selection.
    """

    @classmethod
    def convert(
        cls,
        linear: nn.Linear,
        *,
        left: Tensor | None = None,
        left_index: Tensor | None = None,
        right: Tensor | None = None,
        right_index: Tensor | None = None,
        scale: float = 1.0,
    ) -> "ProjectedLinear":
        """Turn ``linear`` into a ``ProjectedLinear`` in place; ``compact`` is registered but left uninitialised."""
        linear.__class__ = compact_class(cls, type(linear))
        assert isinstance(linear, ProjectedLinear)
        linear._set_bases((left, left_index, right, right_index), scale)
        m, n = linear.weight_shape
        shape = (m if left is None else left.shape[-1], n if right is None else right.shape[-1])
        linear._become_compact(shape, "rows" if left is not None else "columns")
        return linear

    def revert(self) -> None:
        super().revert()
        for key in (*BASES, "scale"):
            self.__dict__.pop(key, None)

    def project_gradient(self, gradient: Tensor) -> Tensor:
        # A^T G B; absent bases are the identity.
        rows = project(gradient.t(), self.left, self.left_index).t()
        return project(rows, self.right, self.right_index)

    def lift(self, compact: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last - 1`` of the change of the weight that ``compact`` stands for, in at least fp32."""
        m, n = self.weight_shape
        c = compact.to(torch.promote_types(compact.dtype, torch.float32))
        rows = lift_rows(c, self.left, self.left_index, first, last, m)
        return lift_rows(rows.t(), self.right, self.right_index, 0, n, n).t() * self.scale

    def forward(self, input: Tensor) -> Tensor:
        self.begin_forward()
        input = self.quantized(input)
        compute_dtype = self.compute_dtype(input)
        bases = (self.left, self.left_index), (self.right, self.right_index)
        of_outputs, of_inputs = reversed(bases) if self.transposed else bases
        return _ProjectedLinearFunction.apply(
            input,
            self.weight,
            self.bias,
            self.compact,
            *of_outputs,
            *of_inputs,
            self.transposed,
            self.weight_stays,
            compute_dtype,
            *self._probe_arguments(input, compute_dtype),
            *self._kept_input(input, compute_dtype, of_inputs),
            self.quantizer,
        )

    def _kept_input(
        self, input: Tensor, compute_dtype: torch.dtype, basis: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None, Projection | None]:
        """What is kept of the projected input where it is sampled: values, rows and projection."""

        def read() -> Tensor:
            return project(input.detach().reshape(-1, input.shape[-1]).to(compute_dtype), *basis)

        # Bases differ from layer to layer.
        kept = self._sampled_input(input, (id(self) if basis[0] is not None else None, compute_dtype), read)
        return (None, None, None) if kept is None else (kept.values, kept.rows, kept.projection)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compact={tuple(self.compact.shape)}"


register(nn.Linear, selected=SelectedLinear.convert, projected=ProjectedLinear.convert)

"""A compact linear layer that trains a subset of its weight's columns or rows.

For ``y = x W^T + b`` with ``W`` of shape ``(m, n)``, ``W`` is frozen and ``compact`` is trained in its stead:

* ``columns``: ``compact`` is ``W[:, index]``, shape ``(m, r)``; its gradient is ``dY^T @ X[:, index]``, so only that
  copy of the input is kept for backward;
* ``rows``: ``compact`` is ``W[index, :]``, shape ``(r, n)``; its gradient is ``dY[:, index]^T @ X``.

``dX = dY @ W`` is exact in both. This is the projection of Grass (Muhamed et al., 2024, arXiv 2406.17660) with scale 1,
held as values instead of as a delta.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compact import CompactLinear, Quantizer, compact_class, keep_dtypes, linear, other_gradients
from .kept import as_activation
from .sampling import Projection, gradient_of
from .selected_weight import SelectedWeight, read_selected, write_selected_
from .shared_copy import SharedCopy
from .unit import ProbeKind, Side


class _SelectedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compact: Tensor,
        index: Tensor,
        start: int | None,
        columns: bool,
        transposed: bool,
        folds_at_use: bool,
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
        if folds_at_use:
            write_selected_(weight.data, compact.data, index, start, dim=int(columns != transposed))
        keep_dtypes(ctx, x, bias, compact, probe, probe_kind, transposed, quantizer, keeps)
        x = x.to(compute_dtype)
        y = linear(x, weight, bias, quantizer=quantizer, transposed=transposed, keeps=keeps)
        saved_x = kept_x if kept_x is not None else x
        if columns and kept_x is None:
            saved_x = read_selected(x.reshape(-1, x.shape[-1]), index, start, dim=1)
        # The weight is saved as it is, not its cast: autocast must not keep a second copy of the model alive.
        folded = compact if folds_at_use else None
        ctx.save_for_backward(as_activation(saved_x), weight, index, folded, probe_input, omega, rows)
        ctx.start, ctx.columns, ctx.projection = start, columns, projection
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        saved_x, weight, index, compact, probe_input, omega, rows = ctx.saved_tensors
        if compact is not None:
            write_selected_(weight.data, compact.data, index, ctx.start, dim=int(ctx.columns != ctx.transposed))
        grad_y_2d, grad_compact = grad_y.reshape(-1, grad_y.shape[-1]), None
        grad_x, grad_bias, grad_probe = other_gradients(ctx, grad_y, grad_y_2d, weight, probe_input, omega)
        if ctx.needs_input_grad[3]:
            of_y = grad_y_2d if ctx.columns else read_selected(grad_y_2d, index, ctx.start, dim=1)
            x_2d = saved_x.reshape(-1, saved_x.shape[-1])
            grad_compact = gradient_of(of_y, x_2d, rows, ctx.projection, transposed=ctx.transposed)
            grad_compact = grad_compact.to(ctx.compact_dtype)
        return grad_x, None, grad_bias, grad_compact, *(None,) * 7, grad_probe, *(None,) * 7


class SelectedLinear(SelectedWeight, CompactLinear):
    """A compact ``nn.Linear`` whose ``compact`` holds the values of selected columns or rows of ``weight``.

    Attributes:
        shared: the copy of the selected inputs that is shared with other layers; columns only.
    """

    shared: SharedCopy | None

    @classmethod
    def convert(
        cls, linear: nn.Linear, *, side: Side, index: Tensor, contiguous: bool, shared: SharedCopy | None = None
    ) -> "SelectedLinear":
        """Turn ``linear`` into a ``SelectedLinear`` in place; ``compact`` is registered but left uninitialised."""
        linear.__class__ = compact_class(cls, type(linear))
        assert isinstance(linear, SelectedLinear)
        linear.shared = shared
        linear._become_selected(side=side, index=index, contiguous=contiguous)
        return linear

    def revert(self) -> None:
        del self.shared
        super().revert()

    def forward(self, input: Tensor) -> Tensor:
        self.begin_forward()
        input = self.quantized(input)
        compute_dtype = self.compute_dtype(input)
        return _SelectedLinearFunction.apply(
            input,
            self.weight,
            self.bias,
            self.compact,
            self.index,
            # A Python int would be a constant of the compiled graph and recompile it at every refresh.
            None if torch.compiler.is_compiling() else self.start,
            (self.side == "columns") != self.transposed,
            self.transposed,
            self.folds_at_use,
            self.weight_stays,
            compute_dtype,
            *self._probe_arguments(input, compute_dtype),
            *self._kept_input(input, compute_dtype),
            self.quantizer,
        )

    def _kept_input(
        self, input: Tensor, compute_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None, Projection | None]:
        """What is kept of the input where it is sampled, or selected for a group: values, rows and projection."""
        columns = (self.side == "columns") != self.transposed

        def read() -> Tensor:
            x_2d = input.detach().reshape(-1, input.shape[-1])
            if not columns:
                return x_2d.to(compute_dtype)
            return read_selected(x_2d, self.index, self.start, dim=1, dtype=compute_dtype)

        key = (self._index_key if columns else None, compute_dtype)
        kept = self._sampled_input(input, key, read)
        if kept is not None:
            return kept.values, kept.rows, kept.projection
        if self.shared is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None, None, None
        return self.shared.get(input, key, read), None, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}, rank={self.index.numel()}"

"""A linear layer whose weight is a stack of matrices, each for its own run of the input's rows: experts' tokens.

For the rows ``X_e`` of expert ``e``: ``Y_e = X_e W_e^T`` with ``W`` of shape ``(experts, outputs, inputs)``, or ``Y_e =
X_e W_e`` where it is ``transposed``. The gradient that is formed is that of the unit's compact values, zero for experts
without rows; all matrix products are grouped by expert.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compact import weight_gradient
from .kept import as_activation

if TYPE_CHECKING:
    from .stacked_weight import StackedWeight

Runs = Sequence[tuple[int, int, int]]
"""Expert, first row and the one after its last, of each expert that has rows; in ascending order without gaps."""


def grouped_product(x: Tensor, matrices: Tensor, runs: Runs) -> Tensor:
    """``x_e M_e`` below each other, ``(rows, n)``.

    Args:
        x: ``(rows, k)``.
        matrices: ``(experts, k, n)``, of any dtype.
    """
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for expert, first, last in runs:
        torch.mm(x[first:last], matrices[expert].to(x.dtype), out=y[first:last])
    return y


def grouped_gradient(grad_y: Tensor, x: Tensor, runs: Runs, *, num: int, transposed: bool) -> Tensor:
    """The gradients of ``num`` stacked weights, or of parts of them, below each other; zero without rows."""
    sizes = (x.shape[1], grad_y.shape[1]) if transposed else (grad_y.shape[1], x.shape[1])
    found = grad_y.new_zeros(num, *sizes)
    for expert, first, last in runs:
        found[expert] = weight_gradient(grad_y[first:last], x[first:last], transposed)
    return found.view(-1, sizes[1])


def dense_grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, *, transposed: bool) -> Tensor:
    """With a weight that is trained whole."""
    matrices = weight.unbind(0)
    parts = [x[first:last] @ (matrices[e] if transposed else matrices[e].t()) for e, first, last in runs]
    if bias is not None:
        biases = bias.unbind(0)
        parts = [part + biases[e] for part, (e, _, _) in zip(parts, runs, strict=True)]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[2 if transposed else 1])


def grouped_linear(
    x: Tensor, unit: "StackedWeight", bias: Tensor | None, runs: Runs, compute_dtype: torch.dtype
) -> Tensor:
    """With a weight that is trained through its compact values."""
    return _GroupedLinearFunction.apply(
        x, unit.weight, bias, unit.compact, unit.probe, unit, runs, compute_dtype, *unit.subspace().values()
    )


class _GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compact: Tensor,
        probe: Tensor | None,
        unit: "StackedWeight",
        runs: Runs,
        compute_dtype: torch.dtype,
        *subspace: Tensor,
    ) -> Tensor:
        unit.fold_at_use()
        ctx.unit, ctx.runs = unit, runs
        ctx.x_dtype, ctx.compact_dtype = x.dtype, compact.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x = x.to(compute_dtype)
        y = grouped_product(x, weight if unit.transposed else weight.mT, runs)
        if bias is not None:
            for expert, first, last in runs:
                y[first:last] += bias[expert].to(compute_dtype)
        ctx.probe_kind = None if probe is None else unit.probe_kind
        omega = None if probe is None else unit.omega
        probe_input = None
        if probe is not None:
            on_inputs = ctx.probe_kind == ("columns" if unit.transposed else "rows")
            probe_input = _along(x, omega, runs) if on_inputs else x
        # With the subspace, so that autograd notices if it has changed before backward.
        ctx.save_for_backward(as_activation(unit.kept_inputs(x, runs)), weight, probe_input, omega, *subspace)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept_x, weight, probe_input, omega, *subspace = ctx.saved_tensors
        unit: StackedWeight = ctx.unit
        runs, transposed = ctx.runs, unit.transposed
        grad_y = grad_outputs[0].contiguous()
        unit.fold_at_use()
        grad_x = grad_bias = grad_compact = grad_probe = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad_y, weight.mT if transposed else weight, runs).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.new_zeros(unit.num_matrices, grad_y.shape[1], dtype=ctx.bias_dtype)
            for expert, first, last in runs:
                grad_bias[expert] = grad_y[first:last].sum(0)
        if ctx.needs_input_grad[3]:
            kept_y = unit.kept_outputs(grad_y, runs)
            grad_compact = grouped_gradient(kept_y, kept_x, runs, num=unit.num_matrices, transposed=transposed)
            grad_compact = grad_compact.to(ctx.compact_dtype)
        if probe_input is not None:
            grad_probe = _observed(ctx, grad_y, probe_input, omega)
        return grad_x, None, grad_bias, grad_compact, grad_probe, *(None,) * (3 + len(subspace))


def _along(rows: Tensor, omega: Tensor | None, runs: Runs) -> Tensor:
    """The rows along directions: the same for all experts, or for each its own."""
    assert omega is not None
    omega, width = omega.to(rows.dtype), rows.shape[1]
    if omega.shape[0] == width:
        return rows @ omega
    return grouped_product(rows, omega.view(-1, width, omega.shape[1]), runs)


def _observed(ctx: Any, grad_y: Tensor, probe_input: Tensor, omega: Tensor | None) -> Tensor:
    """The gradient of the probe."""
    unit: StackedWeight = ctx.unit
    transposed, kind = unit.transposed, ctx.probe_kind
    probe = unit.probe_shape(kind, omega)
    observed = _along(grad_y, omega, ctx.runs) if kind == ("rows" if transposed else "columns") else grad_y
    if kind == "columns" and omega is not None and omega.shape[0] == unit.weight_shape[0]:
        # Every expert's own directions: summed over the experts.
        found = weight_gradient(observed, probe_input, transposed)
    else:
        found = grouped_gradient(observed, probe_input, ctx.runs, num=unit.num_matrices, transposed=transposed)
    assert found.shape == probe
    return found.to(torch.promote_types(unit.weight.dtype, torch.float32))

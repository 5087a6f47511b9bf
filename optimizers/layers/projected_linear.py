"""A compact linear layer that trains its weight's change within a subspace.

For ``y = x W^T + b`` with ``W`` of shape ``(m, n)``, the change of ``W`` in one step is ``scale * A C B^T`` with the
trained ``C``, a left basis ``A`` ``(m, r)`` and a right basis ``B`` ``(n, r)``, either of which may be absent (then it
is the identity). The gradient of ``C`` is ``A^T G B = (dY A)^T (X B)``; with a right basis only the small ``X B`` is
kept for backward. This is the projection of GaLore (Zhao et al., 2024, arXiv 2403.03507, Section 3).

A basis is dense, or a selection: an index and a scale for each selected entry, which may repeat (the projection of
Grass with rho).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics.rounding import add_
from .compact import CompactLinear, ProbeKind, compact_class, keep_dtypes, other_gradients, weight_gradient
from .registry import register
from .selected_linear import SelectedLinear
from .shape import whole_shape


def project(x: Tensor, basis: Tensor | None, selected: Tensor | None) -> Tensor:
    """``x B`` for ``x`` of shape ``(b, d)``.

    Args:
        basis: ``(d, r)``, or with ``selected`` the scales ``(r,)``.
        selected: indices ``(r,)``.
    """
    if basis is None:
        return x
    if selected is None:
        return x @ basis.to(x.dtype)
    return x.index_select(1, selected) * basis.to(x.dtype)


def lift_rows(c: Tensor, basis: Tensor | None, selected: Tensor | None, first: int, last: int, size: int) -> Tensor:
    """Rows ``first`` to ``last - 1`` of ``B c``, where ``c`` is ``(r, k)`` and ``B`` has ``size`` rows."""
    if basis is None:
        return c[first:last]
    if selected is None:
        return basis[first:last].to(c.dtype) @ c
    lifted = torch.zeros(last - first, c.shape[1], dtype=c.dtype, device=c.device)
    inside = (selected >= first) & (selected < last)
    scales = _lift_scales(basis, selected).to(c.dtype)
    # A repeated entry adds zeros but the first time, so the sum does not depend on the order.
    return lifted.index_add_(0, selected[inside] - first, c[inside] * scales[inside, None])


def _lift_scales(scales: Tensor, selected: Tensor) -> Tensor:
    """Equal entries have equal gradients and equal updates: the first stands for all of them."""
    _, inverse, counts = selected.unique(return_inverse=True, return_counts=True)
    order = torch.arange(selected.numel(), device=selected.device)
    first = torch.full_like(counts, selected.numel()).scatter_reduce_(0, inverse, order, "amin")
    return torch.where(first[inverse] == order, scales * counts[inverse], 0.0)


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
        compute_dtype: torch.dtype,
        probe: Tensor | None,
        probe_kind: ProbeKind | None,
        probe_input: Tensor | None,
        omega: Tensor | None,
    ) -> Tensor:
        keep_dtypes(ctx, x, bias, compact, probe, probe_kind, transposed)
        x = x.to(compute_dtype)
        whole = weight.t() if transposed else weight
        y = F.linear(x, whole.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
        projected = project(x.reshape(-1, x.shape[-1]), right, right_index)
        ctx.save_for_backward(projected, weight, left, left_index, probe_input, omega)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        projected, weight, left, left_index, probe_input, omega = ctx.saved_tensors
        grad_y_2d, grad_compact = grad_y.reshape(-1, grad_y.shape[-1]), None
        grad_x, grad_bias, grad_probe = other_gradients(ctx, grad_y, grad_y_2d, weight, probe_input, omega)
        if ctx.needs_input_grad[3]:
            projected_y = project(grad_y_2d, left, left_index)
            grad_compact = weight_gradient(projected_y, projected, ctx.transposed).to(ctx.compact_dtype)
        return grad_x, None, grad_bias, grad_compact, *(None,) * 6, grad_probe, None, None, None


class ProjectedLinear(CompactLinear):
    """A compact layer whose ``compact`` holds a change of ``weight``, zero once it is folded.

    Attributes:
        compact: trainable, ``(m or r, n or r)``.
        left, right: the bases, ``(m, r)`` and ``(n, r)`` in fp32 (fp64 for an fp64 weight), or the scales ``(r,)`` of a
            selection; None for the identity.
        left_index, right_index: int64 ``(r,)``; None where the basis is dense.
        scale: of the change.
    """

    is_delta: ClassVar[bool] = True
    left: Tensor | None
    left_index: Tensor | None
    right: Tensor | None
    right_index: Tensor | None
    scale: float

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
        linear.scale = scale
        for key, value in zip(_KEYS, (left, left_index, right, right_index), strict=True):
            setattr(linear, key, value.to(linear.weight.device) if value is not None else None)
        m, n = linear.weight_shape
        shape = (m if left is None else left.shape[-1], n if right is None else right.shape[-1])
        linear._become_compact(shape, "rows" if left is not None else "columns")
        return linear

    def revert(self) -> None:
        super().revert()
        for key in (*_KEYS, "scale"):
            self.__dict__.pop(key, None)

    def compact_of(self, weight: Tensor) -> Tensor:
        return torch.zeros(whole_shape(self.compact), dtype=weight.dtype, device=weight.device)

    def subspace(self) -> dict[str, Tensor]:
        return {key: value for key in _KEYS if (value := getattr(self, key)) is not None}

    @property
    def rank(self) -> int:
        basis = self.left if self.left is not None else self.right
        assert basis is not None
        return basis.shape[-1]

    def selected(self) -> Tensor:
        index = self.left_index if self.side == "rows" else self.right_index
        assert index is not None
        return index

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        change = self.lift(compact, 0, self.weight_shape[0])
        add_(weight, change, decay, seed=seed, decay_last=decay_last)

    def apply_to_run_(
        self, run: Tensor, start: int, compact: Tensor, decay: float, *, seed: int, decay_last: bool = False
    ) -> None:
        _, n = self.weight_shape
        # The rows that the run touches, without what the first and the last have outside of it.
        first, last = start // n, -(-(start + run.numel()) // n)
        change = self.lift(compact.view(whole_shape(self.compact)), first, max(first, last)).reshape(-1)
        change = change[start - first * n :][: run.numel()].to(run.device)
        add_(run, change, decay, seed=seed, offset=start, decay_last=decay_last)

    def compact_of_run(self, run: Tensor, start: int) -> Tensor:
        return self.compact_of(run).view(-1)

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
        self._begin_forward()
        compute_dtype = self._compute_dtype(input)
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
            compute_dtype,
            *self._probe_arguments(input, compute_dtype),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compact={tuple(self.compact.shape)}"


_KEYS = ("left", "left_index", "right", "right_index")

register(nn.Linear, selected=SelectedLinear.convert, projected=ProjectedLinear.convert)

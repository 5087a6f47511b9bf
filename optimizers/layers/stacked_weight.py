"""The matrices of experts, stacked in one parameter ``(experts, a, b)`` of a module, as a compact unit.

The unit's weight is the matrix ``(experts * a, b)``. A selection of columns or rows is one for all experts; dense bases
are each expert's own, because what directions mean inside an expert is nothing to the others.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .grouped_linear import Runs, grouped_linear, grouped_product
from .projected_weight import ProjectedWeight, lift_rows, project
from .selected_weight import SelectedWeight, read_selected, write_selected_
from .shape import whole_shape
from .unit import CompactUnit, Side
from .watch import unwatch

if TYPE_CHECKING:
    from .experts import CompactExperts


class StackedWeight(CompactUnit):
    """A compact unit that is a parameter of an experts module, beside others.

    Attributes:
        owner: the module.
        transposed: a matrix is inputs times outputs.
    """

    is_named_by_weight: ClassVar[bool] = True
    weight_dim: ClassVar[int] = 3

    def __init__(self, owner: "CompactExperts", key: str, *, transposed: bool) -> None:
        self.owner, self.transposed = owner, transposed
        self.weight_key, self.compact_key = key, f"{key}_compact"
        self.num_matrices = whole_shape(self.weight)[0]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.owner, self.weight_key)

    def holds_weight(self) -> bool:
        return self.weight_key in self.owner._parameters

    @property
    def compact(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.owner, self.compact_key)

    @property
    def weight_shape(self) -> tuple[int, int]:
        num, a, b = whole_shape(self.weight)
        return num * a, b

    def _become_compact(self, shape: tuple[int, int], side: Side) -> None:
        self.side, self.folds_at_use, self.probe, self.omega = side, False, None, None
        self.weight.requires_grad_(False)
        compact = nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device))
        self.owner.register_parameter(self.compact_key, compact)

    def revert(self) -> None:
        unwatch(self)
        self.weight.requires_grad_(True)
        delattr(self.owner, self.compact_key)
        self.owner.release(self)

    def forward(self, x: Tensor, bias: Tensor | None, runs: Runs, compute_dtype: torch.dtype) -> Tensor:
        """The outputs of rows sorted by expert, ``(rows, outputs)``."""
        self.begin_forward()
        return grouped_linear(x, self, bias, runs, compute_dtype)

    def fold_at_use(self) -> None:
        if self.folds_at_use:
            self.apply_(self.weight.data, self.compact.data)

    def kept_inputs(self, x: Tensor, runs: Runs) -> Tensor:
        """What the compact gradient needs of the inputs."""
        raise NotImplementedError

    def kept_outputs(self, grad_y: Tensor, runs: Runs) -> Tensor:
        """What it needs of the outputs' gradients."""
        raise NotImplementedError


class StackedSelected(SelectedWeight, StackedWeight):
    """Holds the values of selected columns or rows of every matrix, the same of all: ``(experts * a, r)`` or
    ``(experts * r, b)``.
    """

    @classmethod
    def make(
        cls, owner: "CompactExperts", key: str, *, transposed: bool, side: Side, index: Tensor, contiguous: bool
    ) -> "StackedSelected":
        """``compact`` is registered but left uninitialised.

        Args:
            side: of ``W^T`` if it is ``transposed``, as for an ``nn.Linear``: columns are inputs.
        """
        unit = cls(owner, key, transposed=transposed)
        stored: Side = side if not transposed else "rows" if side == "columns" else "columns"
        unit._become_selected(side=stored, index=index, contiguous=contiguous)
        return unit

    def _become_compact(self, shape: tuple[int, int], side: Side) -> None:
        rows, columns = shape
        super()._become_compact((rows * self.num_matrices, columns) if side == "rows" else shape, side)

    def compact_of(self, weight: Tensor) -> Tensor:
        if self.side == "columns":
            return read_selected(weight.reshape(self.weight_shape), self.index, self.start, dim=1)
        selected = self._stacked(weight).index_select(1, self.index)
        return selected.view(-1, weight.shape[-1])

    def write_(self, full: Tensor, values: Tensor) -> None:
        if self.side == "columns":
            write_selected_(full.view(self.weight_shape), values, self.index, self.start, dim=1)
        else:
            self._stacked(full).index_copy_(1, self.index, self._stacked(values))

    def _stacked(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.num_matrices, -1, matrix.shape[-1])

    def _selected_rows(self) -> Tensor:
        height = self.weight_shape[0] // self.num_matrices
        first = torch.arange(self.num_matrices, device=self.index.device) * height
        return (first[:, None] + self.index).view(-1)

    @property
    def _selects_inputs(self) -> bool:
        return (self.side == "columns") != self.transposed

    def kept_inputs(self, x: Tensor, runs: Runs) -> Tensor:
        return read_selected(x, self.index, self.start, dim=1) if self._selects_inputs else x

    def kept_outputs(self, grad_y: Tensor, runs: Runs) -> Tensor:
        return grad_y if self._selects_inputs else read_selected(grad_y, self.index, self.start, dim=1)


class StackedProjected(ProjectedWeight, StackedWeight):
    """Holds a change of every matrix, ``A_e C_e B_e^T``, below each other: ``(experts * (a or r), b or r)``.

    Attributes:
        left, right: ``(experts, a, r)`` and ``(experts, b, r)``, or the scales ``(r,)`` of one selection for all.
    """

    @classmethod
    def make(
        cls,
        owner: "CompactExperts",
        key: str,
        *,
        transposed: bool,
        left: Tensor | None = None,
        left_index: Tensor | None = None,
        right: Tensor | None = None,
        right_index: Tensor | None = None,
        scale: float = 1.0,
    ) -> "StackedProjected":
        """``compact`` is registered but left uninitialised.

        Args:
            left, left_index, right, right_index: of ``W^T`` if it is ``transposed``, as for an ``nn.Linear``.
        """
        unit = cls(owner, key, transposed=transposed)
        of_outputs, of_inputs = (left, left_index), (right, right_index)
        unit._set_bases((*of_inputs, *of_outputs) if transposed else (*of_outputs, *of_inputs), scale)
        num, a, b = whole_shape(unit.weight)
        height = a if unit.left is None else unit.left.shape[-1]
        width = b if unit.right is None else unit.right.shape[-1]
        unit._become_compact((num * height, width), "rows" if unit.left is not None else "columns")
        return unit

    def lift(self, compact: Tensor, first: int, last: int) -> Tensor:
        m, n = self.weight_shape
        height = m // self.num_matrices
        c = compact.to(torch.promote_types(compact.dtype, torch.float32)).view(self.num_matrices, -1, compact.shape[1])
        found = [c.new_zeros(0, n)]
        for expert in range(first // height, -(-last // height)):
            low, high = max(0, first - expert * height), min(height, last - expert * height)
            left, right = _of(self.left, expert), _of(self.right, expert)
            rows = lift_rows(c[expert], left, self.left_index, low, high, height)
            found.append(lift_rows(rows.t(), right, self.right_index, 0, n, n).t() * self.scale)
        return torch.cat(found)

    def project_gradient(self, gradient: Tensor) -> Tensor:
        found = []
        for expert, own in enumerate(gradient.view(self.num_matrices, -1, gradient.shape[-1])):
            rows = project(own.t(), _of(self.left, expert), self.left_index).t()
            found.append(project(rows, _of(self.right, expert), self.right_index))
        return torch.cat(found)

    def kept_inputs(self, x: Tensor, runs: Runs) -> Tensor:
        key = "left" if self.transposed else "right"
        return self._projected(x, key, runs)

    def kept_outputs(self, grad_y: Tensor, runs: Runs) -> Tensor:
        key = "right" if self.transposed else "left"
        return self._projected(grad_y, key, runs)

    def _projected(self, rows: Tensor, key: str, runs: Runs) -> Tensor:
        basis, index = getattr(self, key), getattr(self, f"{key}_index")
        if basis is None or index is not None:
            return project(rows, basis, index)
        return grouped_product(rows, basis, runs)


def _of(basis: Tensor | None, expert: int) -> Tensor | None:
    """An expert's own basis, or what all share."""
    return basis[expert] if basis is not None and basis.dim() == 3 else basis

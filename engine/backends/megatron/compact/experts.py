"""Compact parameters of experts that run one after the other.

Everywhere but here, experts' matrices are stacked in one parameter under Hugging Face's name, with one compact
parameter, whose columns or rows are the same for all experts. Here each expert has a parallel linear of its own. The
process rank's part of the compact parameter belongs to Megatron's module of all its experts, which hands each linear
the part that is its own for one forward.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import CompactModule
from narrowgauge.optimizers.layers.experts import HasStackedMatrices, StackedMatrices
from narrowgauge.optimizers.layers.projected_weight import lift_rows, project
from narrowgauge.optimizers.layers.unit import CompactUnit, ProbeKind, Side
from narrowgauge.optimizers.layers.watch import unwatch
from narrowgauge.optimizers.numerics.rounding import add_, decay_

from ..parts import Part
from .experts_cut import ExpertsCut, parts_of
from .linear import train_compact
from .parallel_weight import ALL, ParallelUnit, all_of, columns_of, placeholder
from .product import Product


class ParallelExperts(CompactModule, HasStackedMatrices):
    """Stands for an experts module: its stacked parameters are without memory, of the shapes of all experts.

    Attributes:
        held: by parameter, the linears of this process rank's experts and which part of the stack they hold.
        stacked: those that are compact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, tuple[list[nn.Module], ExpertsCut]] = {}
        self.stacked: dict[str, StackedParallelWeight] = {}

    def add(self, key: str, linears: list[nn.Module], cut: ExpertsCut) -> nn.Parameter:
        """Let a parameter stand for these linears' weights."""
        weight: Any = linears[0].weight
        stand_in = placeholder(weight, cut.shape)
        # Not children: they are Megatron's.
        self.held[key] = (linears, cut)
        self.register_parameter(key, stand_in)
        return stand_in

    def stacked_matrices(self) -> Sequence[StackedMatrices]:
        return [ParallelMatrices(self, key, transposed=False) for key in self.held if key not in self.stacked]

    def compact_units(self) -> Sequence[CompactUnit]:
        return tuple(self.stacked.values())


@dataclass(frozen=True)
class ParallelMatrices(StackedMatrices):
    """A parameter of :class:`ParallelExperts` that can become compact."""

    def to_selected(
        self, *, side: Side, index: Tensor, contiguous: bool, shared: None = None
    ) -> "SelectedParallelExperts":
        return self._added(SelectedParallelExperts(self._owner, self.key, side=side, index=index))

    def to_projected(self, **bases: Any) -> "ProjectedParallelExperts":
        return self._added(ProjectedParallelExperts(self._owner, self.key, **bases))

    @property
    def _owner(self) -> ParallelExperts:
        assert isinstance(self.module, ParallelExperts)
        return self.module

    def _added(self, unit: Any) -> Any:
        self._owner.stacked[self.key] = unit
        return unit


class StackedParallelWeight(ParallelUnit):
    """Experts' matrices, trained through a compact parameter; what is common.

    Attributes:
        owner: the module that stands for the experts.
        cut: what is here.
        matrices: those of the experts that are here.
    """

    is_named_by_weight: ClassVar[bool] = True
    weight_dim: ClassVar[int] = 3

    def __init__(self, owner: ParallelExperts, key: str) -> None:
        self.owner, (linears, self.cut) = owner, owner.held[key]
        self.weight_key, self.compact_key = key, f"{key}_compact"
        self.num_matrices = self.cut.shape[0]
        self.matrices = [_Matrix(self, number, linear) for number, linear in enumerate(linears)]

    def _become(self, side: Side, height: int, local: tuple[int, int], parts: Sequence[Part]) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised.

        Args:
            height: rows of the whole compact parameter for each expert.
            local: of what is here for each.
            parts: where that lies in the whole.
        """
        like: Any = self.matrices[0].linear.weight
        self.side, self.folds_at_use, self.probe, self.omega = side, False, None, None
        self.weight.requires_grad_(False)
        self.height, self._parts = height, parts
        shape = (len(self.matrices) * local[0], local[1])
        compact: Any = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
        # Megatron's: for the gradient norm every rank counts its own, as of its experts' weights.
        compact.tensor_model_parallel, compact.partition_dim, compact.partition_stride = True, 0, 1
        self.owner.register_parameter(self.compact_key, compact)

    def revert(self) -> None:
        unwatch(self)
        self.weight.requires_grad_(True)
        delattr(self.owner, self.compact_key)
        del self.owner.stacked[self.weight_key]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.owner, self.weight_key)

    @property
    def compact(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.owner, self.compact_key)

    @property
    def weight_shape(self) -> tuple[int, int]:
        num, a, b = self.cut.shape
        return num * a, b

    @property
    def stored_weights(self) -> Sequence[Tensor]:
        return [matrix.linear.weight for matrix in self.matrices]

    @property
    def linears(self) -> Sequence[Any]:
        return [matrix.linear for matrix in self.matrices]

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def cut_dim(self) -> int | None:
        # Never the same on two ranks that share experts.
        return 0

    def compact_parts(self, name: str) -> Sequence[Part]:
        return parts_of(name, [part.box for part in self._parts])

    def positions(self, start: int, length: int, device: torch.device) -> Tensor:
        found = [torch.empty(0, dtype=torch.int64, device=device)]
        for part in self._parts:
            first, stop = max(start, part.offset), min(start + length, part.offset + part.numel)
            if first < stop:
                found.append(part.box.positions(first - part.offset, stop - first, device))
        return torch.cat(found)

    def each(self, compact: Tensor) -> tuple[Tensor, ...]:
        """The parts of the experts that are here."""
        return compact.view(len(self.matrices), -1, compact.shape[1]).unbind(0)

    def compact_of(self, weight: Tensor) -> Tensor:
        """Of the linears' weights; the argument stands for them."""
        return torch.cat([self._compact_of(matrix) for matrix in self.matrices])

    def _compact_of(self, matrix: "_Matrix") -> Tensor:
        raise NotImplementedError

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        """To the linears' weights; the argument stands for them."""
        for matrix, own in zip(self.matrices, self.each(compact), strict=True):
            self.apply_to(matrix, own, decay, seed=seed, decay_last=decay_last)

    def apply_to(
        self, matrix: "_Matrix", compact: Tensor, decay: float, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        """:meth:`apply_` for an expert."""
        raise NotImplementedError

    def product_of(self, matrix: "_Matrix") -> Product:
        """How the gradient of an expert's part is made."""
        raise NotImplementedError

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        self.changed()

    def changed(self) -> None:
        for matrix in self.matrices:
            matrix.linear.plan = None

    def start_probe(self, kind: ProbeKind, omega: Tensor | None = None) -> None:
        like = self.matrices[0].linear.weight
        dtype, (m, n) = torch.promote_types(like.dtype, torch.float32), self.cut.local
        size = omega.shape[1] if omega is not None else 0
        shape = {"rows": (m, size), "columns": (size, n), "full": (m, n)}[kind]
        self.probe_kind = kind
        self.omega = omega.to(device=like.device, dtype=dtype) if omega is not None else None
        zero = torch.zeros((), dtype=dtype, device=like.device)
        self.probe = zero
        for matrix in self.matrices:
            matrix.probe = zero.expand(shape).requires_grad_()
        self.changed()

    def end_probe(self) -> Tensor:
        """What was observed here, of the whole stack: zero where other ranks observe."""
        assert self.probe is not None
        (_, a, b), (height, width) = self.cut.shape, self.probe_shape(self.probe_kind, self.omega)
        whole = torch.zeros(height, width, dtype=self.probe.dtype, device=self.probe.device)
        first, size = self.cut.columns if width == b and self.probe_kind != "rows" else (0, width)
        of_each = height // self.num_matrices if self._is_of_each else 0
        for matrix in self.matrices:
            observed = matrix.probe.grad if matrix.probe is not None else None
            if observed is None:
                continue
            if self.probe_kind == "columns":
                whole.narrow(0, matrix.expert * of_each, observed.shape[0]).narrow(1, first, size).add_(observed)
                continue
            before = 0
            for start, number in self.cut.rows:
                target = whole.narrow(0, matrix.expert * a + start, number).narrow(1, first, size)
                target.add_(observed.narrow(0, before, number))
                before += number
        self.drop_probe()
        return whole

    @property
    def _is_of_each(self) -> bool:
        """Whether a sketch of the columns is one of each matrix, rather than of all together."""
        return self.omega is not None and self.omega.shape[0] == self.cut.shape[1]

    def drop_probe(self) -> None:
        super().drop_probe()
        for matrix in self.matrices:
            matrix.probe = None
        self.changed()

    def forget_observed(self) -> None:
        for matrix in self.matrices:
            if matrix.probe is not None:
                matrix.probe.grad = None

    def probe_product_of(self, matrix: "_Matrix") -> Product:
        """How what an expert's probe observes is made."""
        cut, omega = self.cut, self.omega
        if self.probe_kind == "rows":
            assert omega is not None
            of_inputs = cut.own(1, omega)
            return Product(("rows", id(self)), lambda x: x @ of_inputs.to(x.dtype), all_of)
        if self.probe_kind == "columns":
            assert omega is not None
            a = cut.shape[1]
            of_outputs = cut.own(0, omega if self._is_of_each else omega.narrow(0, matrix.expert * a, a))
            return Product(ALL, all_of, lambda grad_y: grad_y @ of_outputs.to(grad_y.dtype))
        return Product(ALL, all_of, all_of)


class _Matrix:
    """An expert's matrix, as its linear has it: :class:`.linear.Held`.

    Attributes:
        linear: the expert's.
        expert: its number in the model.
        handed: its part of the compact parameter, for one forward.
    """

    def __init__(self, unit: StackedParallelWeight, number: int, linear: Any) -> None:
        self.unit, self.number, self.linear = unit, number, linear
        self.expert = unit.cut.experts[number]
        self.probe: Tensor | None = None
        self.handed: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return self.unit.compact

    @property
    def trained(self) -> Tensor:
        assert self.handed is not None
        return self.handed

    @property
    def main_grad(self) -> Tensor | None:
        main: Tensor | None = getattr(self.parameter, "main_grad", None)
        return None if main is None else self.unit.each(main)[self.number]

    def note_call(self) -> None:
        self.unit.was_called = True

    @torch.no_grad()
    def fold(self) -> None:
        self.unit.apply_to(self, self.unit.each(self.parameter.detach())[self.number], 1.0)

    def product(self) -> Product:
        return self.unit.product_of(self)

    def probe_product(self) -> Product:
        return self.unit.probe_product_of(self)


class SelectedParallelExperts(StackedParallelWeight):
    """Trains the values of selected columns or rows, the same of all experts: ``(E * a, r)`` or ``(E * r, b)``.

    Attributes:
        index: the selected ones of a whole matrix, int64 ``(r,)``, ascending.
        local: those of them that lie here, as numbered in a linear.
    """

    is_delta: ClassVar[bool] = False
    index: Tensor
    local: Tensor

    def __init__(self, owner: ParallelExperts, key: str, *, side: Side, index: Tensor) -> None:
        super().__init__(owner, key)
        cut, (m, n), (_, a, b) = self.cut, self.cut.local, self.cut.shape
        self.side = side
        device: Any = owner.held[key][0][0].weight.device
        # Looked at where it was drawn: the weights may have no values.
        self.index, self.local = index.to(device), self._local(index).to(device)
        kept, rank = self.local.numel(), index.numel()
        if side == "columns":
            height, width, local, rows = a, rank, (m, kept), cut.rows
        else:
            height, width, local, rows = rank, b, (kept, n), self._selected_rows()
        boxes = [box for expert in cut.experts for box in cut.boxes(expert, height, width, rows)]
        self._become(side, height, local, parts_of(key, boxes))

    def _local(self, index: Tensor) -> Tensor:
        """Of the index, what lies here.

        Raises:
            ValueError: it is not the same share in each range.
        """
        cut, dim = self.cut, self.dim
        if cut.split == dim:
            rank, whole = index.numel(), cut.shape[1 + dim]
            for first, size in cut.ranges(dim):
                found = int(((index >= first) & (index < first + size)).sum())
                if found * whole != rank * size:
                    raise ValueError(
                        f"strata: expected a multiple of {whole // size}, into which the {self.side} of experts'"
                        f" {self.weight_key} are cut, got {found} of {rank} selected ones in {size} of {whole}"
                    )
        return cut.local_of(dim, index)

    def _selected_rows(self) -> list[tuple[int, int]]:
        """Which of the selected rows lie here, as ranges of their numbers among the selected ones."""
        share = self.index.numel() / self.cut.shape[1]
        return [(round(first * share), round(size * share)) for first, size in self.cut.rows]

    @property
    def rank(self) -> int:
        return self.index.numel()

    def selected(self) -> Tensor:
        return self.index

    def subspace(self) -> dict[str, Tensor]:
        return {"index": self.index}

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        self.local = self._local(self.index)

    def _compact_of(self, matrix: _Matrix) -> Tensor:
        return matrix.linear.weight.detach().index_select(self.dim, self.local)

    def apply_to(
        self, matrix: _Matrix, compact: Tensor, decay: float, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        weight = matrix.linear.weight.detach()
        if decay != 1.0:
            decay_(weight, decay, seed=seed, offset=self.cut.weight_positions(matrix.expert, weight.device))
        weight.index_copy_(self.dim, self.local, compact)

    def product_of(self, matrix: _Matrix) -> Product:
        chosen = self.local
        if self.side == "columns":
            key: Hashable = ("columns", id(self))
            return Product(key, lambda x: columns_of(x, chosen), all_of)
        return Product(ALL, all_of, lambda grad_y: grad_y.index_select(1, chosen))


class ProjectedParallelExperts(StackedParallelWeight):
    """Trains a change of every matrix, ``A_e C_e B_e^T``, each with its own bases.

    Attributes:
        left, right: the bases of all experts, ``(E, a, r)`` and ``(E, b, r)`` in at least fp32; None for the identity.
        scale: of the change.
    """

    is_delta: ClassVar[bool] = True
    left: Tensor | None
    right: Tensor | None
    scale: float

    def __init__(
        self,
        owner: ParallelExperts,
        key: str,
        *,
        left: Tensor | None = None,
        right: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(owner, key)
        device: Any = owner.held[key][0][0].weight.device
        self.left, self.right = (None if basis is None else basis.to(device) for basis in (left, right))
        self.scale = scale
        cut, (m, n), (_, a, b) = self.cut, self.cut.local, self.cut.shape
        projected = {0: left, 1: right}
        if cut.split is not None and projected[cut.split] is not None:
            what = "outputs" if cut.split == 0 else "inputs"
            raise ValueError(
                f"side: expected one that does not project the {what} of experts' {key}, which {cut.size} process"
                f" ranks share (expert_tensor_parallel), got bases of {a} x {b} matrices on the"
                f" {'left' if cut.split == 0 else 'right'}"
            )
        height, width = (a if left is None else left.shape[-1]), (b if right is None else right.shape[-1])
        local = (m if left is None else height, n if right is None else width)
        rows = cut.rows if left is None else [(0, height)]
        boxes = [box for expert in cut.experts for box in cut.boxes(expert, height, width, rows)]
        self._become("rows" if left is not None else "columns", height, local, parts_of(key, boxes))

    @property
    def rank(self) -> int:
        basis = self.left if self.left is not None else self.right
        assert basis is not None
        return basis.shape[-1]

    def subspace(self) -> dict[str, Tensor]:
        bases = {"left": self.left, "right": self.right}
        return {key: basis for key, basis in bases.items() if basis is not None}

    def _compact_of(self, matrix: _Matrix) -> Tensor:
        return torch.zeros_like(self.each(self.compact.detach())[matrix.number])

    def _bases(self, matrix: _Matrix) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.left is None else self.left[matrix.expert],
            None if self.right is None else self.right[matrix.expert],
        )

    def apply_to(
        self, matrix: _Matrix, compact: Tensor, decay: float, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        weight, (m, n), (left, right) = matrix.linear.weight.detach(), self.cut.local, self._bases(matrix)
        c = compact.to(torch.promote_types(compact.dtype, torch.float32))
        rows = lift_rows(c, left, None, 0, m, m)
        change = lift_rows(rows.t(), right, None, 0, n, n).t() * self.scale
        positions = self.cut.weight_positions(matrix.expert, weight.device)
        add_(weight, change, decay, seed=seed, offset=positions, decay_last=decay_last)

    def product_of(self, matrix: _Matrix) -> Product:
        left, right = self._bases(matrix)
        key: Hashable = ALL if right is None else ("basis", id(self))
        return Product(
            key,
            all_of if right is None else lambda x: x @ right.to(x.dtype),
            all_of if left is None else lambda grad_y: project(grad_y, left, None),
        )


class CompactSequentialMLP(CompactModule, SequentialMLP):
    """A ``SequentialMLP`` some or all of whose experts' matrices are compact.

    Attributes:
        units: those that are; not children.
    """

    units: Sequence[StackedParallelWeight]

    def compact_units(self) -> Sequence[CompactUnit]:
        return self.units

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's. Experts without tokens have a gradient of zero."""
        for unit in self.units:
            for matrix, own in zip(unit.matrices, unit.each(unit.compact), strict=True):
                matrix.handed = own
        try:
            return super().forward(*args, **kwargs)
        finally:
            for unit in self.units:
                for matrix in unit.matrices:
                    matrix.handed = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        raise NotImplementedError("compact experts are not moved: their compact values lie in Megatron's buffers")


def become_compact_experts(module: nn.Module, units: Sequence[StackedParallelWeight]) -> None:
    """Turn a ``SequentialMLP`` into one that trains these units. Before Megatron's DDP."""
    assert type(module) is SequentialMLP
    module.__class__ = CompactSequentialMLP
    assert isinstance(module, CompactSequentialMLP)
    module.__dict__["units"] = list(units)
    for unit in units:
        for matrix in unit.matrices:
            train_compact(matrix.linear, [matrix])
        compact: Any = unit.compact
        # Megatron's: which process ranks average the gradient.
        compact.allreduce = getattr(unit.matrices[0].linear.weight, "allreduce", True)
        module.register_parameter(unit.compact_key, compact)

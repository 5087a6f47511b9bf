"""The weights of the model that parallel layers hold, and their compact forms.

A parallel layer may hold several weights (q, k and v; gate and up). Each has its own name, subspace and compact
parameter, so that an optimizer, its options and its checkpoints speak of the same weights under every engine.
"""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import CompactWeight
from narrowgauge.optimizers.layers.projected_weight import lift_rows, project
from narrowgauge.optimizers.layers.registry import register
from narrowgauge.optimizers.layers.selected_weight import read_selected
from narrowgauge.optimizers.layers.unit import CompactUnit, ProbeKind, Side
from narrowgauge.optimizers.layers.watch import unwatch
from narrowgauge.optimizers.numerics.rounding import add_, decay_
from narrowgauge.optimizers.sharding.box import Box

from ..parts import Part
from .product import Product
from .weight_cut import WeightCut


def placeholder(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    """A tensor of this shape without memory of its own, that stands for what a parameter of Megatron's holds of it."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(shape))


class ParallelWeight(nn.Module):
    """A weight that lies in a parallel layer.

    Attributes:
        weight: a tensor without memory, of the whole weight's shape: options and counts are about that.
        layer: the parallel layer; not a child.
        cut: where it lies in the layer's weight.
    """

    layer: Any
    cut: WeightCut
    weight: nn.Parameter

    def __init__(self, layer: nn.Module, cut: WeightCut) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.cut = cut
        self.weight = placeholder(self.layer.weight, cut.shape)


class ParallelUnit(CompactUnit):
    """A compact unit of which this process rank trains a part, in parallel layers.

    Attributes:
        is_replicated: all ranks that share the weight hold the same compact values, whose gradient is the sum of
            theirs.
    """

    @property
    def is_replicated(self) -> bool:
        raise NotImplementedError

    @property
    def compact_shape(self) -> tuple[int, int]:
        rows, columns = self.compact_parts("")[0].box.shape
        return rows, columns

    @property
    def linears(self) -> Sequence[Any]:
        """The compact parallel layers that hold it."""
        raise NotImplementedError

    def positions(self, start: int, length: int, device: torch.device) -> Tensor:
        """The positions in the flattened whole compact parameter of ``length`` elements from ``start`` here, int64."""
        raise NotImplementedError

    def compact_parts(self, name: str) -> Sequence[Part]:
        """Where the compact parameter lies in that of the whole weight, which has this name."""
        raise NotImplementedError

    @property
    def cut_dim(self) -> int | None:
        """As :attr:`.LocalParameter.cut`, of the compact parameter."""
        raise NotImplementedError


class CompactParallelWeight(CompactWeight, ParallelWeight, ParallelUnit):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A weight that is trained through a compact parameter; what is common.

    The compact parameter, too, is this rank's part of that of the whole weight, cut along the same dimension; all of it
    where the subspace is one of that dimension (:attr:`is_replicated`).
    """

    plain: ClassVar[type[nn.Module]] = ParallelWeight

    def _become(self, local_shape: tuple[int, int], whole_shape: tuple[int, int], side: Side) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised."""
        weight, cut = self.layer.weight, self.cut
        self.side, self.folds_at_use, self.probe, self.omega = side, False, None, None
        self.weight.requires_grad_(False)
        compact: Any = nn.Parameter(torch.empty(local_shape, dtype=weight.dtype, device=weight.device))
        offsets = tuple(cut.rank * own * (own < whole) for own, whole in zip(local_shape, whole_shape, strict=True))
        self.box = Box(whole_shape, offsets, local_shape)
        # Megatron's: who counts for the gradient norm.
        compact.tensor_model_parallel = cut.split is not None and not self.is_replicated
        compact.partition_dim = cut.split if compact.tensor_model_parallel else -1
        compact.partition_stride = 1
        self.compact = compact

    def revert(self) -> None:
        del self.compact, self.side, self.folds_at_use, self.probe, self.omega, self.box
        unwatch(self)
        self.weight.requires_grad_(True)
        self.__class__ = ParallelWeight  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def stored_weights(self) -> Sequence[Tensor]:
        return (self.layer.weight,)

    @property
    def linears(self) -> Sequence[Any]:
        return (self.layer,)

    @property
    def parameter(self) -> nn.Parameter:
        return self.compact

    @property
    def trained(self) -> Tensor:
        return self.compact

    @property
    def main_grad(self) -> Tensor | None:
        return getattr(self.compact, "main_grad", None)

    def note_call(self) -> None:
        self.was_called = True

    @torch.no_grad()
    def fold(self) -> None:
        self.apply_(self.weight, self.compact.detach())

    def positions(self, start: int, length: int, device: torch.device) -> Tensor:
        return self.box.positions(start, length, device)

    def compact_parts(self, name: str) -> Sequence[Part]:
        return (Part(name, self.box),)

    @property
    def cut_dim(self) -> int | None:
        return self.cut.split if self.box.local != self.box.shape else None

    @property
    def local_weight(self) -> Tensor:
        """``(groups, rows, n)``: a view of the part in the layer's weight."""
        return self.cut.view(self.layer.weight.detach())

    def _put_back(self, own: Tensor) -> None:
        """Take over what a reshaped :attr:`local_weight`, a copy where its rows lie apart, has become."""
        if self.cut.num_groups > 1:
            self.local_weight.copy_(own.view_as(self.local_weight))

    def product(self) -> Product:
        """How the gradient of ``compact`` is made."""
        raise NotImplementedError

    def changed(self) -> None:
        """The subspace is another one."""
        self.layer.plan = None

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        self.changed()

    def start_probe(self, kind: ProbeKind, omega: Tensor | None = None) -> None:
        m, n = self.cut.local
        weight = self.layer.weight
        size = omega.shape[1] if omega is not None else 0
        shape = {"rows": (m, size), "columns": (size, n), "full": (m, n)}[kind]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.probe_kind = kind
        self.omega = omega.to(device=weight.device, dtype=dtype) if omega is not None else None
        self.probe = torch.zeros((), dtype=dtype, device=weight.device).expand(shape).requires_grad_()
        self.changed()

    def end_probe(self) -> Tensor:
        """What was observed here since :meth:`start_probe`, of the whole weight: zero where other ranks observe."""
        observed = super().end_probe()
        is_weights_dim = (self.probe_kind != "columns", self.probe_kind != "rows")
        return self.cut.lift(observed, is_weights_dim)

    def drop_probe(self) -> None:
        super().drop_probe()
        self.changed()

    def probe_product(self) -> Product:
        """How what the probe observes is made."""
        cut, omega = self.cut, self.omega
        if self.probe_kind == "rows":
            assert omega is not None
            of_inputs = cut.own_rows(1, omega)
            return Product(("rows", id(self)), lambda x: x @ of_inputs.to(x.dtype), cut.outputs, cut)
        if self.probe_kind == "columns":
            assert omega is not None
            of_outputs = cut.own_rows(0, omega)
            return Product(ALL, all_of, lambda grad_y: cut.outputs(grad_y) @ of_outputs.to(grad_y.dtype))
        return Product(ALL, all_of, cut.outputs, cut)


class SelectedParallelWeight(CompactParallelWeight):
    """Trains the values of selected columns or rows of the weight.

    Attributes:
        index: the selected ones of the whole weight, int64 ``(r,)``, on the weight's device.
        local: those of them that lie here, as numbered here.
    """

    is_delta: ClassVar[bool] = False
    index: Tensor
    local: Tensor

    @classmethod
    def convert(cls, part: ParallelWeight, *, side: Side, index: Tensor, contiguous: bool, shared: Any = None) -> Any:
        """Turn ``part`` into a ``SelectedParallelWeight`` in place; ``compact`` is left uninitialised.

        Args:
            contiguous, shared: as of :meth:`.SelectedLinear.convert`; a parallel layer shares by itself.

        Raises:
            ValueError: not every tensor-parallel rank has as many of the selected columns or rows.
        """
        cut, dim = part.cut, 1 if side == "columns" else 0
        per_rank = torch.bincount(index // (cut.shape[dim] // cut.size), minlength=cut.size)
        if cut.split == dim and len(set(per_rank.tolist())) > 1:
            raise ValueError(
                f"strata: expected a multiple of the {cut.size} tensor-parallel ranks, over which the {side} of"
                f" {tuple(cut.shape)} weights are cut, got a selection of {per_rank.tolist()} on each"
            )
        part.__class__ = cls
        assert isinstance(part, SelectedParallelWeight)
        part.index = index.to(part.layer.weight.device)
        part.local = cut.local_of(dim, index).to(part.index.device)
        (m, n), (whole_m, whole_n) = cut.local, cut.shape
        if side == "columns":
            part._become((m, part.local.numel()), (whole_m, index.numel()), side)
        else:
            part._become((part.local.numel(), n), (index.numel(), whole_n), side)
        part.changed()
        return part

    def revert(self) -> None:
        del self.index, self.local
        super().revert()

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def rank(self) -> int:
        return self.index.numel()

    def selected(self) -> Tensor:
        return self.index

    def subspace(self) -> dict[str, Tensor]:
        return {"index": self.index}

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        found = self.cut.local_of(self.dim, self.index)
        if found.shape != self.local.shape:
            raise ValueError(
                f"strata: expected {self.local.numel()} {self.side} on each tensor-parallel rank, got {found.numel()}:"
                " they were selected with other strata"
            )
        self.local = found

    def compact_of(self, weight: Tensor) -> Tensor:
        """Of the layer's weight; the argument stands for it."""
        if self.side == "columns":
            return self.local_weight.index_select(2, self.local).reshape(self.compact.shape)
        return self.layer.weight.detach().index_select(0, self._selected_rows())

    def places(self) -> Tensor:
        """Where the compact values lie in the layer's flattened weight, int64, of the compact shape."""
        width = self.cut.local[1]
        if self.side == "columns":
            return self.cut.numbers(self.local.device)[:, None] * width + self.local
        return self._selected_rows()[:, None] * width + torch.arange(width, device=self.local.device)

    def _selected_rows(self) -> Tensor:
        """The selected rows as those of the layer's weight."""
        return self.cut.numbers(self.local.device)[self.local]

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        """To the layer's weight; the argument stands for it."""
        if decay != 1.0:
            own = self.local_weight.reshape(self.cut.local)
            decay_(own, decay, seed=seed, offset=self.cut.positions(own.device))
            self._put_back(own)
        if self.side == "columns":
            self.local_weight.index_copy_(2, self.local, compact.view(self.cut.num_groups, self.cut.rows, -1))
        else:
            self.layer.weight.detach().index_copy_(0, self._selected_rows(), compact)

    def product(self) -> Product:
        cut = self.cut
        if self.side == "columns":
            chosen = self.local
            key: Hashable = ("columns", tuple(chosen.tolist()))
            return Product(key, lambda x: columns_of(x, chosen), cut.outputs, cut)
        rows = self._selected_rows()
        return Product(ALL, all_of, lambda grad_y: grad_y.index_select(1, rows))


class ProjectedParallelWeight(CompactParallelWeight):
    """Trains a change of the weight within a subspace; see :class:`~.projected_linear.ProjectedLinear`.

    Attributes:
        left, right: the bases of the whole weight, ``(M, r)`` and ``(N, r)`` in at least fp32; None for the identity.
        scale: of the change.
    """

    is_delta: ClassVar[bool] = True
    left: Tensor | None
    right: Tensor | None
    scale: float

    @classmethod
    def convert(
        cls,
        part: ParallelWeight,
        *,
        left: Tensor | None = None,
        left_index: Tensor | None = None,
        right: Tensor | None = None,
        right_index: Tensor | None = None,
        scale: float = 1.0,
    ) -> Any:
        """Turn ``part`` into a ``ProjectedParallelWeight`` in place; ``compact`` is left uninitialised.

        Raises:
            ValueError: the bases are selections.
        """
        if left_index is not None or right_index is not None:
            raise ValueError("selection: expected one without repeats under tensor parallelism")
        part.__class__ = cls
        assert isinstance(part, ProjectedParallelWeight)
        device = part.layer.weight.device
        part.left, part.right = (None if basis is None else basis.to(device) for basis in (left, right))
        part.scale = scale
        (m, n), (whole_m, whole_n) = part.cut.local, part.cut.shape
        local = (m if left is None else left.shape[1], n if right is None else right.shape[1])
        whole = (whole_m if left is None else left.shape[1], whole_n if right is None else right.shape[1])
        part._become(local, whole, "rows" if left is not None else "columns")
        part.changed()
        return part

    def revert(self) -> None:
        del self.left, self.right, self.scale
        super().revert()

    @property
    def is_replicated(self) -> bool:
        if self.cut.split is None:
            return False
        return (self.left, self.right)[self.cut.split] is not None

    @property
    def rank(self) -> int:
        basis = self.left if self.left is not None else self.right
        assert basis is not None
        return basis.shape[1]

    def subspace(self) -> dict[str, Tensor]:
        bases = {"left": self.left, "right": self.right}
        return {key: basis for key, basis in bases.items() if basis is not None}

    def compact_of(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(self.compact)

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        """To the layer's weight; the argument stands for it."""
        cut, (m, n) = self.cut, self.cut.local
        left, right = self._bases()
        c = compact.to(torch.promote_types(compact.dtype, torch.float32))
        rows = lift_rows(c, left, None, 0, m, m)
        change = lift_rows(rows.t(), right, None, 0, n, n).t() * self.scale
        own = self.local_weight.reshape(m, n)
        add_(own, change, decay, seed=seed, offset=cut.positions(own.device), decay_last=decay_last)
        self._put_back(own)

    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        """This rank's rows of the bases."""
        left, right = self.left, self.right
        return (
            None if left is None else self.cut.own_rows(0, left),
            None if right is None else self.cut.own_rows(1, right),
        )

    def product(self) -> Product:
        cut, (left, right) = self.cut, self._bases()
        key: Hashable = ALL if right is None else ("basis", id(self))
        of_part = cut if left is None else None
        return Product(
            key,
            all_of if right is None else lambda x: x @ right.to(x.dtype),
            cut.outputs if left is None else lambda grad_y: project(cut.outputs(grad_y), left, None),
            of_part,
        )


ALL: Hashable = ("all",)


def all_of(x: Tensor) -> Tensor:
    return x


def columns_of(x: Tensor, index: Tensor) -> Tensor:
    """A copy of the selected columns, ``(..., r)``."""
    return read_selected(x.reshape(-1, x.shape[-1]), index, None, dim=1).view(*x.shape[:-1], index.numel())


register(ParallelWeight, selected=SelectedParallelWeight.convert, projected=ProjectedParallelWeight.convert)

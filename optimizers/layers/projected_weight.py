"""Weights that are trained through a change of them within a subspace."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.rounding import add_
from .shape import whole_shape
from .unit import CompactUnit

BASES = ("left", "left_index", "right", "right_index")


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


class ProjectedWeight(CompactUnit):
    """A compact unit whose ``compact`` holds a change of ``weight``, zero once it is folded.

    Attributes:
        left, right: the bases, in fp32 (fp64 for an fp64 weight), or the scales ``(r,)`` of a selection; None for the
            identity.
        left_index, right_index: int64 ``(r,)``; None where the basis is dense.
        scale: of the change.
    """

    is_delta: ClassVar[bool] = True
    left: Tensor | None
    left_index: Tensor | None
    right: Tensor | None
    right_index: Tensor | None
    scale: float

    def _set_bases(self, bases: Sequence[Tensor | None], scale: float) -> None:
        """The part of a conversion that is common, in the order of ``BASES``."""
        self.scale = scale
        for key, value in zip(BASES, bases, strict=True):
            setattr(self, key, value.to(self.weight.device) if value is not None else None)

    def lift(self, compact: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last - 1`` of the change of the weight that ``compact`` stands for, in at least fp32."""
        raise NotImplementedError

    def compact_of(self, weight: Tensor) -> Tensor:
        return torch.zeros(whole_shape(self.compact), dtype=weight.dtype, device=weight.device)

    def subspace(self) -> dict[str, Tensor]:
        return {key: value for key in BASES if (value := getattr(self, key)) is not None}

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

"""Layers that train a selection of their weight's columns or rows, held as values."""

import hashlib
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from narrowgauge.kernels import computes

from ..numerics.rounding import decay_
from .shape import whole_shape
from .unit import CompactUnit, Side


def read_selected(full: Tensor, index: Tensor, start: int | None, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the selected entries of a matrix along ``dim``, cast; a view would keep all of ``full`` alive."""
    dtype = dtype or full.dtype
    if start is not None:
        return full.narrow(dim, start, index.numel()).to(dtype, copy=True, memory_format=torch.contiguous_format)
    if dim == 0:
        return full.index_select(0, index).to(dtype)
    if computes("selected columns", full, _kernel_agrees, full.dtype, dtype):
        from .columns_triton import gather_columns

        return gather_columns(full, index.contiguous(), dtype)
    return _gather_columns(full, index, dtype)


def _gather_columns(full: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    # Faster than index_select, on the CPU by a factor of up to three.
    return full.gather(1, index.expand(full.shape[0], -1)).to(dtype)


def _kernel_agrees(device: torch.device, source: torch.dtype, dtype: torch.dtype) -> bool:
    from .columns_triton import gather_columns

    return gathers_alike(gather_columns, device, source, dtype)


def gathers_alike(
    kernel: Callable[[Tensor, Tensor, torch.dtype], Tensor],
    device: torch.device,
    source: torch.dtype,
    dtype: torch.dtype,
) -> bool:
    """Whether :func:`.columns_triton.gather_columns`, or what is given for it, reads a few columns as PyTorch does."""
    full = (torch.arange(-5000, 6100, dtype=torch.float32, device=device) / 7).to(source).view(37, 300)
    for x in (full, full[3:20, 10:].t()):
        index = torch.arange(x.shape[1], device=device).flip(0)[::2].contiguous()
        if not torch.equal(kernel(x, index, dtype), _gather_columns(x, index, dtype)):
            return False
    return True


def write_selected_(full: Tensor, values: Tensor, index: Tensor, start: int | None, dim: int) -> None:
    """Write ``values`` over the selected entries of ``full`` along ``dim``, in place."""
    if start is None:
        full.index_copy_(dim, index, values)
    else:
        full.narrow(dim, start, index.numel()).copy_(values)


def _content_key(index: Tensor) -> bytes:
    """Equal for equal indices."""
    return hashlib.sha256(str(index.tolist()).encode()).digest()


class SelectedWeight(CompactUnit):
    """A compact unit whose ``compact`` holds the values of selected columns or rows of ``weight``.

    Attributes:
        compact: trainable, ``(m, r)`` for columns or ``(r, n)`` for rows.
        index: the selected columns or rows, int64 ``(r,)``, on the weight's device. Deliberately not a buffer: DDP
            would broadcast it at every forward.
        start: the first selected one where they are neighbours.
    """

    is_delta: ClassVar[bool] = False
    index: Tensor
    start: int | None
    _index_key: bytes

    def _become_selected(self, *, side: Side, index: Tensor, contiguous: bool) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised."""
        self.index = index.to(self.weight.device)
        self.start = int(index[0]) if contiguous else None
        self._index_key = _content_key(index)
        m, n = self.weight_shape
        self._become_compact((m, index.numel()) if side == "columns" else (index.numel(), n), side)

    def revert(self) -> None:
        del self.start, self._index_key
        super().revert()

    @property
    def rank(self) -> int:
        return self.index.numel()

    def selected(self) -> Tensor:
        return self.index

    def compact_of(self, weight: Tensor) -> Tensor:
        """The selected entries of a tensor shaped like ``weight``, as a copy shaped like ``compact``."""
        return read_selected(weight, self.index, self.start, self.dim)

    def agree_in(self, rows: slice) -> Tensor:
        full = self.weight.detach().reshape(self.weight_shape)
        if self.side == "columns":
            found = read_selected(full[rows], self.index, self.start, dim=1)
        else:
            found = full.index_select(0, self._selected_rows()[rows])
        return (self.compact.detach()[rows] == found).all()

    def write_(self, full: Tensor, values: Tensor) -> None:
        """Write ``values``, shaped like ``compact``, over the selected entries of ``full``."""
        write_selected_(full, values, self.index, self.start, self.dim)

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        decay_(weight, decay, seed=seed)
        self.write_(weight, compact)

    def apply_to_run_(
        self, run: Tensor, start: int, compact: Tensor, decay: float, *, seed: int, decay_last: bool = False
    ) -> None:
        decay_(run, decay, seed=seed, offset=start)
        in_run, in_compact = self._selected_in(start, run.numel())
        run[in_run.to(run.device)] = compact[in_compact].to(run.device)

    def compact_of_run(self, run: Tensor, start: int) -> Tensor:
        in_run, in_compact = self._selected_in(start, run.numel())
        found = torch.zeros(math.prod(whole_shape(self.compact)), dtype=run.dtype, device=self.index.device)
        found[in_compact] = run[in_run.to(run.device)].to(found.device)
        return found

    def _selected_in(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Which entries of a run of the flattened weight are selected: their positions in the run and in the flat
        compact values, both int64, in the same order.
        """
        _, n = self.weight_shape
        index, stop = self.index, start + length
        if self.side == "columns":
            # Of every row that the run touches, the selected columns: (rows, r).
            lines = torch.arange(start // n, -(-stop // n), device=index.device)
            in_weight = lines[:, None] * n + index
            in_compact = lines[:, None] * index.numel() + torch.arange(index.numel(), device=index.device)
        else:
            # The selected rows that the run touches, with all their columns: (rows, n).
            rows = self._selected_rows()
            chosen = torch.nonzero((rows + 1 > start // n) & (rows * n < stop)).squeeze(1)
            columns = torch.arange(n, device=index.device)
            in_weight = rows[chosen][:, None] * n + columns
            in_compact = chosen[:, None] * n + columns
        # The first and the last row may be cut.
        inside = (in_weight >= start) & (in_weight < stop)
        return in_weight[inside] - start, in_compact[inside]

    def _selected_rows(self) -> Tensor:
        """Of the weight as one matrix, in the order of the compact values' rows."""
        return self.index

    def project_gradient(self, gradient: Tensor) -> Tensor:
        return self.compact_of(gradient)

    def subspace(self) -> dict[str, Tensor]:
        return {"index": self.index}

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        self._index_key = _content_key(tensors["index"])
        if self.start is not None:
            self.start = int(self.index[0])

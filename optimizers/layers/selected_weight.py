"""Layers that train a selection of their weight's columns or rows, held as values."""

import hashlib
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .compact import CompactWeight

Side = Literal["columns", "rows"]


def read_selected(full: Tensor, index: Tensor, start: int | None, dim: int) -> Tensor:
    """A copy of the selected entries of a matrix along ``dim``; a view would keep all of ``full`` alive."""
    if start is not None:
        return full.narrow(dim, start, index.numel()).clone(memory_format=torch.contiguous_format)
    if dim == 0:
        return full.index_select(0, index)
    # Along the columns gather is faster than index_select, on the CPU by a factor of up to three.
    return full.gather(1, index.expand(full.shape[0], -1))


def write_selected_(full: Tensor, values: Tensor, index: Tensor, start: int | None, dim: int) -> None:
    """Write ``values`` over the selected entries of ``full`` along ``dim``, in place."""
    if start is None:
        full.index_copy_(dim, index, values)
    else:
        full.narrow(dim, start, index.numel()).copy_(values)


def _content_key(index: Tensor) -> bytes:
    """Equal for equal indices."""
    return hashlib.sha256(str(index.tolist()).encode()).digest()


class SelectedWeight(CompactWeight):
    """A compact layer whose ``compact`` holds the values of selected columns or rows of ``weight``.

    Attributes:
        compact: trainable, ``(m, r)`` for columns or ``(r, n)`` for rows.
        index: the selected columns or rows, int64 ``(r,)``, on the weight's device. Deliberately not a buffer: DDP
            would broadcast it at every forward.
        start: the first selected one where they are neighbours.
    """

    is_delta: ClassVar[bool] = False
    index: Tensor
    side: Side
    start: int | None
    _index_key: bytes

    def _become_selected(self, *, side: Side, index: Tensor, contiguous: bool) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised."""
        self.side = side
        self.index = index.to(self.weight.device)
        self.start = int(index[0]) if contiguous else None
        self._index_key = _content_key(index)
        m, n = self.weight_shape
        self._become_compact((m, index.numel()) if side == "columns" else (index.numel(), n))

    def revert(self) -> None:
        del self.side, self.start, self._index_key
        super().revert()

    @property
    def dim(self) -> int:
        """The dimension of ``weight`` that is selected from."""
        return 1 if self.side == "columns" else 0

    def compact_of(self, weight: Tensor) -> Tensor:
        """The selected entries of a tensor shaped like ``weight``, as a copy shaped like ``compact``."""
        return read_selected(weight, self.index, self.start, self.dim)

    def write_(self, full: Tensor, values: Tensor) -> None:
        """Write ``values``, shaped like ``compact``, over the selected entries of ``full``."""
        write_selected_(full, values, self.index, self.start, self.dim)

    def subspace(self) -> dict[str, Tensor]:
        return {"index": self.index}

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        super().set_subspace(tensors)
        self._index_key = _content_key(tensors["index"])
        if self.start is not None:
            self.start = int(self.index[0])

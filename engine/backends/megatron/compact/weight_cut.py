"""Where a weight of the model lies in that of a parallel layer, which may hold several."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowgauge.optimizers.sharding.box import Box


@dataclass(frozen=True)
class WeightCut:
    """The part of a weight that a process rank holds, and where it lies in the parallel layer's.

    The layer's outputs are ``num_groups`` equal groups of neighbours. The weight has neighbouring rows in each: q, k
    and v follow each other in each group of query heads; gate and up follow each other in one group of all outputs.

    Attributes:
        shape: ``(M, N)``, of the whole weight.
        split: the dimension that is cut over the tensor-parallel ranks; None where each holds all of it.
        rank, size: of this process among them, and their number.
        num_groups: of the layer's outputs on this rank.
        group_rows: outputs in a group.
        first: the weight's first row in each group.
    """

    shape: tuple[int, int]
    split: int | None
    rank: int
    size: int
    num_groups: int
    group_rows: int
    first: int

    @property
    def local(self) -> tuple[int, int]:
        """``(m, n)``, the shape of what this rank holds."""
        m, n = self.shape
        return (m // self.size if self.split == 0 else m), (n // self.size if self.split == 1 else n)

    @property
    def box(self) -> Box:
        """What of the whole weight this rank holds."""
        m, n = self.local
        return Box(self.shape, (self.rank * m * (self.split == 0), self.rank * n * (self.split == 1)), (m, n))

    @property
    def rows(self) -> int:
        """The weight's rows in each group."""
        return self.local[0] // self.num_groups

    @property
    def is_whole_layer(self) -> bool:
        """Whether the layer holds no other weight."""
        return self.rows == self.group_rows

    def view(self, of_layer: Tensor) -> Tensor:
        """The weight's rows ``(groups, rows, k)``, a view, of a tensor ``(outputs, k)`` of the layer."""
        grouped = of_layer.view(self.num_groups, self.group_rows, of_layer.shape[1])
        return grouped.narrow(1, self.first, self.rows)

    def part(self, of_layer: Tensor) -> Tensor:
        """The weight's rows ``(m, k)`` of a tensor ``(outputs, k)`` of the layer; a copy where they lie apart."""
        return self.view(of_layer).reshape(self.local[0], of_layer.shape[1])

    def outputs(self, of_layer: Tensor) -> Tensor:
        """The weight's outputs ``(tokens, m)`` of the layer's ``(tokens, outputs)``; a copy where they lie apart."""
        if self.is_whole_layer:
            return of_layer
        grouped = of_layer.view(-1, self.num_groups, self.group_rows)
        return grouped.narrow(2, self.first, self.rows).reshape(-1, self.local[0])

    def numbers(self, device: torch.device) -> Tensor:
        """Which rows of the layer's weight the weight's are, int64 ``(m,)``."""
        every = torch.arange(self.num_groups * self.group_rows, device=device)
        return self.part(every[:, None]).squeeze(1)

    def local_of(self, dim: int, index: Tensor) -> Tensor:
        """Those of the selected rows (``dim`` 0) or columns, of the whole weight, that lie here, as numbered here."""
        if self.split != dim:
            return index
        size = self.local[dim]
        first = self.rank * size
        return index[(index >= first) & (index < first + size)] - first

    def own_rows(self, dim: int, of_whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that has one for each of the whole weight's rows (``dim`` 0) or columns."""
        size = self.local[dim]
        return of_whole.narrow(0, self.rank * size, size) if self.split == dim else of_whole

    def lift(self, part: Tensor, dims: tuple[bool, bool]) -> Tensor:
        """Put what this rank has of a matrix into one of zeros, so that those of all ranks add up to the whole.

        Args:
            part: 2-D.
            dims: whether its rows, and its columns, are those of the weight.
        """
        if self.split is None or not dims[self.split]:
            return part
        size = part.shape[self.split]
        shape = [part.shape[0], part.shape[1]]
        shape[self.split] = size * self.size
        whole = part.new_zeros(shape)
        whole.narrow(self.split, self.rank * size, size).copy_(part)
        return whole

    @property
    def positions_fit(self) -> bool:
        """Whether elements that follow each other here also do in the whole weight."""
        return self.split != 1

    def positions(self, device: torch.device) -> int | Tensor:
        """The position of the first element within the flattened whole weight, or of every element."""
        box = self.box
        if self.positions_fit:
            return box.offsets[0] * self.shape[1]
        return box.positions(0, math.prod(self.local), device)

"""Semi-orthogonal projections of a matrix that lies in shards: partial sums, and the way back."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sharding.blocks import blocks_of
from ..sharding.shards import Shard
from .coordinates import Place


@dataclass(frozen=True)
class LowRank:
    """The subspace of a matrix of shape ``(m, n)`` on its shorter side, as GaLore's ``std``: ``G P`` of shape ``(m,
    rank)`` where ``m >= n``, else ``P^T G`` of shape ``(rank, n)``, with orthonormal columns of ``P``.

    Attributes:
        transposed: ``G`` is inputs times outputs: a square one is projected on its other side, as its transpose is.
    """

    shape: tuple[int, int]
    rank: int
    transposed: bool = False

    @property
    def side(self) -> Literal["right", "left"]:
        """On which side of the gradient ``P`` stands."""
        m, n = self.shape
        return "right" if m > n or (m == n and not self.transposed) else "left"

    @property
    def basis_shape(self) -> tuple[int, int]:
        """Of ``P``: ``(min(m, n), rank)``."""
        return min(self.shape), self.rank

    @property
    def compact_shape(self) -> tuple[int, int]:
        """Of the projected gradient."""
        m, n = self.shape
        return (m, self.rank) if self.side == "right" else (self.rank, n)

    @property
    def numel(self) -> int:
        """Coordinates of the projected gradient."""
        return self.rank * max(self.shape)

    def place(self, shard: Shard) -> Place:
        """Which elements of the projected gradient have their state with a shard: both are cut in the same
        proportions.
        """
        start, end = (
            position * self.numel // (self.shape[0] * self.shape[1])
            for position in (shard.place, shard.place + shard.length)
        )
        return Place(start, end - start, (self.numel,))

    def basis_of(self, gradient: Tensor) -> Tensor:
        """``P`` of the leading singular vectors of a gradient in fp32 or fp64."""
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        return (vh[: self.rank].T if self.side == "right" else u[:, : self.rank]).contiguous()

    def random_basis(self, seed: int, like: Tensor) -> Tensor:
        """A uniformly random ``P`` from a seed, in the dtype, fp32 or fp64, and on the device of ``like``."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(self.basis_shape, generator=generator, dtype=like.dtype).to(like.device)
        q, r = torch.linalg.qr(normal)
        # QR leaves the signs of the columns open; these make the distribution uniform.
        return q * r.diagonal().sign()

    def add_projection_(self, compact: Tensor, shard: Shard, gradient: Tensor, basis: Tensor) -> None:
        """Add the projection of a shard's 1-D gradient to ``compact`` (1-D, of ``numel`` elements)."""
        target = compact.view(self.compact_shape)
        for block in blocks_of(shard):
            values = block.of(gradient)
            if self.side == "right":
                inner = basis.narrow(0, block.column, block.num_columns)
                target.narrow(0, block.row, block.num_rows).addmm_(values, inner)
            else:
                inner = basis.narrow(0, block.row, block.num_rows)
                target.narrow(1, block.column, block.num_columns).addmm_(inner.T, values)

    def expand(self, compact: Tensor, shard: Shard, basis: Tensor) -> Tensor:
        """The shard, 1-D, of the matrix that ``compact`` stands for."""
        source = compact.view(self.compact_shape)
        piece = compact.new_empty(shard.length)
        for block in blocks_of(shard):
            if self.side == "right":
                inner = basis.narrow(0, block.column, block.num_columns)
                values = source.narrow(0, block.row, block.num_rows) @ inner.T
            else:
                inner = basis.narrow(0, block.row, block.num_rows)
                values = inner @ source.narrow(1, block.column, block.num_columns)
            block.of(piece).copy_(values)
        return piece

"""Where the tensor that a process holds lies in a parameter."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a parameter, such as a column- or row-parallel slice of a weight, or all of it.

    Attributes:
        shape: of the whole parameter.
        offsets: of the box's first element in it, by dimension.
        local: the shape of the box.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "Box":
        """All of a parameter."""
        return Box(shape, (0,) * len(shape), shape)

    @property
    def is_one_run(self) -> bool:
        """Whether all its elements are neighbours in the flattened parameter."""
        size = math.prod(self.local)
        return size == 0 or next(self.runs(0, size))[2] == size

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Where elements of the flattened box lie in the flattened parameter, in ascending order.

        Args:
            start: position in the box of the first of ``length`` elements.

        Yields:
            Position in the parameter, position after ``start``, and number of elements that are neighbours in both.
        """
        # Elements of a box follow each other in the parameter up to the last dimension that it does not span.
        cut = max((d for d in range(len(self.shape)) if self.local[d] != self.shape[d]), default=0)
        run = math.prod(self.local[cut:])
        done = 0
        while done < length:
            taken = min(run - (start + done) % run, length - done)
            yield self._position(start + done), done, taken
            done += taken

    def positions(self, start: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """The positions in the flattened parameter of ``length`` elements of the flattened box, int64 ``(length,)``."""
        left = torch.arange(start, start + length, device=device)
        found = torch.zeros_like(left)
        for dim in range(len(self.shape)):
            inner = math.prod(self.local[dim + 1 :])
            found += (left // inner + self.offsets[dim]) * math.prod(self.shape[dim + 1 :])
            left = left % inner
        return found

    def locate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where elements of the flattened parameter lie in the flattened box.

        Args:
            positions: int64 ``(n,)``.

        Returns:
            Their positions in the box, int64 ``(n,)``, and which of them are in it, bool ``(n,)``; those that are not
            have any position.
        """
        found, is_inside = torch.zeros_like(positions), torch.ones_like(positions, dtype=torch.bool)
        for dim in range(len(self.shape)):
            index = positions // math.prod(self.shape[dim + 1 :]) % self.shape[dim] - self.offsets[dim]
            is_inside &= (index >= 0) & (index < self.local[dim])
            found += index * math.prod(self.local[dim + 1 :])
        return found, is_inside

    def overlaps(self, other: "Box") -> bool:
        """Whether they share an element of the parameter."""
        return all(
            first < second + other.local[dim] and second < first + self.local[dim]
            for dim, (first, second) in enumerate(zip(self.offsets, other.offsets, strict=True))
        )

    def _position(self, local: int) -> int:
        found = 0
        for dim in range(len(self.shape)):
            index, local = divmod(local, math.prod(self.local[dim + 1 :]))
            found += (index + self.offsets[dim]) * math.prod(self.shape[dim + 1 :])
        return found

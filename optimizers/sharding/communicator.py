"""Sums over the process ranks that share a parameter's gradient."""

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Communicator(Protocol):
    """A group of process ranks. All methods are collective within it, in place."""

    @property
    def rank(self) -> int:
        """Of this process within the group."""
        ...

    @property
    def size(self) -> int:
        """Number of process ranks in the group."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Make the tensor its sum over the ranks, and return it."""
        ...

    def average_(self, tensor: Tensor) -> Tensor:
        """Make the tensor its mean over the ranks, and return it."""
        ...

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Make the tensor that of the first rank, and return it."""
        ...


CommunicatorOf = Callable[[str], Communicator]
"""The communicator of a parameter by its name, the same object for all that share a group; experts, for example,
reduce over another group than the other layers."""


class GroupCommunicator:
    """A group of ``torch.distributed``; alone where that is not initialised.

    Args:
        group: None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group) if dist.is_initialized() else 1

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def average_(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor


def one_for_all(communicator: Communicator) -> CommunicatorOf:
    """The same communicator for every parameter."""
    return lambda name: communicator

"""Bytes that a process rank sends in collectives, as PyTorch's dispatcher sees them: also without storage or network.

By ring algorithms, as :mod:`.dense_traffic` says: what is counted is what the rank puts on its links, not what is there
before and after.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_sent(func: Any, args: Any, *, scatter_factor: float) -> tuple[float, dist.ProcessGroup | None]:
    """Of an operation, with its process group; none where it is no collective.

    Args:
        func, args: as of ``__torch_dispatch__``.
        scatter_factor: of :func:`~.dense_traffic.reduce_scatter_factor`.
    """
    if func.namespace != "c10d" or (rule := _RULES.get(func._schema.name.removeprefix("c10d::"))) is None:
        return 0.0, None
    group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
    share = (group.size() - 1) / group.size()
    return rule(args, share, scatter_factor, group.rank()), group


class CountedCollectives(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        sent: bytes.
    """

    def __init__(self, *, scatter_factor: float, leave_out: Collection[Any] = ()) -> None:
        """
        Args:
            leave_out: process groups whose collectives are not counted.
        """
        super().__init__()
        self.sent = 0.0
        self._factor, self._leave_out = scatter_factor, [group for group in leave_out if group is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nbytes, group = bytes_sent(func, args, scatter_factor=self._factor)
        if group is not None and group not in self._leave_out:
            self.sent += nbytes
        return func(*args, **(kwargs or {}))


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


def _to_all(args: Any, share: float, factor: float, rank: int) -> float:
    """An all-to-all of one tensor along its rows, in equal pieces or in those of the last list."""
    sent, splits = args[1], args[4]
    if not splits:
        return share * _size(sent)
    rows = sum(splits)
    return _size(sent) * (rows - splits[rank]) / rows if rows else 0.0


# Of (arguments, (N-1)/N, factor of a reduce-scatter, own rank).
_Rule = Callable[[Any, float, float, int], float]
_RULES: dict[str, _Rule] = {
    "allreduce_": lambda args, share, factor, rank: 2 * share * _size(args[0]),
    "allreduce_coalesced_": lambda args, share, factor, rank: 2 * share * _size(args[0]),
    "broadcast_": lambda args, share, factor, rank: share * _size(args[0]),
    "allgather_": lambda args, share, factor, rank: share * _size(args[0]),
    "_allgather_base_": lambda args, share, factor, rank: share * _size(args[0]),
    "allgather_into_tensor_coalesced_": lambda args, share, factor, rank: share * _size(args[0]),
    "reduce_scatter_": lambda args, share, factor, rank: factor * share * _size(args[1]),
    "_reduce_scatter_base_": lambda args, share, factor, rank: factor * share * _size(args[1]),
    "reduce_scatter_tensor_coalesced_": lambda args, share, factor, rank: factor * share * _size(args[1]),
    "alltoall_base_": _to_all,
    "alltoall_": lambda args, share, factor, rank: _size([t for n, t in enumerate(args[1]) if n != rank]),
    "send": lambda args, share, factor, rank: float(_size(args[0])),
}

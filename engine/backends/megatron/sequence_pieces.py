"""Which positions of a sequence a process rank has, where several share it. Plain: nothing of Megatron's.

The order is that of Megatron and Transformer Engine: of ``2 c`` pieces for ``c`` ranks, rank ``r`` has piece ``r`` and
piece ``2 c - 1 - r``. So all have as many pairs of positions, of which the later attends to the earlier.
"""

import torch
from torch import Tensor


def positions_on(rank: int, num_ranks: int, length: int) -> Tensor:
    """A rank's positions, int64 ``(length / num_ranks,)``.

    Args:
        length: a multiple of ``2 * num_ranks``.
    """
    pieces = torch.arange(length).view(2 * num_ranks, -1)
    return pieces[[rank, 2 * num_ranks - 1 - rank]].flatten()


def in_order(gathered: Tensor, num_ranks: int) -> Tensor:
    """The whole sequence, from the ranks' parts one after the other, both along the first dimension."""
    pieces = gathered.unflatten(0, (num_ranks, 2, -1))
    return torch.cat([pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)])

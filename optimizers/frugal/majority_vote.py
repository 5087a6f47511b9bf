"""One step's gradients reduced by two rules: averaged for some coordinates, a majority vote of signs for the others.

Source: Bernstein, Wang, Azizzadenesheli, Anandkumar (2018), "signSGD: Compressed Optimisation for Non-Convex
Problems", arXiv 1802.04434, section 4 (majority vote).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def average_and_vote(averaged: Sequence[Tensor], voting: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Reduce this rank's gradients over all process ranks of the default group. Collective.

    The averaged ones are sent as they are, in one all-reduce. Of the voting ones only signs are sent, 8 in a byte, in
    one all-gather. A second bit for each, whether it is zero, follows in another all-gather if any rank has a
    gradient that is exactly zero.

    Args:
        averaged: 1-D, one dtype and device.
        voting: 1-D, one dtype and device, the same.

    Returns:
        The means of ``averaged``; and for ``voting`` the signs of the sums of the ranks' signs, in its dtype: the
        majority's sign, and 0 where as many ranks are positive as negative.
    """
    local = torch.cat(list(voting))
    # The last element counts the zeros, so that the ranks agree without a message of its own.
    mean = torch.cat([*averaged, (local == 0).sum().to(local.dtype).view(1)])
    dist.all_reduce(mean)
    num_zeros = mean[-1]
    mean.div_(dist.get_world_size())
    votes = torch.zeros(local.shape, dtype=torch.int32, device=local.device)
    if local.numel():
        signs = _gather_bits(local > 0)
        nonzero = _gather_bits(local != 0) if num_zeros > 0 else None
        for rank in range(dist.get_world_size()):
            vote = _unpack(signs[rank], local.numel()) * 2 - 1
            votes += vote if nonzero is None else vote * _unpack(nonzero[rank], local.numel())
    means = mean[:-1].split([tensor.numel() for tensor in averaged])
    majority = votes.sign().to(local.dtype).split([tensor.numel() for tensor in voting])
    return list(means), list(majority)


def _weights(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def _gather_bits(bits: Tensor) -> Tensor:
    """All ranks' bits, uint8 of shape ``(world size, ceil(numel / 8))``; the last byte is padded with zeros."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits
    packed = (padded.view(-1, 8) * _weights(bits.device)).sum(1, dtype=torch.uint8)
    gathered = packed.new_empty(dist.get_world_size() * packed.numel())
    dist.all_gather_into_tensor(gathered, packed)
    return gathered.view(dist.get_world_size(), -1)


def _unpack(packed: Tensor, numel: int) -> Tensor:
    """Packed bits as int8 zeros and ones."""
    bits = (packed.unsqueeze(1) & _weights(packed.device)) != 0
    return bits.view(-1)[:numel].to(torch.int8)

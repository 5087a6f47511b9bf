"""Checksums of stored bytes, on the host or on the device they are on."""

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

_CHECKSUM_PART = 16 << 20


def checksum(memory: Tensor, delta: int, nbytes: int) -> int:
    """Of ``nbytes`` bytes of a uint8 tensor: from ``delta`` on in host memory, from the start on a device."""
    if memory.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(memory.numpy()[delta : delta + nbytes].data)
    return checksum_on_device(memory[:nbytes])


def checksum_on_device(memory: Tensor, *, part: int = _CHECKSUM_PART) -> int:
    """A sum of words with odd weights: any one changed word changes it.

    Args:
        memory: uint8.
        part: bytes that are summed at a time, for the memory it takes meanwhile; a multiple of 8.
    """
    total = 0
    for begin in range(0, memory.numel(), part):
        piece = memory[begin : begin + part]
        words = F.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        weights = torch.arange(begin // 8, begin // 8 + words.numel(), device=memory.device) * 2 + 1
        total = total + (words * weights).sum()
    return int(total)

"""Stochastic rounding to bf16 on CUDA, in one pass over memory: what :mod:`.rounding` states, bit for bit."""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 1024


def round_(target: Tensor, source: Tensor, *, key: int, offset: int | Tensor) -> None:
    """Write fp32 ``source`` into bf16 ``target``, as many elements; both contiguous.

    Args:
        key: of :func:`.rounding.key_of`.
        offset: position of the first element, or of every one, int64 ``(numel,)``, contiguous.
    """
    numel = source.numel()
    if numel == 0:
        return
    first, positions = (0, offset) if isinstance(offset, Tensor) else (offset, source)
    grid = (triton.cdiv(numel, _BLOCK),)
    kernel: Any = _round
    # Triton launches on the current device.
    with torch.cuda.device_of(source):
        kernel[grid](target, source, positions, first, key, numel, GIVEN=isinstance(offset, Tensor), BLOCK=_BLOCK)


@triton.jit
def _hash(position, key):  # noqa: ANN001, ANN202
    """:func:`.rounding.hash_positions`."""
    h = position ^ key
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * -2048144789
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * -1028477387
    return h ^ ((h >> 16) & 0xFFFF)


# Else there would be a kernel for each kind of number that a seed can be.
@triton.jit(do_not_specialize=["first", "key"])
def _round(target, source, positions, first, key, numel, GIVEN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    position = tl.load(positions + place, mask=inside, other=0) if GIVEN else place + first
    noise = _hash((position & 0x7FFFFFFF).to(tl.int32), key.to(tl.int32)) & 0xFFFF
    bits = tl.load(source + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # What is not finite stays so: no carry into it, and no NaN without a digit left.
    bits = tl.where(size < 0x7F800000, bits + noise, tl.where(size > 0x7F800000, bits | 0x400000, bits))
    tl.store(target + place, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)

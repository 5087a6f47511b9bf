"""Stochastic rounding from fp32 to bf16 that every process rank and every sharding agrees on.

The random bits of an element are a hash of ``(seed, its position in the whole tensor)``. A shard therefore rounds its
part exactly as a single process would round the whole, on any device and without a generator to keep in step.
"""

from collections.abc import Callable
from typing import Any

import torch

from narrowgauge.kernels import computes

_INT32_MASK = 0x7FFFFFFF


def hash_positions(position: torch.Tensor, seed: int) -> torch.Tensor:
    """32 well-mixed bits per int32 position, a permutation (the finalizer of MurmurHash3, multiplications wrap)."""
    h = position ^ key_of(seed)
    for multiplier, shift in ((-2048144789, 16), (-1028477387, 13)):
        h = h ^ ((h >> shift) & (_INT32_MASK >> (shift - 1)))
        h = h * multiplier
    return h ^ ((h >> 16) & 0xFFFF)


def key_of(seed: int) -> int:
    """The 31 bits of a seed that positions are hashed with."""
    return (seed ^ (seed >> 31)) & _INT32_MASK


def stochastic_round_(target: torch.Tensor, source: torch.Tensor, *, seed: int, offset: int | torch.Tensor = 0) -> None:
    """Write fp32 ``source`` into bf16 ``target``, rounding up or down with probability equal to the distance.

    Args:
        target: bf16, contiguous, any shape.
        source: fp32, same number of elements, same device.
        seed: any int; the same on all ranks.
        offset: position of the first element within the whole tensor; or of every element, int64 ``(numel,)``, where
            they are not neighbours in it.
    """
    if target.is_contiguous() and computes("stochastic rounding", source, _kernel_agrees):
        from .rounding_triton import round_

        place = offset if isinstance(offset, int) else offset.contiguous()
        round_(target, source.contiguous(), key=key_of(seed), offset=place)
    else:
        _round_(target, source, seed, offset)


def _round_(target: torch.Tensor, source: torch.Tensor, seed: int, offset: int | torch.Tensor) -> None:
    if isinstance(offset, int):
        offset = torch.arange(offset, offset + source.numel(), device=source.device)
    position = offset & _INT32_MASK
    noise = hash_positions(position.to(torch.int32), seed) & 0xFFFF
    bits = (source.reshape(-1).contiguous().view(torch.int32) + noise) & -0x10000
    rounded = bits.view(torch.float32).view_as(source)
    # Adding noise below the mantissa would carry a NaN or an infinity into another value.
    rounded = torch.where(torch.isfinite(source), rounded, source)
    target.copy_(rounded.view_as(target))


def _kernel_agrees(device: torch.device) -> bool:
    from .rounding_triton import round_

    return rounds_alike(round_, device)


def rounds_alike(kernel: Callable[..., None], device: torch.device) -> bool:
    """Whether :func:`.rounding_triton.round_`, or what is given for it, rounds a few numbers as PyTorch does."""
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    numbers = torch.arange(-700, 700, **fp32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3895e38, -3.4e38, -0.0], **fp32)
    source, seed = torch.cat([numbers / 7, numbers * 1e35, numbers * 1e-40, special]), 2**62 + 12345
    for offset in (2**31 - 5, torch.arange(source.numel(), device=device).flip(0).contiguous()):
        expected, found = (torch.empty_like(source, dtype=torch.bfloat16) for _ in range(2))
        _round_(expected, source, seed, offset)
        kernel(found, source, key=key_of(seed), offset=offset)
        bits, is_nan = (found.view(torch.int16) == expected.view(torch.int16)), expected.isnan()
        if not bool(torch.where(is_nan, found.isnan(), bits).all()):
            return False
    return True


def add_(
    weight: torch.Tensor,
    change: torch.Tensor,
    decay: float,
    *,
    seed: int,
    offset: int | torch.Tensor = 0,
    decay_last: bool = False,
) -> None:
    """``weight = decay * weight + change`` in place, in bf16 with stochastic rounding.

    Args:
        change: in at least fp32, as many elements as ``weight``.
        offset: position of the first element within the whole tensor, or of every element, for a shard.
        decay_last: ``decay * (weight + change)`` instead.
    """
    change = change.reshape(weight.shape)
    if weight.dtype is torch.bfloat16:
        whole = weight.float()
        stochastic_round_(weight, _add_to(whole, change, decay, decay_last), seed=seed, offset=offset)
    else:
        _add_to(weight, change.to(weight.dtype), decay, decay_last)


def _add_to(weight: torch.Tensor, change: torch.Tensor, decay: float, decay_last: bool) -> torch.Tensor:
    """:func:`add_` in the weight's own precision."""
    return weight.add_(change).mul_(decay) if decay_last else weight.mul_(decay).add_(change)


def decay_(weight: torch.Tensor, factor: float, *, seed: int, offset: int | torch.Tensor = 0) -> None:
    """Scale ``weight`` in place; in bf16 with stochastic rounding, where a factor near 1 would else be lost.

    Args:
        offset: position of the first element within the whole tensor, or of every element, for a shard.
    """
    if factor == 1.0:
        return
    if weight.dtype is torch.bfloat16:
        stochastic_round_(weight, weight.float() * factor, seed=seed, offset=offset)
    else:
        weight.mul_(factor)

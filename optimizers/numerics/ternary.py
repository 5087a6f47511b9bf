"""Weights of -1, 0 and 1 times a scale, and activations in 8 bits, as BitNet b1.58 rounds them."""

from typing import Any, Literal

import torch
from torch import Tensor

ScaleName = Literal["mean", "median"]
# What a scale is at least.
_EPSILON = 1e-5


def ternary_scale(weight: Tensor, scale: ScaleName) -> Tensor:
    """Of the absolute values of a whole weight, their mean or median (the lower of the two in the middle); a scalar in
    at least fp32.
    """
    magnitudes = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs()
    found = magnitudes.mean() if scale == "mean" else magnitudes.median()
    return found.clamp_min(_EPSILON)


def ternary(weight: Tensor, scale: ScaleName) -> tuple[Tensor, Tensor]:
    """A whole weight as ``values * scale``.

    Source: Ma et al. (2024), "The Era of 1-bit LLMs", arXiv 2402.17764, Section 2 (``mean``); Nielsen and
    Schneider-Kamp (2024), "BitNet b1.58 Reloaded", arXiv 2407.09527, Section 3 (``median``).

    Returns:
        The values -1, 0 and 1, in at least fp32, shaped like ``weight``, and the scale.
    """
    found = ternary_scale(weight, scale)
    return (weight.detach().to(found.dtype) / found).round().clamp(-1.0, 1.0), found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        step = wide.abs().amax(-1, keepdim=True).clamp_min(_EPSILON) / 127.0
        return ((wide / step).round().clamp(-128.0, 127.0) * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0]


def rounded_activations(x: Tensor) -> Tensor:
    """Each token's vector, along the last dimension, as 8-bit integers times its largest magnitude over 127; the
    gradient goes straight through.
    """
    return _Rounded.apply(x)  # pyright: ignore[reportReturnType]


def pack_ternary(values: Tensor) -> Tensor:
    """-1, 0 and 1 of ``(m, n)`` as ``uint8 (m, ceil(n / 4))``: value + 1 in two bits, the first in the lowest ones."""
    m, n = values.shape
    codes = torch.nn.functional.pad((values + 1.0).to(torch.uint8), (0, -n % 4), value=1).view(m, -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=values.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)


def unpack_ternary(packed: Tensor, columns: int) -> Tensor:
    """What :func:`pack_ternary` packed, int8 ``(m, columns)``."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & 3
    return codes.flatten(1)[:, :columns].to(torch.int8) - 1

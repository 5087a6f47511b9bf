"""Mesa's rounding in PyTorch: what :mod:`.mesa_triton` computes too, with the same digits."""

from typing import Any

import torch
from torch import Tensor

LEVELS = 255


def encode(codes: Tensor, tensor: Tensor, noise: Tensor, scale: Tensor, low: Tensor, dim: int, width: int) -> None:
    """``codes = floor(clamp((tensor - low) * scale + noise, 0, 255))`` in fp32.

    Args:
        codes: uint8, laid out as ``tensor``, which has no holes.
        noise: fp32 ``(numel,)``, in the order of memory.
        scale, low: of each group, fp32.
        dim, width: so many neighbours along this dimension are a group.
    """
    # One rounding each, so that no device may leave one out.
    levels = (tensor.float() - _over(low, tensor, dim, width)).mul_(_over(scale, tensor, dim, width))
    levels.add_(noise.as_strided(tensor.shape, tensor.stride()))
    # To an integer it is cut off.
    codes.copy_(levels.clamp_(0, LEVELS))


def decode(values: Tensor, codes: Tensor, step: Tensor, low: Tensor, dim: int, width: int) -> None:
    """``values = codes * step + low`` in fp32, rounded to nearest in the end; arguments as for :func:`encode`."""
    values.copy_((codes * _over(step, codes, dim, width)).add_(_over(low, codes, dim, width)))


def rounds_alike(kernels: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :mod:`.mesa_triton`, or what is given for it, rounds a few numbers both ways as these functions do."""
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    for shape, dim, width in (((3, 390), 1, 64), ((2, 3, 39, 5), 1, 1)):
        tensor = (torch.arange(-585, 585, **fp32) / 7).to(dtype).view(shape)
        # Attention's heads lie behind the tokens in memory.
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2) if len(shape) == 4 else tensor
        noise = torch.arange(tensor.numel(), **fp32) % 97 / 97
        groups = torch.arange(-(-shape[dim] // width), **fp32)
        scale, low = (groups + 1) / 0.9, groups - 60
        codes = [torch.empty_like(tensor, dtype=torch.uint8) for _ in range(2)]
        values = [torch.empty_like(tensor) for _ in range(2)]
        encode(codes[0], tensor, noise, scale, low, dim, width)
        kernels.encode(codes[1], tensor, noise, scale, low, dim, width)
        decode(values[0], codes[0], 1 / scale, low, dim, width)
        kernels.decode(values[1], codes[0], 1 / scale, low, dim, width)
        if not (torch.equal(*codes) and torch.equal(*values)):
            return False
    return True


def _over(of_groups: Tensor, tensor: Tensor, dim: int, width: int) -> Tensor:
    """Each group's number as it is broadcast over the tensor."""
    shape = [1] * tensor.dim()
    shape[dim] = tensor.shape[dim]
    return of_groups.repeat_interleave(width)[: shape[dim]].view(shape)

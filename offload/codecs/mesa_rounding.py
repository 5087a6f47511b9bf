"""Mesa's rounding in PyTorch: what :mod:`.mesa_triton` computes too, with the same digits."""

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


def _over(of_groups: Tensor, tensor: Tensor, dim: int, width: int) -> Tensor:
    """Each group's number as it is broadcast over the tensor."""
    shape = [1] * tensor.dim()
    shape[dim] = tensor.shape[dim]
    return of_groups.repeat_interleave(width)[: shape[dim]].view(shape)

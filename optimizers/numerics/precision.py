"""Parameters in a dtype wide enough to compute with, and what is written back."""

import torch
from torch import Tensor

from .rounding import stochastic_round_


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for lower precisions, otherwise the tensor's own."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """The tensor itself, without its graph, if it is fp32 or fp64, otherwise a copy in fp32."""
    return tensor.detach().to(compute_dtype(tensor))


def write_back(target: Tensor, values: Tensor, *, seed: int, position: int | Tensor = 0) -> None:
    """Write into ``target`` what ``widen(target)`` has become: bf16 with stochastic rounding, fp16 to nearest.

    Args:
        values: the result of ``widen(target)``, changed in place; nothing is left to do where that was ``target``.
        seed: of the rounding; the same on all process ranks.
        position: of the first element within the whole parameter, or of every element, so that every cut rounds alike.
    """
    if target.dtype == torch.bfloat16:
        stochastic_round_(target, values, seed=seed, offset=position)
    elif target.dtype != values.dtype:
        target.copy_(values)

"""Whether one of our Triton kernels computes in the place of PyTorch: on devices where it has given the same bits."""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor, nn

# By name, device and variant: whether the kernel has given PyTorch's bits there, in this process.
_agreed: dict[tuple[Hashable, ...], bool] = {}
_told: set[tuple[str, torch.device]] = set()


def computes(name: str, tensor: Tensor, agrees: Callable[..., bool], *variant: Hashable) -> bool:
    """Whether a kernel computes with a tensor.

    It does on CUDA, where there are Triton and the C compiler that it calls, not inside of ``torch.compile`` and not
    with tensors of other classes, which have no memory of their own; and if it :func:`is_right`.

    Args:
        name, agrees, variant: as of :func:`is_right`.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return _triton_is_here() and is_right(name, tensor.device, agrees, *variant)


def is_right(name: str, device: torch.device, agrees: Callable[..., bool], *variant: Hashable) -> bool:
    """Whether a kernel gives PyTorch's bits on a device: tried once per process. A warning says so if it does not.

    Args:
        name: of what it computes.
        agrees: takes it through a few numbers on a device, beside PyTorch; with ``variant`` as further arguments.
        variant: what kernels of this name differ by, such as dtypes.
    """
    key = (name, device, *variant)
    if key not in _agreed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph cannot wait for the answer.
            return False
        try:
            with torch.no_grad():
                _agreed[key], found = agrees(device, *variant), "others"
        except Exception as error:
            _agreed[key], found = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if not _agreed[key] and (name, device) not in _told:
            _told.add((name, device))
            warnings.warn(
                f"{name}: expected PyTorch's digits of the Triton kernel on {device}, got {found}; PyTorch computes",
                stacklevel=3,
            )
    return _agreed[key]


@cache
def _triton_is_here() -> bool:
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers)

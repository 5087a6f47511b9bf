"""Whether a tensor is computed with Triton's kernels."""

import importlib.util
import os
import shutil
from functools import cache

import torch
from torch import Tensor


def has_kernels(tensor: Tensor) -> bool:
    """On CUDA, where there are Triton and the C compiler that it calls; not inside of ``torch.compile``."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and _triton_is_here()


@cache
def _triton_is_here() -> bool:
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers)

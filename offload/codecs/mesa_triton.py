"""Mesa's rounding on CUDA, in one pass over memory: what :mod:`.mesa_rounding` states, with the same digits.

Tensors are walked through in the order of memory, whatever that of their dimensions.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 1024


def encode(codes: Tensor, tensor: Tensor, noise: Tensor, scale: Tensor, low: Tensor, dim: int, width: int) -> None:
    """See :func:`.mesa_rounding.encode`."""
    _launch(_encode, tensor, dim, width, codes, tensor, noise, scale, low)


def decode(values: Tensor, codes: Tensor, step: Tensor, low: Tensor, dim: int, width: int) -> None:
    """See :func:`.mesa_rounding.decode`."""
    _launch(_decode, values, dim, width, values, codes, step, low)


def _launch(kernel: Any, like: Tensor, dim: int, width: int, *tensors: Tensor) -> None:
    numel = like.numel()
    # A dimension of one element may have any stride, 0 too.
    sizes = (max(like.stride(dim), 1), like.shape[dim], width, numel)
    wide = numel >= 2**31 - _BLOCK
    # Triton launches on the current device. Fused multiply and add would round once where PyTorch rounds twice.
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(numel, _BLOCK),)](*tensors, *sizes, WIDE=wide, BLOCK=_BLOCK, enable_fp_fusion=False)


@triton.jit
def _offsets(WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN202
    """Of this block's elements; 64 bits, whose divisions are slow, where they are needed."""
    block = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    return block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _encode(codes, tensor, noise, scale, low, stride, size, width, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    offset = _offsets(WIDE, BLOCK)
    inside = offset < numel
    group = offset // stride % size // width
    x = tl.load(tensor + offset, mask=inside, other=0.0).to(tl.float32)
    level = (x - tl.load(low + group, mask=inside, other=0.0)) * tl.load(scale + group, mask=inside, other=0.0)
    level = level + tl.load(noise + offset, mask=inside, other=0.0)
    tl.store(codes + offset, tl.minimum(tl.maximum(level, 0.0), 255.0).to(tl.uint8), mask=inside)


@triton.jit
def _decode(values, codes, step, low, stride, size, width, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    offset = _offsets(WIDE, BLOCK)
    inside = offset < numel
    group = offset // stride % size // width
    level = tl.load(codes + offset, mask=inside, other=0).to(tl.float32)
    x = level * tl.load(step + group, mask=inside, other=0.0) + tl.load(low + group, mask=inside, other=0.0)
    tl.store(values + offset, x.to(values.dtype.element_ty), mask=inside)

"""Selected columns of a matrix, cast, on CUDA and in one pass: what :mod:`.selected_weight` states, bit for bit."""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_ROWS, _COLUMNS = 8, 128


def gather_columns(full: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``full[:, index]`` in ``dtype``, a contiguous copy; ``full`` may have any strides, ``index`` has none."""
    rows, columns = full.shape[0], index.numel()
    out = torch.empty(rows, columns, dtype=dtype, device=full.device)
    if out.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
        kernel: Any = _gather
        # Triton launches on the current device.
        with torch.cuda.device_of(full):
            kernel[grid](out, full, index, rows, columns, *full.stride(), ROWS=_ROWS, COLUMNS=_COLUMNS)
    return out


@triton.jit
def _gather(out, full, index, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: ANN001, ANN202
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = tl.load(index + column, mask=column < columns, other=0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(full + row[:, None] * row_stride + wanted[None, :] * column_stride, mask=inside, other=0.0)
    tl.store(out + row[:, None] * columns + column[None, :], x.to(out.dtype.element_ty), mask=inside)

"""Triton's kernels in tests: on CUDA, or on CPUs under Triton's interpreter."""

import importlib
import os
from typing import Any

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def triton_module(name: str, device: str) -> Any:
    """A module of kernels for a device; skips the test where there is no Triton or no such device.

    Triton reads whether to interpret when a kernel is defined: one process tests on one of the two.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        pytest.skip("needs a CUDA device")
    if device == "cpu" and has_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the CUDA device here; set TRITON_INTERPRET=1 to interpret")
    if not has_cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module(name)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values.to(dtype)`` as kernels do it: Triton's interpreter cuts bf16's missing digits off."""
    if dtype is torch.bfloat16 and values.dtype is torch.float32 and not values.is_cuda:
        values = (values.view(torch.int32) & -0x10000).view(torch.float32)
    return values.to(dtype)

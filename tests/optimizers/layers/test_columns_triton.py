"""Selected columns in Triton against PyTorch, bit for bit: on CUDA, else under Triton's interpreter."""

import pytest
import torch

from tests.support.kernels import DEVICES, cast, triton_module

NAME = "narrowgauge.optimizers.layers.columns_triton"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_pytorchs(device: str, dtype: torch.dtype) -> None:
    kernels = triton_module(NAME, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 300, generator=generator).to(device)
    for count in (1, 130, 300):
        index = torch.randperm(300, generator=generator)[:count].to(device)
        for full in (x, x[3:20], x[:, 10:].T.contiguous().T if count < 290 else x, x.bfloat16()):
            chosen = index % full.shape[1]
            found = kernels.gather_columns(full, chosen, dtype)
            assert found.is_contiguous()
            assert torch.equal(found, cast(full.gather(1, chosen.expand(full.shape[0], -1)), dtype))
    assert kernels.gather_columns(x[:0], torch.arange(3, device=device), dtype).shape == (0, 3)

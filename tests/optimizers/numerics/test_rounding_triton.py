"""Stochastic rounding in Triton against PyTorch, bit for bit: on CUDA, else under Triton's interpreter."""

import pytest
import torch

from narrowgauge.optimizers.numerics.rounding import key_of, stochastic_round_
from tests.support.kernels import DEVICES, triton_module

NAME = "narrowgauge.optimizers.numerics.rounding_triton"
SEEDS = [0, 1, 16, 2**31 + 5, 2**62 + 12345]


def numbers(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator) * torch.logspace(-30, 30, count)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.3895e38, -3.4e38, 1.0, 1e-40])
    return torch.cat([x, special])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_pytorchs(device: str, seed: int) -> None:
    kernels = triton_module(NAME, device)
    source = numbers(3001)
    scattered = torch.randperm(2**20, generator=torch.Generator().manual_seed(1))[: source.numel()] + 2**31 - 2**19
    for offset in (0, 1, 4097, 2**31 - 5, 2**33 + 7, scattered):
        expected, found = (torch.empty(source.shape, dtype=torch.bfloat16) for _ in range(2))
        stochastic_round_(expected, source, seed=seed, offset=offset)
        found = found.to(device)
        place = offset.to(device) if isinstance(offset, torch.Tensor) else offset
        kernels.round_(found, source.to(device), key=key_of(seed), offset=place)
        numeric = ~expected.isnan()
        assert found.cpu().isnan().equal(~numeric)
        assert torch.equal(found.cpu().view(torch.int16)[numeric], expected.view(torch.int16)[numeric])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_rounds_as_the_cpu() -> None:
    """Through what the optimizers call, whichever of the two computes."""
    source = numbers(100_000)
    for offset in (0, 2**31 - 5, torch.arange(source.numel()).flip(0)):
        on_cpu = torch.empty(source.shape, dtype=torch.bfloat16)
        on_cuda = on_cpu.cuda()
        stochastic_round_(on_cpu, source, seed=7, offset=offset)
        place = offset.cuda() if isinstance(offset, torch.Tensor) else offset
        stochastic_round_(on_cuda, source.cuda(), seed=7, offset=place)
        assert torch.equal(on_cuda.cpu().nan_to_num(7.0), on_cpu.nan_to_num(7.0))

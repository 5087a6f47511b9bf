"""Mesa's Triton kernels against PyTorch, bit for bit: on CUDA, else under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from narrowgauge.offload.codecs import Mesa8, mesa, mesa_rounding
from tests.support.kernels import DEVICES, cast, triton_module

NAME = "narrowgauge.offload.codecs.mesa_triton"
# Odd sizes; groups that are cut; attention's heads; dimensions of one element.
SHAPES = [(5,), (37, 130), (2, 19, 64), (3, 5, 7, 11), (1, 4, 1, 6)]


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (3 * x + 1).to(dtype).to(device)


def both_orders(x: Tensor) -> list[Tensor]:
    """Attention's heads lie behind the tokens in memory, or before them."""
    return [x, x.transpose(1, 2).contiguous().transpose(1, 2)] if x.dim() == 4 else [x]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_values_are_pytorchs(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    kernels = triton_module(NAME, device)
    for shape in SHAPES:
        for x in both_orders(normal(shape, dtype, device)):
            found, ranges = [], torch.empty(0)
            for module in (mesa_rounding, kernels):
                monkeypatch.setattr(mesa, "_rounding_on", lambda _, module=module: module)
                codec = Mesa8()
                # Running ranges, so that a part is clamped.
                codec.encode(x / 2, "here", torch.Generator(device).manual_seed(1))
                codes, decoder = codec.encode(x, "here", torch.Generator(device).manual_seed(2))
                found.append(codes)
                ranges = decoder.ranges
            expected, codes = found
            assert codes.stride() == x.stride()
            assert torch.equal(codes, expected)
            assert codes.unique().numel() > 2
            exact, back = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x)
            groups = (1, 1) if x.dim() == 4 else (x.dim() - 1, 64)
            mesa_rounding.decode(exact, codes, ranges[0] / 255, ranges[1], *groups)
            kernels.decode(back, codes, ranges[0] / 255, ranges[1], *groups)
            assert torch.equal(back, cast(exact, dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_written_beyond_the_end(device: str) -> None:
    """Of a tensor that does not fill its last block."""
    kernels = triton_module(NAME, device)
    x = normal((3, 130), torch.float32, device)
    room = torch.full((1024,), 77, dtype=torch.uint8, device=device)
    noise, one = torch.rand(390, device=device), torch.ones(3, device=device)
    kernels.encode(room[:390].view(3, 130), x, noise, one, one, 1, 64)
    assert (room[390:] == 77).all()
    assert torch.equal(room[:390].view(3, 130), ((x - 1) + noise.view(3, 130)).clamp(0, 255).to(torch.uint8))

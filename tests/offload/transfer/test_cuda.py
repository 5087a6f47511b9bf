"""CUDA: copies on their own streams must neither read a tensor before it is there nor free it before they are done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends.threads import ThreadsBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EVERYTHING: dict[str, Any] = {"keep_resident": 0.0, "min_tensor_bytes": 0, "capacity_bytes": 1 << 30}


class Slow(torch.autograd.Function):
    """Multiplication whose kernels come late: whoever does not wait for them sees memory of before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        scaled = x * 2
        ctx.save_for_backward(scaled, weight)
        return scaled * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        scaled, weight = ctx.saved_tensors
        torch.cuda._sleep(20_000_000)
        return grad * weight * 2, (grad * scaled).sum(0)


def stack(depth: int = 6, width: int = 512) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(torch.randn(width, device="cuda") for _ in range(depth))


def slow_loss(weights: nn.ParameterList, x: Tensor) -> Tensor:
    for weight in weights:
        x = Slow.apply(x, weight).tanh()  # pyright: ignore[reportAttributeAccessIssue]
    return x.square().sum()


def gradients(loss_of: Callable[[], Tensor], parameters: Any, offload: ActivationOffload | None) -> list[Tensor]:
    if offload is None:
        loss = loss_of()
    else:
        with offload:
            loss = loss_of()
    loss.backward()
    found = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [loss.detach(), *found]


@pytest.mark.parametrize("nbytes", [4096, 5 * 4096, 64 << 20])
def test_buffers_are_pinned_whole_pages(nbytes: int) -> None:
    """Others would be copied without overlap, and direct I/O would refuse them."""
    buffer = ThreadsBackend().new_buffer(nbytes)
    assert (buffer.is_pinned(), buffer.nbytes, buffer.data_ptr() % 4096) == (True, nbytes, 0)


@pytest.mark.parametrize("options", [{}, {"host_memory_bytes": 1 << 30}, {"buffer_bytes": 4096}, {"num_lanes": 1}])
def test_late_kernels(options: dict[str, Any], tmp_path: Path) -> None:
    weights, x = stack(), torch.randn(4096, 512, device="cuda")
    expected = gradients(lambda: slow_loss(weights, x), weights, None)
    offload = ActivationOffload(tmp_path, **EVERYTHING, **options)
    for _ in range(20):
        found = gradients(lambda: slow_loss(weights, x), weights, offload)
        assert all(map(torch.equal, found, expected))
    assert offload.stats().written > 0 or "host_memory_bytes" in options
    assert offload.stats().failed_writes == 0
    offload.close()


def test_work_on_a_stream_of_the_users(tmp_path: Path) -> None:
    weights, x = stack(), torch.randn(4096, 512, device="cuda")
    expected = gradients(lambda: slow_loss(weights, x), weights, None)
    offload, stream = ActivationOffload(tmp_path, **EVERYTHING), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [gradients(lambda: slow_loss(weights, x), weights, offload) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))
    offload.close()


@pytest.mark.parametrize("options", [{}, {"host_memory_bytes": 8 << 30}])
def test_peak_memory_falls(options: dict[str, Any], tmp_path: Path) -> None:
    """Twelve layers keep 12 x 3 x 64 MiB; with everything offloaded a few tensors at a time are on the GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024)) for _ in range(12))
    ).cuda()
    x = torch.randn(16384, 1024, device="cuda")

    def peak(offload: ActivationOffload | None) -> int:
        # The first time allocates workspaces.
        gradients(lambda: model(x).square().mean(), list(model.parameters()), offload)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(lambda: model(x).square().mean(), list(model.parameters()), offload)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    kept = peak(None)
    offload = ActivationOffload(tmp_path, keep_resident=0.0, capacity_bytes=8 << 30, **options)
    assert peak(offload) <= 0.5 * kept
    offload.close()


def test_nothing_is_left(tmp_path: Path) -> None:
    weights, x = stack(), torch.randn(4096, 512, device="cuda")
    offload = ActivationOffload(tmp_path, **EVERYTHING)
    gradients(lambda: slow_loss(weights, x), weights, offload)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        gradients(lambda: slow_loss(weights, x), weights, offload)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert (offload.stats().saved, offload.stats().resident) == (0, 0)
    offload.close()

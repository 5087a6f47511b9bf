"""CUDA: compact layers and optimizers compute there what they compute on the CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.optimizers import OPTIMIZERS, Grass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
WIDTH, TOKENS, STEPS = 64, 96, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "Grass": {"density": 0.25, "refresh_interval": 2},
    "GaLore": {"rank": 16, "refresh_interval": 2},
    "Frugal": {"density": 0.25, "refresh_interval": 2},
    "Apollo": {"rank": 16, "refresh_interval": 2},
    "Lamb": {},
    "Lars": {},
}
GRASS = [
    {"side": "columns", "selection": "uniform"},
    {"side": "columns", "selection": "block"},
    {"side": "rows", "selection": "uniform"},
    {"side": "rows", "selection": "block"},
]


def build() -> nn.Sequential:
    """The same weights each time, on the CPU."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    return x, y


def train(name: str, device: str, **options: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights of a few steps that start alike on all devices."""
    model = build().to(device)
    targets = {} if name in ("Lamb", "Lars") else {"target_modules": ["*.0"]}
    optimizer: Any = OPTIMIZERS[name](model, lr=1e-2, **targets, **options)  # pyright: ignore[reportCallIssue]
    losses = []
    for step in range(STEPS):
        x, y = (part.to(device) for part in data(step))
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [value.cpu() for value in model.state_dict().values()]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "GaLore"])
def test_as_on_the_cpu(name: str) -> None:
    losses, weights = train(name, DEVICE, **OPTIONS[name])
    expected_losses, expected = train(name, "cpu", **OPTIONS[name])
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert losses[-1] < losses[0]


def test_galore_trains() -> None:
    """Its bases come from a decomposition, which is another one on each device."""
    losses, weights = train("GaLore", DEVICE, **OPTIONS["GaLore"])
    expected, _ = train("GaLore", "cpu", **OPTIONS["GaLore"])
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("options", GRASS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_of_a_layer(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Against fp64, as shares of the norm."""
    layer = nn.Linear(256, 384, dtype=dtype, device=DEVICE)
    x = torch.randn(512, 256, dtype=dtype, device=DEVICE, requires_grad=True)
    grad_y = torch.randn(512, 384, dtype=dtype, device=DEVICE)
    weight = layer.weight.detach().double()
    model = nn.Sequential(layer)
    Grass(model, density=0.25, target_modules=["0"], **options)
    y = model(x)
    y.backward(grad_y)
    compact: Any = model[0]
    full = grad_y.double().T @ x.detach().double()
    selected = full[:, compact.index] if options["side"] == "columns" else full[compact.index]

    def error(found: Tensor | None, wanted: Tensor) -> float:
        assert found is not None
        return float((found.detach().double() - wanted).norm() / wanted.norm())

    assert error(compact.compact.grad, selected) < tolerance
    assert error(x.grad, grad_y.double() @ weight) < tolerance
    assert error(y, x.detach().double() @ weight.T + compact.bias.double()) < tolerance


@pytest.mark.parametrize("options", GRASS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_and_refresh(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A step changes the selected entries and no others, and a refresh changes none."""
    model = build().to(DEVICE, dtype=dtype)
    optimizer = Grass(
        model, lr=1e-2, weight_decay=0.0, density=0.25, refresh_interval=None, target_modules=["*.0"], **options
    )
    dim = 1 if options["side"] == "columns" else 0
    for step in range(3):
        before = [layer.module.weight.detach().clone() for layer in optimizer.layers]
        x, y = (part.to(DEVICE, dtype=dtype) for part in data(step))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, old in zip(optimizer.layers, before, strict=True):
            module: Any = layer.module
            new, index = module.weight.detach(), module.index
            assert torch.equal(new.index_select(dim, index), module.compact.detach())
            assert not torch.equal(new, old)
            assert torch.equal(new.index_fill(dim, index, 0), old.index_fill(dim, index, 0))
        folded = copy.deepcopy(model.state_dict())
        optimizer.refresh()
        assert all(map(torch.equal, model.state_dict().values(), folded.values()))


def test_state_is_on_the_gpu_and_comes_back() -> None:
    """Saved after three steps and loaded into a fresh pair, training goes on with the same bits."""

    def steps(model: nn.Module, optimizer: Any, numbers: range) -> list[float]:
        losses = []
        for step in numbers:
            x, y = (part.to(DEVICE) for part in data(step))
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def start() -> tuple[nn.Module, Any]:
        model = build().to(DEVICE)
        return model, Grass(model, lr=1e-2, target_modules=["*.0"], **OPTIONS["Grass"])

    model, optimizer = start()
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = steps(model, optimizer, range(3, 6))
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert moments
    assert {value.device.type for value in moments} == {DEVICE}
    other, other_optimizer = start()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert steps(other, other_optimizer, range(3, 6)) == expected

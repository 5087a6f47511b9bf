"""Layers of other types than torch's, made compact through the registry."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.layers import registry
from narrowgauge.optimizers.layers.projected_linear import ProjectedLinear
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear


class Doubled(nn.Linear):
    """``y = 2 (x W^T + b)``."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class SelectedDoubled(SelectedLinear):
    plain: ClassVar[type[nn.Module]] = Doubled

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class ProjectedDoubled(ProjectedLinear):
    plain: ClassVar[type[nn.Module]] = Doubled

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    registry.register(Doubled, selected=SelectedDoubled.convert, projected=ProjectedDoubled.convert)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Doubled(8, 8), nn.Tanh(), Doubled(8, 4)).double()


def step(layers: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    layers(torch.randn(16, 8, generator=generator, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_registered_type_trains_its_selection_as_adamw_trains_all(side: Any) -> None:
    dense, own = model(), model()
    optimizer = Grass(
        own, lr=1e-2, density=0.5, side=side, target_modules=["*"], refresh_interval=None, weight_decay=0.1
    )
    step(own, optimizer)
    step(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1))
    start = model()
    for layer in optimizer.layers:
        assert type(layer.module) is SelectedDoubled
        name, index, dim = f"{layer.name}.weight", layer.module.selected(), layer.module.dim
        expected = start.get_parameter(name).detach().clone()
        trained = dense.get_parameter(name).detach()
        expected.index_copy_(dim, index, trained.index_select(dim, index))
        torch.testing.assert_close(layer.module.weight, expected, rtol=0, atol=1e-14)
    optimizer.layers[0].module.revert()
    assert type(own[0]) is Doubled


@pytest.mark.usefixtures("doubled")
def test_a_registered_type_trains_its_projection() -> None:
    own = model()
    optimizer = GaLore(own, lr=1e-2, rank=3, target_modules=["*"], refresh_interval=None, weight_decay=0.0)
    module = optimizer.layers[0].module
    assert isinstance(module, ProjectedDoubled)
    assert module.right is not None
    basis, before = module.right.clone(), module.weight.clone()
    step(own, optimizer)
    # Adam's first step is the rate in every coordinate of the subspace, times the scale.
    change = (module.weight - before) @ basis
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.25e-2), rtol=1e-5, atol=0)


def test_a_type_that_is_not_registered_stays_dense() -> None:
    with pytest.raises(ValueError, match=r"model has no nn\.Linear"):
        Grass(model(), density=0.5, target_modules=["*"])

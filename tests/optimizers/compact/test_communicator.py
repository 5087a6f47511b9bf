"""Which process ranks a layer's statistics are averaged over."""

import pytest
import torch
from torch import Tensor

from narrowgauge.engine.config.optimizer_params import make_optimizer
from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.compact.backend import LocalBackend
from narrowgauge.optimizers.galore.options import GaLoreOptions
from narrowgauge.optimizers.grass.options import GrassOptions
from tests.support.models import tiny, token_batch

SCALE = {"attention": 2.0, "experts": 4.0}


class Recorded:
    """A group whose other ranks brought as much again, ``scale`` times in all, per rank."""

    rank, size = 0, 2

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.averaged: list[int] = []
        self.broadcast: list[int] = []

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2.0 * self.scale)

    def average_(self, tensor: Tensor) -> Tensor:
        self.averaged.append(tensor.numel())
        return tensor.mul_(self.scale)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        self.broadcast.append(tensor.numel())
        return tensor


def group_of(name: str) -> str:
    return "experts" if name.endswith(("up", "down")) else "attention"


@pytest.mark.parametrize("optimizer_type", [Grass, GaLore])
def test_each_layer_is_reduced_over_its_own_group(optimizer_type: type[Grass] | type[GaLore]) -> None:
    """Experts share gradients with other ranks than the attention does: here 4 times and 2 times what this rank has."""
    groups = {name: Recorded(scale) for name, scale in SCALE.items()}
    model = tiny(dtype=torch.float64)
    backend = LocalBackend(lambda name: groups[group_of(name)])
    if optimizer_type is Grass:
        grass = GrassOptions(rank=3, selection="top", statistics="exact", refresh_interval=1, lr=0.0)
        optimizer = make_optimizer("Grass", model, grass, backend)
    else:
        galore = GaLoreOptions(rank=3, projector="svd", refresh_interval=1, lr=0.0)
        optimizer = make_optimizer("GaLore", model, galore, backend)
    model(token_batch(0, 4)).backward()
    optimizer.step()
    shapes = {layer.name: layer.module.weight_shape for layer in optimizer.layers}
    for kind, group in groups.items():
        own = [shape for name, shape in shapes.items() if group_of(name) == kind]
        assert group.averaged == [m * n for m, n in own]
        if optimizer_type is Grass:
            # The norms of all columns of the group's layers, in one message.
            assert group.broadcast == [sum(n for _, n in own)]
        else:
            assert group.broadcast == [3 * min(shape) for shape in own]


def test_the_full_norm_counts_each_layer_by_its_group() -> None:
    from narrowgauge.optimizers import CompactOptimizer, FullNorm

    def norm_with(scales: dict[str, float]) -> float:
        groups = {name: Recorded(scale) for name, scale in scales.items()}
        model = tiny(dtype=torch.float64)
        backend = LocalBackend(lambda name: groups[group_of(name)])
        optimizer = make_optimizer("Grass", model, GrassOptions(rank=3), backend)
        assert isinstance(optimizer, CompactOptimizer)
        norm = FullNorm(optimizer, sketch_size=64)
        model(token_batch(0, 4)).backward()
        return float(norm.norm())

    nothing = norm_with({"attention": 0.0, "experts": 0.0})
    attention = norm_with({"attention": 1.0, "experts": 0.0})
    experts = norm_with({"attention": 0.0, "experts": 1.0})
    expected = 4.0 * (attention**2 - nothing**2) + 16.0 * (experts**2 - nothing**2) + nothing**2
    assert norm_with(SCALE) == pytest.approx(expected**0.5, rel=1e-9)

"""Stochastic rounding to bf16: unbiased, equal for any sharding, and keeping what rounding to nearest would lose."""

import torch

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.numerics.rounding import decay_, stochastic_round_
from tests.support.models import tiny, token_batch


def rounded(source: torch.Tensor, seed: int = 1, offset: int = 0) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    stochastic_round_(target, source, seed=seed, offset=offset)
    return target


def test_is_one_of_the_two_neighbours_with_probability_by_distance() -> None:
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.0, 0.125, 0.5, 0.9):
        count = 200_000
        found = rounded(torch.full((count,), low + share * (high - low))).float()
        assert set(found.tolist()) <= {low, high}
        mean = float((found == high).double().mean())
        assert abs(mean - share) < 4 * (0.25 / count) ** 0.5 + 2**-15


def test_mean_over_seeds_is_the_value() -> None:
    torch.manual_seed(0)
    source = torch.randn(2000) * torch.logspace(-8, 8, 2000)
    total = sum(rounded(source, seed).double() for seed in range(400))
    assert isinstance(total, torch.Tensor)
    error = (total / 400 - source.double()).abs() / source.double().abs()
    assert float(error.mean()) < 2**-8 / 400**0.5


def test_a_shard_rounds_as_the_whole() -> None:
    torch.manual_seed(0)
    source = torch.randn(1001)
    whole = rounded(source)
    parts = [rounded(source[a:b], offset=a) for a, b in ((0, 300), (300, 301), (301, 1001))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(rounded(source, seed=2), whole)


def test_values_of_bf16_and_special_values_are_kept() -> None:
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(exact.float()), exact)
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 3.3895e38])
    assert torch.equal(rounded(special)[:4], special[:4].bfloat16())
    assert torch.isnan(rounded(torch.tensor([float("nan")]))).all()


def test_decay_of_unselected_entries_does_not_vanish_in_bf16() -> None:
    """Step by step a factor of 1 - 1e-4 changes no bf16 number at all; accumulated and rounded stochastically it is
    not lost.
    """
    weight = torch.full((100_000,), 0.75, dtype=torch.bfloat16)
    step_by_step = weight.clone()
    for _ in range(50):
        step_by_step.mul_(1 - 1e-4)
    assert torch.equal(step_by_step, weight)
    for interval in range(10):
        decay_(weight, (1 - 1e-4) ** 50, seed=interval)
    assert abs(float(weight.double().mean()) / (0.75 * (1 - 1e-4) ** 500) - 1) < 1e-3


def test_a_bf16_model_trains_with_decay_of_all_entries() -> None:
    model = tiny(dtype=torch.bfloat16)
    optimizer = Grass(model, lr=1e-2, density=0.3, refresh_interval=5, weight_decay=0.1, decay="all")
    layer = optimizer.layers[0].module
    never = torch.ones(20, dtype=torch.bool)
    before = layer.weight.detach().double()
    for step in range(10):
        never[layer.selected()] = False
        model(token_batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 3 < int(never.sum()) < 20
    shrunk = float(layer.weight.detach().double()[:, never].abs().sum() / before[:, never].abs().sum())
    assert abs(shrunk - (1 - 1e-3) ** 10) < 1e-3

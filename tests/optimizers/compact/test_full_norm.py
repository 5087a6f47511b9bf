"""The norm of the full gradient, estimated where only compact gradients are formed."""

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from narrowgauge.optimizers import FullNorm, GaLore, Grass
from narrowgauge.optimizers.compact.backend import LocalBackend
from tests.support.models import TinyTransformer, tiny, token_batch
from tests.support.ranks import RankPool

MAKERS: dict[str, Any] = {
    "columns": lambda model: Grass(model, lr=1e-2, density=0.3, refresh_interval=3),
    "rows-top": lambda model: Grass(model, lr=1e-2, density=0.3, refresh_interval=3, side="rows", selection="top"),
    "columns-top": lambda model: Grass(model, lr=1e-2, density=0.3, refresh_interval=2, selection="top"),
    "replacement-exact": lambda model: Grass(
        model, lr=1e-2, density=0.3, refresh_interval=3, selection="multinomial_replacement", statistics="exact"
    ),
    "galore": lambda model: GaLore(model, lr=1e-2, rank=4, refresh_interval=3),
    "galore-svd": lambda model: GaLore(model, lr=1e-2, rank=4, refresh_interval=3, projector="svd"),
}


def full_norm(model: TinyTransformer, step: int) -> float:
    """The norm of the whole gradient of a plain model with the weights that ``model`` has."""
    plain = tiny(dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    for micro_batch in token_batch(step, 8).chunk(2):
        (plain(micro_batch) / 2).backward()
    return float(torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_is_exact_with_as_many_directions_as_columns(make: Any) -> None:
    """Over steps with and without the optimizer's own statistics; those have fewer directions and may estimate."""
    model = tiny(dtype=torch.float64)
    optimizer = make(model)
    norm = FullNorm(optimizer, sketch_size=33)
    exact = 0
    for step in range(8):
        wanted = full_norm(model, step)
        for micro_batch in token_batch(step, 8).chunk(2):
            (model(micro_batch) / 2).backward()
        found = float(norm.norm())
        assert found == pytest.approx(wanted, rel=0.35)
        exact += abs(found / wanted - 1) < 1e-6
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_refreshes >= 2
    assert exact >= 4


@pytest.mark.slow
def test_few_directions_are_right_on_average() -> None:
    squares = []
    for seed in range(60):
        model = tiny(dtype=torch.float64)
        optimizer = Grass(model, density=0.3, seed=seed)
        norm = FullNorm(optimizer, sketch_size=3)
        wanted = full_norm(model, 0)
        for micro_batch in token_batch(0, 8).chunk(2):
            (model(micro_batch) / 2).backward()
        squares.append((float(norm.norm()) / wanted) ** 2)
    mean = sum(squares) / len(squares)
    assert abs(mean - 1) < 0.02
    assert max(squares) - min(squares) > 1e-3


def test_clips_everything_by_the_full_norm() -> None:
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, density=0.3)
    norm = FullNorm(optimizer, sketch_size=33)
    wanted = full_norm(model, 0)
    for micro_batch in token_batch(0, 8).chunk(2):
        (model(micro_batch) / 2).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    compact = torch.stack([grad.norm() for grad in before]).norm()
    assert float(compact) < 0.99 * wanted
    assert float(norm.clip_(0.1)) == pytest.approx(wanted, rel=1e-6)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * 0.1 / wanted, rtol=1e-5, atol=1e-12)
    assert norm.numbers_reduced == sum(
        layer.module.weight_shape[0] * layer.module.weight_shape[1] for layer in optimizer.layers
    )


def norms_of_ranks(steps: int) -> list[float]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, lr=1e-2, density=0.3, refresh_interval=3, selection="top")
    norm = FullNorm(optimizer, sketch_size=5)
    wrapped = DistributedDataParallel(model)
    found = []
    for step in range(steps):
        wrapped(token_batch(step, 8).chunk(size)[rank]).backward()
        found.append(float(norm.clip_(0.3)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_two_ranks_estimate_the_mean_gradients_norm(two_ranks: RankPool) -> None:
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, lr=1e-2, density=0.3, refresh_interval=3, selection="top")
    norm = FullNorm(optimizer, sketch_size=5)
    wanted = []
    for step in range(7):
        model(token_batch(step, 8)).backward()
        wanted.append(float(norm.clip_(0.3)))
        optimizer.step()
        optimizer.zero_grad()
    first, second = two_ranks.run(norms_of_ranks, 7)
    assert first == second
    assert first == pytest.approx(wanted, rel=1e-9)


def test_refusals() -> None:
    optimizer = Grass(tiny(), density=0.3)
    with pytest.raises(ValueError, match="sketch_size: expected an integer of at least 1, got 0"):
        FullNorm(optimizer, sketch_size=0)
    with pytest.raises(ValueError, match="max_norm: expected a number above 0, got 0"):
        FullNorm(optimizer).clip_(0)
    with pytest.raises(ValueError, match="expected statistics 'sketch' or 'exact', got 'local'"):
        FullNorm(Grass(tiny(), density=0.3, selection="top", statistics="local"))
    optimizer.defer_to_engine(LocalBackend())
    with pytest.raises(ValueError, match="belongs to an engine"):
        FullNorm(optimizer)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_that_a_scaler_has_unscaled_count_as_they_are(name: str) -> None:
    """The sketches kept the loss scale that ``GradScaler.unscale_`` takes from the gradients: clipping went 34,000
    times too far.
    """
    model = tiny(dtype=torch.float64)
    optimizer = MAKERS[name](model)
    norm = FullNorm(optimizer, sketch_size=33)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for step in range(4):
        wanted = full_norm(model, step)
        for micro_batch in token_batch(step, 8).chunk(2):
            scaler.scale(model(micro_batch) / 2).backward()
        scaled = float(norm.norm())
        scaler.unscale_(optimizer)
        found = float(norm.clip_(0.1))
        assert scaled == pytest.approx(65536.0 * found, rel=1e-9)
        assert found == pytest.approx(wanted, rel=0.35)
        scaler.step(optimizer)
        scaler.update()
        # Zeros instead of None: what was observed is forgotten all the same.
        optimizer.zero_grad(set_to_none=step % 2 == 0)

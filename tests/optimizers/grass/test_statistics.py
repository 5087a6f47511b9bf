"""Selections by the gradient's norms: each rule step by step against a reference, and the norms themselves."""

import argparse
import inspect
import io
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.grass.norms import NormStatistics
from tests.support.models import is_matrix, tiny, token_batch, train_steps
from tests.support.ranks import RankPool
from tests.support.references.selected import SelectedReference, projection, projections

INTERVAL, STEPS = 4, 18
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5, "seed": 3}
RULES = ["top", "multinomial", "multinomial_replacement"]
SIDES = ["columns", "rows"]


def norms_of(model: nn.Module, side: str) -> dict[str, Tensor]:
    """Of the columns or rows of the full gradients."""
    norms: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if is_matrix(name):
            assert parameter.grad is not None
            norms[name] = parameter.grad.norm(dim=0 if side == "columns" else 1)
    return norms


def train_against_reference(
    rank: int, world_size: int, *, rule: str, side: str, statistics: str, wrap: bool = False
) -> dict[str, float]:
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    options = {**OPTIONS, "density": 0.3, "side": side, "selection": rule, "statistics": statistics}
    optimizer = Grass(model, refresh_interval=INTERVAL, **options)
    found = projections(optimizer)
    reference = SelectedReference(
        twin,
        found,
        dict.fromkeys(found, side),
        lr=OPTIONS["lr"],
        matrix_lr_scale=OPTIONS["matrix_lr_scale"],
        weight_decay=OPTIONS["weight_decay"],
        decays_whole_weight=rule == "multinomial_replacement",
    )
    trained = DistributedDataParallel(model) if wrap else model
    result = {"loss": 0.0, "weights": 0.0, "top": 1.0, "repeats": 0.0, "refreshes": 0.0}
    for step in range(STEPS):
        for micro_batch in token_batch(step, 8).chunk(2):
            own = micro_batch.chunk(world_size)[rank]
            loss = trained(own) / 2
            loss.backward()
            expected = twin(micro_batch) / 2
            expected.backward()
            mean = loss.detach().clone()
            if world_size > 1:
                dist.all_reduce(mean)
            result["loss"] = max(result["loss"], abs(float(mean) / world_size - float(expected.detach())))
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        if optimizer.num_refreshes > result["refreshes"]:
            result["refreshes"] = optimizer.num_refreshes
            assert (step + 1) % INTERVAL == 0
            norms, found = norms_of(twin, side), projections(optimizer)
            for name, p in found.items():
                chosen = p.sum(1).nonzero().squeeze(1)
                result["repeats"] += p.shape[1] - chosen.numel()
                if rule == "top":
                    largest = norms[name].topk(p.shape[1]).indices
                    overlap = float(torch.isin(chosen, largest).double().mean())
                    result["top"] = min(result["top"], overlap)
                if rule == "multinomial_replacement" and statistics == "exact":
                    q = norms[name]
                    rho = (p.shape[1] * q / q.sum()).rsqrt()
                    torch.testing.assert_close(p.max(1).values[chosen], rho[chosen], rtol=1e-10, atol=0.0)
            reference.select(found)
        twin.zero_grad()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        result["weights"] = max(result["weights"], float((value - wanted[name]).norm() / wanted[name].norm()))
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", SIDES)
def test_each_rule_equals_the_reference_in_fp64(rule: str, side: str) -> None:
    """With exact statistics; the largest norms and rho are those of the gradient of the step before."""
    result = train_against_reference(0, 1, rule=rule, side=side, statistics="exact")
    assert result["refreshes"] == 4
    assert result["top"] == 1.0
    assert (result["repeats"] > 0) == (rule == "multinomial_replacement")
    assert result["loss"] < 1e-12
    assert result["weights"] < 1e-12


def ddp_against_reference(rule: str, side: str, statistics: str) -> dict[str, float]:
    options = {"rule": rule, "side": side, "statistics": statistics}
    return train_against_reference(dist.get_rank(), dist.get_world_size(), wrap=True, **options)


@pytest.mark.parametrize(
    ("rule", "side", "statistics"),
    [
        ("top", "columns", "exact"),
        ("multinomial", "rows", "sketch"),
        ("multinomial_replacement", "columns", "exact"),
        ("multinomial_replacement", "rows", "sketch"),
        ("top", "rows", "local"),
    ],
)
def test_ddp_on_two_ranks_equals_the_reference_in_fp64(
    two_ranks: RankPool, rule: str, side: str, statistics: str
) -> None:
    for result in two_ranks.run(ddp_against_reference, rule, side, statistics):
        assert result["refreshes"] == 4
        assert result["loss"] < 1e-12
        assert result["weights"] < 1e-12
        if statistics == "exact":
            assert result["top"] == 1.0


SOURCE = inspect.getsource(argparse).encode()


def source_text(step: int) -> Tensor:
    """Bytes of the standard library, (8, 64)."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(SOURCE) - 64, (8,), generator=generator).tolist()
    return torch.tensor([list(SOURCE[start : start + 64]) for start in starts]).clamp_max(127)


SIZES: dict[str, Any] = {"width": 48, "hidden": 96, "vocab": 128, "bias": False}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = tiny(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for step in range(150):
        model(source_text(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("side", ["columns", pytest.param("rows", marks=pytest.mark.slow)])
def test_the_sketch_finds_the_largest_norms_of_a_trained_models_gradient(trained: nn.Module, side: str) -> None:
    """Of the top quarter by the exact norms, the share that 32 directions find, and how much of their energy."""
    full = tiny(**SIZES)
    full.load_state_dict(trained.state_dict())
    for micro in range(4):
        (full(source_text(1000 + micro)) / 4).backward()

    def chosen(statistics: str, size: int, seed: int) -> dict[str, Tensor]:
        model = tiny(**SIZES)
        model.load_state_dict(trained.state_dict())
        options: dict[str, Any] = {"statistics": statistics, "sketch_size": size, "shared_inputs": None, "seed": seed}
        optimizer = Grass(model, side=side, selection="top", density=0.25, refresh_interval=1, lr=0.0, **options)  # type: ignore[arg-type]
        for micro in range(4):
            (model(source_text(1000 + micro)) / 4).backward()
        optimizer.step()
        return {layer.name: layer.module.subspace()["index"] for layer in optimizer.layers}

    exact = chosen("exact", 1, 0)

    def compare(size: int) -> tuple[float, float]:
        """The share of entries, and of squared norms, of the exact choice: the mean over layers and three seeds."""
        shares, energies = [], []
        for seed in range(3):
            for name, index in chosen("sketch", size, seed).items():
                grad = full.get_parameter(f"{name}.weight").grad
                assert grad is not None
                squares = grad.square().sum(0 if side == "columns" else 1)
                assert torch.equal(exact[name], squares.topk(index.numel()).indices.sort().values)
                shares.append(float(torch.isin(index, exact[name]).double().mean()))
                energies.append(float(squares[index].sum() / squares[exact[name]].sum()))
        return sum(shares) / len(shares), sum(energies) / len(energies)

    few, default, all_directions = compare(4), compare(32), compare(96)
    assert default[0] >= 0.9
    assert default[1] >= 0.99
    assert few[0] < default[0]
    assert all_directions == (1.0, 1.0)


def observed_norms(rank: int, world_size: int, num_micro: int, statistics: str, side: str) -> dict[str, Tensor]:
    """Squared norms of one batch of twelve, cut into micro-batches and over ranks."""
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, side=cast(Any, side), density=0.3, shared_inputs=None)
    observed = NormStatistics(cast(Any, statistics), 32)
    observed.start(optimizer.layers, seed=0)
    for micro_batch in token_batch(0, 12).chunk(num_micro):
        (model(micro_batch.chunk(world_size)[rank]) / num_micro).backward()
    found = observed.finish(optimizer.layers, optimizer.backend)
    return {layer.name: squares for layer, squares in zip(optimizer.layers, found, strict=True)}


def norms_on_this_rank(num_micro: int, statistics: str, side: str) -> dict[str, Tensor]:
    return observed_norms(dist.get_rank(), dist.get_world_size(), num_micro, statistics, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_norms_do_not_depend_on_the_split_into_micro_batches_and_ranks(
    two_ranks: RankPool, side: str, statistics: str
) -> None:
    whole = observed_norms(0, 1, 1, statistics, side)
    for num_micro in (2, 3):
        for name, squares in observed_norms(0, 1, num_micro, statistics, side).items():
            torch.testing.assert_close(squares, whole[name], rtol=1e-11, atol=0.0)
    first, second = two_ranks.run(norms_on_this_rank, 3, statistics, side)
    for name, squares in first.items():
        assert torch.equal(squares, second[name])
        torch.testing.assert_close(squares, whole[name], rtol=1e-11, atol=0.0)
    if statistics == "exact":
        model = tiny(dtype=torch.float64)
        model(token_batch(0, 12)).backward()
        for name, squares in whole.items():
            grad = model.get_parameter(f"{name}.weight").grad
            assert grad is not None
            torch.testing.assert_close(squares, grad.square().sum(0 if side == "columns" else 1), rtol=1e-11, atol=0.0)


def test_local_norms_are_the_first_ranks(two_ranks: RankPool) -> None:
    model = tiny(dtype=torch.float64)
    model(token_batch(0, 12).chunk(2)[0]).backward()
    for found in two_ranks.run(norms_on_this_rank, 1, "local", "rows"):
        for name, squares in found.items():
            grad = model.get_parameter(f"{name}.weight").grad
            assert grad is not None
            torch.testing.assert_close(squares, grad.square().sum(1), rtol=1e-11, atol=0.0)


def indices_in_bf16(rule: str, side: str) -> list[dict[str, Tensor]]:
    model = tiny(dtype=torch.bfloat16)
    optimizer = Grass(model, density=0.3, refresh_interval=2, side=side, selection=rule, lr=1e-2)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel(model)
    found = []
    for step in range(6):
        wrapped(token_batch(step, 8).chunk(2)[dist.get_rank()]).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({f"{layer.name}.{k}": v for layer in optimizer.layers for k, v in layer.module.subspace().items()})
        found[-1] = {name: value.clone() for name, value in found[-1].items()}
    return found


@pytest.mark.parametrize("rule", RULES)
def test_ranks_choose_alike_bit_for_bit_in_bf16(two_ranks: RankPool, rule: str) -> None:
    first, second = two_ranks.run(indices_in_bf16, rule, "columns")
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.equal(value, first[5][name]) for name, value in first[0].items())


@pytest.mark.cover(1)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("saved_after", [2, 3, 4])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(rule: str, saved_after: int) -> None:
    """Also right before a step that is observed (3): the probe has to start anew."""
    options: dict[str, Any] = {**OPTIONS, "density": 0.3, "selection": rule, "refresh_interval": 4}
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, **options)
    train_steps(model, optimizer, 0, saved_after)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    expected = train_steps(model, optimizer, saved_after, 14)
    resumed = tiny(seed=9, dtype=torch.float64)
    other = Grass(resumed, **options)
    # Leaves a probe open that belongs to another step.
    train_steps(resumed, other, 0, 3)
    resumed.load_state_dict(states["model"])
    other.load_state_dict(states["optimizer"])
    assert [layer.module.probe is not None for layer in other.layers] == [saved_after == 3] * len(other.layers)
    assert train_steps(resumed, other, saved_after, 14) == expected
    assert torch.equal(projection(other.layers[0].module), projection(optimizer.layers[0].module))


def test_a_gradient_that_was_thrown_away_is_not_observed() -> None:
    """A loss scaler skips a step whose gradients are not finite and zeroes them: the norms are the next step's."""
    options: dict[str, Any] = {"density": 0.3, "selection": "top", "statistics": "exact", "refresh_interval": 1}
    chosen = []
    for skips in (False, True):
        model = tiny()
        optimizer = Grass(model, **options)
        if skips:
            (model(token_batch(5, 4)) * float("inf")).backward()
            optimizer.zero_grad()
        train_steps(model, optimizer, 0, 1)
        chosen.append([layer.module.subspace()["index"] for layer in optimizer.layers])
    assert all(torch.equal(one, other) for one, other in zip(*chosen, strict=True))


def test_observing_leaves_the_gradients_as_they_are_and_forms_no_full_gradient_between() -> None:
    options: dict[str, Any] = {"density": 0.3, "refresh_interval": 2, "lr": 1e-2, "shared_inputs": None}
    gradients = []
    for selection in ("uniform", "top"):
        model = tiny()
        optimizer = Grass(model, selection=selection, **options)  # type: ignore[arg-type]
        train_steps(model, optimizer, 0, 1)
        assert [layer.module.probe is None for layer in optimizer.layers] == [selection == "uniform"] * 12
        model(token_batch(1, 4)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        assert all(layer.module.probe is None for layer in optimizer.layers)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

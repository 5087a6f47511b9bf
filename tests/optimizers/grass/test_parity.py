"""Grass in plain PyTorch and under DDP, step by step against a second statement of it that forms the full gradient."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from narrowgauge.optimizers import OPTIMIZERS, CompactLinear, Grass
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear
from tests.support.cases import cases
from tests.support.models import TinyTransformer, is_matrix, tiny, token_batch, train_steps
from tests.support.ranks import RankPool
from tests.support.references.grass import ReferenceGrass

STEPS, INTERVAL, ACCUMULATION, CLIP = 20, 7, 2, 0.2
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": INTERVAL,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
}


def train_against_reference(
    rank: int, world_size: int, *, wrap: bool, block: bool = False, **options: Any
) -> tuple[float, float, int]:
    """Largest loss difference, largest relative weight difference, and the number of refreshes, over 20 steps."""
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    selection = "block" if block else "uniform"
    optimizer = Grass(model, **OPTIONS, selection=selection, **options)
    reference = ReferenceGrass(twin, is_matrix=is_matrix, block=block, **OPTIONS, **options)
    trained = DistributedDataParallel(model) if wrap else model
    loss_error = 0.0
    for step in range(STEPS):
        for micro_batch in token_batch(step, 8).chunk(ACCUMULATION):
            own = micro_batch.chunk(world_size)[rank]
            loss = trained(own) / ACCUMULATION
            loss.backward()
            expected = twin(micro_batch) / ACCUMULATION
            expected.backward()
            mean = loss.detach().clone()
            if world_size > 1:
                dist.all_reduce(mean)
            loss_error = max(loss_error, abs(float(mean) / world_size - float(expected.detach())))
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert reference.step(CLIP) > CLIP, "clipping must take part"
        twin.zero_grad()
    found, wanted = model.state_dict(), twin.state_dict()
    assert found.keys() == wanted.keys()
    weight_error = max(float((found[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)
    return loss_error, weight_error, optimizer.num_refreshes


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("decay", ["active", "all"])
@pytest.mark.parametrize("block", [False, True])
def test_equals_reference_in_fp64(side: str, decay: str, block: bool) -> None:
    loss_error, weight_error, refreshes = train_against_reference(0, 1, wrap=False, side=side, decay=decay, block=block)
    assert refreshes == 2
    assert loss_error < 1e-12
    assert weight_error < 1e-12


def ddp_against_reference(side: str, decay: str) -> tuple[float, float, int]:
    return train_against_reference(dist.get_rank(), dist.get_world_size(), wrap=True, side=side, decay=decay)


@pytest.mark.parametrize(("side", "decay"), [("columns", "active"), ("columns", "all"), ("rows", "active")])
def test_ddp_on_two_ranks_equals_reference_in_fp64(two_ranks: RankPool, side: str, decay: str) -> None:
    for loss_error, weight_error, refreshes in two_ranks.run(ddp_against_reference, side, decay):
        assert refreshes == 2
        assert loss_error < 1e-12
        assert weight_error < 1e-12


def test_density_one_equals_torch_adamw() -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Grass(model, density=1.0, refresh_interval=5, **options)
    assert not any(isinstance(m, CompactLinear) for m in model.modules())
    assert train_steps(model, optimizer, 0, 15) == train_steps(
        twin, torch.optim.AdamW(twin.parameters(), **options), 0, 15
    )


def test_rank_of_all_but_one_column_is_almost_adamw_and_of_all_is_adamw_within_an_interval() -> None:
    """The compact path itself at full coverage: with every column but one selected, only that column may differ."""
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Grass(model, rank=19, refresh_interval=None, lr=1e-2, target_modules=["*.q"])
    train_steps(model, optimizer, 0, 1)
    train_steps(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2), 0, 1)
    layer, dense = model.get_submodule("blocks.0.q"), twin.get_parameter("blocks.0.q.weight")
    assert isinstance(layer, SelectedLinear)
    left_out = sorted(set(range(20)) - set(layer.index.tolist()))
    assert len(left_out) == 1
    difference = (layer.weight - dense).detach().abs()
    assert float(difference[:, layer.index].max()) < 1e-15
    assert float(difference[:, left_out].min()) > 1e-4


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_unselected_entries_stay_bit_identical(side: str) -> None:
    model = tiny()
    optimizer = Grass(model, lr=1e-2, density=0.25, side=side, refresh_interval=None, weight_decay=0.1)  # type: ignore[arg-type]
    before = {layer.name: layer.module.weight.clone() for layer in optimizer.layers}
    train_steps(model, optimizer, 0, 5)
    for layer in optimizer.layers:
        module = layer.module
        untouched = torch.ones(module.weight_shape[module.dim], dtype=torch.bool)
        untouched[module.selected()] = False
        assert torch.equal(
            module.weight[:, untouched] if side == "columns" else module.weight[untouched],
            before[layer.name][:, untouched] if side == "columns" else before[layer.name][untouched],
        )
        assert not torch.equal(module.weight, before[layer.name])


def test_three_groups_have_their_own_rates_and_decay() -> None:
    """Groups by name, each cut into its compact and its dense part, against the reference with the same rules."""
    specs = [
        {"params": ["*norm*", "*.bias"], "weight_decay": 0.0},
        {"params": ["embed.weight", "blocks.1.*"], "lr": 3e-2},
    ]

    def options_of(name: str) -> dict[str, float]:
        if "norm" in name or name.endswith(".bias"):
            return {"weight_decay": 0.0}
        return {"lr": 3e-2} if name == "embed.weight" or name.startswith("blocks.1.") else {}

    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Grass(model, param_groups=specs, **OPTIONS)
    assert [(g["kind"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("compact", 5e-3, 0.1),
        ("compact", 1.5e-2, 0.1),
        ("dense", 1e-2, 0.1),
        ("dense", 1e-2, 0.0),
        ("dense", 3e-2, 0.1),
    ]
    reference = ReferenceGrass(twin, is_matrix=is_matrix, side="columns", options_of=options_of, **OPTIONS)
    for step in range(16):
        for trained in (model, twin):
            trained(token_batch(step, 4)).backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        twin.zero_grad()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        assert float((value - wanted[name]).norm() / wanted[name].norm()) < 1e-12, name


def test_indices_depend_on_the_seed_and_change_at_each_refresh() -> None:
    def indices(seed: int) -> list[list[int]]:
        model = tiny()
        optimizer = Grass(model, density=0.3, refresh_interval=2, seed=seed)
        found = []
        for step in range(6):
            if step % 2 == 0:
                found.append(optimizer.layers[0].module.selected().tolist())
            train_steps(model, optimizer, step, step + 1)
        return found

    assert indices(0) == indices(0)
    assert indices(0) != indices(1)
    assert len({tuple(index) for index in indices(0)}) == 3


def test_moments_and_step_start_again_at_a_refresh_and_only_there() -> None:
    model = tiny()
    optimizer = Grass(model, density=0.3, refresh_interval=4, lr=1e-3)

    def counts(kind: str) -> set[float]:
        return {
            float(optimizer.state[p]["step"]) for g in optimizer.param_groups if g["kind"] == kind for p in g["params"]
        }

    for step, (compact, dense) in enumerate([(1, 1), (2, 2), (3, 3), (0, 4), (1, 5)]):
        train_steps(model, optimizer, step, step + 1)
        assert counts("compact") == {compact}
        assert counts("dense") == {dense}


def test_first_update_after_a_refresh_is_the_learning_rate() -> None:
    """Keeping the step count while zeroing the moments made this update several times too large."""
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, density=0.3, refresh_interval=10, lr=1e-3, weight_decay=0.0, eps=1e-30)
    train_steps(model, optimizer, 0, 10)
    before = {layer.name: layer.module.compact.clone() for layer in optimizer.layers}
    train_steps(model, optimizer, 10, 11)
    for layer in optimizer.layers:
        update = (layer.module.compact - before[layer.name]).detach().abs()
        moved = update[update > 0]
        assert float((moved - 1e-3).abs().max()) < 1e-12


def test_other_parameters_of_a_model_without_blocks() -> None:
    """A pattern may name any linear, also outside blocks, and biases are trained whole."""
    model = TinyTransformer()
    twin = copy.deepcopy(model)
    optimizer = Grass(model, rank=5, target_modules=["head"], lr=1e-2)
    assert [layer.name for layer in optimizer.layers] == ["head"]
    train_steps(model, optimizer, 0, 1)
    assert not torch.equal(model.get_parameter("blocks.0.up.bias"), twin.get_parameter("blocks.0.up.bias"))


def train_in_a_join(name: str, interval: int | None) -> tuple[str, bool]:
    """Rank 1 has one batch less."""
    model = tiny()
    options: dict[str, Any] = {"lr": 1e-2, "refresh_interval": interval}
    if name != "Apollo":
        options["density"] = 0.3
    else:
        options["rank"] = 4
    optimizer = OPTIMIZERS[name](model, **options)
    trained = DistributedDataParallel(model)
    said = ""
    try:
        with Join([trained]):
            for step in range(3 - dist.get_rank()):
                trained(token_batch(step, 2)).backward()
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        said = str(error)
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    others = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(others, weights)
    return said, torch.equal(*others)


@pytest.mark.parametrize(
    "name", cases({name: (name,) for name in ("Grass", "GaLore", "Frugal", "Apollo")}, slow={"GaLore", "Apollo"})
)
def test_ranks_that_step_less_often_than_others_are_refused(two_ranks: RankPool, name: str) -> None:
    """The rank with fewer batches kept its subspace, the other changed it: their weights differed for good."""
    for said, same in two_ranks.run(train_in_a_join, name, 2):
        assert said.startswith(f"{name}.step: expected as many steps on every process rank, got Distributed")
        assert same


def test_a_subspace_that_never_changes_may_be_joined(two_ranks: RankPool) -> None:
    assert two_ranks.run(train_in_a_join, "Grass", None) == [("", True)] * 2

"""Saving and resuming Grass in plain PyTorch."""

import io
from typing import Any

import pytest
import torch

from narrowgauge.optimizers import Grass
from tests.support.models import tiny, train_steps

OPTIONS: dict[str, Any] = {"lr": 1e-2, "density": 0.3, "refresh_interval": 7, "weight_decay": 0.1, "decay": "all"}


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.cover(2)
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("selection", ["uniform", "block"])
@pytest.mark.parametrize("saved_after", [3, 7, 10])
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    side: str, selection: str, saved_after: int, model_first: bool
) -> None:
    """Saved in the middle of an interval, right at a refresh, and after one; loaded in either order, across later
    refreshes.
    """
    options = {**OPTIONS, "side": side, "selection": selection}
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, **options)
    train_steps(model, optimizer, 0, saved_after)
    states = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train_steps(model, optimizer, saved_after, 18)

    resumed = tiny(seed=9, dtype=torch.float64)
    resumed_optimizer = Grass(resumed, **options)
    train_steps(resumed, resumed_optimizer, 0, 2)
    loads = [
        lambda: resumed.load_state_dict(states["model"]),
        lambda: resumed_optimizer.load_state_dict(states["optimizer"]),
    ]
    for load in loads if model_first else reversed(loads):
        load()
    assert train_steps(resumed, resumed_optimizer, saved_after, 18) == expected
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


def test_a_state_with_the_waiting_decay_in_its_groups_continues_alike() -> None:
    """As it was saved once. It was dropped without a word, so that unselected entries missed an interval of decay."""
    model, resumed = tiny(dtype=torch.float64), tiny(seed=9, dtype=torch.float64)
    optimizer, again = Grass(model, **OPTIONS), Grass(resumed, **OPTIONS)
    train_steps(model, optimizer, 0, 4)
    states = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    (factor,) = set(states["optimizer"]["subspace"].pop("pending_decay").values())
    assert factor < 1.0
    for group in states["optimizer"]["param_groups"]:
        if group["kind"] == "compact":
            group["pending_decay"] = factor
    resumed.load_state_dict(states["model"])
    again.load_state_dict(states["optimizer"])
    assert train_steps(resumed, again, 4, 18) == train_steps(model, optimizer, 4, 18)
    assert all("pending_decay" not in group for group in again.param_groups)


def test_state_holds_compact_values_indices_and_moments() -> None:
    model = tiny()
    optimizer = Grass(model, **OPTIONS)
    train_steps(model, optimizer, 0, 9)
    state = optimizer.state_dict()
    assert state["subspace"]["num_steps"] == 9
    assert state["subspace"]["num_refreshes"] == 1
    layer = optimizer.layers[0]
    assert torch.equal(state["subspace"]["tensors"][f"{layer.name}.index"], layer.module.selected())
    assert torch.equal(state["subspace"]["compact"][layer.name], layer.module.compact)
    shapes = {tuple(moments["exp_avg"].shape) for moments in state["state"].values()}
    assert tuple(layer.module.compact.shape) in shapes
    assert (20, 20) not in shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.5}, "expected .* of shape \\[10\\], got \\[6\\]"),
        ({"side": "rows", "density": 0.3}, "expected side 'rows', got 'columns'"),
        ({"target_modules": ["*.q"]}, "compact layers differ"),
        ({"param_groups": [{"params": ["*norm*"], "lr": 1.0}]}, "different number of parameter groups"),
    ],
)
def test_a_state_of_another_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    model = tiny()
    optimizer = Grass(model, **OPTIONS)
    train_steps(model, optimizer, 0, 8)
    state = optimizer.state_dict()
    other = Grass(tiny(), **{**OPTIONS, **change})
    before = {layer.name: layer.module.selected().clone() for layer in other.layers}
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert all(torch.equal(layer.module.selected(), before[layer.name]) for layer in other.layers)
    assert (other.num_steps, other.num_refreshes) == (0, 0)


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = tiny()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not a state of Grass"):
        Grass(model, **OPTIONS).load_state_dict(adamw.state_dict())


def test_a_learning_rate_schedule_moves_both_kinds_of_groups() -> None:
    model = tiny()
    optimizer = Grass(model, **{**OPTIONS, "matrix_lr_scale": 0.2})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train_steps(model, optimizer, 0, 1)
    schedule.step()
    assert {g["kind"]: pytest.approx(g["lr"]) for g in optimizer.param_groups} == {"compact": 1e-3, "dense": 5e-3}


def test_step_hooks_run_once_per_step() -> None:
    """Grass adds its fold as a hook and leaves ``step`` alone; overriding it would have run users' hooks twice."""
    model = tiny()
    torch.optim.AdamW(model.parameters())
    optimizer = Grass(model, **OPTIONS)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    train_steps(model, optimizer, 0, 3)
    assert len(calls) == 3
    assert optimizer.num_steps == 3

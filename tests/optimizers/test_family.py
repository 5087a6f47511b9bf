"""What holds for all optimizers: refusals, resuming with other options, parameters without gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from narrowgauge.optimizers import OPTIMIZERS, Apollo, Frugal, GaLore, Grass, Lamb, Lars
from tests.support.models import tiny, token_batch, train_steps

MAKERS: dict[str, Any] = {
    "Grass": lambda model, **o: Grass(model, **{"density": 0.3, **o}),
    "GaLore": lambda model, **o: GaLore(model, **{"rank": 4, **o}),
    "Frugal": Frugal,
    "Apollo": lambda model, **o: Apollo(model, **{"rank": 4, **o}),
    "Lamb": Lamb,
    "Lars": lambda model, **o: Lars(model, **{"lr": 1e-2, **o}),
}
SHARDED = ["Frugal", "Apollo", "Lamb", "Lars"]
every = pytest.mark.parametrize("name", MAKERS)


def test_every_optimizer_is_here() -> None:
    assert MAKERS.keys() == OPTIMIZERS.keys()


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number of at least 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0, got -1.0"),
        ({"matrix_lr_scale": 0.0}, "matrix_lr_scale: expected a number above 0, got 0.0"),
        ({"target_modules": ["*.nothing"]}, r"target_modules: '\*.nothing' matches no nn.Linear"),
        (
            {"param_groups": [{"params": ["*"], "lr": "x"}]},
            r"param_groups\[0\].lr: expected a number of at least 0, got 'x'",
        ),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAKERS[name](tiny(), **options)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Lars"])
@pytest.mark.parametrize("betas", [(1.5, 0.9), (0.9,), 0.9])
def test_wrong_betas_are_named(name: str, betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got "):
        MAKERS[name](tiny(), betas=betas)
    with pytest.raises(ValueError, match=r"param_groups\[0\].betas: expected two numbers in \[0, 1\), got "):
        MAKERS[name](tiny(), param_groups=[{"params": ["*"], "betas": betas}])


@every
def test_a_state_of_another_optimizer_changes_nothing(name: str) -> None:
    model, other = tiny(), "Lamb" if name != "Lamb" else "Lars"
    donor = MAKERS[other](tiny())
    optimizer = MAKERS[name](model)
    train_steps(model, optimizer, 0, 1)
    with pytest.raises(ValueError, match=f"{name} state: "):
        optimizer.load_state_dict(donor.state_dict())
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("name", SHARDED)
def test_a_state_with_other_groups_changes_nothing(name: str) -> None:
    """The counter was once restored before the groups were compared."""
    model, twin = tiny(), tiny()
    donor = MAKERS[name](twin, param_groups=[{"params": ["*norm*"], "weight_decay": 0.0}])
    train_steps(twin, donor, 0, 2)
    optimizer = MAKERS[name](model)
    with pytest.raises(ValueError, match="parameter groups of"):
        optimizer.load_state_dict(donor.state_dict())
    assert optimizer.num_steps == 0


@pytest.mark.parametrize("name", SHARDED)
def test_replaced_parameters_and_late_groups_are_named(name: str) -> None:
    optimizer = MAKERS[name](tiny())
    with pytest.raises(ValueError, match="give it param_groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().view(-1) for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(RuntimeError, match="another library replaced them"):
        optimizer.step()


def test_a_block_does_not_take_a_state_whose_entries_are_scattered() -> None:
    """It once took the first entry as the start of a block and folded the others' values into its neighbours."""
    model, twin = tiny(), tiny()
    donor = Grass(model, density=0.3, lr=1e-2)
    train_steps(model, donor, 0, 2)
    twin.load_state_dict(model.state_dict())
    optimizer = Grass(twin, density=0.3, lr=1e-2, selection="block")
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected a block in .*, got scattered entries"):
        optimizer.load_state_dict(donor.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("name", ["Grass", "GaLore"])
@pytest.mark.parametrize(("saved", "own"), [("AdamW", "Adafactor"), ("AdamW", "AdamW8bit"), ("AdamW8bit", "AdamW")])
def test_a_state_of_another_base_is_refused(name: str, saved: str, own: str) -> None:
    donor, optimizer = MAKERS[name](tiny(), base=saved), MAKERS[name](tiny(), base=own)
    with pytest.raises(ValueError, match=f"expected base '{own}', got '{saved}'"):
        optimizer.load_state_dict(donor.state_dict())


def test_adafactor_does_not_go_with_scaled_selections() -> None:
    with pytest.raises(ValueError, match=r"base: expected 'AdamW' or 'AdamW8bit' with .*, got 'Adafactor'"):
        Grass(tiny(), density=0.3, selection="multinomial_replacement", base="Adafactor")


@pytest.mark.parametrize("name", ["Lamb", "Lars"])
def test_lamb_and_lars_need_no_linear(name: str) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 3, 3)
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten())
    optimizer = MAKERS[name](model, lr=0.1)
    before = convolution.weight.detach().clone()
    model(torch.ones(1, 1, 5, 5)).square().sum().backward()
    optimizer.step()
    assert float((convolution.weight.detach() - before).norm()) > 1e-5
    with pytest.raises(ValueError, match=r"no trainable nn\.Linear"):
        MAKERS[name](model, lr=0.1, matrix_lr_scale=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: GaLore(model, rank=4, lr=0.1, weight_decay=0.5),
        lambda model: GaLore(
            model, rank=4, lr=0.1, weight_decay=0.5, projector="svd", reference_compatible=True, refresh_interval=1
        ),
        lambda model: Grass(model, density=0.3, lr=0.1, weight_decay=0.5, selection="multinomial_replacement"),
        lambda model: Grass(model, density=0.3, lr=0.1, weight_decay=0.5),
        lambda model: Frugal(model, lr=0.1, weight_decay=0.5),
        lambda model: Apollo(model, lr=0.1, weight_decay=0.5, rank=4),
        lambda model: Lamb(model, lr=0.1, weight_decay=0.5),
        lambda model: Lars(model, lr=0.1, weight_decay=0.5),
    ],
)
def test_parameters_without_gradient_stay(make: Any) -> None:
    model = tiny()
    optimizer = make(model)
    unused = model.blocks[1]
    before = {name: value.clone() for name, value in unused.state_dict().items()}
    model.blocks = nn.ModuleList([model.blocks[0]])
    for step in range(3):
        model(token_batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in unused.state_dict().items())


def test_frugal_corrects_by_the_updates_since_a_refresh() -> None:
    """A block that had no gradients for some steps after a refresh begins with an update of the learning rate."""
    model = tiny(dtype=torch.float64)
    optimizer = Frugal(model, lr=1e-2, density=0.5, refresh_interval=5, weight_decay=0.0, state_free_lr_scale=0.0)
    blocks = model.blocks
    train_steps(model, optimizer, 0, 5)
    model.blocks = nn.ModuleList([blocks[0]])
    train_steps(model, optimizer, 5, 8)
    model.blocks = blocks
    weight = blocks[1].get_parameter("up.weight")
    before = weight.detach().clone()
    train_steps(model, optimizer, 8, 9)
    assert float((weight.detach() - before).abs().max()) == pytest.approx(1e-2, rel=1e-3)


def test_galore_cannot_refresh_without_an_observed_gradient() -> None:
    model = tiny()
    optimizer = GaLore(model, rank=4, refresh_interval=5)
    train_steps(model, optimizer, 0, 2)
    with pytest.raises(RuntimeError, match="was not observed"):
        optimizer.refresh()

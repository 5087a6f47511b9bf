"""FRUGAL against a second statement of it, on whole parameters and on shards that are cut anywhere."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.frugal.frugal import Frugal
from tests.support.models import is_matrix, tiny, token_batch, train_steps
from tests.support.references.frugal import ReferenceFrugal

STEPS, INTERVAL = 20, 6
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": INTERVAL,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "seed": 3,
}
SELECTIONS = ("columns", "rows", "randk", "blockwise", "svd", "random")


def rule_of(name: str, *, embeddings: str = "full", head: str = "full", norms: str = "full") -> str:
    if is_matrix(name):
        return "projected"
    return {"embed.weight": embeddings, "head.weight": head}.get(name, norms)


def against_reference(**options: Any) -> tuple[float, Frugal]:
    """Largest relative difference of the weights over 20 steps with three refreshes."""
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    options = {**OPTIONS, **options}
    optimizer = Frugal(model, **options)
    kinds = {key: options.pop(key) for key in ("embeddings", "head", "norms") if key in options}
    reference = ReferenceFrugal(twin, is_matrix=is_matrix, rule_of=lambda name: rule_of(name, **kinds), **options)
    worst = 0.0
    for step in range(STEPS):
        for trained, stepped in ((model, optimizer), (twin, reference)):
            trained.zero_grad()
            trained(token_batch(step, 4)).backward()
            stepped.step()
        for (name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
            worst = max(worst, float((found - wanted).detach().norm() / wanted.detach().norm()))
            assert worst < 1e-6, (step, name)
    return worst, optimizer


@pytest.mark.parametrize(
    "options",
    [
        *({"selection": selection} for selection in SELECTIONS),
        *({"selection": selection, "state_free": "SGD", "state_free_lr_scale": 3.0} for selection in SELECTIONS),
        *({"selection": "blockwise", "block_order": order} for order in ("ascending", "descending")),
        {"selection": "columns", "state_free_lr_scale": 0.1, "betas": (0.8, 0.95), "eps": 1e-4},
        {"selection": "svd", "density": 0.04},
        {"selection": "randk", "embeddings": "projected", "head": "free", "norms": "free"},
        {"selection": "rows", "embeddings": "free", "head": "projected"},
        {"selection": "blockwise", "embeddings": "projected", "head": "projected"},
        {"selection": "svd", "embeddings": "projected", "head": "projected"},
        {"selection": "columns", "density": 0.0, "state_free_lr_scale": 0.3},
        {"density": 1.0, "selection": "svd"},
    ],
    ids=str,
)
def test_equals_the_reference_in_fp64(options: dict[str, Any]) -> None:
    error, optimizer = against_reference(**options)
    assert optimizer.num_refreshes == 3
    assert error < 1e-11


@pytest.mark.parametrize("selection", SELECTIONS)
def test_density_one_is_torch_adamw(selection: Any) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    model, twin = tiny(), tiny()
    optimizer = Frugal(model, density=1.0, selection=selection, refresh_interval=4, **options)
    adamw = torch.optim.AdamW(twin.parameters(), **options)
    assert train_steps(model, optimizer, 0, 13) == train_steps(twin, adamw, 0, 13)


def test_density_zero_is_sign_sgd_at_the_scaled_rate() -> None:
    model = tiny(dtype=torch.float64)
    optimizer = Frugal(model, lr=1e-2, density=0.0, state_free_lr_scale=0.25, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, optimizer, 0, 1)
    for name, parameter in model.named_parameters():
        if is_matrix(name):
            moved = (parameter.detach() - before[name]).abs()
            assert torch.allclose(moved, torch.full_like(moved, 2.5e-3), rtol=1e-12, atol=1e-15)
            assert optimizer.state[parameter]["exp_avg"].numel() == 0


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_without_remainder_it_is_grass(side: Any) -> None:
    """The same lines at the same refreshes, the same reset; Grass never forms the gradient of the others."""
    options = {**OPTIONS, "weight_decay": 0.0}
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    found = train_steps(model, Frugal(model, selection=side, state_free_lr_scale=0.0, **options), 0, STEPS)
    wanted = train_steps(twin, Grass(twin, side=side, selection="uniform", shared_inputs=None, **options), 0, STEPS)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-12
    weights = twin.state_dict()
    assert all(float((v - weights[k]).norm() / weights[k].norm()) < 1e-12 for k, v in model.state_dict().items())


def two_layers(width: int = 256) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False))


@pytest.mark.parametrize("density", [0.05, 0.25, 0.6])
@pytest.mark.parametrize("selection", ["columns", "rows", "randk", "svd", "random"])
def test_optimizer_bytes_are_eight_per_state_full_coordinate(selection: Any, density: float) -> None:
    model = two_layers()
    optimizer = Frugal(model, density=density, selection=selection, refresh_interval=2, target_modules=["*"])
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    found = sum(t.untyped_storage().nbytes() for t in tensors)
    formula = 8 * density * sum(p.numel() for p in model.parameters())
    assert abs(found / formula - 1) < 0.02


def test_blockwise_keeps_state_for_the_active_matrices_only() -> None:
    model = tiny()
    optimizer = Frugal(model, density=0.25, selection="blockwise", refresh_interval=2)
    seen = set()
    for step in range(9):
        train_steps(model, optimizer, step, step + 1)
        active = {n for n, p in model.named_parameters() if is_matrix(n) and optimizer.state[p]["exp_avg"].numel()}
        assert len(active) == 3  # of 12
        assert all(optimizer.state[p]["exp_avg"].numel() in (0, p.numel()) for p in model.parameters())
        seen |= active
    assert len(seen) > 3


def chosen_of(optimizer: Frugal, model: nn.Module, name: str) -> Tensor:
    """Which coordinates moved unequally to the state-free rate, by the selection that the optimizer reports."""
    flat = model.get_parameter(name)
    slot = next(s for s in optimizer.slots_of(flat))
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    for part in slot.parts():
        part.put_(mask, mask.new_ones(part.numel()))
    return mask


def test_randk_takes_every_coordinate_equally_often() -> None:
    """Over 400 refreshes with K = N/4, counts are binomial: mean 100, deviation 8.66; rows and columns of the matrix
    are no more alike than chance, and two refreshes share K^2/N coordinates.
    """
    model = two_layers(32)
    optimizer = Frugal(model, density=0.25, selection="randk", refresh_interval=1, target_modules=["*"])
    masks = []
    for _ in range(400):
        masks.append(chosen_of(optimizer, model, "0.weight"))
        optimizer.after_step([])
    chosen = torch.stack(masks).double()
    n = chosen.shape[1]
    assert set(chosen.sum(1).tolist()) == {n / 4}
    counts = chosen.sum(0)
    assert float(counts.std()) == pytest.approx(8.66, rel=0.1)
    assert float((counts - 100).abs().max()) < 45
    lines = chosen.view(400, 64, 32)
    for dim, length in ((1, 64), (2, 32)):
        # The hypergeometric variance of a line's count.
        wanted = length * 0.25 * 0.75 * (n - length) / (n - 1)
        assert float(lines.sum(dim).var()) == pytest.approx(wanted, rel=0.1)
    shared = (chosen[1:] * chosen[:-1]).sum(1)
    assert float(shared.mean()) == pytest.approx(n / 16, rel=0.02)
    assert float(shared.std()) == pytest.approx(math.sqrt(n / 4 * 0.25 * 0.75 * 0.75), rel=0.2)


def test_small_steps_do_not_vanish_in_bf16() -> None:
    """The step is a tenth of half the distance between neighbours at 1: rounding to nearest would never move them."""
    model = two_layers().to(torch.bfloat16)
    optimizer = Frugal(
        model, lr=4e-4, density=0.25, refresh_interval=10, weight_decay=0.0, eps=1e-30, target_modules=["*"]
    )
    for parameter in model.parameters():
        parameter.data.fill_(1.5)
        parameter.grad = torch.ones_like(parameter)
    for _ in range(50):
        optimizer.step()
    for parameter in model.parameters():
        assert float(parameter.detach().double().mean()) == pytest.approx(1.5 - 50 * 4e-4, abs=3e-4)
        assert optimizer.state[parameter]["exp_avg"].dtype is torch.float32


# State in plain PyTorch.


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.cover(1)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("saved_after", [3, 6, 10])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(selection: Any, saved_after: int) -> None:
    options = {**OPTIONS, "selection": selection, "embeddings": "projected"}
    model = tiny()
    optimizer = Frugal(model, **options)
    train_steps(model, optimizer, 0, saved_after)
    states = through_disk((model.state_dict(), optimizer.state_dict()))
    expected = train_steps(model, optimizer, saved_after, 18)
    resumed = tiny(seed=1)
    resumed_optimizer = Frugal(resumed, **options)
    train_steps(resumed, resumed_optimizer, 0, 2)
    resumed.load_state_dict(states[0])
    resumed_optimizer.load_state_dict(states[1])
    assert train_steps(resumed, resumed_optimizer, saved_after, 18) == expected
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.5}, "expected density 0.5, got 0.3"),
        ({"selection": "rows"}, "expected selection 'rows', got 'columns'"),
        ({"refresh_interval": 5}, "expected refresh_interval 5, got 6"),
        ({"seed": 4}, "expected seed 4, got 3"),
        ({"head": "free"}, "other rules for some parameters"),
    ],
)
def test_a_state_of_other_subspaces_is_refused(change: dict[str, Any], message: str) -> None:
    model = tiny()
    optimizer = Frugal(model, **OPTIONS)
    train_steps(model, optimizer, 0, 8)
    other = Frugal(tiny(), **{**OPTIONS, **change})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert other.num_steps == 0
    assert not other.state


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="not a state of Frugal"):
        Frugal(model, **OPTIONS).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density: expected a number of at least 0 and of at most 1, got 1.5"),
        ({"density": True}, "density: expected .*, got True"),
        ({"selection": "column"}, "selection: expected one of .*'columns'.*, got 'column'"),
        ({"block_order": "ascending"}, "block_order: expected 'random' with selection 'columns', got 'ascending'"),
        ({"state_free": "sgd"}, "state_free: expected one of .*'SGD'.*, got 'sgd'"),
        ({"state_free_lr_scale": -1.0}, "state_free_lr_scale: expected a number of at least 0, got -1.0"),
        ({"refresh_interval": 0}, "refresh_interval: expected an integer of at least 1 or None, got 0"),
        ({"norms": "projected"}, r"norms: expected one of \['full', 'free'\], got 'projected'"),
        ({"matrix_lr_scale": 0.0}, "matrix_lr_scale: expected a number above 0, got 0.0"),
        (
            {"reduction": "majority_vote", "state_free": "SGD"},
            "expected state_free 'signSGD' and a selection of coordinates, got 'SGD'",
        ),
        ({"reduction": "majority_vote", "selection": "svd"}, "selection of coordinates"),
        ({"reduction": "majority_vote"}, "'majority_vote' expected torch.distributed to be initialised"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frugal(tiny(), **options)


def test_blocks_that_decay_only_while_active_are_badam() -> None:
    """Luo et al. 2024: AdamW from new on the matrices of one transformer block at a time, the last block first; all
    else stays as it is.
    """
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Frugal(
        model,
        lr=1e-2,
        weight_decay=0.1,
        selection="blockwise",
        block_order="descending",
        density=1 / 2,
        refresh_interval=INTERVAL,
        state_free_lr_scale=0.0,
        decay="active",
        embeddings="free",
        head="free",
        norms="free",
    )
    named, adam = dict(twin.named_parameters()), None
    for step in range(STEPS):
        if adam is None or step % INTERVAL == 0:
            block = f"blocks.{1 - step // INTERVAL % 2}."
            active = [p for name, p in named.items() if is_matrix(name) and name.startswith(block)]
            adam = torch.optim.AdamW(active, lr=1e-2, weight_decay=0.1)
        for trained, stepped in ((model, optimizer), (twin, adam)):
            trained.zero_grad()
            trained(token_batch(step, 4)).backward()
            stepped.step()
    start = tiny(dtype=torch.float64).state_dict()
    for name, found in model.state_dict().items():
        torch.testing.assert_close(found, named[name].detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(found, start[name]) != is_matrix(name)


@pytest.mark.parametrize("selection", ["columns", "randk"])
def test_only_chosen_coordinates_decay_where_asked(selection: Any) -> None:
    """At a rate without gradients' part: the weights are those that were chosen, decayed, and the rest."""
    model = tiny(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Frugal(
        model, lr=0.5, weight_decay=0.2, density=0.3, selection=selection, decay="active", state_free_lr_scale=0.0
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, found in model.state_dict().items():
        decayed = found == before[name] * 0.9
        kept = found == before[name]
        assert bool((decayed | kept).all())
        if is_matrix(name):
            assert float(decayed.double().mean()) == pytest.approx(0.3, abs=0.05)
        else:
            assert bool(decayed.all())


def test_active_decay_is_refused_without_coordinates() -> None:
    with pytest.raises(ValueError, match="decay: expected 'all' with selection 'svd'"):
        Frugal(tiny(), selection="svd", decay="active")

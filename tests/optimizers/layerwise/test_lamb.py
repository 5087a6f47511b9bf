"""LAMB and LARS against their equations on whole tensors, alone and on flat partitions over several ranks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from narrowgauge.optimizers.layerwise.lamb import Lamb
from narrowgauge.optimizers.layerwise.lars import Lars
from tests.support.models import TinyTransformer, is_matrix, tiny, token_batch, train_steps
from tests.support.partition import Partition
from tests.support.ranks import RankPool
from tests.support.references.layerwise import EquationsOfLamb, EquationsOfLars

STEPS = 12
GROUPS = [{"params": ["embed.weight"], "lr": 3e-2, "weight_decay": 0.3}]
COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5, "param_groups": GROUPS}
LAMB: dict[str, Any] = {**COMMON, "betas": (0.8, 0.95), "eps": 1e-4}
LARS: dict[str, Any] = {**COMMON, "momentum": 0.8, "trust_coefficient": 0.3}


def rate_and_decay(name: str, options: dict[str, Any]) -> tuple[float, float]:
    """The same groups, for the equations."""
    if name == "embed.weight":
        return 3e-2, 0.3
    return options["lr"] * (options["matrix_lr_scale"] if is_matrix(name) else 1.0), options["weight_decay"]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lamb": ("lamb", {}),
    "lamb-bounded": ("lamb", {"weight_norm_bounds": [0.5, 2.0]}),
    "lamb-nothing-excluded": ("lamb", {"exclude": []}),
    "lars": ("lars", {}),
    "lars-nesterov": ("lars", {"nesterov": True}),
    "lars-exclude": ("lars", {"exclude": ["embed.weight", "blocks.1.up.weight"]}),
}


def make(kind: str, model: TinyTransformer, extra: dict[str, Any]) -> Any:
    return Lamb(model, **LAMB, **extra) if kind == "lamb" else Lars(model, **LARS, **extra)


def equations(kind: str, model: TinyTransformer, extra: dict[str, Any]) -> EquationsOfLamb | EquationsOfLars:
    options, exclude = {**(LAMB if kind == "lamb" else LARS), **extra}, extra.get("exclude")
    cls = EquationsOfLamb if kind == "lamb" else EquationsOfLars
    return cls(
        model,
        rate_and_decay=lambda name: rate_and_decay(name, options),
        is_plain=lambda name, parameter: parameter.dim() == 1 if exclude is None else name in exclude,
        **options,
    )


def pair(dtype: torch.dtype = torch.float64) -> tuple[TinyTransformer, TinyTransformer]:
    """Two equal models; a bias starts at zero, so that what has no norm is met with and without exclusions."""
    models = tiny(dtype=dtype), tiny(dtype=dtype)
    for model in models:
        torch.nn.init.zeros_(model.get_parameter("blocks.0.up.bias"))
    return models


def train_both(
    model: TinyTransformer,
    twin: TinyTransformer,
    step: Callable[[], None],
    reference: EquationsOfLamb | EquationsOfLars,
) -> float:
    """The largest relative difference of a parameter after training."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(STEPS):
        for trained in (model, twin):
            trained.zero_grad()
            trained(token_batch(number, 4)).backward()
        step()
        reference.step()
    wanted = dict(twin.named_parameters())
    assert all(float((wanted[name] - p).detach().norm()) > 1e-4 for name, p in start.items()), "all must have moved"
    return max(float(((p - wanted[n]).norm() / wanted[n].norm()).detach()) for n, p in model.named_parameters())


@pytest.mark.parametrize(("kind", "extra"), CASES.values(), ids=CASES)
def test_equals_its_equations_in_fp64(kind: str, extra: dict[str, Any]) -> None:
    model, twin = pair()
    assert train_both(model, twin, make(kind, model, extra).step, equations(kind, twin, extra)) < 1e-13


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_equals_its_equations_in_fp32(kind: str) -> None:
    model, twin = pair(torch.float32)
    assert train_both(model, twin, make(kind, model, {}).step, equations(kind, twin, {})) < 2e-5


def train_partitioned(kind: str, extra: dict[str, Any], cuts: list[float]) -> tuple[float, int, int]:
    model, twin = pair()
    optimizer = make(kind, model, extra)
    partition = Partition(model, optimizer, cuts)
    error = train_both(model, twin, partition.step, equations(kind, twin, extra))
    return error, partition.num_sums, len(optimizer.param_groups)


@pytest.mark.cover(1)
@pytest.mark.parametrize(("kind", "extra"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("cuts", [[0.37], [0.9999]], ids=["within-rows", "almost-all-on-one-rank"])
def test_norms_are_those_of_whole_tensors_cut_over_two_ranks(
    two_ranks: RankPool, kind: str, extra: dict[str, Any], cuts: list[float]
) -> None:
    for error, num_sums, num_groups in two_ranks.run(train_partitioned, kind, extra, cuts):
        assert error < 1e-13
        assert num_sums == STEPS * num_groups, "one all-reduce per group and step"


def test_norms_are_those_of_whole_tensors_cut_over_three_ranks(three_ranks: RankPool) -> None:
    """The second case leaves the middle rank without an element of any parameter."""
    for cuts in ([0.213, 0.641], [0.5, 0.5]):
        for kind in ("lamb", "lars"):
            for error, _, _ in three_ranks.run(train_partitioned, kind, {}, cuts):
                assert error < 1e-13


@pytest.mark.parametrize("kind", ["lamb", "lars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continues_bit_equal_from_its_state(kind: str, dtype: torch.dtype) -> None:
    """The moments of bf16 parameters are fp32, which torch's own loading would round."""
    model = tiny(dtype=dtype)
    optimizer = make(kind, model, {})
    train_steps(model, optimizer, 0, 5)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train_steps(model, optimizer, 5, 10)
    other = tiny(seed=3, dtype=dtype)
    other.load_state_dict(weights)
    resumed = make(kind, other, {})
    resumed.load_state_dict(state)
    assert resumed.num_steps == 5
    assert train_steps(other, resumed, 5, 10) == expected
    found = other.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_bf16_follows_fp32(kind: str) -> None:
    """The state is fp32, and steps of 2e-4 of a weight, which rounding to nearest would lose, add up."""
    model, twin = tiny(dtype=torch.bfloat16), tiny(dtype=torch.bfloat16).float()
    optimizers = [make(kind, m, {"exclude": []}) for m in (model, twin)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 3e-2
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for _ in range(60):
        for name, p in model.named_parameters():
            p.grad = start[name].sign().bfloat16()
            twin.get_parameter(name).grad = start[name].sign()
        for optimizer in optimizers:
            optimizer.step()
    assert all(v.dtype == torch.float32 for s in optimizers[0].state.values() for v in s.values() if torch.is_tensor(v))
    wanted = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.numel() >= 300:
            shrunk = float(p.detach().float().abs().sum() / start[name].abs().sum())
            expected = float(wanted[name].detach().abs().sum() / start[name].abs().sum())
            assert 0.8 < expected < 0.995, name
            assert abs(shrunk - expected) < 0.1 * (1 - expected), name


def test_a_tensor_of_zeros_moves() -> None:
    for kind in ("lamb", "lars"):
        model = tiny()
        torch.nn.init.zeros_(model.get_parameter("blocks.0.q.weight"))
        train_steps(model, make(kind, model, {}), 0, 2)
        weight = model.get_parameter("blocks.0.q.weight").detach()
        assert float(weight.norm()) > 0
        assert torch.isfinite(weight).all()


def test_update_is_as_long_as_the_weight_asks() -> None:
    """LAMB's defining property, from its first step: ``||change|| = lr * ||x||``."""
    model = tiny(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, Lamb(model, lr=1e-2), 0, 1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert float((p.detach() - before[name]).norm() / before[name].norm()) == pytest.approx(1e-2, rel=1e-9)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Lamb, {"lr": -1.0}, "lr: expected a number of at least 0, got -1.0"),
        (Lamb, {"betas": (0.9, 1.0)}, "betas: .* two numbers in"),
        (Lamb, {"weight_norm_bounds": [2.0, 1.0]}, "weight_norm_bounds: .*low <= high"),
        (Lamb, {"exclude": ["*.nothing"]}, "exclude: '\\*.nothing' matches no trainable parameter"),
        (Lars, {"momentum": 1.0}, "momentum: expected a number of at least 0 and below 1, got 1.0"),
        (Lars, {"trust_coefficient": 0.0}, "trust_coefficient: expected a number above 0, got 0.0"),
        (Lars, {"nesterov": True, "momentum": 0.0}, "nesterov: expected a momentum above 0, got 0"),
        (
            Lars,
            {"param_groups": [{"params": ["*norm*"], "eps": 1e-3}]},
            "param_groups\\[0\\]: expected 'params' and any of \\['lr', 'weight_decay'\\], got \\['eps', 'params'\\]",
        ),
    ],
)
def test_refusals(cls: type[Lamb] | type[Lars], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(tiny(), **{"lr": 1e-3, **options})


def test_refuses_the_state_of_another_type() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="expected type 'Lamb', got 'Lars'"):
        Lamb(model).load_state_dict(Lars(model, lr=0.1).state_dict())

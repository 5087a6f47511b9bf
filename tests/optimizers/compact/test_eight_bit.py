"""The other bases: bitsandbytes' AdamW with 8-bit moments, alone, under ZeRO and through checkpoints; Adafactor."""

import io
import math
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from narrowgauge.engine.backends.deepspeed.shards import local_shards
from narrowgauge.optimizers import CompactOptimizer, GaLore, Grass
from narrowgauge.optimizers.layers.projected_linear import ProjectedLinear
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear
from narrowgauge.optimizers.layers.watch import unwatch
from tests.support.mixture import EXPERTS, mixture, mixture_batch
from tests.support.models import tiny, token_batch, train_steps
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, make_engine, train_step

# Every compact value and the embedding have the 4,096 elements from which bitsandbytes quantises.
SIZES: dict[str, Any] = {"width": 128, "hidden": 160, "blocks": 1}
INTERVAL = 4
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OPTIONS: dict[str, Any] = {**ADAM, "density": 0.25, "refresh_interval": INTERVAL}
MADE: dict[str, tuple[type[CompactOptimizer], dict[str, Any]]] = {
    "Grass": (Grass, {}),
    "GaLore-keep": (GaLore, {"moments": "keep"}),
    "GaLore-reset": (GaLore, {"moments": "reset"}),
}


def made(kind: str, base: str, **overrides: Any) -> tuple[nn.Module, CompactOptimizer]:
    cls, extra = MADE[kind]
    model = tiny(**SIZES)
    return model, cls(model, **{**OPTIONS, **extra, **overrides}, base=cast(Any, base))  # type: ignore[call-arg]


def fold_by_hand(optimizer: CompactOptimizer, lr: float) -> None:
    for layer in optimizer.layers:
        module = layer.module
        if isinstance(module, SelectedLinear):
            module.weight[:, module.index] = module.compact
        else:
            assert isinstance(module, ProjectedLinear)
            change = module.lift(module.compact, 0, module.weight_shape[0])
            module.weight.mul_(1 - lr * ADAM["weight_decay"]).add_(change)
            module.compact.zero_()


def groups_of(optimizer: CompactOptimizer) -> list[dict[str, Any]]:
    for layer in optimizer.layers:
        # For another optimizer, with folds by hand.
        unwatch(layer.module)
    return [{"params": group["params"]} for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", MADE)
def test_equals_bitsandbytes_stepping_the_compact_parameters_bit_for_bit(kind: str) -> None:
    """Through three refreshes; the twin's optimizer only chooses the subspaces."""
    model, optimizer = made(kind, "AdamW8bit")
    twin, chooser = made(kind, "AdamW")
    stepper = cast(Any, bitsandbytes.optim).AdamW8bit(groups_of(chooser), **ADAM)
    chooser.register_step_pre_hook(lambda *_: pytest.fail("only bitsandbytes steps"))
    for step in range(3 * INTERVAL + 2):
        for network in (model, twin):
            network(token_batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepper.step()
        with torch.no_grad():
            fold_by_hand(chooser, ADAM["lr"])
        chooser.num_steps += 1
        if chooser.is_refresh_due():
            chooser.refresh()
            if kind != "GaLore-keep" or step == 0:
                for layer in chooser.layers:
                    stepper.state[layer.module.compact] = {}
        if isinstance(chooser, GaLore):
            chooser._observe_next_step()
        stepper.zero_grad()
    assert optimizer.num_refreshes >= 3
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_stacked_experts_are_stepped_by_bitsandbytes_bit_for_bit() -> None:
    """Through a refresh; an expert is idle in some steps."""
    model, twin = mixture(hidden=128), mixture(hidden=128)
    optimizer, chooser = Grass(model, **OPTIONS, base="AdamW8bit"), Grass(twin, **OPTIONS)
    assert {layer.module.num_matrices for layer in chooser.layers} == {1, EXPERTS}
    assert any(layer.module.compact.numel() >= 4096 for layer in chooser.layers)
    stepper = cast(Any, bitsandbytes.optim).AdamW8bit(groups_of(chooser), **ADAM)
    for step in range(INTERVAL + 2):
        for network in (model, twin):
            network(mixture_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepper.step()
        with torch.no_grad():
            for unit in (layer.module for layer in chooser.layers):
                # The same columns of every matrix.
                unit.weight[..., unit.selected()] = unit.compact.view(*unit.weight.shape[:-1], -1)
        chooser.num_steps += 1
        if chooser.is_refresh_due():
            chooser.refresh()
            for layer in chooser.layers:
                stepper.state[layer.module.compact] = {}
        stepper.zero_grad()
    assert optimizer.num_refreshes == 1
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MADE)
def test_moments_take_one_byte_each(kind: str) -> None:
    """And four more for 256 of them; both moments of parameters below 4,096 elements stay in fp32."""
    model, optimizer = made(kind, "AdamW8bit")
    train_steps(model, optimizer, 0, 2)
    found = {key: 0 for key in ("state1", "state2", "absmax1", "absmax2")}
    large = small = scales = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key in found:
                value = optimizer.state[parameter].get(key)
                found[key] += 0 if value is None else value.numel() * value.element_size()
            large += parameter.numel() if parameter.numel() >= 4096 else 0
            scales += -(-parameter.numel() // 256) if parameter.numel() >= 4096 else 0
            small += parameter.numel() if parameter.numel() < 4096 else 0
    assert found["state1"] == found["state2"] == large + 4 * small
    assert found["absmax1"] == found["absmax2"] == 4 * scales
    assert large > 20 * small


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("saved_after", [INTERVAL, INTERVAL + 2])
def test_a_state_dict_resumes_bit_for_bit(kind: str, saved_after: int) -> None:
    model, optimizer = made(kind, "AdamW8bit")
    train_steps(model, optimizer, 0, saved_after)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train_steps(model, optimizer, saved_after, 3 * INTERVAL)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed, resumed_optimizer = made(kind, "AdamW8bit")
    train_steps(resumed, resumed_optimizer, 20, 22)
    resumed.load_state_dict(states["model"])
    resumed_optimizer.load_state_dict(states["optimizer"])
    assert train_steps(resumed, resumed_optimizer, saved_after, 3 * INTERVAL) == expected
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


ZERO_SIZES: dict[str, Any] = {"width": 64, "hidden": 96}
STEPS = 24


def engine_of(kind: str, base: str, stage: int, **overrides: Any) -> Any:
    params = {"base": base, "lr": 5e-3, "density": 0.3, "refresh_interval": 5, "weight_decay": 0.1}
    config = ds_config(stage, optimizer={"type": kind, "params": params}, **overrides)
    return make_engine(config, **ZERO_SIZES)


def losses_of(kind: str, base: str, stage: int, **overrides: Any) -> tuple[list[float], float]:
    """The losses, and the share of moments held in one byte."""
    engine = engine_of(kind, base, stage, **overrides)
    losses = [train_step(engine, step % 3) for step in range(STEPS)]
    moments = [v for s in engine.own_optimizer.state.values() for k, v in s.items() if k in ("state1", "state2")]
    small = sum(v.numel() for v in moments if v.dtype is torch.uint8)
    finish(engine)
    return losses, small / max(1, sum(v.numel() for v in moments))


@pytest.mark.parametrize("kind", ["Grass", pytest.param("GaLore", marks=pytest.mark.slow)])
def test_training_under_zero_follows_adamw_with_fp32_moments(two_ranks: RankPool, kind: str) -> None:
    """Over 24 steps on three repeated batches, through four refreshes: each loss within 0.3 % of AdamW's, which has
    fallen by a third by then.
    """
    expected, none = two_ranks.run(losses_of, kind, "AdamW", 1)[0]
    assert none == 0.0
    assert expected[-1] < 0.7 * expected[0]
    for stage in (1, 2, 3):
        overrides = {"zero": {"offload_optimizer": {"device": "cpu"}}} if stage == 2 else {}
        (found, share), (other, _) = two_ranks.run(losses_of, kind, "AdamW8bit", stage, **overrides)
        assert found == other
        assert share > 0.7
        assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < 3e-3


Pieces = dict[tuple[str, str], list[tuple[int, Tensor]]]


def moments_of(engine: Any) -> Pieces:
    """This rank's pieces of the moments in fp32, by parameter and key, with their positions."""
    own, found = engine.own_optimizer, {}
    for shard in local_shards(engine):
        for key, value in own.dense_state(shard.flat).items():
            if key.startswith("state"):
                assert value.dtype is torch.float32
                found.setdefault((shard.name, key), []).append((shard.start, shard.of(value).clone()))
    return found


def save_eight_bit(kind: str, stage: int, folder: str, saved_after: int, last: int) -> tuple[Pieces, list[float]]:
    engine = engine_of(kind, "AdamW8bit", stage)
    for step in range(saved_after):
        train_step(engine, step)
    engine.save_checkpoint(folder, tag="saved")
    moments = moments_of(engine)
    losses = [train_step(engine, step) for step in range(saved_after, last)]
    finish(engine)
    return moments, losses


def load_eight_bit(kind: str, stage: int, folder: str, saved_after: int, last: int) -> tuple[Pieces, list[float]]:
    engine = engine_of(kind, "AdamW8bit", stage)
    train_step(engine, 99)
    engine.load_checkpoint(folder, tag="saved")
    own = engine.own_optimizer
    assert all(s["state1"].dtype is torch.uint8 for p, s in own.state.items() if s and p.numel() >= 4096)
    assert {s["step"] for s in own.state.values() if s} <= {saved_after, saved_after - 1, saved_after % 5}
    moments = moments_of(engine)
    losses = [train_step(engine, step) for step in range(saved_after, last)]
    finish(engine)
    return moments, losses


def joined(of_ranks: list[Pieces]) -> dict[tuple[str, str], Tensor]:
    """The whole moments; without ZeRO every rank holds all of them."""
    pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
    for found in of_ranks:
        for key, parts in found.items():
            pieces.setdefault(key, {}).update(parts)
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in pieces.items()}


@pytest.mark.parametrize("kind", ["Grass", pytest.param("GaLore", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "saved_after"),
    [
        pytest.param(1, 1, 7, marks=pytest.mark.slow),
        (1, 3, 7),
        pytest.param(3, 1, 7, marks=pytest.mark.slow),
        pytest.param(1, 0, 5, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_holds_the_moments_for_any_number_of_ranks(
    two_ranks: RankPool,
    one_rank: RankPool,
    tmp_path: Path,
    kind: str,
    saved_at: int,
    loaded_at: int,
    saved_after: int,
) -> None:
    """Between refreshes, and right after one, when Grass has no moments of compact values: none may be left over.

    Quantised anew, in other blocks, they differ by an 8-bit rounding: under 10 % in the norm of a bias that shares its
    block with larger values, where losing or misplacing them would be 100 %.
    """
    last = saved_after + 6
    saved = two_ranks.run(save_eight_bit, kind, saved_at, str(tmp_path), saved_after, last)
    before, expected = joined([moments for moments, _ in saved]), saved[0][1]
    for pool in (two_ranks, one_rank):
        loaded = pool.run(load_eight_bit, kind, loaded_at, str(tmp_path), saved_after, last)
        after = joined([moments for moments, _ in loaded])
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert float((after[key] - value).norm()) <= 0.1 * float(value.norm()), key
        for _, losses in loaded:
            assert losses == pytest.approx(expected, rel=5e-3)


def test_adafactor_of_selected_values_is_torchs() -> None:
    """It is AdamW's stand-in on the compact values, through two refreshes that forget its factors."""
    options = {"density": 0.25, "refresh_interval": INTERVAL, "weight_decay": 0.1, "lr": 1e-2}
    model, twin = tiny(**SIZES), tiny(**SIZES)
    optimizer, chooser = Grass(model, **options, base="Adafactor"), Grass(twin, **options)
    stepper = torch.optim.Adafactor(groups_of(chooser), lr=1e-2, weight_decay=0.1)
    for step in range(2 * INTERVAL + 2):
        for network in (model, twin):
            network(token_batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepper.step()
        with torch.no_grad():
            fold_by_hand(chooser, 1e-2)
        chooser.num_steps += 1
        if chooser.is_refresh_due():
            chooser.refresh()
            for layer in chooser.layers:
                stepper.state[layer.module.compact] = {}
        stepper.zero_grad()
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_adafactor_of_changes_steps_relative_to_the_weights() -> None:
    """Shazeer and Stern's Algorithm 4 on the projected gradient, with the size of the whole weight."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(40, 24, bias=False, dtype=torch.float64)])
    lr, rank = 0.05, 4
    optimizer = GaLore(
        model, rank=rank, base="Adafactor", lr=lr, weight_decay=0.1, refresh_interval=None, target_modules=["*"]
    )
    module = cast(ProjectedLinear, optimizer.layers[0].module)
    weight, basis = module.weight.detach().clone(), cast(Tensor, module.left)
    row = col = torch.zeros(())
    for step in range(1, 6):
        x, grad_y = torch.randn(7, 40, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
        module(x).backward(grad_y)
        optimizer.step()
        optimizer.zero_grad()
        projected = basis.t() @ grad_y.t() @ x
        share = step**-0.8
        row = (1 - share) * row + share * projected.square().mean(1, keepdim=True)
        col = (1 - share) * col + share * projected.square().mean(0, keepdim=True)
        update = projected / (row * col / row.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        size = max(1e-3, float(weight.square().mean().sqrt())) * min(lr, 1 / math.sqrt(step))
        weight = weight * (1 - lr * 0.1) - 0.25 * size * basis @ update
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "AdamW8bit", "fused": True}, "fused: expected None with base AdamW8bit"),
        ({"base": "AdamW8bit", "foreach": True}, "foreach: expected None with base AdamW8bit"),
        ({"base": "Adafactor", "fused": True}, "fused: expected None with base Adafactor"),
        (
            {"base": "Adafactor", "param_groups": [{"params": ["*norm*"], "eps": 1e-6}]},
            r"param_groups: expected no \['eps'\] with base Adafactor",
        ),
    ],
)
@pytest.mark.parametrize("cls", [Grass, GaLore])
def test_options_that_a_base_does_not_have_are_refused(
    cls: type[CompactOptimizer], options: dict[str, Any], message: str
) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        cls(model, rank=4, **options)  # type: ignore[call-arg]
    assert all(p.requires_grad for p in model.parameters())

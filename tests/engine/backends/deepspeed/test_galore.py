"""GaLore under DeepSpeed ZeRO on two ranks against one process, through refresh, accumulation and clipping."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowgauge.engine.backends.deepspeed.supported import check_supported
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import ConfigError
from narrowgauge.optimizers import GaLore
from tests.support.cases import cases
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, full_weights, make_engine, train_step
from tests.support.zero_sharded import compare_with_one_process, continue_from, engine_of, save_at

STEPS, INTERVAL = 14, 4
GALORE: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 5,
    "oversampling": 4,
    "refresh_interval": INTERVAL,
    "scale": 0.5,
    "betas": [0.8, 0.95],
    "eps": 1e-4,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "param_groups": [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}],
}
SVD, FULL = {**GALORE, "projector": "svd"}, {**GALORE, "projector": "svd", "side": "full"}
CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
CASES: dict[str, tuple[dict[str, Any], int, bool, dict[str, Any]]] = {
    **{f"zero{stage}-sketch": (GALORE, stage, False, {}) for stage in range(4)},
    **{f"zero{stage}-svd": (SVD, stage, False, {}) for stage in (1, 2, 3)},
    "zero1-full-reset": ({**FULL, "moments": "reset"}, 1, False, {}),
    "zero3-full": (FULL, 3, False, {}),
    "zero3-left-power": ({**GALORE, "side": "left", "projector": "power"}, 3, False, {}),
    "zero2-right-offload": ({**GALORE, "side": "right"}, 2, False, CPU_OFFLOAD),
    "zero3-reset-offload": ({**GALORE, "moments": "reset"}, 3, False, CPU_OFFLOAD),
    "zero3-zero-init": (GALORE, 3, True, {}),
    "zero3-parameters-on-cpu": (
        GALORE,
        3,
        False,
        {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ),
    "zero3-sub-groups": (GALORE, 3, False, {"zero": {"sub_group_size": 300}}),
    "zero3-nothing-persistent": (GALORE, 3, False, {"zero": {"stage3_param_persistence_threshold": 0}}),
    "zero3-all-persistent": (GALORE, 3, False, {"zero": {"stage3_param_persistence_threshold": 10**6}}),
}


SLOW = {
    "zero2-svd",
    "zero3-svd",
    "zero3-sketch",
    "zero3-reset-offload",
    "zero3-nothing-persistent",
    "zero3-all-persistent",
}


@pytest.mark.quick("zero0-sketch", "zero1-svd", "zero2-right-offload", "zero3-sub-groups")
@pytest.mark.parametrize(("params", "stage", "zero_init", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, params: dict[str, Any], stage: int, zero_init: bool, overrides: dict[str, Any]
) -> None:
    """Three parameter groups, no size divisible by the number of ranks, four refreshes."""
    results = two_ranks.run(compare_with_one_process, "GaLore", params, stage, STEPS, zero_init, **overrides)
    for result in results:
        assert result["subspace"]["num_refreshes"] == 4
        assert result["loss"] < 1e-6
        assert result["weights"] < 2e-5
        for key, basis in results[0]["subspace"]["tensors"].items():
            assert torch.equal(result["subspace"]["tensors"][key], basis)


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "saved_after"),
    [
        *[
            pytest.param(stage, stage, after, marks=pytest.mark.slow)
            for stage in (1, 3)
            for after in (INTERVAL - 1, INTERVAL, INTERVAL + 1)
        ],
        (1, 3, INTERVAL),
        pytest.param(3, 0, INTERVAL, marks=pytest.mark.slow),
        pytest.param(2, 1, INTERVAL + 1, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_two_ranks_continues_on_one_and_two(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, saved_at: int, loaded_at: int, saved_after: int
) -> None:
    """Saved before the step that is observed, right before it, and right after the refresh."""
    expected = two_ranks.run(save_at, "GaLore", GALORE, saved_at, tmp_path, saved_after, 10)[0]
    for pool in (two_ranks, one_rank):
        for losses in pool.run(continue_from, "GaLore", GALORE, loaded_at, tmp_path, saved_after, 10):
            if pool is two_ranks and saved_at == loaded_at:
                assert losses == expected
            assert losses == pytest.approx(expected, abs=2e-6)


def in_bf16(stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = engine_of("GaLore", GALORE, stage, bf16={"enabled": True})
    losses = [train_step(engine, step) for step in range(30)]
    weights = full_weights(engine)
    finish(engine)
    return losses, weights


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_bf16_follows_fp32_and_the_ranks_agree_bit_for_bit(two_ranks: RankPool, stage: int) -> None:
    """Means over ten steps, relative: single losses carry bf16's rounding of the logits."""
    (found, weights), (other, other_weights) = two_ranks.run(in_bf16, stage)
    assert found == other
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    expected = one_process_losses(30)
    for first in range(0, 30, 10):
        mean, wanted = (sum(losses[first : first + 10]) / 10 for losses in (found, expected))
        assert abs(mean - wanted) / wanted < 1e-2


def one_process_losses(steps: int) -> list[float]:
    from tests.support.zero_sharded import one_process

    return one_process("GaLore", GALORE, steps)[0]


def near_one(stage: int) -> tuple[float, float, dict[str, Tensor]]:
    """A layer of ones in bf16 that a constant gradient drives down by 1e-3 in each of 201 steps: the mean weight."""
    params = {
        "lr": 4e-3,
        "rank": 1,
        "scale": 1.0,
        "side": "left",
        "refresh_interval": 1000,
        "target_modules": ["*"],
        "projector": "svd",
    }
    from narrowgauge.engine import initialize

    model = torch.nn.Sequential(torch.nn.Linear(48, 16, bias=False))
    with torch.no_grad():
        next(model.parameters()).fill_(1.0)
    config = ds_config(stage, optimizer={"type": "GaLore", "params": params}, bf16={"enabled": True})
    engine, *_ = initialize(model=model, config={**config, "gradient_clipping": 0.0})
    x = torch.ones(2, 48, dtype=torch.bfloat16)
    means = []
    for step in range(201):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(x).float().sum())
            engine.step()
        if step in (0, 200):
            means.append(float(full_weights(engine)["0.weight"].double().mean()))
    weights = full_weights(engine)
    finish(engine)
    return means[0], means[1], weights


@pytest.mark.parametrize("stage", [1, 3])
def test_steps_below_the_precision_of_bf16_move_the_weights(two_ranks: RankPool, stage: int) -> None:
    """The basis of a constant gradient is a vector of quarters, and Adam's direction is one."""
    first, second = two_ranks.run(near_one, stage)
    before, after, weights = first
    assert before - after == pytest.approx(0.2, rel=0.02)
    assert torch.equal(weights["0.weight"], second[2]["0.weight"])


def after_a_skipped_step(skip: bool) -> dict[str, Tensor]:
    engine = engine_of("GaLore", GALORE, 1, bf16={"enabled": True})
    for step in range(INTERVAL + 3):
        if step == INTERVAL and skip:
            for _ in range(engine.gradient_accumulation_steps()):
                engine.backward(engine(token_batch(99, 2)) * float("nan"))
                engine.step()
            assert engine.skipped_steps == 1
        train_step(engine, step)
    weights = full_weights(engine)
    assert engine.own_optimizer.num_refreshes == 2
    finish(engine)
    return weights


def test_a_skipped_step_leaves_no_trace_in_the_bases(two_ranks: RankPool) -> None:
    """The gradients of the skipped step are not finite; the next one is the one that is observed."""
    expected, _ = two_ranks.run(after_a_skipped_step, False)
    for found in two_ranks.run(after_a_skipped_step, True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def numbers_held(stage: int) -> list[int]:
    engine = make_engine(ds_config(stage, optimizer={"type": "GaLore", "params": GALORE}))
    train_step(engine, 0)
    own = engine.own_optimizer
    moments = sum(v.numel() for s in own.state.values() for k, v in s.items() if k.startswith("exp_avg"))
    finish(engine)
    return [moments]


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_are_cut_between_the_ranks(two_ranks: RankPool, stage: int) -> None:
    """All ranks together hold the two moments of the projected matrices and of the others, up to ZeRO's padding."""
    model = tiny()
    GaLore(model, rank=GALORE["rank"])
    expected = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = [held for (held,) in two_ranks.run(numbers_held, stage)]
    assert expected <= sum(found) <= expected + 200
    assert max(found) < 0.55 * sum(found)


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"base": "Adafactor"}, r"optimizer\.params\.base: Adafactor does not work with the engine"),
        (
            {"reference_compatible": True, "projector": "svd"},
            r"optimizer\.params\.reference_compatible: true does not work with the engine",
        ),
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_zero_cannot_do_is_refused_before_anything_starts(
    stage: int, params: dict[str, Any], message: str
) -> None:
    config = load_config(ds_config(stage, optimizer={"type": "GaLore", "params": {"rank": 4, **params}}))
    with pytest.raises(ConfigError, match=message):
        check_supported(config)
    plain = load_config(ds_config(stage))
    with pytest.raises(ConfigError, match=message):
        check_supported(plain, client=GaLore(tiny(), rank=4, **params))

"""Grass under DeepSpeed ZeRO on two ranks against one process, through refresh, accumulation and clipping."""

from typing import Any

import pytest
import torch

from tests.support.cases import cases
from tests.support.ranks import RankPool
from tests.support.zero import PARAMS, ds_config, finish, full_weights, make_engine, reference_run, train_step, worst

STEPS = 20


def compare_with_one_process(stage: int, params: dict[str, Any], zero_init: bool, **overrides: Any) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, params=params, **overrides), zero_init=zero_init)
    losses = [train_step(engine, step) for step in range(STEPS)]
    expected_losses, expected = reference_run(STEPS, side=params.get("side", "columns"), **without_side(params))
    result = {
        "refreshes": engine.own_optimizer.num_refreshes,
        "groups": len(engine.basic_optimizer.param_groups),
        "loss": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "weights": worst(full_weights(engine), expected),
    }
    finish(engine)
    return result


def without_side(params: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if k != "side"}


CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
ALL_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
ROWS = {"side": "rows"}


def persistence(elements: int) -> dict[str, Any]:
    return {"zero": {"stage3_param_persistence_threshold": elements}}


CASES: dict[str, tuple[int, dict[str, Any], bool, dict[str, Any]]] = {
    **{f"zero{stage}-{side}": (stage, {"side": side}, False, {}) for stage in range(4) for side in ("columns", "rows")},
    **{f"zero{stage}-offload-decay-all": (stage, {"decay": "all"}, False, CPU_OFFLOAD) for stage in (1, 2, 3)},
    "zero3-rows-zero-init-offload-decay-all": (3, {**ROWS, "decay": "all"}, True, CPU_OFFLOAD),
    "zero3-columns-zero-init": (3, {}, True, {}),
    "zero3-rows-parameters-on-cpu": (3, ROWS, False, ALL_OFFLOAD),
    "zero2-block": (2, {"selection": "block"}, False, {}),
    "zero3-rows-block": (3, {**ROWS, "selection": "block"}, False, {}),
    "zero3-sub-groups": (3, {}, False, {"zero": {"sub_group_size": 300}}),
    "zero3-nothing-persistent": (3, {}, False, persistence(0)),
    "zero3-rows-all-persistent": (3, ROWS, False, persistence(10**6)),
    "zero1-not-contiguous": (1, {}, False, {"zero": {"contiguous_gradients": False}}),
    "zero1-small-buckets": (1, {}, False, {"zero": {"reduce_bucket_size": 700}}),
    "zero2-aligned": (2, {}, False, {"zero": {"parameter_alignment": True}}),
}


SLOW = {
    "zero1-columns",
    "zero2-columns",
    "zero3-columns",
    "zero3-rows",
    "zero1-offload-decay-all",
    "zero3-offload-decay-all",
    "zero3-columns-zero-init",
    "zero3-rows-block",
}


@pytest.mark.quick("zero0-columns", "zero2-block", "zero3-sub-groups", "zero3-rows-zero-init-offload-decay-all")
@pytest.mark.parametrize(("stage", "params", "zero_init", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, stage: int, params: dict[str, Any], zero_init: bool, overrides: dict[str, Any]
) -> None:
    """Three parameter groups, no size divisible by the number of ranks, two refreshes."""
    for result in two_ranks.run(compare_with_one_process, stage, params, zero_init, **overrides):
        assert result["refreshes"] == 2
        assert result["groups"] == 3
        assert result["loss"] < 1e-6
        assert result["weights"] < 2e-5


IN_BF16: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero{stage}": (stage, {}) for stage in (1, 2, 3)},
    "zero1-fp32-accumulation": (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2-offload": (2, CPU_OFFLOAD),
}


def losses_in_bf16(stage: int, side: str, overrides: dict[str, Any]) -> list[float]:
    engine = make_engine(ds_config(stage, bf16={"enabled": True}, params={"side": side}, **overrides))
    losses = [train_step(engine, step) for step in range(50)]
    assert engine.own_optimizer.num_refreshes == 7
    finish(engine)
    return losses


@pytest.mark.parametrize("side", ["columns", pytest.param("rows", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "overrides"), cases(IN_BF16, slow=IN_BF16.keys() - {"zero1-fp32-accumulation"}))
def test_bf16_follows_fp32_over_fifty_steps(
    two_ranks: RankPool, stage: int, side: str, overrides: dict[str, Any]
) -> None:
    """Mean over windows of ten steps, relative: single losses carry bf16's rounding of the logits."""
    expected, _ = reference_run(50, side=side)
    found, other = two_ranks.run(losses_in_bf16, stage, side, overrides)
    assert found == other
    for first in range(0, 50, 10):
        mean, wanted = (sum(losses[first : first + 10]) / 10 for losses in (found, expected))
        assert abs(mean - wanted) / wanted < 1e-2
    assert all(abs(a - b) / b < 2e-2 for a, b in zip(found, expected, strict=True))


def bf16_weights(stage: int) -> dict[str, torch.Tensor]:
    engine = make_engine(ds_config(stage, bf16={"enabled": True}, params={"decay": "all"}))
    for step in range(PARAMS["refresh_interval"]):
        train_step(engine, step)
    weights = full_weights(engine)
    finish(engine)
    return weights


def test_ranks_agree_on_what_was_rounded_stochastically(two_ranks: RankPool) -> None:
    """Right after a refresh: the demoted values were rounded by their owners, the decayed ones by every rank for
    itself.
    """
    for stage in (1, 3):
        first, second = two_ranks.run(bf16_weights, stage)
        assert all(torch.equal(first[name], second[name]) for name in first)


def weights_after_overflow() -> tuple[int, int, bool]:
    engine = make_engine(ds_config(1, bf16={"enabled": True}))
    train_step(engine, 0)
    before = full_weights(engine)
    steps = engine.own_optimizer.num_steps
    for micro_batch in range(2):
        loss = engine(torch.zeros(2, 11, dtype=torch.int64)) * (float("nan") if micro_batch else 1.0)
        engine.backward(loss)
        engine.step()
    after = full_weights(engine)
    counted = engine.own_optimizer.num_steps - steps
    same = all(torch.equal(before[name], after[name]) for name in before)
    skipped = engine.skipped_steps
    finish(engine)
    return skipped, counted, same


def test_a_skipped_step_is_not_counted_and_changes_nothing(two_ranks: RankPool) -> None:
    for skipped, counted, same in two_ranks.run(weights_after_overflow):
        assert skipped == 1
        assert counted == 0
        assert same


def scheduled_rates() -> list[tuple[str, float]]:
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 2, "warmup_type": "linear"}
    engine = make_engine(ds_config(1, scheduler={"type": "WarmupLR", "params": params}))
    for step in range(4):
        train_step(engine, step)
    rates = [(group["kind"], group["lr"]) for group in engine.basic_optimizer.param_groups]
    finish(engine)
    return rates


def test_deepspeeds_schedules_keep_the_groups_proportions(two_ranks: RankPool) -> None:
    """WarmupLR sets one rate for all groups; the compact group would silently train at the dense rate."""
    for rates in two_ranks.run(scheduled_rates):
        assert rates == [
            ("compact", pytest.approx(5e-3)),
            ("dense", pytest.approx(1e-2)),
            ("dense", pytest.approx(1e-2)),
        ]

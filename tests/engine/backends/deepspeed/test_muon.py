"""Muon and NorMuon under DeepSpeed ZeRO: numbers of one process, bytes of what is cut, resume on other ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from narrowgauge.engine.backends.deepspeed.traffic import TrafficCounter
from narrowgauge.optimizers.compact.muon import Muon
from tests.support.ranks import RankPool
from tests.support.zero import finish, train_step
from tests.support.zero_sharded import compare_with_one_process, continue_from, engine_of, save_at

STEPS = 10
PARAMS: dict[str, Any] = {
    "lr": 1e-2,
    "matrix_lr_scale": 0.5,
    "density": 0.3,
    "refresh_interval": 4,
    "weight_decay": 0.1,
    "base": "Muon",
    # Borders of shards fall between the model's two blocks: with these groups they fall into a matrix of each.
    "param_groups": [{"params": ["blocks.0.up.weight"], "weight_decay": 0.0}],
}
NORMUON = {**PARAMS, "base": "NorMuon"}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
Case = tuple[str, dict[str, Any], int, int, dict[str, Any]]
CASES: dict[str, Case] = {
    **{
        f"{kind}-zero{stage}-{k}": (kind, PARAMS, stage, k, {})
        for kind in ("Grass", "GaLore")
        for stage in range(4)
        for k in (1, 4)
    },
    **{f"normuon-zero{stage}": ("Grass", NORMUON, stage, 4, {}) for stage in range(4)},
    **{f"offload-zero{stage}-{k}": ("Grass", NORMUON, stage, k, OFFLOAD) for stage in (1, 2, 3) for k in (1, 4)},
    "rows-zero1": ("Grass", {**NORMUON, "side": "rows"}, 1, 2, {}),
    "carry-zero3": ("Grass", {**NORMUON, "moments": "carry"}, 3, 2, {}),
    "carry-rows-zero2": ("Grass", {**PARAMS, "moments": "carry", "side": "rows"}, 2, 2, {}),
    "galore-reset-zero3": ("GaLore", {**NORMUON, "moments": "reset"}, 3, 2, {}),
    "sub-groups-zero3": ("Grass", NORMUON, 3, 2, {"zero": {"sub_group_size": 300}}),
    "whole-zero2": ("Grass", {**NORMUON, "density": 1.0}, 2, 2, {}),
}


@pytest.mark.quick("Grass-zero1-4", "normuon-zero3", "offload-zero2-4")
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_two_ranks_equal_one_process(two_ranks: RankPool, case: Case) -> None:
    """Micro-batches, clipping, two refreshes; the momentum moves once per step."""
    kind, params, stage, k, overrides = case
    for result in two_ranks.run(
        compare_with_one_process, kind, params, stage, STEPS, False, gradient_accumulation_steps=k, **overrides
    ):
        assert result["loss"] < 1e-6
        assert result["weights"] < 2e-5


def cut_and_sent(stage: int) -> dict[str, Any]:
    """Of a step: what lies on both ranks, and what this one sends in gathers with and without Muon."""
    found: dict[str, Any] = {}
    for base in ("AdamW", "Muon"):
        engine = engine_of("Grass", {**PARAMS, "base": base, "refresh_interval": None}, stage)
        train_step(engine, 0)
        train_step(engine, 1)
        counter = TrafficCounter()
        counter.attach()
        train_step(engine, 2)
        counter.detach()
        found[base] = counter.gathered
        own = engine.own_optimizer.base
        if isinstance(own, Muon):
            rank = torch.distributed.get_rank()
            plans = list(own._plans.values())
            found["matrices"] = sum(len(plan.whole) + len(plan.cut) for plan in plans)
            found["cut"] = sum(len(plan.cut) for plan in plans)
            # Of those that another updates the own piece and a flag go there; of the own ones the other's come back.
            found["expected"] = sum(
                4 * (plan.own[k].length + 1 if updater != rank else plan.held[k][1 - rank][1])
                for plan in plans
                for k, updater in plan.cut.items()
                if k in plan.own
            )
        finish(engine)
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_only_pieces_of_what_a_border_cuts_are_sent(two_ranks: RankPool, stage: int) -> None:
    """At stage 3 every matrix is cut, and each rank updates half of them."""
    results = two_ranks.run(cut_and_sent, stage)
    for found in results:
        assert found["Muon"] - found["AdamW"] == found["expected"]
        assert found["cut"] == (12 if stage == 3 else 2)
    assert sum(found["matrices"] - found["cut"] for found in results) == (0 if stage == 3 else 10)


@pytest.mark.quick("normuon-1-3")
@pytest.mark.parametrize(
    ("params", "saved_at", "loaded_at"),
    [
        pytest.param(NORMUON, 1, 3, id="normuon-1-3"),
        pytest.param(NORMUON, 3, 1, id="normuon-3-1"),
        pytest.param(NORMUON, 2, 0, id="normuon-2-0"),
        pytest.param(PARAMS, 3, 2, id="muon-3-2"),
    ],
)
def test_a_checkpoint_in_the_middle_of_an_interval_loads_on_other_ranks(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, params: dict[str, Any], saved_at: int, loaded_at: int
) -> None:
    expected = two_ranks.run(save_at, "Grass", params, saved_at, tmp_path, 6, 11)[0]
    for pool in (two_ranks, one_rank):
        for losses in pool.run(continue_from, "Grass", params, loaded_at, tmp_path, 6, 11):
            assert losses == pytest.approx(expected, abs=2e-6)

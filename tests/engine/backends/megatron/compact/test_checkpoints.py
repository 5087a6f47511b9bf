"""Checkpoints of compact optimizers between layouts and engines, after a change of subspace and before another."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps
from tests.support.ranks import RankPool
from tests.support.zero import worst

from .test_parity import OPTIMIZERS, PP2, SP, TP2

SAVED_AFTER, STEPS = 4, 8
Layout = tuple[str, int, dict[str, Any] | None]
SAVED_BY: Layout = ("megatron", 4, {**TP2, **SP})
LOADED_BY: list[Layout] = [
    ("megatron", 1, {}),
    ("megatron", 2, {**PP2, "virtual_pipeline": 2}),
    ("megatron", 4, {**TP2, **PP2, "distributed_optimizer": False}),
    ("ddp", 1, None),
]


def check(steps: Any, weights: Any, found: Any, whole: Any, where: Any) -> None:
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps[SAVED_AFTER:]], abs=2e-6), where
    assert worst(whole, weights) < 2e-5, where


@pytest.mark.parametrize(
    "optimizer",
    ["columns", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rows", "top", "galore", "groups"))],
)
def test_a_run_goes_on_in_another_layout(megatron_ranks: MegatronPool, tmp_path: Path, optimizer: str) -> None:
    folder, more = str(tmp_path / "saved"), {"optimizer": OPTIMIZERS[optimizer], "last": STEPS}
    engine, ranks, layout = SAVED_BY
    steps, _, weights = megatron_ranks.run(
        run_steps, engine, "llama", layout, ranks=ranks, save=(SAVED_AFTER, folder), **more
    )[0]
    for engine, ranks, layout in LOADED_BY:
        found, _, whole = megatron_ranks.run(run_steps, engine, "llama", layout, ranks=ranks, load=folder, **more)[0]
        check(steps, weights, found, whole, (engine, layout))


def under_zero_3(optimizer: str, folder: str, save: bool) -> Any:
    kinds: dict[str, Any] = {"save": (SAVED_AFTER, folder)} if save else {"load": folder}
    more = {"zero_optimization": {"stage": 3}, "steps_per_print": 1 << 40, "optimizer": OPTIMIZERS[optimizer]}
    return run_steps("deepspeed", "llama", None, last=STEPS, **kinds, **more)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["columns", "galore"])
def test_a_run_goes_on_under_zero_3_and_back(
    megatron_ranks: MegatronPool, two_ranks: RankPool, tmp_path: Path, optimizer: str
) -> None:
    folder, more = str(tmp_path / "megatron"), {"optimizer": OPTIMIZERS[optimizer], "last": STEPS}
    engine, ranks, layout = SAVED_BY
    steps, _, weights = megatron_ranks.run(
        run_steps, engine, "llama", layout, ranks=ranks, save=(SAVED_AFTER, folder), **more
    )[0]
    found, _, whole = two_ranks.run(under_zero_3, optimizer, folder, False)[0]
    check(steps, weights, found, whole, "ZeRO-3")
    folder = str(tmp_path / "deepspeed")
    two_ranks.run(under_zero_3, optimizer, folder, True)
    found, _, whole = megatron_ranks.run(run_steps, engine, "llama", layout, ranks=ranks, load=folder, **more)[0]
    check(steps, weights, found, whole, "back")

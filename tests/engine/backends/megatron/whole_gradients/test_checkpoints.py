"""Checkpoints of optimizers on whole gradients between layouts and engines, after a change of subspace and before
another: moments of selected columns lie in boxes where the layout cuts their matrix.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps

from ..compact.test_checkpoints import LOADED_BY, SAVED_AFTER, SAVED_BY, STEPS, Layout, check
from ..compact.test_parity import PP2, SP, TP2
from .test_parity import EP2, ETP2, OPTIMIZERS

SAVED: dict[str, Layout] = {
    "llama": SAVED_BY,
    "qwen2": ("megatron", 4, {**TP2, **PP2}),
    "mixtral": ("megatron", 4, {**TP2, **SP, **EP2, **ETP2}),
}
LOADED: dict[str, list[Layout]] = {
    "llama": LOADED_BY,
    "qwen2": [("megatron", 2, TP2), ("ddp", 1, None)],
    "mixtral": [("megatron", 4, {**PP2, **EP2, "distributed_optimizer": False}), ("ddp", 1, None)],
}
CASES = [
    *((optimizer, "llama") for optimizer in ("frugal", "frugal-rows", "frugal-svd", "apollo", "apollo-mini", "lars")),
    *((optimizer, "mixtral") for optimizer in ("frugal", "frugal-random", "apollo", "lamb")),
    ("frugal", "qwen2"),
]


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [pytest.param(*case, marks=() if case == ("frugal", "llama") else pytest.mark.slow) for case in CASES],
)
def test_a_run_goes_on_in_another_layout_and_comes_back(
    megatron_ranks: MegatronPool, tmp_path: Path, optimizer: str, family: str
) -> None:
    folder, more = str(tmp_path / "saved"), {"optimizer": OPTIMIZERS[optimizer], "last": STEPS}
    engine, ranks, layout = SAVED[family]
    steps, _, weights = megatron_ranks.run(
        run_steps, engine, family, layout, ranks=ranks, save=(SAVED_AFTER, folder), **more
    )[0]
    back = str(tmp_path / "ddp")
    for engine, ranks, layout in LOADED[family]:
        save: dict[str, Any] = {"save": (SAVED_AFTER + 1, back)} if engine == "ddp" else {}
        found, _, whole = megatron_ranks.run(
            run_steps, engine, family, layout, ranks=ranks, load=folder, **save, **more
        )[0]
        check(steps, weights, found, whole, (engine, layout))
    engine, ranks, layout = SAVED[family]
    found, _, whole = megatron_ranks.run(run_steps, engine, family, layout, ranks=ranks, load=back, **more)[0]
    check(steps[1:], weights, found, whole, "back")

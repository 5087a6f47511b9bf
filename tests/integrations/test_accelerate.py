"""``accelerator.prepare`` trains with our optimizers: to the weights of a plain loop around ``initialize``."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
from torch import Tensor

from narrowgauge.integrations.accelerate import narrowgauge_initializes
from tests.integrations.fine_tuning import accelerate_refuses, train_by_loop, trained_by_accelerate, weights_in
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import finish, train_step, worst

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def by_loop(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("loop")
    one_rank.run(train_by_loop, folder)
    return weights_in(folder)


@pytest.mark.parametrize(
    ("stage", "client"),
    [
        (2, False),
        *(pytest.param(*case, marks=slow) for case in ((None, True), (0, False), (1, True), (3, False), (3, True))),
    ],
)
def test_weights_are_those_of_a_plain_loop(
    stage: int | None, client: bool, by_loop: dict[str, Tensor], two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(trained_by_accelerate, tmp_path, stage=stage, client=client) == ["Grass", "Grass"]
    assert worst(weights_in(tmp_path), by_loop) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16(stage: int, one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(trained_by_accelerate, tmp_path, stage=stage, bf16=True)
    one_rank.run(train_by_loop, tmp_path / "loop", bf16=True)
    found, expected = weights_in(tmp_path), weights_in(tmp_path / "loop")
    assert worst({k: v.float() for k, v in found.items()}, {k: v.float() for k, v in expected.items()}) < 1e-3


def test_an_optimizer_that_is_passed_trains_under_cpu_offload(
    by_loop: dict[str, Tensor], one_rank: RankPool, tmp_path: Path
) -> None:
    """Accelerate took DeepSpeed's Adam in its place."""
    found = one_rank.run(trained_by_accelerate, tmp_path, stage=2, client=True, cpu_offload=True)
    assert found == ["Grass"]
    assert worst(weights_in(tmp_path), by_loop) < 1e-5


def test_ranks_that_accelerate_does_not_know_of_are_refused(one_rank: RankPool) -> None:
    (said,) = one_rank.run(accelerate_refuses, 4)
    assert "expected the launcher's 4 process ranks, got 1" in said


def foreign_with_offload(folder: str) -> tuple[int, int]:
    """How often DeepSpeed's own ``initialize`` was called, and the bytes that a step's forward has written."""
    calls, original = [], deepspeed.initialize

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(1)
        return original(*args, **given)

    deepspeed.initialize = counted
    try:
        block = {"path": folder, "keep_resident": 0, "min_tensor_bytes": 0}
        config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
        with narrowgauge_initializes({"activation_offload": block}):
            engine, *_ = deepspeed.initialize(model=tiny(), config=config)
    finally:
        deepspeed.initialize = original
    train_step(engine, 0)
    written = engine.activation_offload.stats().written
    finish(engine)
    return len(calls), written


def test_any_optimizer_goes_with_the_offload(one_rank: RankPool, tmp_path: Path) -> None:
    """Optimizers that are not narrowgauge's are made by DeepSpeed's function, which was looked up in its place: endless
    calls of itself.
    """
    ((calls, written),) = one_rank.run(foreign_with_offload, str(tmp_path))
    assert calls == 1
    assert written > 10_000

"""Checkpoints between layouts and engines: a run goes on as if nothing had been cut otherwise."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps
from tests.support.ranks import RankPool
from tests.support.zero import worst

SAVED_AFTER, STEPS = 2, 4
ALL = {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True}
FOLDED = {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 4, "expert_tensor_parallel": 1}
Layout = tuple[str, int, dict[str, Any] | None]

# What is saved, and what goes on from it: the engine, its process ranks and layout.
CASES: dict[str, tuple[str, Layout, list[Layout]]] = {
    "dense": (
        "llama",
        ("megatron", 4, ALL),
        [
            ("megatron", 2, {}),
            ("megatron", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2, "distributed_optimizer": False}),
            ("ddp", 1, None),
        ],
    ),
    "from-ddp": ("llama", ("ddp", 2, None), [("megatron", 4, ALL), ("megatron", 4, {"tensor_parallel": 2})]),
    "plain": (
        "llama",
        ("megatron", 4, {"tensor_parallel": 2, "distributed_optimizer": False}),
        [("megatron", 1, {}), ("megatron", 4, ALL)],
    ),
    "context": (
        "llama",
        ("megatron", 4, {"context_parallel": 2}),
        [("megatron", 4, {"context_parallel": 2, "tensor_parallel": 2}), ("ddp", 1, None)],
    ),
    "tied": (
        "qwen2",
        ("megatron", 4, {"pipeline_parallel": 2}),
        [("ddp", 1, None), ("megatron", 2, {"tensor_parallel": 2})],
    ),
    "experts": (
        "mixtral",
        ("megatron", 4, FOLDED),
        [("ddp", 1, None), ("megatron", 2, {"expert_parallel": 2, "distributed_optimizer": False})],
    ),
    "experts-plain": (
        "mixtral",
        ("megatron", 2, {"expert_parallel": 2, "distributed_optimizer": False}),
        [("megatron", 4, FOLDED), ("megatron", 4, {"expert_parallel": 2, "expert_tensor_parallel": 2})],
    ),
}


def go_on(pool: Any, where: Layout, family: str, folder: str) -> Any:
    engine, ranks, layout = where
    return pool.run(run_steps, engine, family, layout, ranks=ranks, last=STEPS, load=folder)[0]


@pytest.mark.parametrize(
    ("family", "saved_by", "loaded_by"),
    cases(CASES, slow=["dense", "from-ddp", "plain", "context", "tied", "experts-plain"]),
)
def test_a_run_goes_on_in_another_layout(
    megatron_ranks: MegatronPool, tmp_path: Path, family: str, saved_by: Layout, loaded_by: list[Layout]
) -> None:
    folder = str(tmp_path / "step-2")
    engine, ranks, layout = saved_by
    save = (SAVED_AFTER, folder)
    steps, evaluated, weights = megatron_ranks.run(
        run_steps, engine, family, layout, ranks=ranks, last=STEPS, save=save
    )[0]
    for where in loaded_by:
        found, evaluation, whole = go_on(megatron_ranks, where, family, folder)
        expected = steps[SAVED_AFTER:]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=2e-6), where
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-5), where
        assert evaluation == pytest.approx(evaluated, abs=2e-6), where
        assert worst(whole, weights) < 2e-5, where


def under_deepspeed(family: str, folder: str, save: bool) -> Any:
    more = {"zero_optimization": {"stage": 1}, "steps_per_print": 1 << 40}
    kinds: dict[str, Any] = {"save": (SAVED_AFTER, folder)} if save else {"load": folder}
    return run_steps("deepspeed", family, None, last=STEPS, **kinds, **more)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_goes_on_under_deepspeed_and_back(
    megatron_ranks: MegatronPool, two_ranks: RankPool, tmp_path: Path, family: str
) -> None:
    layout = FOLDED if family == "mixtral" else ALL
    folder = str(tmp_path / "megatron")
    steps, _, weights = megatron_ranks.run(
        run_steps, "megatron", family, layout, last=STEPS, save=(SAVED_AFTER, folder)
    )[0]
    expected = pytest.approx([loss for loss, _ in steps[SAVED_AFTER:]], abs=2e-6)
    found, _, whole = two_ranks.run(under_deepspeed, family, folder, False)[0]
    assert [loss for loss, _ in found] == expected
    assert worst(whole, weights) < 2e-5
    folder = str(tmp_path / "deepspeed")
    two_ranks.run(under_deepspeed, family, folder, True)
    found, _, whole = go_on(megatron_ranks, ("megatron", 4, layout), family, folder)
    assert [loss for loss, _ in found] == expected
    assert worst(whole, weights) < 2e-5

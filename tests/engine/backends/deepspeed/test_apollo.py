"""APOLLO under DeepSpeed ZeRO on two ranks against one process, through refresh, accumulation and clipping."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.models import is_matrix, tiny
from tests.support.ranks import RankPool
from tests.support.zero_sharded import compare_with_one_process, continue_from, save_at

STEPS = 14
APOLLO: dict[str, Any] = {
    "lr": 3e-3,
    "rank": 7,
    "refresh_interval": 4,
    "betas": [0.8, 0.95],
    "eps": 1e-4,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "param_groups": [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}],
}
MINI = {**APOLLO, "rank": 1, "scale_type": "tensor", "scale": 2.0}
CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
CASES: dict[str, tuple[dict[str, Any], int, bool, dict[str, Any]]] = {
    **{f"zero{stage}": (APOLLO, stage, False, {}) for stage in range(4)},
    **{f"zero{stage}-mini": (MINI, stage, False, {}) for stage in (1, 2, 3)},
    "zero1-reference": ({**APOLLO, "reference_compatible": True}, 1, False, {}),
    "zero2-offload": (APOLLO, 2, False, CPU_OFFLOAD),
    "zero3-offload": (MINI, 3, False, CPU_OFFLOAD),
    "zero3-zero-init": (APOLLO, 3, True, {}),
    "zero3-sub-groups": (APOLLO, 3, False, {"zero": {"sub_group_size": 300}}),
    "zero1-not-contiguous": (APOLLO, 1, False, {"zero": {"contiguous_gradients": False}}),
}


SLOW = {"zero1", "zero2", "zero3", "zero2-mini", "zero3-mini"}


@pytest.mark.quick("zero0", "zero1-mini", "zero2-offload", "zero3-sub-groups")
@pytest.mark.parametrize(("params", "stage", "zero_init", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, params: dict[str, Any], stage: int, zero_init: bool, overrides: dict[str, Any]
) -> None:
    """Three parameter groups, no size divisible by the number of ranks, three refreshes."""
    results = two_ranks.run(compare_with_one_process, "Apollo", params, stage, STEPS, zero_init, **overrides)
    for result in results:
        assert result["subspace"]["num_refreshes"] == 3
        assert result["subspace"]["seeds"] == results[0]["subspace"]["seeds"]
        assert result["subspace"]["norms"] == pytest.approx(results[0]["subspace"]["norms"], rel=1e-4 * (stage == 0))
        assert result["loss"] < 2e-6
        assert result["weights"] < 5e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_of_matrices_are_cut_between_the_ranks(two_ranks: RankPool, stage: int) -> None:
    """All ranks together hold two numbers per rank and channel, and two per element of the other parameters, up to
    ZeRO's padding.
    """
    results = two_ranks.run(compare_with_one_process, "Apollo", APOLLO, stage, 1, False)
    parameters = dict(tiny().named_parameters())
    matrices = 2 * 7 * sum(max(p.shape) for name, p in parameters.items() if is_matrix(name))
    others = 2 * sum(p.numel() for name, p in parameters.items() if not is_matrix(name))
    found = [result["state_numbers"] for result in results]
    assert matrices + others <= sum(found) <= matrices + others + 100
    assert max(found) < 0.55 * sum(found)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_ranks_continues_on_one_and_two(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, saved_at: int, loaded_at: int
) -> None:
    """Between two refreshes, at another stage, across the next refresh."""
    expected = two_ranks.run(save_at, "Apollo", APOLLO, saved_at, tmp_path, 6, 10)[0]
    for pool in (two_ranks, one_rank):
        for losses in pool.run(continue_from, "Apollo", APOLLO, loaded_at, tmp_path, 6, 10):
            assert losses == pytest.approx(expected, abs=2e-6)

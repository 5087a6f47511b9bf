"""LAMB and LARS under DeepSpeed ZeRO on two ranks against one process, with accumulation and clipping."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.ranks import RankPool
from tests.support.zero_sharded import compare_with_one_process, continue_from, save_at

STEPS = 10
COMMON: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "param_groups": [{"params": ["embed.weight"], "lr": 3e-2}],
}
LAMB = {**COMMON, "betas": [0.8, 0.95], "eps": 1e-4}
BOUNDED = {**LAMB, "weight_norm_bounds": [0.5, 2.0], "exclude": []}
LARS = {**COMMON, "momentum": 0.8, "trust_coefficient": 0.3}
NESTEROV = {**LARS, "nesterov": True}
CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
CASES: dict[str, tuple[str, dict[str, Any], int, bool, dict[str, Any]]] = {
    **{f"lamb-zero{stage}": ("Lamb", LAMB, stage, False, {}) for stage in range(4)},
    **{f"lars-zero{stage}": ("Lars", LARS, stage, False, {}) for stage in range(4)},
    "lamb-zero1-bounded": ("Lamb", BOUNDED, 1, False, {}),
    "lamb-zero2-offload": ("Lamb", LAMB, 2, False, CPU_OFFLOAD),
    "lars-zero3-offload-nesterov": ("Lars", NESTEROV, 3, False, CPU_OFFLOAD),
    "lamb-zero3-zero-init": ("Lamb", LAMB, 3, True, {}),
    "lars-zero3-sub-groups": ("Lars", LARS, 3, False, {"zero": {"sub_group_size": 300}}),
}


SLOW = {"lamb-zero2", "lamb-zero3", "lars-zero1", "lars-zero2", "lars-zero3"}


@pytest.mark.quick("lamb-zero1-bounded", "lamb-zero3-zero-init", "lars-zero0")
@pytest.mark.parametrize(("kind", "params", "stage", "zero_init", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, kind: str, params: dict[str, Any], stage: int, zero_init: bool, overrides: dict[str, Any]
) -> None:
    """Three parameter groups that hold several tensors each; no size is divisible by the number of ranks."""
    for result in two_ranks.run(compare_with_one_process, kind, params, stage, STEPS, zero_init, **overrides):
        assert result["subspace"]["num_steps"] == STEPS
        assert result["loss"] < 2e-6
        assert result["weights"] < 5e-5


@pytest.mark.parametrize(("kind", "params"), [("Lamb", LAMB), ("Lars", LARS)])
def test_a_checkpoint_of_two_ranks_continues_on_one_and_two(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, kind: str, params: dict[str, Any]
) -> None:
    expected = two_ranks.run(save_at, kind, params, 1, tmp_path, 4, 8)[0]
    for pool in (two_ranks, one_rank):
        for losses in pool.run(continue_from, kind, params, 3, tmp_path, 4, 8):
            assert losses == pytest.approx(expected, abs=2e-6)

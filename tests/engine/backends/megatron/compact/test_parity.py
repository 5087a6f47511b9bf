"""Compact optimizers in every layout against one process of the ``ddp`` engine, whose selections are the same.

With accumulation, clipping, decay, a schedule and at least two changes of subspace.
"""

from typing import Any

import pytest

from tests.support.megatron_parity import assert_equal_runs
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import Run, run_steps

STEPS = 8
# A larger epsilon than usual: Adam divides gradients that are all rounding by their own size.
BASE: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "refresh_interval": 3, "weight_decay": 0.1}
COLUMNS: dict[str, Any] = {**BASE, "density": 0.25, "strata": 4}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "columns": {"type": "Grass", "params": COLUMNS},
    "rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "density": 0.5, "decay": "all"}},
    "block": {"type": "Grass", "params": {**COLUMNS, "selection": "block", "shared_inputs": "siblings"}},
    "top": {"type": "Grass", "params": {**COLUMNS, "selection": "top", "decay": "all"}},
    "top-rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "selection": "top", "statistics": "exact"}},
    "multinomial": {
        "type": "Grass",
        "params": {**COLUMNS, "selection": "multinomial", "sketch_size": 4, "shared_inputs": "siblings"},
    },
    "groups": {
        "type": "Grass",
        "params": {
            **COLUMNS,
            "target_modules": ["*.mlp.*"],
            "matrix_lr_scale": 0.5,
            "param_groups": [{"params": ["*layernorm*", "*gate_proj*"], "weight_decay": 0.0}],
        },
    },
    "carry": {"type": "Grass", "params": {**COLUMNS, "density": 0.5, "moments": "carry", "decay": "all"}},
    "carry-rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "density": 0.5, "moments": "carry"}},
    "budget": {"type": "Grass", "params": {**BASE, "budget": 12_000}},
    "full": {"type": "Grass", "params": {**COLUMNS, "density": 1.0, "matrix_lr_scale": 0.5}},
    "galore": {"type": "GaLore", "params": {**BASE, "rank": 4}},
    "galore-left": {"type": "GaLore", "params": {**BASE, "rank": 4, "side": "left", "projector": "power"}},
    "galore-right": {"type": "GaLore", "params": {**BASE, "density": 0.25, "side": "right", "moments": "reset"}},
    "galore-full": {"type": "GaLore", "params": {**BASE, "rank": 4, "side": "full", "projector": "svd"}},
}

TP2, PP2, SP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"sequence_parallel": True}
PLAIN = {"distributed_optimizer": False}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one-plain": (1, PLAIN),
    "TP2": (2, TP2),
    "TP2-SP": (2, {**TP2, **SP}),
    "DP2": (2, {}),
    "DP2-plain": (2, PLAIN),
    "DP2-overlap": (2, OVERLAP),
    "TP2-DP2": (4, TP2),
    "TP2-DP2-plain": (4, {**TP2, **PLAIN}),
    "TP2-SP-DP2-overlap": (4, {**TP2, **SP, **OVERLAP}),
    "TP2-SP-CP2": (4, {**TP2, **SP, "context_parallel": 2}),
    "PP2": (2, PP2),
    "PP2-DP2-overlap": (4, {**PP2, **OVERLAP}),
    "VPP": (2, {**PP2, "virtual_pipeline": 2}),
    "TP2-SP-PP2": (4, {**TP2, **SP, **PP2}),
    "TP2-full": (2, {**TP2, "recompute": "full"}),
    "TP2-SP-selective": (2, {**TP2, **SP, **SELECTIVE}),
}

QUICK = {("rows", "TP2-SP-PP2"), ("galore", "TP2-SP"), ("carry", "TP2-SP-DP2-overlap")}
ANYWHERE = OPTIMIZERS.keys() - {"budget"}
SLOW = {
    ("multinomial", "TP2-full"),
    *((optimizer, layout) for optimizer in ("columns", "rows", "galore") for layout in LAYOUTS),
    *((optimizer, layout) for optimizer in ANYWHERE for layout in ("one", "TP2-SP-DP2-overlap")),
    *(("budget", layout) for layout in ("DP2-plain", "DP2-overlap")),
    *(("carry-rows", layout) for layout in ("PP2-DP2-overlap", "TP2-DP2-plain")),
    ("groups", "TP2-SP-PP2"),
    ("top", "VPP"),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case))
    for case in sorted(QUICK | SLOW)
]


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool) -> Any:
    """What one process of the ``ddp`` engine finds, by optimizer; once each."""
    found: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in found:
            optimizer = OPTIMIZERS[name]
            (found[name],) = megatron_ranks.run(run_steps, "ddp", "llama", ranks=1, last=STEPS, optimizer=optimizer)
        return found[name]

    return of


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_a_layout_equals_one_process_of_ddp(
    megatron_ranks: MegatronPool, expected: Any, optimizer: str, layout: str
) -> None:
    ranks, block = LAYOUTS[layout]
    results = megatron_ranks.run(
        run_steps, "megatron", "llama", block, ranks=ranks, last=STEPS, optimizer=OPTIMIZERS[optimizer]
    )
    assert_equal_runs(results, expected(optimizer), abs=1e-6)


@pytest.mark.parametrize("layout", ["TP2-SP", pytest.param("TP2-SP-DP2-overlap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["columns", pytest.param("galore", marks=pytest.mark.slow)])
def test_bf16_is_near_to_fp32(megatron_ranks: MegatronPool, expected: Any, optimizer: str, layout: str) -> None:
    steps, _, _ = expected(optimizer)
    ranks, block = LAYOUTS[layout]
    more = {"optimizer": OPTIMIZERS[optimizer], "bf16": {"enabled": True}}
    found, _, weights = megatron_ranks.run(run_steps, "megatron", "llama", block, ranks=ranks, last=STEPS, **more)[0]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], abs=1e-2)
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}

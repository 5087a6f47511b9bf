"""The ``megatron`` engine in many layouts against one process of the ``ddp`` engine: the same numbers."""

from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import Run, run_steps
from tests.support.zero import worst

TP2, PP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
SP, EP2 = {"sequence_parallel": True}, {"expert_parallel": 2}
CP2, PLAIN = {"context_parallel": 2}, {"distributed_optimizer": False}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one": ("llama", 1, {}),
    "one-plain": ("llama", 1, PLAIN),
    "DP2": ("llama", 2, {}),
    "DP2-plain": ("llama", 2, PLAIN),
    "DP2-overlap": ("llama", 2, OVERLAP),
    "TP2": ("llama", 2, TP2),
    "TP2-SP": ("llama", 2, {**TP2, **SP}),
    "CP2": ("llama", 2, CP2),
    "CP2-plain": ("llama", 2, {**CP2, **PLAIN}),
    "CP4": ("llama", 4, {"context_parallel": 4}),
    "CP2-DP2-overlap": ("llama", 4, {**CP2, **OVERLAP}),
    "CP2-TP2-SP": ("llama", 4, {**CP2, **TP2, **SP}),
    "CP2-VPP": ("llama", 4, {**CP2, **PP2, "virtual_pipeline": 2}),
    "CP2-full": ("llama", 2, {**CP2, "recompute": "full"}),
    "CP2-selective": ("qwen3", 2, {**CP2, **SELECTIVE}),
    "CP2-EP2": ("mixtral", 4, {**CP2, **EP2}),
    "CP2-EP2-ETP1-TP2-SP": ("mixtral", 4, {**CP2, **TP2, **SP, **EP2, "expert_tensor_parallel": 1}),
    "PP2": ("llama", 2, PP2),
    "PP2-plain": ("llama", 2, {**PP2, **PLAIN}),
    "PP4": ("llama", 4, {"pipeline_parallel": 4}),
    "VPP": ("llama", 2, {**PP2, "virtual_pipeline": 2}),
    "TP2-PP2-SP": ("llama", 4, {**TP2, **PP2, **SP}),
    "TP2-VPP-SP": ("llama", 4, {**TP2, **PP2, **SP, "virtual_pipeline": 2}),
    "PP2-DP2-overlap": ("llama", 4, {**PP2, **OVERLAP}),
    "VPP-DP2-overlap": ("llama", 4, {**PP2, **OVERLAP, "virtual_pipeline": 2}),
    "TP2-DP2-plain": ("llama", 4, {**TP2, **PLAIN}),
    "full": ("llama", 2, {**TP2, **SP, "recompute": "full"}),
    "full-VPP": ("llama", 2, {**PP2, "virtual_pipeline": 2, "recompute": "full", "recompute_layers": 1}),
    "selective": (
        "llama",
        2,
        {**TP2, **SELECTIVE},
    ),
    "mistral-TP2": ("mistral", 2, TP2),
    "tied": ("qwen2", 1, {}),
    "tied-TP2-PP2": ("qwen2", 4, {**TP2, **PP2}),
    "tied-PP2-DP2": ("qwen2", 4, PP2),
    "qk-norm-TP2": ("qwen3", 2, TP2),
    "qk-norm-TP2-SP-PP2": ("qwen3", 4, {**TP2, **SP, **PP2}),
    "MoE": ("mixtral", 1, {}),
    "EP2": ("mixtral", 2, EP2),
    "EP2-plain": ("mixtral", 2, {**EP2, **PLAIN}),
    "EP2-DP4": ("mixtral", 4, EP2),
    "EP2-PP2": ("mixtral", 4, {**EP2, **PP2}),
    "EP2-ETP2-TP2-SP": ("mixtral", 4, {**TP2, **SP, **EP2}),
    "EP4-ETP1-TP2-SP": ("mixtral", 4, {**TP2, **SP, "expert_parallel": 4, "expert_tensor_parallel": 1}),
    "ETP1-TP2-SP": ("mixtral", 2, {**TP2, **SP, "expert_tensor_parallel": 1}),
    "ETP2-TP1": ("mixtral", 2, {"expert_tensor_parallel": 2}),
    "EP2-ETP2-TP1": ("mixtral", 4, {**EP2, "expert_tensor_parallel": 2}),
    "EP2-recompute-moe": ("mixtral", 2, {**EP2, "recompute": "selective", "recompute_modules": ["moe"]}),
    "qwen3-moe-EP2": ("qwen3_moe", 2, EP2),
    "shared-expert-EP2": ("qwen2_moe", 2, EP2),
    "shared-expert-TP2-SP-EP2-ETP1": ("qwen2_moe", 2, {**TP2, **SP, **EP2, "expert_tensor_parallel": 1}),
}
QUICK = {"one", "CP2", "VPP", "TP2-PP2-SP", "EP2"}


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool) -> Any:
    """What one process of the ``ddp`` engine finds, by family; once each."""
    found: dict[str, Run] = {}

    def of(family: str) -> Run:
        if family not in found:
            (found[family],) = megatron_ranks.run(run_steps, "ddp", family, ranks=1)
        return found[family]

    return of


@pytest.mark.parametrize(("family", "ranks", "layout"), cases(CASES, slow=CASES.keys() - QUICK))
def test_a_layout_equals_one_process_of_ddp(
    megatron_ranks: MegatronPool, expected: Any, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    """From scratch by the same seed, with accumulation, clipping and a schedule; losses, norms, evaluation, weights."""
    steps, evaluated, weights = expected(family)
    assert all(norm > 0.2 for _, norm in steps)
    for number, (found, evaluation, whole) in enumerate(
        megatron_ranks.run(run_steps, "megatron", family, layout, ranks=ranks)
    ):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], abs=1e-6)
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in steps], rel=1e-5)
        assert evaluation == pytest.approx(evaluated, abs=1e-6)
        if number == 0:
            assert worst(whole, weights) < 2e-5


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("layout", "ranks"),
    cases({"DP2": ({}, 2), "TP2-SP-DP2": ({**TP2, **SP}, 4), "PP2-plain": ({**PP2, **PLAIN}, 2)}, slow=["PP2-plain"]),
)
def test_bf16_is_near_to_fp32(megatron_ranks: MegatronPool, expected: Any, layout: dict[str, Any], ranks: int) -> None:
    steps, _, _ = expected("llama")
    found, _, weights = megatron_ranks.run(run_steps, "megatron", "llama", layout, ranks=ranks, **BF16)[0]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], abs=1e-2)
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}

"""Compact experts: against one process of the ``ddp`` engine, in bytes, in checkpoints, and one without tokens."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from narrowgauge.engine.report.summary import optimizer_state_bytes
from tests.support.megatron_parity import assert_equal_runs, run_of_ddp
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, micro_batches, run_config, run_steps

from .test_checkpoints import check
from .test_parity import BASE, COLUMNS, OVERLAP, PP2, SP, TP2
from .test_traffic import bytes_per_step, padded

STEPS, SAVED_AFTER = 8, 4
EP2, ETP1, ETP2 = {"expert_parallel": 2}, {"expert_tensor_parallel": 1}, {"expert_tensor_parallel": 2}
# Of a shared expert's gate, which Megatron has no parallel layer for, the engines do not train the same.
NO_GATE = {"target_modules": ["*.self_attn.*", "*.experts.*", "*.shared_expert.*"]}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "columns": {"type": "Grass", "params": COLUMNS},
    "rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "density": 0.5, "decay": "all"}},
    "top": {"type": "Grass", "params": {**COLUMNS, "selection": "top", "sketch_size": 4, "decay": "all"}},
    "top-rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "selection": "top", "statistics": "exact"}},
    "experts-only": {"type": "Grass", "params": {**COLUMNS, "target_modules": ["*.gate_up_proj"]}},
    "carry": {"type": "Grass", "params": {**COLUMNS, "density": 0.5, "moments": "carry"}},
    "carry-rows": {"type": "Grass", "params": {**COLUMNS, "side": "rows", "density": 0.5, "moments": "carry"}},
    "budget": {"type": "Grass", "params": {**BASE, "budget": 30_000}},
    "no-gate": {"type": "Grass", "params": {**COLUMNS, **NO_GATE}},
    "galore": {"type": "GaLore", "params": {**BASE, "rank": 4}},
    "galore-full": {"type": "GaLore", "params": {**BASE, "rank": 4, "side": "full", "projector": "svd"}},
}
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("columns", "mixtral", 2, EP2),
    ("columns", "mixtral", 4, {**TP2, **SP, **EP2, **ETP2}),
    ("columns", "mixtral", 4, {**TP2, **SP, "expert_parallel": 4, **ETP1}),
    ("columns", "mixtral", 4, {**PP2, **EP2, **OVERLAP}),
    ("columns", "mixtral", 2, {**EP2, "recompute": "selective", "recompute_modules": ["moe"]}),
    ("columns", "mixtral", 2, {**TP2, **SP, **ETP1}),
    ("columns", "qwen3_moe", 2, EP2),
    ("no-gate", "qwen2_moe", 2, {**TP2, **SP, **EP2, **ETP1}),
    ("rows", "mixtral", 4, {**EP2, **ETP2}),
    ("rows", "mixtral", 4, {**EP2, "distributed_optimizer": False}),
    ("top", "mixtral", 4, {**EP2, **ETP2}),
    ("top-rows", "mixtral", 4, EP2),
    ("experts-only", "mixtral", 2, EP2),
    ("galore", "mixtral", 4, {**TP2, **SP, **EP2, **ETP1}),
    ("galore", "mixtral", 2, {**EP2, "recompute": "full"}),
    ("galore-full", "mixtral", 2, EP2),
    ("carry", "mixtral", 4, {**EP2, **ETP2}),
    ("carry-rows", "mixtral", 4, {**TP2, **SP, **EP2, **ETP2}),
    ("budget", "mixtral", 4, EP2),
]
QUICK = {0, 13}


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool) -> Any:
    """What one process of the ``ddp`` engine finds; once each."""
    return cache(lambda name, family: run_of_ddp(megatron_ranks, family, OPTIMIZERS[name], last=STEPS))


@pytest.mark.parametrize(
    ("optimizer", "family", "ranks", "layout"),
    [pytest.param(*case, marks=() if n in QUICK else pytest.mark.slow, id=str(n)) for n, case in enumerate(CASES)],
)
def test_compact_experts_equal_one_process_of_ddp(
    megatron_ranks: MegatronPool, expected: Any, optimizer: str, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    more = {"last": STEPS, "optimizer": OPTIMIZERS[optimizer]}
    results = megatron_ranks.run(run_steps, "megatron", family, layout, ranks=ranks, **more)
    assert_equal_runs(results, expected(optimizer, family), rel=1e-6)


def gradients_of_experts(optimizer: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Of the first layer's experts, of which two get no tokens: of each weight, what Megatron adds up, and what follows
    from plain matrices.
    """
    engine: Any = make_engine(run_config("megatron", "mixtral", {}, optimizer=optimizer), "mixtral")
    experts: Any = engine.module.chunks[0].decoder.layers[0].mlp.experts
    tokens, x = [5, 0, 3, 0], torch.randn(8, 32, requires_grad=True)
    grad_y = torch.randn(8, 32)
    (y, _) = experts(x, torch.tensor(tokens), torch.ones(8))
    y.backward(grad_y)
    fc1 = [expert.linear_fc1.weight.detach().clone().requires_grad_() for expert in experts.local_experts]
    fc2 = [expert.linear_fc2.weight.detach().clone().requires_grad_() for expert in experts.local_experts]
    outputs = []
    for own, up_gate, down in zip(x.detach().split(tokens), fc1, fc2, strict=True):
        gate, up = (own @ up_gate.t()).chunk(2, dim=1)
        outputs.append((F.silu(gate) * up) @ down.t())
    torch.cat(outputs).backward(grad_y)
    found = []
    for unit, plain in zip(experts.units, (fc1, fc2), strict=True):
        dense = torch.stack([w.grad if w.grad is not None else torch.zeros_like(w) for w in plain])
        selected = dense.index_select(2 if unit.side == "columns" else 1, unit.index)
        found.append((unit.compact.main_grad.clone().view_as(selected), selected))
    engine.close()
    return found


@pytest.mark.parametrize("name", ["columns", "rows"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(megatron_ranks: MegatronPool, name: str) -> None:
    (found,) = megatron_ranks.run(gradients_of_experts, OPTIMIZERS[name], ranks=1)
    for gradient, reference in found:
        assert bool((gradient[[1, 3]] == 0.0).all())
        assert float(gradient[[0, 2]].abs().max()) > 0.0
        assert torch.allclose(gradient, reference, atol=1e-6)


def test_experts_are_exchanged_as_the_density_says(megatron_ranks: MegatronPool) -> None:
    """Of 4 layers at EP2 x DP4: two copies of each expert, four of the rest. gloo reduces and scatters at twice the
    bytes.
    """
    hidden, inner, key, vocab, layers, experts = 32, 48, 16, 101, 4, 4
    dense = [(rows, hidden // 4) for rows in (hidden, key, key, hidden)]
    others = 2 * padded(vocab * hidden) + (2 * layers + 1) * padded(hidden) + layers * padded(experts * hidden)
    of_dense = padded(layers * sum(padded(m * r) for m, r in dense) + others, 128)
    own = experts // 2
    of_experts = padded(layers * (padded(own * 2 * inner * hidden // 4) + padded(own * hidden * inner // 4)), 128)
    sent = 3 / 4 * of_dense + 1 / 2 * of_experts
    for reduced, gathered, whole in megatron_ranks.run(bytes_per_step, OPTIMIZERS["columns"], "mixtral", EP2):
        assert reduced == 2 * 4 * sent
        assert gathered == 4 * sent
        assert whole[1] > 1.5 * gathered


def states(optimizer: dict[str, Any], layout: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of moments here, of dense AdamW's here, and elements of the model."""
    engine: Any = make_engine(run_config("megatron", "mixtral", layout, optimizer=optimizer), "mixtral")
    engine.train_step(micro_batches(engine, 0), lambda name: nullcontext())
    moments = sum(
        value.nbytes
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    )
    _, dense = optimizer_state_bytes(engine)
    total = engine.parameter_counts()["total"]
    engine.close()
    return moments, dense, total


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, EP2), pytest.param(2, {**EP2, "distributed_optimizer": False}, marks=pytest.mark.slow)],
)
def test_the_state_of_dense_adamw_is_what_adamw_has(
    megatron_ranks: MegatronPool, ranks: int, layout: dict[str, Any]
) -> None:
    """Experts have fewer copies than the rest, over which their state is cut: it was counted as cut over all ranks."""
    adamw = {"type": "AdamW", "params": {"lr": 1e-3}}
    found = megatron_ranks.run(states, adamw, layout, ranks=ranks)
    moments, dense, totals = zip(*found, strict=True)
    # Each rank's own differs with the places where parameters are cut.
    assert sum(dense) == pytest.approx(sum(moments), abs=8 * ranks)
    if layout == EP2:
        assert sum(dense) == pytest.approx(8 * totals[0], abs=8 * ranks)
    compact = megatron_ranks.run(states, OPTIMIZERS["columns"], layout, ranks=ranks)
    assert [own for _, own, _ in compact] == list(dense)


@pytest.mark.slow
def test_bf16_is_near_to_fp32(megatron_ranks: MegatronPool, expected: Any) -> None:
    """Gradients of experts are added up over micro-batches in fp32."""
    for name in ("columns", "galore"):
        steps, _, _ = expected(name, "mixtral")
        more = {"optimizer": OPTIMIZERS[name], "bf16": {"enabled": True}}
        found, _, _ = megatron_ranks.run(run_steps, "megatron", "mixtral", EP2, ranks=2, last=STEPS, **more)[0]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["columns", "rows", "galore"])
def test_a_run_goes_on_in_another_layout(megatron_ranks: MegatronPool, tmp_path: Path, optimizer: str) -> None:
    folder, more = str(tmp_path / "saved"), {"optimizer": OPTIMIZERS[optimizer], "last": STEPS}
    cut = ETP1 if optimizer == "galore" else ETP2
    saved_by: dict[str, Any] = {**TP2, **SP, **EP2, **cut}
    steps, _, weights = megatron_ranks.run(
        run_steps, "megatron", "mixtral", saved_by, ranks=4, save=(SAVED_AFTER, folder), **more
    )[0]
    others: list[tuple[str, int, dict[str, Any] | None]] = [
        ("megatron", 1, {}),
        ("megatron", 4, {"expert_parallel": 4}),
        ("megatron", 4, {**PP2, **EP2, "distributed_optimizer": False}),
        ("ddp", 1, None),
    ]
    for engine, ranks, layout in others:
        found, _, whole = megatron_ranks.run(run_steps, engine, "mixtral", layout, ranks=ranks, load=folder, **more)[0]
        check(steps, weights, found, whole, (engine, layout))

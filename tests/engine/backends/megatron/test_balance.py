"""The balance loss, the record of the experts' use, and the dropping of tokens, stated in plain PyTorch in fp64."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowgauge.engine.backends import backend_of
from tests.support.cases import cases
from tests.support.megatron_models import hf_config
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import (
    LENGTH,
    MICRO_BATCH,
    make_engine,
    micro_batches,
    run_config,
    run_steps,
    tokens_of,
)

# Enough to be a good part of the gradient.
COEFFICIENT = 0.5
PLAIN = {"distributed_optimizer": False}
TP2, PP2, SP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"sequence_parallel": True}
EP2, CP2 = {"expert_parallel": 2}, {"context_parallel": 2}

Statement = tuple[float, dict[str, Any], dict[str, Tensor]]


def stated(family: str, *, balance: str, capacity_factor: float | None, sequence_parts: int) -> Statement:
    """One step of a plain model on the whole batch of eight sequences, in micro-batches of two.

    Args:
        sequence_parts: pieces of each sequence that drop tokens on their own.

    Returns:
        The mean loss without that of balance, what is recorded, and the gradients.
    """
    described = hf_config(family, router_aux_loss_coef=COEFFICIENT)
    config = run_config("ddp", family)
    assert config.parsed.model is not None
    model: Any = backend_of("ddp").construct(config.parsed.model, described, config)
    model.double().train()
    # Grouped products are not for fp64.
    model.config._experts_implementation = "eager"
    num_layers, num_experts, k = 4, 4, 2
    logits: list[list[Tensor]] = [[] for _ in range(num_layers)]
    kept = pairs = 0

    def routed(layer: int, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal kept, pairs
        found, weights, experts = output
        logits[layer].append(found)
        is_kept = torch.ones_like(weights, dtype=torch.bool)
        if capacity_factor is not None:
            for part in torch.arange(MICRO_BATCH * LENGTH).view(MICRO_BATCH, LENGTH).chunk(sequence_parts, 1):
                own = part.reshape(-1)
                capacity = math.ceil(own.numel() * k / num_experts * capacity_factor)
                for expert in range(num_experts):
                    takers = [(t, s) for t in own.tolist() for s in range(k) if int(experts[t, s]) == expert]
                    takers.sort(key=lambda taker: -float(weights[taker]))
                    for taker in takers[capacity:]:
                        is_kept[taker] = False
        kept, pairs = kept + int(is_kept.sum()), pairs + is_kept.numel()
        return found, weights * is_kept, experts

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda module, args, output, n=number: routed(n, output))
    batches = tokens_of(0).chunk(4)
    losses = [model(input_ids=own, labels=own).loss for own in batches]
    loss = torch.stack(losses).mean()

    def balance_of(found: list[Tensor]) -> tuple[Tensor, float]:
        p = torch.cat(found).softmax(-1)
        choices = torch.bincount(p.topk(k).indices.reshape(-1), minlength=num_experts).double()
        return num_experts * (choices / choices.sum() * p.mean(0)).sum(), float(choices.max() / choices.mean())

    whole = [balance_of(own) for own in logits]
    total = loss
    if balance == "global":
        total = loss + COEFFICIENT * sum(value for value, _ in whole)
    elif balance == "micro_batch":
        total = loss + COEFFICIENT * sum(balance_of([each])[0] / 4 for own in logits for each in own)
    total.backward()
    record = {
        "balance_loss": float(sum(value for value, _ in whole)) / num_layers,
        "max_load": [load for _, load in whole],
        "dropped": 1 - kept / pairs,
    }
    return float(loss), record, {name: p.grad for name, p in model.named_parameters()}


def differences(
    family: str, layout: dict[str, Any], gradients: dict[str, Tensor]
) -> tuple[float, dict[str, Any], float]:
    """One step of the engine: the sum of losses on this rank, the record, and how far the gradients are from others."""
    config = run_config("megatron", family, {**PLAIN, **layout}, gradient_clipping=0.0)
    engine: Any = make_engine(config, family, router_aux_loss_coef=COEFFICIENT)
    loss = float(engine.train_step(micro_batches(engine, 0), lambda name: nullcontext())) / engine.accumulation_steps
    worst = 0.0
    for parameter, tensor in engine.module.local_parameters():
        for part in parameter.parts:
            off = part.of_tensor(tensor.main_grad) - part.of_weight(gradients[part.name])
            worst = max(worst, float(off.abs().max()))
    record = engine.step_metrics()["experts"]
    engine.close()
    return loss, record, worst


@pytest.fixture(scope="module")
def statement(megatron_ranks: MegatronPool) -> Any:
    """What the plain model finds; once for each question."""
    found: dict[Any, Statement] = {}

    def of(family: str, balance: str = "none", capacity: float | None = None, parts: int = 1) -> Statement:
        key = (family, balance, capacity, parts)
        if key not in found:
            more = {"balance": balance, "capacity_factor": capacity, "sequence_parts": parts}
            (found[key],) = megatron_ranks.run(stated, family, ranks=1, **more)
        return found[key]

    return of


def compare(pool: MegatronPool, ranks: int, family: str, layout: dict[str, Any], wanted: Statement) -> None:
    loss, record, gradients = wanted
    results = pool.run(differences, family, layout, gradients, ranks=ranks)
    assert sum(own for own, _, _ in results) / ranks == pytest.approx(loss, abs=1e-6)
    for _, found, worst in results:
        assert found["balance_loss"] == pytest.approx(record["balance_loss"], abs=1e-6)
        assert [*found["max_load"]] == ["0", "1", "2", "3"]
        assert [*found["max_load"].values()] == pytest.approx(record["max_load"], abs=1e-12)
        assert found["dropped"] == pytest.approx(record["dropped"], abs=1e-12)
        assert worst < 1e-6


GLOBAL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "1x4": ("mixtral", 1, {}),
    "2x2": ("mixtral", 2, {}),
    "4x1": ("mixtral", 4, {}),
    "EP4": ("mixtral", 4, {"expert_parallel": 4}),
    "EP2-TP2-SP": ("mixtral", 4, {**TP2, **SP, **EP2}),
    "CP2-EP4": ("mixtral", 4, {**CP2, "expert_parallel": 4}),
    "4x1-full": ("mixtral", 4, {**EP2, "recompute": "full"}),
    "EP2-PP2-full": ("mixtral", 4, {**PP2, **EP2, "recompute": "full"}),
    "VPP-moe": (
        "mixtral",
        2,
        {**PP2, "virtual_pipeline": 2, "recompute": "selective", "recompute_modules": ["moe"]},
    ),
    "qwen2-EP2": ("qwen2_moe", 2, EP2),
    "qwen3-EP2-TP2-SP-ETP1": ("qwen3_moe", 2, {**TP2, **SP, **EP2, "expert_tensor_parallel": 1}),
}


@pytest.mark.parametrize(("family", "ranks", "layout"), cases(GLOBAL, slow=GLOBAL.keys() - {"1x4", "2x2", "4x1"}))
def test_the_global_balance_loss_is_that_of_the_whole_batch(
    megatron_ranks: MegatronPool, statement: Any, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    """Value and gradient, for every split into micro-batches and process ranks."""
    wanted = statement(family, "global")
    compare(megatron_ranks, ranks, family, {**layout, "balance_loss": "global"}, wanted)
    # The loss is a good part of the gradients, and not the same as that of micro-batches.
    for other in ("none", "micro_batch"):
        gradients = statement(family, other)[2]
        assert max(float((own - gradients[name]).abs().max()) for name, own in wanted[2].items()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(2, EP2), (4, {**TP2, **SP}), (4, CP2)])
def test_the_balance_loss_of_micro_batches(
    megatron_ranks: MegatronPool, statement: Any, ranks: int, layout: dict[str, Any]
) -> None:
    wanted = statement("mixtral", "micro_batch")
    compare(megatron_ranks, ranks, "mixtral", {**layout, "balance_loss": "micro_batch"}, wanted)


DROPPING: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "one": ("mixtral", 1, {}, 1),
    "EP2": ("mixtral", 2, EP2, 1),
    "EP2-allgather": ("mixtral", 2, {**EP2, "expert_dispatcher": "allgather"}, 1),
    "TP2-SP-EP2-ETP1": ("mixtral", 2, {**TP2, **SP, **EP2, "expert_tensor_parallel": 1}, 2),
    "qwen2": ("qwen2_moe", 2, EP2, 1),
    "global-EP2": ("mixtral", 2, {**EP2, "balance_loss": "global"}, 1),
}


@pytest.mark.parametrize(
    ("family", "ranks", "layout", "parts"), cases(DROPPING, slow=DROPPING.keys() - {"EP2-allgather"})
)
def test_an_expert_drops_the_least_weighted_of_what_is_above_its_capacity(
    megatron_ranks: MegatronPool, statement: Any, family: str, ranks: int, layout: dict[str, Any], parts: int
) -> None:
    """A capacity of three quarters of an even share, in each micro-batch on each process rank."""
    wanted = statement(family, layout.get("balance_loss", "none"), 0.75, parts)
    assert wanted[1]["dropped"] > 0.25
    compare(megatron_ranks, ranks, family, {**layout, "expert_capacity_factor": 0.75}, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(2, EP2), (4, {**TP2, **SP, **EP2})])
def test_all_gathered_tokens_are_the_same_as_those_sent_to_their_experts(
    megatron_ranks: MegatronPool, ranks: int, layout: dict[str, Any]
) -> None:
    runs = [
        megatron_ranks.run(run_steps, "megatron", "mixtral", {**layout, "expert_dispatcher": name}, ranks=ranks)[0]
        for name in ("alltoall", "allgather")
    ]
    (sent, _, _), (gathered, _, _) = runs
    assert [loss for loss, _ in gathered] == pytest.approx([loss for loss, _ in sent], abs=1e-6)
    assert [norm for _, norm in gathered] == pytest.approx([norm for _, norm in sent], rel=1e-5)


@pytest.mark.slow
def test_parameters_may_be_gathered_while_choices_are_counted(megatron_ranks: MegatronPool) -> None:
    """The forward that counts is the first after a step."""
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    plain, overlapped = (
        megatron_ranks.run(run_steps, "megatron", "mixtral", {**EP2, **more, "balance_loss": "global"}, ranks=2)[0]
        for more in ({}, overlap)
    )
    assert [loss for loss, _ in overlapped[0]] == pytest.approx([loss for loss, _ in plain[0]], abs=1e-6)

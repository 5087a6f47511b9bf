"""Bytes that forwards and backwards send between ranks that share layers, experts or a pipeline, as formulas.

Four micro-batches in a step of 2 sequences of 16 tokens; hidden 32, 4 layers, fp32: what a layer sends is counted in
``H``, the bytes of a micro-batch's hidden states. Of two ranks an all-reduce sends ``H``, a gather half of it, and
gloo's reduce-scatter as much as an all-reduce.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.forecast.forecast import forecast
from narrowgauge.engine.forecast.hardware import LINKS
from narrowgauge.engine.forecast.machine import Machine
from narrowgauge.engine.forecast.sent import Sent
from tests.support.cases import cases
from tests.support.megatron_models import hf_config
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, micro_batches, run_config

from .compact.test_parity import OPTIMIZERS

H, TOKENS, HIDDEN, LAYERS, STEP = 2 * 16 * 32 * 4, 2 * 16, 32, 4, 4
GATHER, REDUCE = H / 2, H
TP2, PP2, SP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"sequence_parallel": True}
# The largest logit, that of the label, and the sum of exponentials, of each token.
LOSS = 3 * 4 * TOKENS
# Forward and backward of attention and MLP: an all-reduce each.
LAYER = 4 * REDUCE
# With sequence parallelism a gather and a scatter each, and in backward the inputs once more.
CUT_LAYER = 4 * (GATHER + REDUCE)
NORMS = (2 * LAYERS + 1) * HIDDEN * 4

# Of each process rank, in order.
CASES: dict[str, tuple[int, dict[str, Any], str, list[float]]] = {
    "TP2": (2, TP2, "AdamW", [STEP * (LAYERS * LAYER + 2 * REDUCE + LOSS)] * 2),
    "TP2-full": (
        2,
        {**TP2, "recompute": "full"},
        "AdamW",
        [STEP * (LAYERS * (LAYER + 2 * REDUCE) + 2 * REDUCE + LOSS)] * 2,
    ),
    "TP2-SP": (
        2,
        {**TP2, **SP},
        "AdamW",
        [
            # The embedding scatters and gathers, the head gathers twice and scatters.
            STEP * (LAYERS * (CUT_LAYER + 2 * GATHER) + 2 * REDUCE + 3 * GATHER + LOSS) + NORMS
        ]
        * 2,
    ),
    "TP2-SP-columns": (
        2,
        {**TP2, **SP},
        "columns",
        # A quarter of the columns for each of q, k, v, gate and up.
        [STEP * (LAYERS * (CUT_LAYER + 5 / 4 * GATHER) + 2 * REDUCE + 3 * GATHER + LOSS) + NORMS] * 2,
    ),
    "PP2": (2, PP2, "AdamW", [STEP * H] * 2),
    "VPP": (2, {**PP2, "virtual_pipeline": 2}, "AdamW", [STEP * 3 * H] * 2),
    "TP2-PP2": (
        4,
        {**TP2, **PP2},
        "AdamW",
        [
            # Megatron sends whole hidden states from stage to stage, on each tensor-parallel rank.
            *[STEP * (LAYERS / 2 * LAYER + REDUCE + H)] * 2,
            *[STEP * (LAYERS / 2 * LAYER + REDUCE + LOSS + H)] * 2,
        ],
    ),
    "DP2": (2, {}, "AdamW", [0, 0]),
    # Keys and values, as wide together as hidden states, and their gradients.
    "CP2": (2, {"context_parallel": 2}, "AdamW", [STEP * LAYERS * (GATHER + REDUCE)] * 2),
}


def sent(layout: dict[str, Any], optimizer: str, family: str = "llama") -> float:
    """In a step with a micro-batch more than once."""
    more = {"optimizer": OPTIMIZERS[optimizer]} if optimizer != "AdamW" else {}
    engine: Any = make_engine(run_config("megatron", family, layout, **more), family)
    engine.traffic.attach()
    engine.train_step(micro_batches(engine, 0), lambda name: nullcontext())
    found = engine.traffic.activations
    engine.train_step(micro_batches(engine, 1), lambda name: nullcontext())
    assert engine.traffic.activations == found  # of the first step alone
    engine.close()
    return found


@pytest.mark.parametrize(
    ("ranks", "layout", "optimizer", "expected"), cases(CASES, slow=CASES.keys() - {"TP2-SP-columns", "VPP"})
)
def test_what_layers_and_stages_send(
    megatron_ranks: MegatronPool, ranks: int, layout: dict[str, Any], optimizer: str, expected: list[float]
) -> None:
    """Counted, by formula, and told ahead for a rank of each stage; losses and norms of gradients are a few bytes
    beside.
    """
    found = megatron_ranks.run(sent, layout, optimizer, ranks=ranks)
    assert found == pytest.approx(expected, abs=64)
    more = {"optimizer": OPTIMIZERS[optimizer]} if optimizer != "AdamW" else {}
    ahead = told(layout, "llama", ranks, **more)
    assert [own.activations for own in ahead] == pytest.approx(expected[:: ranks // len(ahead)], abs=64)
    pieces = layout.get("virtual_pipeline", 1)
    assert [own.stages for own in ahead] == [STEP * (2 * pieces - 1) * H if len(ahead) > 1 else 0.0] * len(ahead)


@pytest.mark.slow
def test_what_experts_are_sent(megatron_ranks: MegatronPool) -> None:
    """Two micro-batches on each of two ranks: half of the tokens' choices, there and back, in forward and backward, on
    the mean of both ranks; beside them a weight for each, and how many there are.
    """
    found = megatron_ranks.run(sent, {"expert_parallel": 2}, "AdamW", "mixtral", ranks=2)
    choices = TOKENS * 2 / 2
    expected = 2 * LAYERS * (4 * choices * HIDDEN * 4 + 2 * choices * 4)
    assert torch.tensor(found).mean() == pytest.approx(expected, rel=0.03)


def told(layout: dict[str, Any], family: str, ranks: int, **more: Any) -> list[Sent]:
    """Of a rank of each stage."""
    config = run_config("megatron", family, layout, **more)
    return [
        sent for _, sent in backend_of("megatron").forecast(config, hf_config(family), ranks, on_gpu=False, steps=3)
    ]


GLOBAL = {"balance_loss": "global"}
ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "stages"),
    [({**TP2, **SP}, [0.0]), (PP2, [2.0, 1.0]), ({**PP2, "virtual_pipeline": 2}, [5.0, 4.0])],
    ids=["TP2-SP", "PP2", "VPP"],
)
def test_counting_ahead_sends_each_forward_twice(
    megatron_ranks: MegatronPool, layout: dict[str, Any], stages: list[float]
) -> None:
    """Of a balance loss over several micro-batches: what is counted is told, and more than without it."""
    found = megatron_ranks.run(sent, {**layout, **GLOBAL}, "AdamW", "mixtral", ranks=2)
    with_counts, without = told({**layout, **GLOBAL}, "mixtral", 2), told(layout, "mixtral", 2)
    # Once a step, each expert's choices in each layer.
    assert [own.activations for own in with_counts] == pytest.approx(found[:: 2 // len(stages)], rel=1e-3, abs=512)
    assert [own.stages for own in with_counts] == [STEP * times * H for times in stages]
    for own, less in zip(with_counts, without, strict=True):
        # A third of what layers send is sent in their forwards, and more without the backward's second gather.
        assert own.activations - own.stages >= 1.3 * (less.activations - less.stages)


@pytest.mark.parametrize(
    ("family", "layout", "more", "message"),
    [
        ("mixtral", {"expert_dispatcher": "allgather"}, {}, "expert_dispatcher: expected 'alltoall'"),
        ("llama", TP2, {**ZERO_3, "optimizer": OPTIMIZERS["columns"]}, "zero_optimization.stage: .*AdamW, got Grass"),
        ("llama", {**TP2, "recompute": "full"}, ZERO_3, "recompute: expected 'none' at stage 3"),
    ],
)
def test_what_is_not_told_ahead(family: str, layout: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        told(layout, family, 4, **more)


@pytest.mark.parametrize(
    ("machine", "link"),
    [
        (Machine(gpus=2), LINKS * Machine().gpu.link),
        # Two that share layers, and lie on two nodes.
        (Machine(nodes=2, gpus=1, link=1e9), LINKS * 1e9),
    ],
    ids=["in a node", "between nodes"],
)
def test_what_is_sent_between_layers_takes_its_time(machine: Machine, link: float) -> None:
    """Whatever reductions of gradients do beside it."""
    layout = {**TP2, "overlap_grad_reduce": True}
    config = run_config("megatron", "llama", layout)
    found = forecast(config, hf_config("llama"), world_size=2, machine=machine)
    sent = STEP * (LAYERS * LAYER + 2 * REDUCE + LOSS)
    assert found.seconds is not None
    assert found.seconds.collectives == pytest.approx(sent / link)

"""Bytes on the wire: counted on the collectives, predicted by formula, and seen by the kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from narrowgauge.engine.backends.deepspeed.traffic import TrafficCounter
from narrowgauge.engine.report.dense_traffic import dense_traffic, dense_traffic_zero3
from narrowgauge.optimizers import CompactLinear
from tests.support.models import token_batch
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, make_engine, train_step

# The kernel counts what all processes of the machine send.
pytestmark = pytest.mark.alone

# Large enough that headers and flags are small change: 1.6 M parameters, of which 1.57 M in the matrices.
SIZES = {"width": 256, "hidden": 512, "blocks": 3, "bias": False}
STEPS = 4


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface, by the kernel's count."""
    line = next(text for text in Path("/proc/net/dev").read_text().splitlines() if text.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure(stage: int, accumulation: int, dense: bool, zero: dict[str, Any], density: float = 0.25) -> dict[str, Any]:
    """Per step: bytes counted on this rank, and bytes of all ranks on the loopback interface."""
    config = ds_config(stage, zero=zero, params={"density": density, "refresh_interval": None})
    config |= {"gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0}
    if dense:
        config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    engine = make_engine(config, **SIZES)
    train_step(engine, 0)
    counter = TrafficCounter()
    counter.attach()
    dist.barrier()
    before = loopback_bytes()
    for step in range(1, STEPS + 1):
        for micro_batch in range(accumulation):
            engine.backward(engine(token_batch(step + micro_batch, 2)))
            engine.step()
    dist.barrier()
    seen = loopback_bytes() - before
    counter.detach()
    parameters = list(engine.module.parameters())
    numel = [int(getattr(p, "ds_numel", p.numel())) for p in parameters]
    matrices = sum(
        m.weight_shape[0] * m.weight_shape[1] for m in engine.module.modules() if isinstance(m, CompactLinear)
    )
    result = {
        "matrices": 4 * matrices,
        "reduced": counter.reduced / STEPS,
        "gathered": counter.gathered / STEPS,
        "kernel": seen / STEPS,
        "trainable": 4 * sum(n for n, p in zip(numel, parameters, strict=True) if p.requires_grad),
        "sizes": [(4 * n, bool(getattr(p, "ds_persist", False))) for n, p in zip(numel, parameters, strict=True)],
    }
    finish(engine)
    return result


PINNED = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 1000}


@pytest.mark.cover(2)
@pytest.mark.parametrize("dense", [False, True], ids=["grass", "dense"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_send_what_the_formula_says(
    two_ranks: RankPool, stage: int, accumulation: int, dense: bool
) -> None:
    """ZeRO-1: 3 P (N-1)/N; ZeRO-2: (2 k + 1) P (N-1)/N, with P the bytes of trainable parameters."""
    results = two_ranks.run(measure, stage, accumulation, dense, {})
    for result in results:
        total = result["reduced"] + result["gathered"]
        reductions = accumulation if stage == 2 else 1
        assert total == pytest.approx((2 * reductions + 1) * result["trainable"] / 2, rel=1e-3)
        predicted = dense_traffic(
            stage=stage, parameter_bytes=result["trainable"], world_size=2, accumulation_steps=accumulation
        )
        assert (result["reduced"], result["gathered"]) == pytest.approx(predicted, rel=1e-3)
    assert results[0]["kernel"] == pytest.approx(sum(r["reduced"] + r["gathered"] for r in results), rel=0.03)


def predicted_dense(
    result: dict[str, Any], dense_sizes: list[tuple[int, bool]], accumulation: int
) -> tuple[float, float]:
    return dense_traffic_zero3(
        gathered=result["gathered"],
        current=result["sizes"],
        dense=dense_sizes,
        trainable_bytes=sum(size for size, _ in dense_sizes),
        world_size=dist.get_world_size(),
        accumulation_steps=accumulation,
    )


@pytest.mark.cover(1)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [PINNED, {"stage3_param_persistence_threshold": 1000}], ids=["pinned", "reused"])
def test_zero_3_sends_what_follows_from_its_collectives(
    two_ranks: RankPool, accumulation: int, zero: dict[str, Any]
) -> None:
    """Gradients reduce-scattered per micro-batch (on gloo an all-reduce), every parameter gathered in forward and,
    where it
    is not kept until then, in backward; persistent ones once per step. What a dense run would send follows from a
    compact one."""
    results = two_ranks.run(measure, 3, accumulation, False, zero)
    gathers = accumulation * (2 if "stage3_max_reuse_distance" in zero else 1)
    for result in results:
        persistent = sum(size for size, kept in result["sizes"] if kept)
        others = sum(size for size, kept in result["sizes"] if not kept)
        assert result["reduced"] == pytest.approx(2 * accumulation * result["trainable"] / 2, rel=1e-3)
        # Without the pinning the first gather of a step also brings what the step before has released.
        assert result["gathered"] == pytest.approx((persistent + gathers * others) / 2, rel=2e-3)
    assert results[0]["kernel"] == pytest.approx(sum(r["reduced"] + r["gathered"] for r in results), rel=0.03)
    dense = two_ranks.run(measure, 3, accumulation, True, zero)
    predictions = two_ranks.run(predicted_dense, results[0], dense[0]["sizes"], accumulation)
    assert predictions[0] == pytest.approx((dense[0]["reduced"], dense[0]["gathered"]), rel=2e-3)


@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_compact_payload_is_the_density_of_the_dense_payload(two_ranks: RankPool, density: float) -> None:
    compact = two_ranks.run(measure, 1, 1, False, {}, density=density)[0]
    dense = two_ranks.run(measure, 1, 1, True, {})[0]
    # 2 (N-1)/N for the reduction, (N-1)/N for the gather, of the same matrices
    saved = (1 - density) * compact["matrices"] / 2
    assert dense["reduced"] - compact["reduced"] == pytest.approx(2 * saved, rel=1e-3)
    assert dense["gathered"] - compact["gathered"] == pytest.approx(saved, rel=1e-3)

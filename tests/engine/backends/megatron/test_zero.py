"""DeepSpeed's ZeRO around a tensor-parallel model of Megatron's: the numbers of one process, and of Megatron's own
distributed optimizer, which :mod:`.test_parity` compares with the same.
"""

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.megatron_parity import assert_equal_runs
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import Run, make_engine, micro_batches, run_config, run_steps
from tests.support.ranks import RankPool
from tests.support.zero import worst

from .compact.test_parity import OPTIMIZERS

TP2, SP = {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}
FULL = {**SP, "recompute": "full"}
# Steps of dense AdamW, and of a compact optimizer: two changes of subspace.
STEPS = {"AdamW": 4, "columns": 8, "rows": 8, "top": 8, "galore": 8}

# Optimizer, stage, process ranks, layout, family.
CASES: dict[str, tuple[str, int, int, dict[str, Any], str]] = {
    f"{optimizer}-{stage}-{'SP-' if layout is SP else ''}{ranks // 2}": (optimizer, stage, ranks, layout, "llama")
    for optimizer in ("AdamW", "columns", "rows", "galore")
    for stage in (1, 2, 3)
    for layout in (TP2, SP)
    for ranks in (2, 4)
}
CASES |= {
    "top-1": ("top", 1, 4, SP, "llama"),
    "top-3": ("top", 3, 4, SP, "llama"),
    "full-2": ("AdamW", 2, 4, FULL, "llama"),
    "full-3": ("AdamW", 3, 4, FULL, "llama"),
    "tied-2": ("AdamW", 2, 4, TP2, "qwen2"),
    "tied-3": ("AdamW", 3, 4, TP2, "qwen2"),
    # Each rank uses these norms for its own heads.
    "head-norms-1": ("AdamW", 1, 4, TP2, "qwen3"),
    "head-norms-3": ("AdamW", 3, 4, TP2, "qwen3"),
    "data-parallel": ("AdamW", 2, 2, {}, "llama"),
}
QUICK = {"columns-2-SP-2", "AdamW-3-SP-2"}


def more(optimizer: str, stage: int | None) -> dict[str, Any]:
    """Arguments of :func:`run_steps`."""
    found: dict[str, Any] = {"last": STEPS[optimizer]}
    if optimizer != "AdamW":
        found["optimizer"] = OPTIMIZERS[optimizer]
    return found if stage is None else {**found, "zero_optimization": {"stage": stage}}


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool) -> Any:
    """What one process of the ``ddp`` engine finds; once each."""
    found: dict[tuple[str, str], Run] = {}

    def of(optimizer: str, family: str) -> Run:
        if (optimizer, family) not in found:
            (found[optimizer, family],) = megatron_ranks.run(run_steps, "ddp", family, ranks=1, **more(optimizer, None))
        return found[optimizer, family]

    return of


@pytest.mark.parametrize(("optimizer", "stage", "ranks", "layout", "family"), cases(CASES, slow=CASES.keys() - QUICK))
def test_a_stage_equals_one_process_of_ddp(
    megatron_ranks: MegatronPool,
    expected: Any,
    optimizer: str,
    stage: int,
    ranks: int,
    layout: dict[str, Any],
    family: str,
) -> None:
    """With accumulation, clipping, decay and a schedule; the norm sees each parameter once."""
    results = megatron_ranks.run(run_steps, "megatron", family, layout, ranks=ranks, **more(optimizer, stage))
    assert_equal_runs(results, expected(optimizer, family), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["AdamW", "columns"])
def test_bf16_is_near_to_fp32(megatron_ranks: MegatronPool, expected: Any, optimizer: str, stage: int) -> None:
    steps, _, _ = expected(optimizer, "llama")
    options = {**more(optimizer, stage), "bf16": {"enabled": True}}
    found, _, weights = megatron_ranks.run(run_steps, "megatron", "llama", SP, **options)[0]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], abs=1e-2)
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}


SAVED_AFTER = 4
Where = tuple[str, int, dict[str, Any] | None, int | None]
OTHERS: list[Where] = [
    ("megatron", 4, SP, 3),
    ("megatron", 2, TP2, 1),
    ("megatron", 4, {"tensor_parallel": 2, "pipeline_parallel": 2}, None),
    ("ddp", 1, None, None),
]


def check(steps: Any, weights: Any, found: Any, whole: Any, where: Any) -> None:
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps[SAVED_AFTER:]], abs=2e-6), where
    assert worst(whole, weights) < 2e-5, where


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["columns", "galore"])
def test_a_run_goes_on_in_another_layout(
    megatron_ranks: MegatronPool, tmp_path: Path, optimizer: str, stage: int
) -> None:
    """After a change of subspace and before another: at another stage, in a pipeline, without Megatron; and back."""
    folder = str(tmp_path / "zero")
    steps, _, weights = megatron_ranks.run(
        run_steps, "megatron", "llama", SP, save=(SAVED_AFTER, folder), **more(optimizer, stage)
    )[0]
    for engine, ranks, layout, other in OTHERS:
        found, _, whole = megatron_ranks.run(
            run_steps, engine, "llama", layout, ranks=ranks, load=folder, **more(optimizer, other)
        )[0]
        check(steps, weights, found, whole, (engine, layout, other))
    folder = str(tmp_path / "pipeline")
    pipeline = {"tensor_parallel": 2, "pipeline_parallel": 2}
    megatron_ranks.run(run_steps, "megatron", "llama", pipeline, save=(SAVED_AFTER, folder), **more(optimizer, None))
    found, _, whole = megatron_ranks.run(run_steps, "megatron", "llama", SP, load=folder, **more(optimizer, stage))[0]
    check(steps, weights, found, whole, "back")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "columns"])
def test_a_run_goes_on_under_deepspeed_alone(
    megatron_ranks: MegatronPool, two_ranks: RankPool, tmp_path: Path, optimizer: str
) -> None:
    folder, options = str(tmp_path / "saved"), {**more(optimizer, 2), "last": 6}
    steps, _, weights = megatron_ranks.run(run_steps, "megatron", "llama", SP, save=(SAVED_AFTER, folder), **options)[0]
    found, _, whole = two_ranks.run(going_on, optimizer, folder)[0]
    check(steps, weights, found, whole, "deepspeed")


def going_on(optimizer: str, folder: str) -> Any:
    options = {**more(optimizer, 2), "last": 6, "steps_per_print": 1 << 40}
    return run_steps("deepspeed", "llama", None, load=folder, **options)


def bytes_per_step(optimizer: str, stage: int) -> tuple[float, float]:
    config = run_config("megatron", "llama", TP2, **{k: v for k, v in more(optimizer, stage).items() if k != "last"})
    engine = make_engine(config, "llama")
    engine.traffic.attach()
    for step in range(2):
        engine.train_step(micro_batches(engine, step), lambda name: nullcontext())
    found = engine.traffic.reduced / 2, engine.traffic.gathered / 2
    engine.close()
    return found


@pytest.mark.slow
def test_gradients_and_parameters_are_exchanged_as_the_density_says(megatron_ranks: MegatronPool) -> None:
    """Of 4 layers at TP2 x DP2 and ZeRO-1; hidden 32, inner 48, GQA 4/2, vocabulary 101: the norm and the overflow flag
    are a few bytes beside.
    """
    hidden, inner, key, vocab, layers = 32, 48, 16, 51, 4
    dense_layer = 2 * hidden * hidden + 2 * key * hidden + 3 * inner * hidden
    others = 2 * vocab * hidden + (2 * layers + 1) * hidden
    for optimizer, density in (("AdamW", 1.0), ("columns", 0.25)):
        elements = layers * dense_layer * density / 2 + others
        for reduced, gathered in megatron_ranks.run(bytes_per_step, optimizer, 1):
            # An all-reduce among two sends what it has, a gather half of it.
            assert reduced == pytest.approx(4 * elements, rel=2e-3)
            assert gathered == pytest.approx(4 * elements / 2, rel=2e-3)


def num_threads() -> int:
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.slow
def test_nothing_is_left_of_a_closed_run(megatron_ranks: MegatronPool) -> None:
    """Each process group has threads. DeepSpeed kept models of ZeRO-3, on a stack of modules and in a cache, and with
    them 48 threads of a run; Megatron, in a cache of rotary embeddings, three.
    """
    found = []
    for _ in range(3):
        stage = {"stage": 3}
        megatron_ranks.run(run_steps, "megatron", "llama", TP2, ranks=2, last=1, zero_optimization=stage)
        found.append(megatron_ranks.run(num_threads, ranks=2))
    assert found[0] == found[1] == found[2]

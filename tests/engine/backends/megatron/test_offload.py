"""Activation offload in Megatron's schedules: bit for bit the same training, less memory, Megatron's order."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from narrowgauge.engine.backends.megatron.layout import Layout, Sizes
from narrowgauge.engine.backends.megatron.passes import schedule_of
from narrowgauge.engine.protocol import TrainingEngine
from narrowgauge.offload import MicroBatch
from narrowgauge.offload.schedule import Pass
from tests.offload.support import settle
from tests.support.cases import cases
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import MICRO_BATCH, make_engine, micro_batches, run_config, tokens_of

TP2, PP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
VPP = {**PP2, "virtual_pipeline": 2}
FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]}
GRASS = {
    "optimizer": {
        "type": "Grass",
        "params": {"lr": 1e-2, "density": 0.25, "strata": 2, "refresh_interval": 1, "shared_inputs": "siblings"},
    }
}
EVERYTHING = {"keep_resident": 0.0, "min_tensor_bytes": 1024, "backend": "threads", "capacity_bytes": 64 << 20}
STEPS = 3

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "one-selective": (1, SELECTIVE, {}),
    "CP2-selective": (2, {"context_parallel": 2, **SELECTIVE}, {}),
    "PP2": (2, PP2, {}),
    "PP2-grass-full": (2, {**PP2, **FULL}, GRASS),
    "VPP": (2, VPP, {}),
    "VPP-full": (2, {**VPP, **FULL}, {}),
    "VPP-selective-grass": (2, {**VPP, **SELECTIVE}, GRASS),
    "TP2-SP": (2, TP2_SP, {}),
    "TP2-SP-selective-grass": (2, {**TP2_SP, **SELECTIVE}, GRASS),
    "TP2-SP-full": (2, {**TP2_SP, **FULL}, {}),
    "TP2-SP-VPP": (4, {**TP2_SP, **VPP}, GRASS),
    "PP2-DP2-overlap": (4, {**PP2, "overlap_grad_reduce": True, "overlap_param_gather": True}, GRASS),
    "PP4": (4, {"pipeline_parallel": 4}, {}),
    "PP2-bf16": (2, PP2, {"bf16": {"enabled": True}}),
    "VPP-auto": (2, VPP, {"keep_resident": "auto"}),
    "PP2-half": (2, PP2, {"keep_resident": 0.5}),
}
QUICK = {"PP2-grass-full", "VPP", "TP2-SP-selective-grass"}


class Phases:
    """Waits after each forward until what it saved is written, and notes what is saved and resident then."""

    def __init__(self, engine: TrainingEngine, *, settles: bool) -> None:
        self._offload, self._settles = engine.activation_offload, settles
        self.levels: list[tuple[int, int]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        yield
        if self._offload is not None and name == "forward":
            if self._settles:
                settle(self._offload)
            stats = self._offload.stats()
            self.levels.append((stats.saved, stats.resident))


def trained(layout: dict[str, Any], settles: bool, family: str = "llama", **more: Any) -> dict[str, Any]:
    """Losses, what this rank holds at the end, and what was moved."""
    changes = {"router_aux_loss_coef": 0.1} if family == "mixtral" else {}
    engine = make_engine(run_config("megatron", family, layout, **more), family, **changes)
    phases = Phases(engine, settles=settles)
    losses = [float(engine.train_step(micro_batches(engine, step), phases)) for step in range(STEPS)]
    found: dict[str, Any] = {"losses": losses, "weights": [p.detach().clone() for p in engine.module.parameters()]}
    found["levels"] = phases.levels
    if engine.activation_offload is not None:
        found["stats"] = engine.activation_offload.stats()
    engine.close()
    return found


def on_and_off(layout: dict[str, Any], folder: str, settles: bool, offload: dict[str, Any], **more: Any) -> Any:
    off = trained(layout, settles, **more)
    on = trained(layout, settles, activation_offload={**EVERYTHING, "path": folder, **offload}, **more)
    same = off["losses"] == on["losses"] and all(map(torch.equal, off["weights"], on["weights"]))
    return same, on["stats"], on["levels"], dist.get_rank()


@pytest.mark.parametrize("settles", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ranks", "layout", "more"), cases(CASES, slow=CASES.keys() - QUICK))
def test_training_is_bit_equal(
    megatron_ranks: MegatronPool,
    tmp_path: Path,
    ranks: int,
    layout: dict[str, Any],
    more: dict[str, Any],
    settles: bool,
) -> None:
    """Losses and weights of three steps, with as many changes of subspace under Grass. With pauses all is written and
    read back; without, some is taken from memory before it is written.
    """
    changed = {key: value for key, value in more.items() if key in EVERYTHING}
    others = {key: value for key, value in more.items() if key not in EVERYTHING}
    found = megatron_ranks.run(on_and_off, layout, str(tmp_path), settles, changed, ranks=ranks, **others)
    for same, stats, levels, _ in found:
        assert same
        assert (stats.failed_writes, stats.full) == (0, 0)
        if settles and not changed:
            saved, resident = max(levels)
            assert stats.written > saved * STEPS
            if layout.get("recompute") == "full":
                # Layers' inputs: the schedule itself holds the first ones, and so small ones are all read ahead.
                assert stats.read > 0
            else:
                assert stats.read > stats.written / 2
                # Whatever is in flight is on disk once its forward is through, but for what is read ahead: two tensors,
                # a larger part where little is saved.
                assert resident < saved / (3 if saved > 200_000 or layout.get("tensor_parallel") else 2)
    assert not list(tmp_path.iterdir())


GALORE = {"optimizer": {"type": "GaLore", "params": {"lr": 1e-2, "rank": 4, "refresh_interval": 1}}}
EP2 = {"expert_parallel": 2}
WITH_EXPERTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "EP2": (2, {**EP2, "balance_loss": "global"}, GRASS),
    "EP2-allgather": (2, {**EP2, "expert_dispatcher": "allgather", "balance_loss": "micro_batch"}, {}),
    "EP2-drops": (2, {**EP2, "expert_capacity_factor": 1.0}, {}),
    "EP2-recomputed": (2, {**EP2, "recompute": "selective", "recompute_modules": ["moe"]}, GALORE),
    "EP2-full": (2, {**EP2, "recompute": "full"}, GRASS),
    "TP2-SP-EP2": (4, {**TP2_SP, **EP2, "expert_tensor_parallel": 1}, GRASS),
    "VPP-EP2": (4, {**VPP, **EP2, "balance_loss": "global"}, {}),
}


@pytest.mark.parametrize(("ranks", "layout", "more"), cases(WITH_EXPERTS, slow=WITH_EXPERTS.keys() - {"EP2"}))
def test_training_with_experts_is_bit_equal(
    megatron_ranks: MegatronPool, tmp_path: Path, ranks: int, layout: dict[str, Any], more: dict[str, Any]
) -> None:
    """What an expert saves has as many rows as it has tokens, in each micro-batch another number. A forward that
    counts ahead for the balance loss saves nothing.
    """
    found = megatron_ranks.run(on_and_off, layout, str(tmp_path), True, {}, ranks=ranks, family="mixtral", **more)
    for same, stats, levels, _ in found:
        assert same
        assert (stats.failed_writes, stats.full) == (0, 0)
        assert stats.written > max(levels)[0] * STEPS
        assert stats.read > 0
    assert not list(tmp_path.iterdir())


def passes_of_megatron(layout: dict[str, Any], num_micro_batches: int) -> list[Pass]:
    """What this rank does in a step, as Megatron's own functions are called."""
    from megatron.core.pipeline_parallel import schedules

    engine = make_engine(
        run_config("megatron", "llama", layout, train_batch_size=MICRO_BATCH * num_micro_batches), "llama"
    )
    found: list[Pass] = []
    # Outputs stay alive until their backward.
    made: dict[int, MicroBatch] = {}
    forward_step, backward_step = schedules.forward_step, schedules.backward_step

    def forward(*args: Any, current_microbatch: int, vp_stage: int | None = None, **kwargs: Any) -> Any:
        result = forward_step(*args, current_microbatch=current_microbatch, vp_stage=vp_stage, **kwargs)
        output = result[0][0] if isinstance(result[0], list) else result[0]
        made[id(output)] = MicroBatch(current_microbatch, vp_stage or 0)
        found.append(("forward", made[id(output)]))
        return result

    def backward(inputs: Any, output: Any, *args: Any) -> Any:
        found.append(("backward", made.pop(id(output[0] if isinstance(output, list) else output))))
        return backward_step(inputs, output, *args)

    schedules.forward_step, schedules.backward_step = forward, backward
    try:
        engine.train_step(iter(tokens_of(0, MICRO_BATCH * num_micro_batches).chunk(num_micro_batches)), no_phase)
    finally:
        schedules.forward_step, schedules.backward_step = forward_step, backward_step
    engine.close()
    return found


def no_phase(name: str) -> nullcontext[None]:
    return nullcontext()


def all_passes(layouts: list[tuple[dict[str, Any], int]]) -> list[list[Pass]]:
    return [passes_of_megatron(*layout) for layout in layouts]


ORDERS: dict[int, list[tuple[dict[str, Any], int]]] = {
    2: [(TP2, 2), (PP2, 1), (PP2, 4), (VPP, 2), (VPP, 6)],
    4: [({"pipeline_parallel": 4}, 3), ({"pipeline_parallel": 4}, 6), ({**VPP, **TP2}, 4)],
}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_order_of_passes_is_megatrons(megatron_ranks: MegatronPool, ranks: int) -> None:
    """Also with fewer micro-batches than there are stages."""
    found = megatron_ranks.run(all_passes, ORDERS[ranks], ranks=ranks)
    keys = {"tensor_parallel": "tensor", "pipeline_parallel": "pipeline", "virtual_pipeline": "chunks"}
    for number, (block, count) in enumerate(ORDERS[ranks]):
        layout = Layout.of(
            Sizes(**{"expert_tensor": block.get("tensor_parallel", 1)}, **{keys[k]: v for k, v in block.items()}), ranks
        )
        for rank in range(ranks):
            place = layout.place_of(rank)
            schedule = schedule_of(layout, place, count)
            assert found[rank][number] == schedule.passes, (block, count, rank)
            is_last = place.pipeline == layout.pipeline - 1
            kept = (
                {MicroBatch(n, layout.chunks - 1) for n in range(count)} if is_last and layout.pipeline > 1 else set()
            )
            assert kept <= schedule.kept
            assert schedule.kept == kept or not is_last


def test_more_is_kept_where_backward_follows_at_once() -> None:
    """1F1B on four stages: as many forwards wait as there are stages behind."""
    layout = Layout.of(Sizes(pipeline=4), 4)
    waiting = [schedule_of(layout, layout.place_of(rank), 8) for rank in range(4)]
    assert [len(schedule.kept) for schedule in waiting] == [0, 0, 0, 8]
    most = []
    for schedule in waiting:
        levels, level = [], 0
        for name, _ in schedule.passes:
            level += 1 if name == "forward" else -1
            levels.append(level)
        most.append(max(levels))
    assert most == [4, 3, 2, 1]

"""Updates with gradients that are missing or not finite, under every ZeRO stage."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowgauge.engine import initialize
from narrowgauge.engine.backends.deepspeed.privates import autocast_scaler, groups_and_masters
from narrowgauge.engine.backends.deepspeed.training import DeepSpeedTraining
from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tests.support.cases import cases
from tests.support.models import token_batch
from tests.support.ranks import RankPool
from tests.support.zero import finish, full_weights

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Grass": {"density": 0.25, "refresh_interval": 3},
    "GaLore": {"rank": 8, "refresh_interval": 3},
    "Frugal": {"density": 0.25, "refresh_interval": 3},
    "Apollo": {"rank": 4},
    "Lamb": {},
    "Lars": {},
    "AdamW": {"torch_adam": True},
}
STAGES: list[dict[str, Any]] = [{"stage": stage} for stage in range(4)]
OFFLOADED: list[dict[str, Any]] = [{"stage": stage, "offload_optimizer": {"device": "cpu"}} for stage in (1, 2, 3)]


class DropsLayers(nn.Module):
    """Leaves out another block in each micro-batch (LayerDrop, an idle expert).

    Attributes:
        is_poisoned: the next loss is finite, and its gradient is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 20)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)) for _ in range(3))
        self.head = nn.Linear(20, 37)
        self.num_calls, self.drop_every, self.is_poisoned = 0, 3, False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        self.num_calls += 1
        for number, block in enumerate(self.blocks):
            if (self.num_calls + number) % 3 or not self.drop_every:
                x = x + block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())
        return loss + torch.sqrt((x * 0.0).sum()) if self.is_poisoned else loss


def make_engine(optimizer: str, zero: dict[str, Any], accumulation: int, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, **OPTIMIZERS[optimizer]}},
        **more,
    }
    engine, *_ = initialize(model=DropsLayers(), config=config)
    return engine


def micro_step(engine: Any, number: int) -> float:
    loss = engine(token_batch(number, 4).chunk(dist.get_world_size())[dist.get_rank()])
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def losses_of(optimizer: str, zero: dict[str, Any], accumulation: int = 1) -> list[float]:
    engine = make_engine(optimizer, zero, accumulation)
    losses = [micro_step(engine, number) for number in range(7 * accumulation)]
    finish(engine)
    return losses


@pytest.mark.parametrize("optimizer", cases({name: (name,) for name in OPTIMIZERS}, slow={"Frugal", "Apollo", "Lars"}))
def test_a_parameter_without_a_gradient_has_a_gradient_of_zero_at_every_stage(
    one_rank: RankPool, optimizer: str
) -> None:
    """ZeRO-3, and every stage with the optimizer on the CPU, stepped with the parameter's gradient of an earlier step:
    with AdamW the seventh loss was 2.71 instead of 2.76.
    """
    (expected,) = one_rank.run(losses_of, optimizer, {"stage": 0})
    for zero in STAGES[1:]:
        assert one_rank.run(losses_of, optimizer, zero)[0] == pytest.approx(expected, abs=1e-5), zero


@pytest.mark.parametrize("optimizer", ["Grass", "AdamW"])
def test_a_gradient_of_an_earlier_micro_batch_reaches_an_optimizer_on_the_cpu(
    one_rank: RankPool, optimizer: str
) -> None:
    """DeepSpeed copied gradients to the CPU in the last micro-batch alone: one that a parameter had in the first only
    was lost, and the one of the step before applied.
    """
    (expected,) = one_rank.run(losses_of, optimizer, {"stage": 1}, 2)
    for zero in OFFLOADED:
        assert one_rank.run(losses_of, optimizer, zero, 2)[0] == pytest.approx(expected, abs=1e-5), zero


def losses_on_nvme(folder: str, accumulation: int) -> list[float]:
    zero = {
        "stage": 3,
        "sub_group_size": 1000,
        "offload_optimizer": {"device": "nvme", "nvme_path": folder, "pin_memory": True},
    }
    return losses_of("AdamW", zero, accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_optimizer_on_nvme_finds_no_gradient_of_an_earlier_step(
    one_rank: RankPool, tmp_path: Path, accumulation: int
) -> None:
    """The files kept the gradient of the last step in which a parameter had one."""
    (expected,) = one_rank.run(losses_of, "AdamW", {"stage": 1}, accumulation)
    assert one_rank.run(losses_on_nvme, str(tmp_path), accumulation)[0] == pytest.approx(expected, abs=1e-5)


class Zeroed(TorchDispatchMode):
    """Counts the elements of each storage that are set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zero_.default:
            storage = args[0].untyped_storage().data_ptr()
            self.elements[storage] = self.elements.get(storage, 0) + args[0].numel()
        return func(*args, **(kwargs or {}))


def zeroed_in_steps(zero: dict[str, Any], accumulation: int, drop_every: int) -> list[int]:
    """Elements of ZeRO's gradient buffers that each step set to zero."""
    engine = make_engine("AdamW", zero, accumulation)
    engine.module.drop_every = drop_every
    wrapper, found = engine.optimizer, []
    for step in range(3):
        kept = [masters.grad for _, masters in groups_and_masters(wrapper) or () if masters.grad is not None]
        kept += [wrapper.grad_partitions_flat_buffer] if zero["stage"] == 3 else []
        with Zeroed() as zeroed:
            for number in range(accumulation):
                micro_step(engine, step * accumulation + number)
        kept += getattr(wrapper, "accumulated_grads_in_cpu", {}).values()
        found.append(sum(zeroed.elements.get(key, 0) for key in {t.untyped_storage().data_ptr() for t in kept}))
    finish(engine)
    return found


@pytest.mark.cover(1)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [*OFFLOADED, {"stage": 3}], ids=["cpu1", "cpu2", "cpu3", "zero3"])
def test_only_gradients_of_idle_parameters_are_set_to_zero(
    one_rank: RankPool, zero: dict[str, Any], accumulation: int
) -> None:
    """All of them were, in host memory, after each step."""
    assert one_rank.run(zeroed_in_steps, zero, accumulation, 0)[0] == [0, 0, 0]
    block = 2 * (20 * 20 + 20)
    # One block is left out of each micro-batch: of the first, which is not of the second, or of the only one.
    (found,) = one_rank.run(zeroed_in_steps, zero, accumulation, 3)
    # Stage 1 sums micro-batches up on the device: what had a gradient in one of them is copied to the CPU once.
    is_summed_before = zero["stage"] == 1 and accumulation > 1
    assert set(found[1:]) == {0 if is_summed_before else block}


def skip_one(optimizer: str, zero: dict[str, Any], poisoned_step: int) -> dict[str, Any]:
    engine = make_engine(optimizer, zero, 1)
    engine.module.drop_every = 0
    for number in range(poisoned_step):
        micro_step(engine, number)
    before = full_weights(engine)
    engine.module.is_poisoned = dist.get_rank() == 1
    micro_step(engine, poisoned_step)
    engine.module.is_poisoned = False
    after = full_weights(engine)
    assert before.keys() == after.keys()
    found = {
        "compared": len(before),
        "changed": [name for name, value in before.items() if not torch.equal(after[name], value)],
        "skipped": engine.skipped_steps,
        "applied": engine.was_step_applied(),
        "losses": [micro_step(engine, number) for number in range(poisoned_step + 1, poisoned_step + 5)],
        "steps": engine.global_steps,
    }
    finish(engine)
    return found


@pytest.mark.cover(1)
@pytest.mark.parametrize("zero", STAGES, ids=lambda zero: f"zero{zero['stage']}")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_gradients_are_not_finite_on_one_rank_is_left_out_on_all(
    two_ranks: RankPool, optimizer: str, zero: dict[str, Any]
) -> None:
    """At ZeRO-0 in fp32 they were applied, and every weight was NaN; GaLore, whose bases are due after the first step,
    ended in the SVD of a statistic that is not finite.
    """
    found = two_ranks.run(skip_one, optimizer, zero, 0 if optimizer == "GaLore" else 2)
    for own in found:
        assert own["compared"] == len(DropsLayers().state_dict())
        assert own["changed"] == []
        assert (own["skipped"], own["applied"]) == (1, False)
        assert all(0.5 < loss < 5.0 for loss in own["losses"])


def autocast_norms(loss_factor: float) -> list[tuple[float, float]]:
    """The norm that the engine tells, and that of the gradients of the same loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    twin = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    engine, *_ = initialize(model=model, config=config)
    found = []
    for step in range(2):
        x = torch.randn(2, 20, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x).float().square().mean() * loss_factor)
        engine.step()
        assert engine.was_step_applied()
        twin.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = twin(x)
        (y.float().square().mean() * loss_factor).backward()
        norms = [p.grad.norm() for p in twin.parameters() if p.grad is not None]
        found.append((engine.get_global_grad_norm(), float(torch.stack(norms).norm())))
    finish(engine)
    return found


def test_the_norm_with_fp16_autocast_is_that_of_the_gradients(one_rank: RankPool) -> None:
    """It was 65536 times as large: that of the scaled loss."""
    for told, expected in one_rank.run(autocast_norms, 1e-3)[0]:
        assert told == pytest.approx(expected, rel=2e-2)


def autocast_steps(kind: str, stage: int, loss_factor: float) -> dict[str, Any]:
    """Steps with a clip and fp16 autocast, by an engine and by ``torch.autocast`` with a ``GradScaler``."""
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    model = copy.deepcopy(twin)
    start = copy.deepcopy(twin.state_dict())

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        """Two, which DeepSpeed steps one after the other."""
        return [
            {"params": [p for p in of.parameters() if p.dim() == 2]},
            {"params": [p for p in of.parameters() if p.dim() == 1], "lr": 0.5 if kind == "SGD" else 2e-2},
        ]

    def made(of: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups(of), lr=1.0) if kind == "SGD" else torch.optim.AdamW(groups(of), lr=1e-2)

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.05,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = initialize(model=model, optimizer=made(model), config=config)
    optimizer, scaler = made(twin), torch.amp.GradScaler("cpu")
    told, norms = [], []
    for step in range(7):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        own = x.chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(own).float().square().mean() * loss_factor)
        engine.step()
        told.append(engine.get_global_grad_norm())
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = twin(x)
        scaler.scale(y.float().square().mean() * loss_factor).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(twin.parameters(), 0.05)))
        scaler.step(optimizer)
        scaler.update()
    weights = full_weights(engine)
    moved = {name: value - start[name] for name, value in twin.state_dict().items()}
    found = {
        "told": [float(norm) for norm in told],
        "norms": norms,
        "skipped": engine.skipped_steps,
        "error": max(float((weights[n] - start[n] - m).norm() / m.norm()) for n, m in moved.items()),
    }
    finish(engine)
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("kind", ["SGD", pytest.param("AdamW", marks=pytest.mark.slow)])
def test_fp16_autocast_clips_the_gradients_and_not_the_scaled_ones(two_ranks: RankPool, kind: str, stage: int) -> None:
    """ZeRO clipped by the norm of gradients times 65536: a step of SGD was 61,800 times too short."""
    for found in two_ranks.run(autocast_steps, kind, stage, 1.0):
        assert found["skipped"] == 0
        assert found["told"] == pytest.approx(found["norms"], rel=2e-2)
        assert found["error"] < 2e-2


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fp16_autocast_lowers_a_scale_that_is_too_high(two_ranks: RankPool, stage: int) -> None:
    """ZeRO left every step out that was not finite, without telling the scaler: all of them, for ever."""
    for found in two_ranks.run(autocast_steps, "SGD", stage, 50.0):
        overflows = sum(not math.isfinite(norm) for norm in found["norms"])
        assert 0 < overflows < 6
        assert found["skipped"] == overflows
        assert found["error"] < 2e-2


def losses_beside_autocast(stage: int) -> list[list[float]]:
    """Of engines in fp32 made before any with ``torch_autocast``, kept while one is made, and made after it."""
    zero = {"stage": stage, "reduce_bucket_size": 500}
    clipped = {"gradient_clipping": 0.01}
    first = make_engine("AdamW", zero, 1, **clipped)
    alone = [micro_step(first, number) for number in range(4)]
    finish(first)
    kept = make_engine("AdamW", zero, 1, **clipped)
    autocast = make_engine("AdamW", zero, 1, torch_autocast={"enabled": True, "dtype": "float16"})
    found = [alone, [micro_step(kept, number) for number in range(4)]]
    finish(kept)
    finish(autocast)
    later = make_engine("AdamW", zero, 1, **clipped)
    found.append([micro_step(later, number) for number in range(4)])
    finish(later)
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_engine_with_autocast_changes_no_other_of_the_process(one_rank: RankPool, stage: int) -> None:
    """DeepSpeed keeps that there was one for the whole process: an engine in fp32 that came later scaled its gradients
    by 65536 and clipped them by the norm of that, and its second loss was 3.86 for 3.70.
    """
    (found,) = one_rank.run(losses_beside_autocast, stage)
    assert found[1] == found[0]
    assert found[2] == found[0]


def scales_over_a_checkpoint(stage: int, folder: str) -> list[float]:
    """The scale that was saved, and those of an engine before and after it has loaded."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    found = []
    for load in (False, True):
        engine = make_engine("AdamW", {"stage": stage}, 1, **autocast)
        training, scaler = DeepSpeedTraining(engine), autocast_scaler(engine)
        assert scaler is not None
        micro_step(engine, 0)
        if load:
            found.append(scaler.get_scale())
            load_checkpoint(training, Path(folder) / "tag")
        else:
            scaler.update(1024.0)
            save_checkpoint(training, Path(folder) / "tag", {})
        found.append(scaler.get_scale())
        finish(engine)
    return found


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_autocasts_scale_is_in_the_checkpoint(one_rank: RankPool, tmp_path: Path, stage: int) -> None:
    """A run that went on began at 65536 again, and left out steps that the whole run made."""
    assert one_rank.run(scales_over_a_checkpoint, stage, str(tmp_path)) == [[1024.0, 65536.0, 1024.0]]

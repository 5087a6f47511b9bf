"""The ``ddp`` engine on two ranks against DeepSpeed without ZeRO: the same numbers, and the same checkpoints."""

import gc
import io
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.protocol import TrainingEngine
from narrowgauge.optimizers import OPTIMIZERS
from tests.engine.backends.deepspeed.test_gradients import DropsLayers
from tests.support.models import TinyTransformer, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import worst

STEPS, SAVED_AFTER, MICRO_BATCHES = 10, 5, 2
GROUPS = [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}]
COMPACT = {"lr": 1e-2, "refresh_interval": 3, "matrix_lr_scale": 0.5, "weight_decay": 0.1, "param_groups": GROUPS}

CASES: dict[str, dict[str, Any]] = {
    "Grass-columns": {"type": "Grass", "params": {**COMPACT, "density": 0.3, "decay": "all"}},
    "Grass-top": {"type": "Grass", "params": {**COMPACT, "density": 0.3, "side": "rows", "selection": "top"}},
    "Grass-NorMuon": {"type": "Grass", "params": {**COMPACT, "density": 0.3, "base": "NorMuon"}},
    "GaLore": {"type": "GaLore", "params": {**COMPACT, "rank": 4}},
    "Frugal": {"type": "Frugal", "params": {"lr": 1e-2, "density": 0.25, "refresh_interval": 3}},
    "Apollo": {"type": "Apollo", "params": {"lr": 1e-2, "rank": 4, "refresh_interval": 3}},
    "Lamb": {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    "Lars": {"type": "Lars", "params": {"lr": 1e-1, "weight_decay": 0.1}},
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "torch_adam": True}},
}


class Model(TinyTransformer):
    """Called as a Hugging Face model."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SimpleNamespace(loss=super().forward(input_ids))


def make_engine(
    engine: str, optimizer: dict[str, Any], *, seed: int = 0, stage: int = 0, model: Any = None, **more: Any
) -> Any:
    config = load_config(
        {
            "engine": engine,
            "train_batch_size": 8,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.2,
            "zero_optimization": {"stage": stage},
            "optimizer": optimizer,
            "steps_per_print": 1 << 40,
            **more,
        }
    )
    backend = backend_of(engine)
    backend.check(config)
    torch.manual_seed(seed)
    built = (model or Model)().to(torch.bfloat16 if config.bf16 and engine == "ddp" else torch.float32)
    return backend.build(config, built, schedule=lambda opt: LambdaLR(opt, lambda step: min(1.0, (step + 1) / 4)))


def micro_batches(step: int) -> Iterator[Tensor]:
    for micro_batch in token_batch(step, 8).chunk(MICRO_BATCHES):
        yield micro_batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(engine: TrainingEngine, first: int, last: int) -> list[float]:
    """The mean losses over all ranks."""
    losses = []
    for step in range(first, last):
        loss = engine.train_step(micro_batches(step), lambda name: nullcontext())
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size() / MICRO_BATCHES)
    return losses


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    engine.before_save()
    return {name: tensor.detach().clone() for name, tensor in engine.whole_weights()}


def finish(engine: Any) -> None:
    engine.close()
    del engine
    gc.collect()


def whole_run(engine_name: str, case: str, folder: str, stage: int = 0) -> tuple[list[float], dict[str, Tensor]]:
    """Train to the end, and save a checkpoint on the way."""
    engine = make_engine(engine_name, CASES[case], stage=stage)
    losses = train(engine, 0, SAVED_AFTER)
    save_checkpoint(engine, Path(folder), {"note": 1})
    losses += train(engine, SAVED_AFTER, STEPS)
    weights = weights_of(engine)
    finish(engine)
    return losses, weights


def continued_run(engine_name: str, case: str, folder: str, stage: int = 0) -> tuple[list[float], dict[str, Tensor]]:
    """Go on from a checkpoint in an engine that has trained on something else."""
    engine = make_engine(engine_name, CASES[case], seed=7, stage=stage)
    train(engine, 99, 100)
    assert load_checkpoint(engine, Path(folder)) == {"note": 1}
    assert engine.counters()["global_steps"] == SAVED_AFTER
    losses = train(engine, SAVED_AFTER, STEPS)
    weights = weights_of(engine)
    finish(engine)
    return losses, weights


def test_every_optimizer_is_compared() -> None:
    assert OPTIMIZERS.keys() <= {case["type"] for case in CASES.values()}


@pytest.mark.quick("Grass-columns", "GaLore", "AdamW", "Lamb")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_deepspeed_and_continue_its_checkpoints(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, case: str
) -> None:
    """With accumulation, clipping, a schedule and refreshes before and after the checkpoint."""
    expected_losses, expected = two_ranks.run(whole_run, "deepspeed", case, str(tmp_path / "deepspeed"))[0]
    assert len(set(expected_losses)) == STEPS
    for losses, weights in two_ranks.run(whole_run, "ddp", case, str(tmp_path / "ddp")):
        assert losses == pytest.approx(expected_losses, abs=1e-6)
        assert worst(weights, expected) < 2e-5
    for pool, engine, saved_by, stage in (
        (two_ranks, "ddp", "deepspeed", 0),
        (two_ranks, "deepspeed", "ddp", 0),
        (one_rank, "ddp", "deepspeed", 0),
        (one_rank, "deepspeed", "ddp", 1),
    ):
        losses, weights = pool.run(continued_run, engine, case, str(tmp_path / saved_by), stage)[0]
        assert losses == pytest.approx(expected_losses[SAVED_AFTER:], abs=2e-6)
        assert worst(weights, expected) < 5e-5


def resume_in_bf16(case: str, folder: str) -> tuple[list[float], list[float], bool]:
    engine = make_engine("ddp", CASES[case], bf16={"enabled": True})
    train(engine, 0, SAVED_AFTER)
    save_checkpoint(engine, Path(folder), {})
    expected, weights = train(engine, SAVED_AFTER, STEPS), weights_of(engine)
    finish(engine)
    engine = make_engine("ddp", CASES[case], seed=7, bf16={"enabled": True})
    load_checkpoint(engine, Path(folder))
    losses, found = train(engine, SAVED_AFTER, STEPS), weights_of(engine)
    finish(engine)
    assert all(weight.dtype == torch.bfloat16 for weight in found.values())
    return losses, expected, all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.quick("Grass-NorMuon", "GaLore", "Lamb")
@pytest.mark.parametrize("case", ["Grass-columns", "Grass-NorMuon", "GaLore", "Frugal", "Lamb"])
@pytest.mark.filterwarnings("ignore:bf16.enabled")
def test_bf16_is_resumed_bit_for_bit(two_ranks: RankPool, tmp_path: Path, case: str) -> None:
    """Moments are wider than the weights where the optimizer keeps them so."""
    for losses, expected, same in two_ranks.run(resume_in_bf16, case, str(tmp_path / "tag")):
        assert losses == expected
        assert same


def step_with_infinite_gradient() -> tuple[bool, dict[str, Any], list[float], int]:
    engine = make_engine("ddp", CASES["Grass-columns"])
    train(engine, 0, 2)
    before, own = weights_of(engine), engine.own_optimizer.num_steps
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    factor = float("inf") if dist.get_rank() == 1 else 1.0
    hook = engine.module.norm.weight.register_hook(lambda gradient: gradient * factor)
    train(engine, 2, 3)
    hook.remove()
    after = weights_of(engine)
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert [group["lr"] for group in engine.optimizer.param_groups] == rates
    counters, counted = engine.counters(), engine.own_optimizer.num_steps - own
    losses = train(engine, 3, 4)
    finish(engine)
    return same, counters, losses, counted


def test_a_step_with_gradients_that_are_not_finite_is_left_out_on_all_ranks(two_ranks: RankPool) -> None:
    for same, counters, losses, counted in two_ranks.run(step_with_infinite_gradient):
        assert same
        assert counted == 0
        assert counters == {"global_steps": 3, "global_samples": 24, "skipped_steps": 1}
        assert 0.0 < losses[0] < 10.0


class SometimesIdle(DropsLayers):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SimpleNamespace(loss=super().forward(input_ids))


def losses_with_idle_layers(engine: str, case: str) -> list[float]:
    made = make_engine(engine, CASES[case], model=SometimesIdle)
    losses = train(made, 0, 7)
    finish(made)
    return losses


def test_a_parameter_without_a_gradient_has_one_of_zero_as_under_deepspeed(one_rank: RankPool) -> None:
    """AdamW would leave the parameter, its moments and its step count as they are."""
    for case in ("AdamW", "Grass-columns"):
        found, expected = (one_rank.run(losses_with_idle_layers, name, case)[0] for name in ("ddp", "deepspeed"))
        assert found == pytest.approx(expected, abs=1e-6)


def resume_at_another_rate(folder: str) -> list[str]:
    for rate in (1e-2, 5e-2):
        optimizer = {"type": "AdamW", "params": {"lr": rate, "torch_adam": True}}
        engine = make_engine("ddp", optimizer)
        if rate == 1e-2:
            train(engine, 0, 1)
            save_checkpoint(engine, Path(folder), {})
            finish(engine)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("narrowgauge").addHandler(handler)
    load_checkpoint(engine, Path(folder))
    logging.getLogger("narrowgauge").removeHandler(handler)
    finish(engine)
    return said.getvalue().splitlines()


def test_other_learning_rates_than_the_checkpoints_are_said_once(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(resume_at_another_rate, str(tmp_path / "saved"))
    assert first == [
        f"{tmp_path / 'saved'}: training goes on with its learning rates, [0.01], not with those given, [0.05]"
    ]
    assert second == []


def bytes_sent(case: str) -> tuple[float, float, float]:
    engine = make_engine("ddp", CASES[case])
    engine.traffic.attach()
    train(engine, 0, 4)
    expected, _ = engine.dense_traffic(gathered=0.0)
    trained = sum(p.nbytes for p in engine.module.parameters() if p.requires_grad)
    found = engine.traffic.reduced
    finish(engine)
    return found, 4 * expected, 4.0 * trained


def test_bytes_of_gradients_are_counted(two_ranks: RankPool) -> None:
    """Two ranks: an all-reduce sends its size once. One per step, whatever the accumulation."""
    for found, dense, trained in two_ranks.run(bytes_sent, "AdamW"):
        assert found == dense == trained
    for found, dense, trained in two_ranks.run(bytes_sent, "Grass-columns"):
        assert found == trained
        assert trained < dense


def losses_with_offload(folder: str | None) -> tuple[list[float], int]:
    more: dict[str, Any] = (
        {"activation_offload": {"path": folder, "min_tensor_bytes": 0, "keep_resident": 0}} if folder else {}
    )
    engine = make_engine("ddp", CASES["Grass-columns"], **more)
    losses = train(engine, 0, 4)
    written = engine.activation_offload.stats().written if folder else 0
    finish(engine)
    return losses, written


def test_offload_changes_no_bit(two_ranks: RankPool, tmp_path: Path) -> None:
    expected = two_ranks.run(losses_with_offload, None)
    for (losses, written), (wanted, _) in zip(two_ranks.run(losses_with_offload, str(tmp_path)), expected, strict=True):
        assert losses == wanted
        assert written > 0

"""Schedules of the configuration and of the caller: they work under ZeRO, and keep their place over a resume."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch.optim import lr_scheduler as schedules

from narrowgauge.engine import initialize
from narrowgauge.engine.backends.deepspeed.schedules import momentum_note
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import ConfigError
from tests.support.cases import cases
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import finish

STEPS, SAVED_AFTER = 8, 3

FROM_FILE: dict[str, dict[str, Any]] = {
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.1},
    "StepLR": {"step_size": 2},
    "ConstantLR": {"total_iters": 4},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 7},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 9},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5},
    "WarmupLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "total_num_steps": 8},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 2},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 4},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 2},
}
FROM_CALLER: dict[str, Any] = {
    "MultiplicativeLR": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "SequentialLR": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [schedules.LinearLR(optimizer, total_iters=2), schedules.MultiStepLR(optimizer, [1, 4])],
        milestones=[2],
    ),
    "ChainedScheduler": lambda optimizer: schedules.ChainedScheduler(
        [schedules.ExponentialLR(optimizer, 0.9), schedules.MultiStepLR(optimizer, [2, 5])]
    ),
    "transformers-cosine": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 2, 8),
    "transformers-wsd": lambda optimizer: transformers.get_wsd_schedule(optimizer, 2, 4, num_training_steps=8),
    "transformers-restarts": lambda optimizer: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, 2, 8, 2
    ),
}
QUICK = {"MultiStepLR", "OneCycleLR", "ReduceLROnPlateau", "WarmupDecayLR", "SequentialLR", "transformers-wsd"}


def make_engine(name: str, stage: int, optimizer: dict[str, Any]) -> Any:
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}, "optimizer": optimizer}
    if name in FROM_FILE:
        config["scheduler"] = {"type": name, "params": FROM_FILE[name]}
    engine, *_ = initialize(model=tiny(blocks=1), config=config, lr_scheduler=FROM_CALLER.get(name))
    return engine


def rates_of(engine: Any, name: str, first: int, last: int) -> list[list[float]]:
    rates = []
    for step in range(first, last):
        loss = engine(token_batch(step, 2))
        engine.backward(loss)
        rates.append([round(group["lr"], 12) for group in engine.basic_optimizer.param_groups])
        engine.step({"metrics": 1.0} if name == "ReduceLROnPlateau" else None)
    return rates


GRASS: dict[str, Any] = {"type": "Grass", "params": {"lr": 1e-2, "density": 0.3, "matrix_lr_scale": 0.5}}


def save_and_resume(name: str, stage: int, folder: str) -> list[list[list[float]]]:
    engine = make_engine(name, stage, GRASS)
    rates_of(engine, name, 0, SAVED_AFTER)
    engine.save_checkpoint(folder)
    expected = rates_of(engine, name, SAVED_AFTER, STEPS)
    finish(engine)
    found = [expected]
    for optimizer_states in (True, False):
        engine = make_engine(name, stage, GRASS)
        engine.load_checkpoint(folder, load_optimizer_states=optimizer_states)
        found.append(rates_of(engine, name, SAVED_AFTER, STEPS))
        finish(engine)
    return found


@pytest.mark.quick("WarmupDecayLR-3", "MultiStepLR-0", "OneCycleLR-3", "transformers-wsd-0")
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "name", cases({n: (n,) for n in [*FROM_FILE, *FROM_CALLER]}, slow={*FROM_FILE, *FROM_CALLER} - QUICK)
)
def test_a_schedule_goes_on_where_it_was(one_rank: RankPool, name: str, stage: int, tmp_path: Path) -> None:
    """``MultiStepLR``'s milestones came back as text, so that after a resume none was met; torch's schedules in the
    file were given ZeRO's wrapper, a TypeError.
    """
    ((expected, resumed, without_states),) = one_rank.run(save_and_resume, name, stage, str(tmp_path))
    assert len({tuple(rates) for rates in expected}) > 1
    assert resumed == expected
    if name not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"):
        assert without_states == expected
    assert expected[0][0] != expected[0][1]  # the groups keep their proportions


def dense_rates(stage: int) -> list[list[float]]:
    adamw = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = make_engine("MultiStepLR", stage, adamw)
    rates = rates_of(engine, "MultiStepLR", 0, STEPS)
    finish(engine)
    return rates


def test_torchs_schedules_work_with_deepspeeds_optimizers_too(one_rank: RankPool) -> None:
    expected = [[1e-2]] * 2 + [[1e-3]] * 3 + [[1e-4]] * 3
    for stage in (0, 1, 3):
        assert one_rank.run(dense_rates, stage) == [expected]


def problems(scheduler: dict[str, Any], **params: Any) -> list[str]:
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "Grass", "params": {"lr": 0.01, "density": 0.5, **params}},
        "scheduler": scheduler,
    }
    try:
        load_config(config)
    except ConfigError as error:
        return error.problems
    return []


def test_what_a_schedule_does_to_the_momentum_is_said() -> None:
    """DeepSpeed's OneCycle replaced the ``betas`` of the file, and its momentum decay took beta1 past 1."""
    params = FROM_FILE["OneCycle"]
    assert problems({"type": "OneCycle", "params": params}) == []
    assert problems({"type": "OneCycle", "params": {**params, "cycle_momentum": False}}, betas=[0.8, 0.95]) == []
    (found,) = problems({"type": "OneCycle", "params": params}, betas=[0.8, 0.95])
    assert "cycle_momentum: expected true or false beside optimizer.params.betas, got none" in found
    (found,) = problems({"type": "OneCycle", "params": {**params, "decay_mom_rate": 0.5}})
    assert "decay_mom_rate: expected 0, got 0.5" in found
    (found,) = problems({"type": "OneCycle", "params": {**params, "cycle_max_mom": 1.0}})
    assert "cycle_max_mom: expected at least 0 and less than 1, got 1.0" in found
    (found,) = problems({"type": "LambdaLR", "params": {"lr_lambda": "x"}})
    assert "LambdaLR is made of functions or schedules, which JSON cannot hold" in found


def test_a_cycle_of_the_momentum_that_nobody_asked_for_is_said() -> None:
    """Without ``betas`` in the file, beta1 went from 0.9 to 0.8 and back without a word."""
    block = {"type": "OneCycle", "params": FROM_FILE["OneCycle"]}
    told = momentum_note({"scheduler": block, "optimizer": GRASS})
    assert told is not None
    assert "betas[0], or its momentum, between 0.8 and 0.9" in told
    given = {**block, "params": {**block["params"], "cycle_min_mom": 0.6}}
    assert "between 0.6 and 0.9" in str(momentum_note({"scheduler": given}))
    given = {**block, "params": {**block["params"], "cycle_momentum": True}}
    for silent in ({"scheduler": given}, {"scheduler": {"type": "WarmupLR"}}, {"optimizer": GRASS}):
        assert momentum_note(silent) is None


def warned_of_a_cycle() -> list[str]:
    with pytest.warns(UserWarning, match="OneCycle also moves") as caught:
        finish(make_engine("OneCycle", 1, GRASS))
    return [str(warning.message) for warning in caught]


def test_the_cycle_is_said_at_the_start(one_rank: RankPool) -> None:
    (told,) = one_rank.run(warned_of_a_cycle)
    assert any("say scheduler.params.cycle_momentum" in text for text in told)


def plateau_without_a_loss() -> str:
    engine = make_engine("ReduceLROnPlateau", 1, GRASS)
    engine.backward(engine(token_batch(0, 2)))
    with pytest.raises(ValueError, match="ReduceLROnPlateau") as caught:
        engine.step()
    finish(engine)
    return str(caught.value)


def test_a_plateau_is_not_looked_for_in_the_batch_size(one_rank: RankPool) -> None:
    """DeepSpeed gives a schedule that wants a loss the batch size."""
    (found,) = one_rank.run(plateau_without_a_loss)
    assert "expected lr_kwargs={'metrics': loss}" in found

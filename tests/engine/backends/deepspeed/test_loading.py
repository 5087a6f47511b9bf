"""Weights and counters that are loaded apart from the optimizer's state."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, full_weights, make_engine, train_step, worst


def load_weights_in_mid_run(stage: int, dtype: str) -> tuple[float, float, float]:
    engine = make_engine({**ds_config(stage), "bf16": {"enabled": dtype == "bf16"}})
    for step in range(3):
        train_step(engine, step)
    before = full_weights(engine)
    wanted = {name: value.to(before[name].dtype) for name, value in tiny(seed=5).state_dict().items()}
    engine.load_module_state_dict({"module": wanted})
    loaded = worst(full_weights(engine), wanted)
    train_step(engine, 3)
    after = full_weights(engine)
    finish(engine)
    return loaded, worst(after, wanted), worst(after, before)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_weights_that_are_loaded_in_mid_run_reach_the_masters(two_ranks: RankPool, stage: int, dtype: str) -> None:
    """The next step wrote the masters of before over them; at ZeRO-3 shapes did not fit."""
    for loaded, moved, gone in two_ranks.run(load_weights_in_mid_run, stage, dtype):
        assert loaded == 0.0
        assert moved < 0.2
        assert gone > 0.7


def load_into_the_module(stage: int, dtype: str, optimizer: str) -> tuple[float, float]:
    config = {**ds_config(stage), "bf16": {"enabled": dtype == "bf16"}}
    if optimizer == "AdamW":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = make_engine(config)
    for step in range(2):
        train_step(engine, step)
    before = full_weights(engine)
    wanted = {name: value.to(before[name].dtype) for name, value in tiny(seed=5).state_dict().items()}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        engine.module.load_state_dict(wanted)
    # A part of it, which changes it a second time.
    part = {name: value / 2 for name, value in wanted.items() if name.startswith("blocks.0.")}
    with deepspeed.zero.GatheredParameters(list(engine.module.blocks[0].parameters()), modifier_rank=0):
        engine.module.blocks[0].load_state_dict({n.removeprefix("blocks.0."): v for n, v in part.items()})
    train_step(engine, 2)
    after = full_weights(engine)
    finish(engine)
    return worst(after, wanted | part), worst(after, before)


@pytest.mark.cover(1)
@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("optimizer", ["Grass", "AdamW"])
def test_weights_that_are_loaded_past_the_engine_reach_the_masters(
    two_ranks: RankPool, stage: int, dtype: str, optimizer: str
) -> None:
    """``engine.module.load_state_dict`` was undone by the next step, without a word."""
    if stage == 3 and optimizer == "Grass":
        with pytest.raises(AssertionError, match="use engine"):
            two_ranks.run(load_into_the_module, stage, dtype, optimizer)
        return
    for moved, gone in two_ranks.run(load_into_the_module, stage, dtype, optimizer):
        assert moved < 0.2
        assert gone > 0.6


def refused_weights() -> list[str]:
    engine = make_engine(ds_config(1))
    weights = {name: torch.zeros_like(value) for name, value in tiny().state_dict().items()}
    before, found = full_weights(engine), []
    cases: list[dict[str, Any]] = [{**weights, "other": torch.zeros(1)}, {"head.weight": weights["head.weight"]}]
    for state in cases:
        with pytest.raises(ValueError, match="expected") as caught:
            engine.load_module_state_dict({"module": state})
        found.append(str(caught.value))
    assert worst(full_weights(engine), before) == 0.0
    finish(engine)
    return found


def test_weights_that_do_not_fit_are_refused(one_rank: RankPool) -> None:
    ((unknown, missing),) = one_rank.run(refused_weights)
    assert unknown == "other: expected a weight of the model (1 are none)"
    assert "got nothing" in missing


def counters_of(folder: str, **what: bool) -> tuple[int, int]:
    engine = make_engine(ds_config(1))
    if not what:
        for step in range(3):
            train_step(engine, step)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder, **what)
    found = engine.global_steps, engine.global_samples
    finish(engine)
    return found


def test_counters_come_without_the_optimizers_state_too(one_rank: RankPool, tmp_path: Path) -> None:
    """``load_optimizer_states=False`` left them at zero; DeepSpeed leaves them so for ``load_module_only`` alone."""
    folder = str(tmp_path)
    assert one_rank.run(counters_of, folder) == [(3, 24)]
    assert one_rank.run(counters_of, folder, load_optimizer_states=False) == [(3, 24)]
    assert one_rank.run(counters_of, folder, load_module_only=True) == [(0, 0)]

"""What ``initialize`` passes on to DeepSpeed, and what it refuses."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from narrowgauge.engine import initialize
from narrowgauge.engine.errors import ConfigError
from narrowgauge.optimizers import Grass
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import built_under_zero_init, ds_config, finish, train_step


def refused(config: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        initialize(model=arguments.pop("model", None) or tiny(), config=config, **arguments)
    return str(caught.value)


def without_optimizer(stage: int) -> dict[str, Any]:
    return {key: value for key, value in ds_config(stage).items() if key != "optimizer"}


def refusals() -> list[str]:
    model, other = tiny(), tiny()
    sgd = {**ds_config(1), "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    return [
        refused(ds_config(1), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)),
        refused(without_optimizer(1), optimizer=Grass(other, rank=4)),
        refused(ds_config(1), model=built_under_zero_init(without_optimizer(3), 0)),
        refused(sgd),
    ]


def test_combinations_that_would_not_do_what_they_say(one_rank: RankPool) -> None:
    (found,) = one_rank.run(refusals)
    assert "an optimizer was passed to initialize, and the configuration names another" in found[0]
    assert "the Grass that was passed to initialize was made from another model" in found[1]
    assert "zero_optimization.stage: expected 3 for a model built under deepspeed.zero.Init, got 1" in found[2]
    assert "refused by DeepSpeed" in found[3]
    assert "untested ZeRO Optimizer" in found[3]


def train_adamw(params: dict[str, Any]) -> tuple[list[str], list[float]]:
    config = {**ds_config(1), "optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = initialize(model=tiny(), config=config)
    told = [str(warning.message) for warning in caught if "are not used by" in str(warning.message)]
    losses = [train_step(engine, step) for step in range(3)]
    finish(engine)
    return told, losses


def test_the_word_adamw_instead_of_grass_trains_all_parameters(one_rank: RankPool) -> None:
    (plain,) = one_rank.run(train_adamw, {"lr": 0.01, "weight_decay": 0.1})
    (found,) = one_rank.run(train_adamw, {"lr": 0.01, "weight_decay": 0.1, "density": 0.3, "refresh_interval": 7})
    assert plain[0] == []
    assert found[0] == [
        "optimizer.params: density, refresh_interval are not used by AdamW, which trains every parameter at lr"
    ]
    assert found[1] == plain[1]


def warned_of_fp32(names: list[str], bf16: bool) -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": bf16},
        "data_types": {"keep_in_fp32_modules": names},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = initialize(model=model, config=config)
    assert engine.module[1].running_mean.dtype is torch.float32 or not bf16
    finish(engine)
    return [str(w.message) for w in caught if "keep_in_fp32" in str(w.message)]


def test_names_of_what_is_not_kept_in_fp32_are_said(one_rank: RankPool) -> None:
    """DeepSpeed keeps buffers alone; of a parameter's name, and of one that nothing has, nothing was said."""
    ((of_weight, of_nothing),) = one_rank.run(warned_of_fp32, ["0.weight", "running_mean", "router"], True)
    assert "'0.weight' is followed for buffers only" in of_weight
    assert "0.weight among them (1)" in of_weight
    assert "'router' matches no buffer" in of_nothing
    ((of_run,),) = one_rank.run(warned_of_fp32, ["running_mean"], False)
    assert "not used: without fp16 or bf16" in of_run

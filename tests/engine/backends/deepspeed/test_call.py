"""``initialize`` called as scripts for DeepSpeed call it."""

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine import initialize
from narrowgauge.engine.errors import UserError
from narrowgauge.optimizers import Grass
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, train_step

STEPS = 9
WITHOUT_DECAY = {"weight_decay": 0.0, "lr": 5e-3}


def losses_of(engine: Any) -> list[float]:
    losses = [train_step(engine, step) for step in range(STEPS)]
    finish(engine)
    return losses


def calls(file: str, stage: int) -> dict[str, list[float]]:
    """Losses by the way of calling."""
    by_names = ds_config(stage, params={"param_groups": [{"params": ["*norm*", "*.bias"], **WITHOUT_DECAY}]})
    plain = ds_config(stage, params={"param_groups": []})
    Path(file).write_text(json.dumps(plain))

    def groups(model: Any) -> list[dict[str, Any]]:
        special = [n for n, _ in model.named_parameters() if "norm" in n or n.endswith(".bias")]
        own = dict(model.named_parameters())
        return [
            {"params": (p for n, p in own.items() if n not in special), "name": "decayed"},
            {"params": [own[n] for n in special], **WITHOUT_DECAY},
            {"params": []},
        ]

    found = {"names": losses_of(initialize(model=tiny(), config=by_names)[0])}
    model = tiny()
    found["groups"] = losses_of(
        initialize(Namespace(deepspeed_config=file, local_rank=-1), model, None, groups(model))[0]
    )
    found["plain"] = losses_of(initialize(model=tiny(), config=plain)[0])
    model = tiny()
    given = filter(lambda p: p.requires_grad, model.parameters())
    found["parameters"] = losses_of(initialize(None, model, None, given, config_params=plain, mesh_param=(1, 1))[0])
    model = tiny()
    named = {"model_parameters": model.named_parameters(), "config": plain, "distributed_port": 29500}
    found["named"] = losses_of(initialize(model=model, **named)[0])
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_ways_of_calling_train_alike(one_rank: RankPool, tmp_path: Path, stage: int) -> None:
    (found,) = one_rank.run(calls, str(tmp_path / "ds.json"), stage)
    assert found["groups"] == found["names"]
    assert found["parameters"] == found["named"] == found["plain"]
    assert found["names"] != found["plain"]


def with_a_part(stage: int) -> tuple[list[str], list[float], list[float]]:
    """The warnings, and losses where a part is given and where the rest was frozen before."""
    config = ds_config(stage, params={"param_groups": []})
    model = tiny()
    part = [p for n, p in model.named_parameters() if "embed" not in n]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine, *_ = initialize(model=model, model_parameters=part, config=config)
    found = losses_of(engine)
    frozen = tiny()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("embed" not in name)
    expected = losses_of(initialize(model=frozen, config=config)[0])
    return [str(w.message) for w in said if "model_parameters" in str(w.message)], found, expected


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_what_model_parameters_leave_out_is_frozen_and_said(one_rank: RankPool, stage: int) -> None:
    (((said,), found, expected),) = one_rank.run(with_a_part, stage)
    assert "embed" in said
    assert "frozen" in said
    assert found == expected


def refused(file: str) -> dict[str, str]:
    """What each wrong call is told."""
    config = ds_config(1, params={"param_groups": []})
    Path(file).write_text(json.dumps(config))
    model, other = tiny(), tiny()
    (first, *_), all_of_model = model.parameters(), list(model.parameters())
    owned = Grass(other, rank=4)
    part = owned.param_groups[0]["params"][:1]
    without_optimizer = {key: value for key, value in config.items() if key != "optimizer"}
    with_groups = ds_config(1)
    wrong: dict[str, dict[str, Any]] = {
        "none": {},
        "two": {"args": Namespace(deepspeed_config=file), "config": config},
        "no model": {"model": None, "config": config},
        "another rank": {"config": config, "args": Namespace(local_rank=3)},
        "foreign": {"config": config, "model_parameters": [*all_of_model, next(other.parameters())]},
        "twice": {"config": config, "model_parameters": [{"params": [first]}, {"params": [first]}]},
        "mixed": {"config": config, "model_parameters": [first, {"params": all_of_model[1:]}]},
        "empty": {"config": config, "model_parameters": []},
        "option": {"config": config, "model_parameters": [{"params": all_of_model, "momentum": 0.9}]},
        "groups twice": {"config": with_groups, "model_parameters": [{"params": all_of_model, "lr": 1.0}]},
        "client": {"model": other, "config": without_optimizer, "optimizer": owned, "model_parameters": part},
        "sequence": {"config": config, "mesh_param": (1, 2)},
    }
    found = {}
    for name, call in wrong.items():
        try:
            initialize(**{"model": model, **call})
        except UserError as error:
            found[name] = str(error)
    return found


def test_wrong_calls_are_told_what_is_wrong(one_rank: RankPool, tmp_path: Path) -> None:
    (found,) = one_rank.run(refused, str(tmp_path / "ds.json"))
    expected = {
        "none": "expected one configuration in one of config, config_params, args.deepspeed_config",
        "two": "got config and args.deepspeed_config",
        "no model": "model: expected an nn.Module, got None",
        "another rank": "args.local_rank: expected LOCAL_RANK (0) or -1, got 3",
        "foreign": "model_parameters[0]: expected parameters of the model, got a tensor of shape",
        "twice": "model_parameters[1]: ",
        "mixed": "expected parameters or groups, got both",
        "empty": "expected parameters of the model, got none",
        "option": "model_parameters[0]: expected 'params' and any of",
        "groups twice": "optimizer.params.param_groups: expected none beside groups in model_parameters",
        "client": "model_parameters: expected all that the optimizer trains",
        "sequence": "mesh_param: expected a sequence-parallel size of 1",
    }
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert part in found[name]

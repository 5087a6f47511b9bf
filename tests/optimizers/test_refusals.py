"""What Grass refuses, and with what words."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from narrowgauge.optimizers import CompactLinear, Grass
from tests.support.models import tiny
from tests.support.ranks import RankPool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank, density and budget"),
        ({"rank": 4, "density": 0.5}, "exactly one of rank, density and budget"),
        ({"rank": 0}, "rank: expected an integer of at least 1 or None, got 0"),
        ({"density": 0.0}, r"density: expected a number in \(0, 1\] or None, got 0.0"),
        ({"density": 1.5}, r"density: expected .*, got 1.5"),
        ({"density": float("nan")}, "density: expected .*, got nan"),
        ({"rank": 21}, "rank: 21 is above the 20 columns .* of 'blocks.0.q' and .* other layers; at most 20"),
        ({"rank": 34, "side": "rows"}, "rank: 34 is above the 20 rows"),
        ({"rank": 4, "side": "diagonal"}, "side: expected one of .*, got 'diagonal'"),
        ({"rank": 4, "selection": "largest"}, "selection: expected one of .*, got 'largest'"),
        ({"rank": 4, "refresh_interval": 0}, "refresh_interval: expected an integer of at least 1 or None, got 0"),
        ({"rank": 4, "decay": "none"}, "decay: expected one of .*, got 'none'"),
        (
            {"rank": 4, "decay": "all", "refresh_interval": None},
            "decay: 'all' takes effect at a refresh: expected a refresh_interval, got None",
        ),
        (
            {"rank": 4, "target_modules": ["*.query"]},
            r"'\*.query' matches no nn.Linear. The .* linears: blocks.0.q",
        ),
        ({"rank": 4, "target_modules": ["*.q", "x"]}, "'x' matches no nn.Linear"),
        ({"rank": 4, "param_groups": [{"params": ["nothing"]}]}, r"param_groups\[0\]: \['nothing'\] matches no"),
        (
            {"rank": 4, "param_groups": [{"params": ["*"], "momentum": 1}]},
            r"param_groups\[0\]: expected 'params' and any of .*, got \['momentum', 'params'\]",
        ),
        ({"rank": 4, "lr": -1.0}, "lr: expected a number of at least 0, got -1.0"),
        ({"rank": True}, "rank: expected .*, got True"),
        ({"rank": 4.5}, "rank: expected .*, got 4.5"),
        ({"density": "x"}, "density: expected .*, got 'x'"),
        ({"rank": 4, "refresh_interval": 2.5}, "refresh_interval: expected .*, got 2.5"),
        ({"rank": 4, "matrix_lr_scale": -1.0}, "matrix_lr_scale: expected a number above 0, got -1.0"),
        (
            {"rank": 4, "param_groups": [{"params": "*norm*"}]},
            r"param_groups\[0\].params: expected a list of globs, got '\*norm\*'",
        ),
        (
            {"rank": 4, "param_groups": [{"params": ["*"], "lr": -1.0}]},
            r"param_groups\[0\].lr: expected a number of at least 0, got -1.0",
        ),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        Grass(model, **options)
    assert not any(isinstance(m, CompactLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny().named_parameters()]


@pytest.mark.parametrize("copy", [copy.deepcopy, pickle.dumps])
def test_copying_the_optimizer_is_refused(copy: Any) -> None:
    """A copy would train compact values that nothing folds into the weights."""
    optimizer = Grass(tiny(), rank=4)
    with pytest.raises(TypeError, match=r"use state_dict\(\)"):
        copy(optimizer)


def test_a_group_added_later_is_dense() -> None:
    model, head = tiny(), nn.Linear(37, 1)
    optimizer = Grass(model, rank=4, refresh_interval=1, decay="all")
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.1})
    before = head.weight.clone()
    head(torch.ones(1, 37)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[-1]["kind"] == "dense"
    # The first step of AdamW: the rate in size, beside its decay.
    assert torch.allclose(before * (1 - 0.1 * 0.01) - head.weight, torch.full_like(before, 0.1), atol=1e-5)


def test_a_model_without_linears_says_what_it_has() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Conv1d(3, 3, 1))]), "lm_head": nn.Linear(3, 9)})
    with pytest.raises(ValueError, match=r"no trainable nn\.Linear .* lm_head"):
        Grass(model, rank=4)
    with pytest.raises(ValueError, match=r"no nn\.Linear; its layers with parameters are .*Conv1d"):
        Grass(nn.ModuleList([nn.Conv1d(3, 3, 1)]), rank=2)


def test_a_second_optimizer_on_the_same_model_is_refused() -> None:
    model = tiny()
    Grass(model, rank=4)
    with pytest.raises(ValueError, match="already has compact layers"):
        Grass(model, rank=4)


def test_a_compiled_model_is_refused_either_way() -> None:
    with pytest.raises(ValueError, match="already wrapped by OptimizedModule"):
        Grass(torch.compile(tiny()), rank=4)  # type: ignore[arg-type]
    inner = tiny()
    wrapper = torch.compile(inner)
    with pytest.raises(ValueError, match="already wrapped by OptimizedModule"):
        Grass(inner, rank=4)
    assert wrapper is not None
    in_place = tiny()
    in_place.compile()
    with pytest.raises(ValueError, match=r"already wrapped by torch\.compile"):
        Grass(in_place, rank=4)


def convert_after_wrapping() -> list[str]:
    messages = []
    for hand_over in ("wrapper", "module"):
        model = tiny()
        wrapper = DistributedDataParallel(model)
        try:
            Grass(wrapper if hand_over == "wrapper" else model, rank=4)
        except ValueError as error:
            messages.append(str(error))
    from torch.distributed.fsdp import fully_shard

    sharded = tiny()
    fully_shard(sharded)
    try:
        Grass(sharded, rank=4)
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_converting_after_ddp_or_fsdp_is_refused(two_ranks: RankPool) -> None:
    """After DDP it would go on, each rank with its own gradient; found out even from ``ddp.module``."""
    for messages in two_ranks.run(convert_after_wrapping):
        assert len(messages) == 3
        assert all("create the optimizer first, then wrap" in message for message in messages)
        assert "DistributedDataParallel" in messages[0]
        assert "DistributedDataParallel" in messages[1]
        assert "fully_shard" in messages[2]


def hand_to_deepspeed(rank_of_gloo: int) -> str:
    import deepspeed

    model = tiny()
    optimizer = Grass(model, density=0.3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": 2,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    try:
        engine.backward(engine(torch.zeros(1, 5, dtype=torch.int64)))
        engine.step()
    except RuntimeError as error:
        return str(error)
    return f"no error on rank {dist.get_rank()}"


def test_handing_it_to_deepspeed_directly_is_refused_at_the_first_step(two_ranks: RankPool) -> None:
    for message in two_ranks.run(hand_to_deepspeed, 0):
        assert "under DeepSpeed give it to narrowgauge.engine.initialize" in message


def shard_after_converting() -> str:
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny()
    optimizer = Grass(model, density=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
            sharded(torch.zeros(1, 5, dtype=torch.int64)).backward()
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            return str(error)
    return f"no error on rank {dist.get_rank()}"


def test_fsdp_after_converting_is_refused_at_the_first_step(two_ranks: RankPool) -> None:
    for message in two_ranks.run(shard_after_converting):
        assert "FSDP or another engine has cut them" in message

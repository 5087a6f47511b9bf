"""Selections by norms, and carried moments, under DeepSpeed ZeRO on two ranks against one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.cases import cases
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.references.selected import SelectedReference, projections
from tests.support.zero import ds_config, finish, full_weights, make_engine, plain_step, train_step, worst

INTERVAL, STEPS = 4, 15
VOCABULARY = ("embed.weight", "head.weight")
PARAMS: dict[str, Any] = {"refresh_interval": INTERVAL, "weight_decay": 0.1, "param_groups": []}


def compare_with_one_process(stage: int, params: dict[str, Any], **overrides: Any) -> dict[str, float]:
    params = {**PARAMS, **params}
    engine = make_engine(ds_config(stage, params=params, gradient_clipping=0.0, **overrides))
    optimizer, twin = engine.own_optimizer, tiny()
    found = projections(optimizer)
    reference = SelectedReference(
        twin,
        found,
        {name: "rows" if name in VOCABULARY else params["side"] for name in found},
        lr=1e-2,
        matrix_lr_scale=0.5,
        weight_decay=0.1,
        decays_whole_weight=params["selection"] == "multinomial_replacement",
        dense_rate=VOCABULARY,
    )
    result = {"loss": 0.0, "refreshes": 0.0, "moved": 0.0}
    for step in range(STEPS):
        loss, expected = train_step(engine, step), plain_step(twin, step, reference.step)
        result["loss"] = max(result["loss"], abs(loss - expected))
        if optimizer.num_refreshes > result["refreshes"]:
            result["refreshes"] = optimizer.num_refreshes
            previous, found = found, projections(optimizer)
            result["moved"] += sum(not torch.equal(p, previous[name]) for name, p in found.items()) / len(found)
            reference.select(found, carry=params.get("moments") == "carry")
    for p in projections(optimizer).values():
        first = p.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)
    result["weights"] = worst(full_weights(engine), twin.state_dict())
    finish(engine)
    return result


SUB_GROUPS = {"zero": {"sub_group_size": 300}}
CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "zero1-top-columns-sketch": (1, {"selection": "top", "side": "columns"}, {}),
    "zero2-replacement-rows-exact": (
        2,
        {"selection": "multinomial_replacement", "side": "rows", "statistics": "exact"},
        {},
    ),
    "zero3-replacement-columns-sketch": (3, {"selection": "multinomial_replacement", "side": "columns"}, {}),
    "zero1-multinomial-rows-carry": (1, {"selection": "multinomial", "side": "rows", "moments": "carry"}, {}),
    "zero2-uniform-columns-carry-offload": (
        2,
        {"selection": "uniform", "side": "columns", "moments": "carry"},
        CPU_OFFLOAD,
    ),
    "zero3-multinomial-columns-carry": (
        3,
        {"selection": "multinomial", "side": "columns", "moments": "carry"},
        SUB_GROUPS,
    ),
    "zero1-multinomial-vocabulary": (
        1,
        {"selection": "multinomial", "vocabulary": "rows", "side": "columns", "shared_inputs": "siblings"},
        {},
    ),
    "zero3-multinomial-vocabulary": (
        3,
        {"selection": "multinomial", "vocabulary": "rows", "side": "columns", "shared_inputs": "siblings"},
        {},
    ),
}


SLOW = {"zero1-multinomial-vocabulary"}


@pytest.mark.quick("zero1-multinomial-rows-carry", "zero3-replacement-columns-sketch", "zero3-multinomial-vocabulary")
@pytest.mark.parametrize(("stage", "params", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, stage: int, params: dict[str, Any], overrides: dict[str, Any]
) -> None:
    for result in two_ranks.run(compare_with_one_process, stage, params, **overrides):
        assert result["refreshes"] == 3
        assert result["moved"] > 1.0
        assert result["loss"] < 1e-6
        assert result["weights"] < 2e-5


def copies_kept(stage: int, shared_inputs: str | None) -> int:
    """How many storages of the shape of a copy of 6 of 20 inputs a forward keeps."""
    engine = make_engine(ds_config(stage, params={"shared_inputs": shared_inputs}))
    kept, alive = set(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.shape == (2 * 11, 6):
            kept.add(tensor.untyped_storage()._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(token_batch(0, 8).chunk(2)[0].chunk(2)[dist.get_rank()])
    engine.backward(loss)
    finish(engine)
    return len(kept)


def test_layers_that_share_an_input_keep_one_copy_under_zero(two_ranks: RankPool) -> None:
    """ZeRO-3 hands each layer an alias of the input. Of each of two blocks: q, k, v; out; up."""
    for stage in (1, 3):
        assert two_ranks.run(copies_kept, stage, "siblings") == [6, 6]
        assert two_ranks.run(copies_kept, stage, None) == [10, 10]

"""FRUGAL under DeepSpeed ZeRO on two ranks against one process, through refreshes, accumulation and clipping."""

from pathlib import Path
from typing import Any

import pytest
import torch

from narrowgauge.optimizers import Frugal
from tests.support.cases import cases
from tests.support.models import is_matrix, tiny
from tests.support.ranks import RankPool
from tests.support.references.frugal import ReferenceFrugal
from tests.support.zero import (
    CLIP,
    ds_config,
    finish,
    full_weights,
    make_engine,
    options_of,
    plain_steps,
    train_step,
    worst,
)

STEPS = 13
PARAMS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": 4,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
}
GROUPS = [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}]


def rule_of(name: str, *, embeddings: str = "full", head: str = "full") -> str:
    if is_matrix(name):
        return "projected"
    return {"embed.weight": embeddings, "head.weight": head}.get(name, "full")


def frugal_config(stage: int, params: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    optimizer = {"type": "Frugal", "params": {**PARAMS, "param_groups": GROUPS, **params}}
    return {**ds_config(stage, **overrides), "optimizer": optimizer}


def reference_run(params: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of one process on the whole batch, by the second statement of FRUGAL."""
    kinds = {key: value for key, value in params.items() if key in ("embeddings", "head")}
    options = {key: value for key, value in {**PARAMS, **params}.items() if key not in kinds}
    model = tiny()
    reference = ReferenceFrugal(
        model, is_matrix=is_matrix, rule_of=lambda name: rule_of(name, **kinds), options_of=options_of, **options
    )
    return plain_steps(model, STEPS, lambda: reference.step(CLIP)), model.state_dict()


def compare_with_one_process(
    stage: int, params: dict[str, Any], zero_init: bool, overrides: dict[str, Any]
) -> dict[str, Any]:
    engine = make_engine(frugal_config(stage, params, **overrides), zero_init=zero_init)
    losses = [train_step(engine, step) for step in range(STEPS)]
    expected_losses, expected = reference_run(params)
    result = {
        "refreshes": engine.own_optimizer.num_refreshes,
        "groups": len(engine.basic_optimizer.param_groups),
        "loss": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "weights": worst(full_weights(engine), expected),
    }
    finish(engine)
    return result


CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
SELECTIONS = ("columns", "rows", "randk", "blockwise", "svd", "random")
CASES: dict[str, tuple[int, dict[str, Any], bool, dict[str, Any]]] = {
    **{f"zero1-{name}": (1, {"selection": name}, False, {}) for name in SELECTIONS},
    **{f"zero2-{name}": (2, {"selection": name}, False, {}) for name in ("randk", "svd")},
    **{f"zero3-{name}": (3, {"selection": name}, False, {}) for name in ("rows", "randk", "blockwise", "random")},
    "zero0-columns": (0, {"selection": "columns"}, False, {}),
    "zero0-svd": (0, {"selection": "svd"}, False, {}),
    "zero2-density-zero": (2, {"selection": "columns", "density": 0.0}, False, {}),
    "zero3-density-one": (3, {"selection": "svd", "density": 1.0}, False, {}),
    "zero1-kinds": (1, {"selection": "randk", "embeddings": "projected", "head": "free"}, False, {}),
    "zero3-kinds-svd": (3, {"selection": "svd", "embeddings": "projected", "head": "projected"}, False, {}),
    "zero3-columns-zero-init": (3, {"selection": "columns"}, True, {}),
    "zero3-svd-sub-groups": (3, {"selection": "svd"}, False, {"zero": {"sub_group_size": 300}}),
    "zero2-columns-offload": (2, {"selection": "columns"}, False, CPU_OFFLOAD),
    "zero3-svd-offload": (3, {"selection": "svd"}, False, CPU_OFFLOAD),
}


SLOW = {
    "zero1-rows",
    "zero1-randk",
    "zero1-blockwise",
    "zero1-random",
    "zero2-svd",
    "zero3-randk",
    "zero0-svd",
    "zero3-svd-offload",
}


@pytest.mark.quick("zero0-columns", "zero1-kinds", "zero2-columns-offload", "zero3-svd-sub-groups")
@pytest.mark.parametrize(("stage", "params", "zero_init", "overrides"), cases(CASES, slow=SLOW))
def test_two_ranks_equal_one_process_in_fp32(
    two_ranks: RankPool, stage: int, params: dict[str, Any], zero_init: bool, overrides: dict[str, Any]
) -> None:
    """Three parameter groups, no size divisible by the number of ranks, three refreshes."""
    for result in two_ranks.run(compare_with_one_process, stage, params, zero_init, overrides):
        assert result["refreshes"] == 3
        assert result["groups"] == 3
        assert result["loss"] < 2e-6
        assert result["weights"] < 5e-5


SAVED_AFTER = 6


def save_and_go_on(stage: int, params: dict[str, Any], folder: str) -> tuple[list[float], int]:
    engine = make_engine(frugal_config(stage, params))
    for step in range(SAVED_AFTER):
        train_step(engine, step)
    engine.save_checkpoint(folder, tag="tag")
    moments = sum(state["exp_avg"].numel() for state in engine.own_optimizer.state.values())
    losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    finish(engine)
    return losses, moments


def load_and_go_on(stage: int, params: dict[str, Any], folder: str) -> list[float]:
    engine = make_engine(frugal_config(stage, params), seed=7)
    train_step(engine, 99)
    engine.load_checkpoint(folder)
    losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    finish(engine)
    return losses


@pytest.mark.parametrize(
    ("selection", "written", "read"),
    [
        ("randk", 1, 3),
        pytest.param("svd", 3, 2, marks=pytest.mark.slow),
        pytest.param("columns", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_on_other_ranks_and_stages(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, selection: str, written: int, read: int
) -> None:
    """Saved in the middle of an interval, across a refresh; the state of two ranks is that of one, and no more.

    ``svd`` with SGD: what a projection leaves of one coordinate in this run is zero but for rounding, and its sign
    differs with the number of ranks (by two steps of ``lr``, 1e-2; all other weights are equal to 2e-6).
    """
    params = {"selection": selection, "embeddings": "projected"}
    if selection == "svd":
        params["state_free"] = "SGD"
    results = two_ranks.run(save_and_go_on, written, params, str(tmp_path))
    expected = results[0][0]
    assert two_ranks.run(load_and_go_on, written, params, str(tmp_path))[0] == expected
    assert one_rank.run(load_and_go_on, read, params, str(tmp_path))[0] == pytest.approx(expected, abs=1e-5)
    optimizer = Frugal(tiny(), **{**PARAMS, **params})
    optimizer.num_steps = SAVED_AFTER
    whole = sum(slot.count for g in optimizer.param_groups for p in g["params"] for slot in optimizer.slots_of(p))
    assert sum(moments for _, moments in results) == whole


def majority_vote_refusal() -> str:
    try:
        make_engine(frugal_config(1, {"reduction": "majority_vote"}))
    except ValueError as error:
        return str(error)
    return ""


def test_a_majority_vote_is_refused(two_ranks: RankPool) -> None:
    for message in two_ranks.run(majority_vote_refusal):
        assert "averages gradients before the optimizer sees them" in message

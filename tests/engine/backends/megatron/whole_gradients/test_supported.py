"""What optimizers on whole gradients refuse under Megatron: before there is a process group."""

from typing import Any

import pytest

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.errors import ConfigError
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, run_config

TP2: dict[str, Any] = {"tensor_parallel": 2}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "embeddings": (
        {},
        "Frugal",
        {"lr": 1e-2, "embeddings": "projected"},
        "params.embeddings: expected 'full' with the megatron engine, got 'projected'",
    ),
    "randk": (TP2, "Frugal", {"lr": 1e-2, "selection": "randk"}, "params.selection: expected one of lines or"),
    "blockwise": (
        {"pipeline_parallel": 2},
        "Frugal",
        {"lr": 1e-2, "selection": "blockwise"},
        "params.selection: expected another than 'blockwise' with megatron.pipeline_parallel",
    ),
    "reference": (
        {},
        "Apollo",
        {"lr": 1e-2, "rank": 2, "reference_compatible": True},
        "params.reference_compatible: expected false with the megatron engine, got true",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_options_are_refused(case: str) -> None:
    layout, name, params, message = CASES[case]
    config = run_config("megatron", "llama", layout, optimizer={"type": name, "params": params})
    with pytest.raises(ConfigError) as caught:
        backend_of("megatron").check(config)
    assert f"optimizer.{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params"),
    [("Lamb", {}), ("Lars", {}), ("Frugal", {}), ("Apollo", {"rank": 2})],
    ids=lambda value: str(value),
)
def test_zero_around_tensor_parallelism_refuses_them(name: str, params: dict[str, Any]) -> None:
    optimizer = {"type": name, "params": {"lr": 1e-2, **params}}
    config = run_config("megatron", "llama", TP2, optimizer=optimizer, zero_optimization={"stage": 2})
    with pytest.raises(ConfigError, match=rf"optimizer\.type: expected Grass, GaLore or AdamW .* got {name}"):
        backend_of("megatron").check(config)


def message_of(optimizer: dict[str, Any]) -> str:
    try:
        make_engine(run_config("megatron", "llama", {}, optimizer=optimizer), "llama")
    except ConfigError as error:
        return str(error)
    return "none"


def test_weights_of_one_layer_belong_to_one_group(megatron_ranks: MegatronPool) -> None:
    """Megatron packs q, k and v into one parameter."""
    optimizer = {"type": "Frugal", "params": {"lr": 1e-2, "target_modules": ["*q_proj"]}}
    (found,) = megatron_ranks.run(message_of, optimizer, ranks=1)
    assert "optimizer.params.param_groups: expected one group for" in found
    assert "q_proj" in found

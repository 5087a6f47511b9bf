"""What compact optimizers refuse under Megatron: before there is a process group."""

from typing import Any

import pytest

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.errors import ConfigError
from tests.support.megatron_models import hf_config
from tests.support.megatron_runs import run_config

GRASS: dict[str, Any] = {"lr": 1e-2, "density": 0.25, "strata": 2}
TP2: dict[str, Any] = {"tensor_parallel": 2}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "strata": (TP2, {**GRASS, "strata": 1}, "strata: expected a multiple of megatron.tensor_parallel, 2, got 1"),
    "budget": (
        {"pipeline_parallel": 2},
        {"lr": 1e-2, "budget": 10_000},
        "budget: expected None with megatron.pipeline_parallel, got 10000",
    ),
    "budget-TP": (TP2, {"lr": 1e-2, "budget": 10_000}, "strata: expected a multiple of megatron.tensor_parallel, 2"),
    "vocabulary": ({}, {**GRASS, "strata": 1, "vocabulary": "rows"}, "vocabulary: expected 'dense'"),
    "local": (TP2, {**GRASS, "selection": "top", "statistics": "local"}, "statistics: expected 'sketch' or 'exact'"),
    "repeats": ({}, {"lr": 1e-2, "density": 0.25, "selection": "multinomial_replacement"}, "selection: expected one"),
    "muon": (
        {},
        {**GRASS, "base": "Muon"},
        "base: expected 'AdamW' with the megatron engine, got 'Muon': ranks have slices of matrices",
    ),
    "adaptive": (
        {"pipeline_parallel": 2},
        {**GRASS, "selection": "top", "adaptive_refresh": 0.4},
        "adaptive_refresh: expected None with megatron.pipeline_parallel, got 0.4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_options_are_refused(case: str) -> None:
    layout, params, message = CASES[case]
    config = run_config("megatron", "llama", layout, optimizer={"type": "Grass", "params": params})
    with pytest.raises(ConfigError) as caught:
        backend_of("megatron").check(config)
    assert f"optimizer.params.{message}" in str(caught.value)


def test_moments_are_not_carried_around_zero() -> None:
    optimizer = {"type": "Grass", "params": {**GRASS, "moments": "carry"}}
    config = run_config("megatron", "llama", TP2, optimizer=optimizer, zero_optimization={"stage": 1})
    with pytest.raises(ConfigError, match=r"optimizer\.params\.moments: expected 'reset' .* and zero_optimization"):
        backend_of("megatron").check(config)


@pytest.mark.parametrize(
    ("optimizer", "params", "message"),
    [
        (
            "Grass",
            {**GRASS, "strata": 3},
            "strata: expected a multiple of 2, into which expert_tensor_parallel (2) cuts",
        ),
        ("Grass", {**GRASS, "side": "rows"}, "strata: expected a multiple of 4, into which expert_tensor_parallel (2)"),
        (
            "GaLore",
            {"lr": 1e-2, "rank": 4, "side": "right"},
            "side: expected one that leaves experts' down_proj's inputs",
        ),
    ],
)
def test_experts_that_are_cut(optimizer: str, params: dict[str, Any], message: str) -> None:
    layout = {"expert_parallel": 2, "expert_tensor_parallel": 2}
    config = run_config("megatron", "mixtral", layout, optimizer={"type": optimizer, "params": params})
    backend_of("megatron").check(config)
    with pytest.raises(ConfigError) as caught:
        backend_of("megatron").check_model(config, hf_config("mixtral"), 4)
    assert f"optimizer.params.{message}" in str(caught.value)

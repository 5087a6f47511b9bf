"""Globs over names of a model whose layers lie on several stages of a pipeline."""

from typing import Any

import pytest

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.megatron.architecture import architecture_of
from narrowgauge.engine.backends.megatron.globs import options_of_stage
from narrowgauge.engine.backends.megatron.layout import Layout
from narrowgauge.engine.errors import ConfigError
from narrowgauge.optimizers.frugal.options import FrugalOptions
from narrowgauge.optimizers.grass.options import GrassOptions
from narrowgauge.optimizers.layerwise.options import LambOptions
from narrowgauge.optimizers.options import Options
from tests.support.megatron_models import hf_config
from tests.support.megatron_runs import run_config

# Two tensor-parallel ranks, two that share data, two stages of two layers.
LAYOUT = Layout(tensor=2, pipeline=2, data=2, expert_tensor=2, expert_data=2)


def of_stages(options: Options, family: str = "llama") -> list[Any]:
    architecture = architecture_of(hf_config(family))
    return [options_of_stage(options, architecture, LAYOUT, LAYOUT.place_of(rank)) for rank in (1, 5)]


def test_each_stage_sees_the_globs_that_are_its_own() -> None:
    """Those that match nothing at all stay on every stage, where they are an error."""
    globs = ["*norm*", "*.layers.0.*", "lm_head.*", "*nowhere*"]
    found = [options.exclude for options in of_stages(LambOptions(exclude=globs))]
    assert found == [["*norm*", "*.layers.0.*", "*nowhere*"], ["*norm*", "lm_head.*", "*nowhere*"]]
    found = [options.exclude for options in of_stages(LambOptions(exclude=["lm_head.*"]))]
    assert found == [[], ["lm_head.*"]]
    # Norms are no layers that can be named: not elsewhere either.
    globs = ["*.layers.1.*", "*.layers.2.*", "*.mlp.*", "*norm*"]
    found = [options.target_modules for options in of_stages(FrugalOptions(target_modules=globs))]
    assert found == [["*.layers.1.*", "*.mlp.*", "*norm*"], ["*.layers.2.*", "*.mlp.*", "*norm*"]]
    shared = [["*.layers.0.*.q_proj", "*.layers.0.*.k_proj"], ["*.up_proj", "*.gate_proj"]]
    found = [options.shared_inputs for options in of_stages(GrassOptions(density=0.5, shared_inputs=shared))]
    assert found == [shared, shared[1:]]
    globs = ["*.0.mlp.experts.*", "*.3.mlp.experts.down_proj", "*.experts.gate_up_proj"]
    found = [options.target_modules for options in of_stages(FrugalOptions(target_modules=globs), "mixtral")]
    assert found == [[globs[0], globs[2]], globs[1:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FrugalOptions(target_modules=["*.layers.0.*"]), "target_modules: expected layers of every stage .*layers.2"),
        (
            LambOptions(param_groups=[{"params": ["*norm*"]}, {"params": ["lm_head*"], "lr": 0.1}]),
            r"param_groups\[1\]: expected parameters of every stage .* got \['lm_head\*'\].* has model.embed_tokens",
        ),
    ],
)
def test_what_every_stage_needs_something_of(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_stages(options)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Lars", {"exclude": ["lm_head*", "*.layers.9.*"]}, "exclude: '*.layers.9.*' matches nothing of the model"),
        (
            "Frugal",
            {"target_modules": ["*.mlp.*", "lm_head"]},
            "target_modules: 'lm_head' matches nothing of the model",
        ),
        (
            "Frugal",
            {"param_groups": [{"params": ["*bias"]}]},
            "param_groups[0]: ['*bias'] matches nothing of the model",
        ),
        ("Frugal", {"target_modules": ["*.layers.3.*"]}, "target_modules: expected layers of every stage"),
    ],
)
def test_it_is_told_before_a_run(name: str, params: dict[str, Any], message: str) -> None:
    """On every process rank, before there is a process group."""
    optimizer = {"type": name, "params": {"lr": 1.0, **params}}
    config = run_config("megatron", "llama", {"pipeline_parallel": 2}, optimizer=optimizer)
    with pytest.raises(ConfigError) as caught:
        backend_of("megatron").check_model(config, hf_config("llama"), 2)
    (problem,) = caught.value.problems
    assert problem.startswith(f"optimizer.params.{message}")

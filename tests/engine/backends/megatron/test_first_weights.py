"""Weights from scratch as transformers draws them, under the ``megatron`` engine."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from narrowgauge.engine.backends import backend_of
from tests.support.cases import cases
from tests.support.megatron_models import hf_config, model_block
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_config

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tensor_parallel": 2}),
    "tied": ("qwen2", {"pipeline_parallel": 2}),
    "experts": ("mixtral", {"expert_parallel": 2}),
}


def built(family: str, layout: dict[str, Any]) -> dict[str, Tensor]:
    from narrowgauge.engine.backends.megatron.draw import shapes_of
    from narrowgauge.engine.backends.megatron.whole import Gathering

    block = {"config": model_block(family), "initial_weights": "transformers"}
    config = run_config("megatron", family, layout, model=block)
    assert config.parsed.model is not None
    model: Any = backend_of("megatron").construct(config.parsed.model, hf_config(family), config)
    return {name: weight.clone() for name, weight in Gathering(model, shapes_of(hf_config(family))).weights()}


@pytest.mark.parametrize(("family", "layout"), cases(CASES, slow=["tied", "experts"]))
def test_the_stream_of_transformers_is_drawn_on_request(
    megatron_ranks: MegatronPool, family: str, layout: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(hf_config(family), dtype=torch.float32)
    expected = dict(model.named_parameters())
    found = megatron_ranks.run(built, family, layout, ranks=2)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.detach()), name

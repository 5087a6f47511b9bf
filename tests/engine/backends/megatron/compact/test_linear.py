"""Compact parallel layers by themselves: fp32 gradients under bf16, and what does not fit Megatron's packed layers."""

from typing import Any

import pytest
import torch

from narrowgauge.engine.errors import ConfigError
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, run_config

from .test_parity import OPTIMIZERS

COLUMNS = OPTIMIZERS["columns"]["params"]


def summed_gradients(name: str) -> list[float]:
    """The relative errors of fp32 gradients that three micro-batches in bf16 add up to, by layer."""
    config = run_config("megatron", "llama", {}, optimizer=OPTIMIZERS[name], bf16={"enabled": True})
    engine: Any = make_engine(config, "llama")
    block = engine.module.chunks[0].decoder.layers[0]
    errors = []
    for layer in (block.self_attention.linear_qkv, block.mlp.linear_fc2):
        outputs, inputs = layer.weight.shape
        whole = torch.zeros(outputs, inputs, dtype=torch.float64)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            x, grad = (torch.randn(16, 2, size, generator=generator).bfloat16() for size in (inputs, outputs))
            layer(x.requires_grad_())[0].backward(grad)
            whole += grad.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
        for weight in layer.held:
            part = weight.cut.part(whole)
            wanted = part[:, weight.local] if weight.side == "columns" else part[weight.local]
            found = weight.compact.main_grad
            assert found.dtype is torch.float32
            errors.append(float((found - wanted).norm() / wanted.norm()))
    engine.close()
    return errors


@pytest.mark.parametrize("name", ["columns", "rows"])
def test_gradients_of_bf16_layers_are_added_up_in_fp32(megatron_ranks: MegatronPool, name: str) -> None:
    """Rounded to bf16 in between they would be wrong by 1e-3."""
    (errors,) = megatron_ranks.run(summed_gradients, name, ranks=1)
    assert len(errors) == 4
    assert max(errors) < 1e-6


def refusal(optimizer: dict[str, Any], layout: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_engine(run_config("megatron", "llama", layout, optimizer=optimizer), "llama")
    return str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"target_modules": ["*.q_proj", "*.k_proj", "*.o_proj"]},
            "to be compact or none of them, which are one layer",
        ),
        (
            {"param_groups": [{"params": ["*gate_proj*"], "lr": 1e-3}], "target_modules": ["*.self_attn.*"]},
            "param_groups: expected one group for",
        ),
        (
            {"param_groups": [{"params": ["model.embed_tokens.weight"], "lr": 1e-3}]},
            "param_groups[0]: expected parameters of every stage of the pipeline, got ['model.embed_tokens.weight']",
        ),
    ],
    ids=["part-of-a-layer", "groups-of-a-layer", "group-of-one-stage"],
)
def test_what_does_not_fit_packed_layers_is_refused(
    megatron_ranks: MegatronPool, params: dict[str, Any], message: str
) -> None:
    optimizer = {"type": "Grass", "params": {**COLUMNS, **params}}
    found = megatron_ranks.run(refusal, optimizer, {"pipeline_parallel": 2}, ranks=2)
    assert len(set(found)) == 1
    assert message in found[0]

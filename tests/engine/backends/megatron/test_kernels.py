"""Of which package a layer's parts are: what is chosen, what is built from it, and what only a GPU can run."""

from pathlib import Path
from typing import Any

import pytest
import torch

# A machine for the tests marked gpu need not have these.
pytest.importorskip("pydantic")
pytest.importorskip("megatron.core")

from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import TEGroupedMLP

from narrowgauge.engine.backends.megatron.architecture import architecture_of
from narrowgauge.engine.backends.megatron.attention import CausalAttention
from narrowgauge.engine.backends.megatron.kernels import Kernels, can_use_transformer_engine, choose
from narrowgauge.engine.backends.megatron.layout import Layout, Sizes
from narrowgauge.engine.backends.megatron.parts import local_parameters
from narrowgauge.engine.backends.megatron.specification import block_specification
from tests.support.command import losses, run, tiny_config
from tests.support.megatron_models import hf_config

ALL = Kernels(norm=True, attention=True, grouped=True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, Kernels(norm=True, attention=True)),
        ({"grouped": True}, ALL),
        ({"packed": True}, Kernels(norm=True)),
        ({"bf16": False}, Kernels(norm=True)),
        ({"can_use_te": False, "grouped": True}, Kernels()),
    ],
)
def test_what_is_chosen(asked: dict[str, bool], expected: Kernels) -> None:
    """Nothing of Transformer Engine's without it; its attention neither where examples are packed nor in fp32."""
    assert choose(**{"can_use_te": True, "bf16": True, "packed": False, "grouped": False, **asked}) == expected


def test_what_is_said_of_them() -> None:
    assert Kernels().describe() is None
    assert Kernels(norm=True).describe() == "norms of Transformer Engine"
    assert ALL.describe() == "norms, attention, grouped experts of Transformer Engine"


def parts_of(family: str, kernels: Kernels) -> tuple[Any, Any]:
    """Of a layer, and the norm after the last."""
    block: Any = block_specification(architecture_of(hf_config(family)), 3, "none", kernels)
    assert len(block.layer_specs) == 3
    return block.layer_specs[0].submodules, block.layer_norm


@pytest.mark.parametrize("kernels", [Kernels(), Kernels(norm=True), Kernels(norm=True, attention=True)])
def test_what_a_layer_is_built_from(kernels: Kernels) -> None:
    """Linear layers are Megatron's own in each case: what fuses a norm with a product cannot be compact."""
    layer, last = parts_of("qwen3", kernels)
    attention = layer.self_attention.submodules
    norms = {layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm, last}
    assert len(norms) == 1
    assert (norms == {te.TENorm}) == kernels.norm
    assert attention.core_attention is (te.TEDotProductAttention if kernels.attention else CausalAttention)
    assert (attention.linear_qkv, attention.linear_proj) == (ColumnParallelLinear, RowParallelLinear)
    mlp = layer.mlp.submodules
    assert (mlp.linear_fc1, mlp.linear_fc2) == (ColumnParallelLinear, RowParallelLinear)


def test_what_experts_are_built_from() -> None:
    experts = parts_of("mixtral", ALL)[0].mlp.submodules.experts
    assert experts.module is TEGroupedMLP
    assert experts.submodules.linear_fc1 is te.TEColumnParallelGroupedLinear
    assert experts.submodules.linear_fc2 is te.TERowParallelGroupedLinear
    one_by_one = parts_of("mixtral", Kernels(norm=True, attention=True))[0].mlp.submodules.experts
    assert one_by_one.submodules.linear_fc1 is ColumnParallelLinear


def test_grouped_experts_have_other_names_and_the_same_parts() -> None:
    """A matrix for each expert of a process rank, numbered in the layer's two modules."""
    architecture = architecture_of(hf_config("mixtral"))
    layout = Layout.of(Sizes(expert=2), 2)
    plain, grouped = (
        [p for p in local_parameters(architecture, layout, layout.place_of(1), 0, kernels) if p.is_expert]
        for kernels in (Kernels(), ALL)
    )
    assert [(p.shape, p.parts, p.cut) for p in grouped] == [(p.shape, p.parts, p.cut) for p in plain]
    names = {p.name.removeprefix("decoder.layers.0.mlp.experts.") for p in grouped if ".layers.0." in p.name}
    assert names == {f"linear_fc{which}.weight{number}" for which in (1, 2) for number in range(2)}


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_run_with_transformer_engine_is_near_to_one_without(corpus: Path, tmp_path: Path, num_gpus: int) -> None:
    """In bf16: its norms and attention on one GPU, on two with a sequence that both share."""
    if not can_use_transformer_engine() or torch.cuda.device_count() < num_gpus:
        pytest.skip(f"not {num_gpus} GPUs with Transformer Engine")
    found: list[dict[int, float]] = []
    for block in ({"transformer_engine": False}, {"context_parallel": num_gpus}):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        more = {"engine": "megatron", "megatron": block, "bf16": {"enabled": True}, "training": {"steps": 5}}
        config = tiny_config(corpus, folder, optimizer={"type": "AdamW", "params": {"lr": 0.005}}, **more)
        result = run("train", str(config), ranks=num_gpus if found else 1)
        assert result.returncode == 0, result.stderr
        assert ("norms, attention of Transformer Engine" in result.stdout.replace("\n", " ")) == bool(found)
        found.append(losses(folder / "run"))
    assert found[1] == pytest.approx(found[0], abs=1e-2)

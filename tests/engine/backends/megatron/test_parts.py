"""Boxes of weights: over all process ranks they make every weight of the model, each element once."""

import pytest
import torch

from narrowgauge.engine.backends.megatron.architecture import architecture_of
from narrowgauge.engine.backends.megatron.draw import shapes_of
from narrowgauge.engine.backends.megatron.layout import Layout, Sizes
from narrowgauge.engine.backends.megatron.parts import local_parameters
from tests.support.megatron_models import FAMILIES, hf_config

LAYOUTS = {
    "whole": Sizes(),
    "stages": Sizes(pipeline=2, chunks=2),
    "all axes": Sizes(tensor=2, expert_tensor=2, pipeline=2, chunks=2, expert=2),
    "context": Sizes(tensor=2, expert_tensor=2, context=2),
    "folded": Sizes(tensor=2, expert_tensor=1, expert=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_they_cover_every_weight_once(family: str) -> None:
    config = hf_config(family)
    architecture, shapes = architecture_of(config, 32), shapes_of(config)
    for sizes in LAYOUTS.values():
        layout = Layout.of(sizes, 8)
        count = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        for place in layout.places():
            for chunk in range(layout.chunks):
                for parameter in local_parameters(architecture, layout, place, chunk):
                    copy = place.expert_data if parameter.is_expert else place.replica
                    if copy == 0 and parameter.is_held_first_by(place):
                        for part in parameter.parts:
                            part.of_weight(count[part.name]).add_(1)
        assert all(bool((found == 1).all()) for found in count.values())


def test_queries_keys_and_values_lie_group_by_group() -> None:
    """Four heads in two groups of dimension 8: on the second of two ranks, heads 2 and 3, then key and value 1."""
    architecture = architecture_of(hf_config("llama"), 32)
    layout = Layout.of(Sizes(tensor=2, expert_tensor=2), 2)
    (qkv,) = (
        parameter
        for parameter in local_parameters(architecture, layout, layout.place_of(1), 0)
        if parameter.name == "decoder.layers.0.self_attention.linear_qkv.weight"
    )
    assert qkv.shape == (32, 32)
    assert [(part.name.split(".")[-2], part.box.offsets[0], part.box.local[0]) for part in qkv.parts] == [
        ("q_proj", 16, 16),
        ("k_proj", 8, 8),
        ("v_proj", 8, 8),
    ]
    tensor, weight = torch.zeros(qkv.shape), torch.arange(16.0)[:, None].expand(16, 32)
    qkv.fill(tensor, "model.layers.0.self_attn.k_proj.weight", weight)
    assert tensor[:, 0].tolist() == [0.0] * 16 + [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0] + [0.0] * 8

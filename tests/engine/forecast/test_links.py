"""Which link carries what is sent between layers."""

from typing import Any

import pytest

from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.forecast.forecast import link_in_layers
from narrowgauge.engine.forecast.machine import Machine
from tests.support.command import under_megatron


@pytest.mark.parametrize(
    ("layout", "in_a_node"),
    [
        ({"tensor_parallel": 4}, True),
        ({"tensor_parallel": 2, "expert_parallel": 2}, True),
        # 2 x 4 ranks share the experts of a layer; they were thought to be in one node.
        ({"tensor_parallel": 2, "expert_parallel": 4}, False),
        ({"expert_parallel": 8}, False),
        ({"tensor_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1}, True),
    ],
)
def test_experts_of_several_nodes_use_the_link_between_them(layout: dict[str, Any], in_a_node: bool) -> None:
    config, machine = load_config({"train_batch_size": 8, **under_megatron(**layout)}), Machine(nodes=2, gpus=4)
    assert (link_in_layers(config, machine) > machine.slowest_link) is in_a_node

"""Parameter groups of optimizers that are not ours, whose matrices have a rate of their own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from narrowgauge.optimizers.layers.find_experts import find_experts
from narrowgauge.optimizers.layers.targets import find_targets


def matrix_groups(model: nn.Module, params: Mapping[str, Any], factor: float) -> list[dict[str, Any]]:
    """The trainable parameters, those of the matrices within the blocks apart, at ``factor`` of the rate.

    Args:
        params: of the optimizer; ``lr`` is 1e-3 where it says nothing.

    Raises:
        ValueError: the model has no such matrices.
    """
    found = find_targets(model, None, find_experts(model))
    names = {*found, *(f"{name}.weight" for name in found)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dense = [p for name, p in trained if name not in names]
    matrices = [p for name, p in trained if name in names]
    rate = params.get("lr", 1e-3) * factor
    return [{"params": dense, "kind": "dense"}, {"params": matrices, "lr": rate, "kind": "matrix"}]

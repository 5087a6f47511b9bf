"""Numbers of parameters, as the user knows the model."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.layers.plain import plain_parameters


def count_parameters(
    model: nn.Module, shape_of: Callable[[Tensor], tuple[int, ...]] = lambda p: tuple(p.shape)
) -> dict[str, int]:
    """Numbers of elements: ``total`` as the user knows the model, of which ``frozen`` in weights that are trained
    through ``compact`` ones or not at all; ``dense`` are trained whole.

    Args:
        shape_of: the whole shape of a parameter, where an engine has cut it.
    """
    plain = [p for _, p in plain_parameters(model)]
    compact = [unit.compact for unit in compact_units(model)]

    def count(parameters: list[Tensor]) -> int:
        return sum(math.prod(shape_of(p)) for p in parameters)

    return {
        "total": count([*plain]),
        "dense": count([p for p in plain if p.requires_grad]),
        "compact": count([*compact]),
        "frozen": count([p for p in plain if not p.requires_grad]),
    }

"""Which matrices there are in the parameters that are not trained as dense ones."""

from collections.abc import Collection, Sequence

from torch import nn

from ..layers.find_experts import find_experts
from ..layers.registry import is_transposed
from ..layers.shape import whole_shape
from ..layers.targets import CompactLayer
from .matrices import Matrices


def trained_matrices(
    model: nn.Module, layers: Sequence[CompactLayer], full_rank: Collection[str]
) -> dict[str, Matrices]:
    """By parameter: those of the compact layers, and of the layers or stacks of experts that are trained whole.

    Raises:
        ValueError: one that is trained whole does not lie in memory row by row.
    """
    found = {}
    for layer in layers:
        unit = layer.module
        rows, columns = unit.compact_shape
        found[layer.compact_name] = Matrices(unit.num_matrices, rows // unit.num_matrices, columns, unit.transposed)
    experts = find_experts(model) if full_rank else {}
    for name in full_rank:
        if (stack := experts.get(name)) is not None:
            count, rows, columns = whole_shape(stack.weight)
            found[name] = Matrices(count, rows, columns, stack.transposed)
            continue
        linear = model.get_submodule(name)
        rows, columns = whole_shape(linear.get_parameter("weight"))
        found[f"{name}.weight"] = Matrices(1, rows, columns, is_transposed(linear))
        if not (weight := linear.get_parameter("weight")).is_contiguous():
            raise ValueError(
                f"base: expected {name}.weight to be contiguous with Muon, got strides {weight.stride()}: give the"
                " layer a contiguous copy of it"
            )
    return found

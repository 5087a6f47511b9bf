"""What the optimizers on full gradients train by one rule each: a parameter, or one matrix of a stack."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .layers.experts import StackedMatrices
from .layers.registry import is_transposed
from .layers.shape import whole_shape
from .sharding.stacked import matrix_name


@dataclass(frozen=True)
class Member:
    """A trainable parameter, or one of the matrices stacked in it.

    Attributes:
        parameter: its name.
        shape: of the member.
        num_dims: of what one layer or expert has; one where the biases of experts are stacked.
        is_target: a matrix that ``target_modules`` names.
        is_transposed: a target that is inputs times outputs.
    """

    parameter: str
    shape: tuple[int, ...]
    num_dims: int
    is_target: bool = False
    is_transposed: bool = False


def members_of(
    model: nn.Module, targets: Mapping[str, nn.Linear | StackedMatrices], experts: Mapping[str, StackedMatrices]
) -> dict[str, Member]:
    """A model's members by name, in its order.

    Args:
        targets: as :func:`~.layers.targets.find_targets` finds them.
        experts: all stacks of the model, by the names of their parameters.
    """
    biases = {f"{name}_bias" for name in experts}
    found: dict[str, Member] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = whole_shape(parameter)
        target = targets.get(name) or targets.get(name.removesuffix(".weight") if name.endswith(".weight") else "")
        own = (target is not None, target is not None and is_transposed(target))
        if name in experts:
            member = Member(name, shape[1:], len(shape) - 1, *own)
            found.update(dict.fromkeys((matrix_name(name, i) for i in range(shape[0])), member))
        else:
            found[name] = Member(name, shape, len(shape) - (name in biases), *own)
    return found

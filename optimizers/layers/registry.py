"""From the type of a layer to the compact layers that it can become."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from .compact import CompactWeight


@dataclass(frozen=True)
class CompactTypes:
    """How layers of one type are converted, in place.

    Attributes:
        selected: called as :meth:`.SelectedLinear.convert`; gives a layer that holds values.
        projected: called as :meth:`.ProjectedLinear.convert`; gives a layer that holds a change. None for layers that
            ``target_modules`` does not name.
    """

    selected: Callable[..., CompactWeight]
    projected: Callable[..., CompactWeight] | None


_types: dict[type[nn.Module], CompactTypes] = {}


def register(
    layer_type: type[nn.Module],
    *,
    selected: Callable[..., CompactWeight],
    projected: Callable[..., CompactWeight] | None = None,
) -> None:
    """Let layers of exactly ``layer_type`` become compact; a subclass may compute something else, and is its own type.

    Args:
        selected, projected: as in :class:`CompactTypes`. With both, the layer has ``nn.Linear``'s ``weight``,
            ``in_features`` and ``out_features``.
    """
    _types[layer_type] = CompactTypes(selected, projected)


def is_target(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``target_modules`` may name the layer: it has both compact forms."""
    found = _types.get(type(module))
    return found is not None and found.projected is not None


def to_selected(module: nn.Module, **arguments: Any) -> CompactWeight:
    """Convert a layer of a registered type in place, to one that trains a selection of its weight."""
    return _types[type(module)].selected(module, **arguments)


def to_projected(module: nn.Module, **arguments: Any) -> CompactWeight:
    """Convert a layer that :func:`is_target` in place, to one that trains a change of its weight."""
    projected = _types[type(module)].projected
    assert projected is not None
    return projected(module, **arguments)

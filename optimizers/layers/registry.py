"""From the type of a layer to the compact layers that it can become."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .compact import CompactWeight
from .experts import StackedMatrices
from .shape import whole_shape
from .unit import CompactUnit


@dataclass(frozen=True)
class CompactTypes:
    """How layers of one type are converted, in place.

    Attributes:
        selected: called as :meth:`.SelectedLinear.convert`; gives a layer that holds values.
        projected: called as :meth:`.ProjectedLinear.convert`; gives a layer that holds a change. None for layers that
            ``target_modules`` does not name.
        transposed: the weight is inputs times outputs.
    """

    selected: Callable[..., CompactUnit]
    projected: Callable[..., CompactUnit] | None
    transposed: bool = False


_types: dict[type[nn.Module], CompactTypes] = {}
_names: dict[str, CompactTypes] = {}


def register(
    layer_type: type[nn.Module],
    *,
    selected: Callable[..., CompactUnit],
    projected: Callable[..., CompactUnit] | None = None,
) -> None:
    """Let layers of exactly ``layer_type`` become compact; a subclass may compute something else, and is its own type.
    (Those of ``nn.Linear`` that compute what it does count as it.)

    Args:
        selected, projected: as in :class:`CompactTypes`. With both, the layer has ``nn.Linear``'s ``weight`` and
            ``bias``.
    """
    _types[layer_type] = CompactTypes(selected, projected)


def register_name(
    name: str,
    *,
    selected: Callable[..., CompactUnit],
    projected: Callable[..., CompactUnit],
    transposed: bool = False,
) -> None:
    """As :func:`register`, for a type of a package that need not be there, by its whole name.

    Args:
        transposed: as in :class:`CompactTypes`.
    """
    _names[name] = CompactTypes(selected, projected, transposed)


def _types_of(module: nn.Module) -> CompactTypes | None:
    cls = type(module)
    found = _types.get(cls) or _names.get(f"{cls.__module__}.{cls.__qualname__}")
    return found or (_types.get(nn.Linear) if _computes_as_linear(module) else None)


def _computes_as_linear(module: nn.Module) -> bool:
    """Whether it is of a subclass of ``nn.Linear`` that computes the same."""
    cls = type(module)
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, CompactWeight)
        and cls.__call__ is nn.Module.__call__
        # Its weight is read by nn.MultiheadAttention, which does not call it.
        and cls is not NonDynamicallyQuantizableLinear
        # A parametrised weight is computed.
        and module._parameters.get("weight") is not None
        and (cls.forward is nn.Linear.forward or _is_linear_when_tried(module))
    )


_OF_LINEARS = {"training", "in_features", "out_features"}


def _is_linear_when_tried(module: nn.Linear) -> bool:
    """Whether a ``forward`` of its own gives what that of ``nn.Linear`` does: tried on a copy with a small weight, as
    the layer's own may be cut or on no device, in training and in evaluation. A layer with attributes of its own is
    not: they may change what it computes later.
    """
    tried: Any = copy.copy(module)
    own = [key for key, value in module._parameters.items() if value is not None and key not in ("weight", "bias")]
    more = {key for key in module.__dict__ if not key.startswith(("_", "ds_"))} - _OF_LINEARS
    if own or more or module._modules or module._buffers:
        return False
    weight = torch.linspace(-1.0, 1.3, 15).square().sub(0.4).reshape(3, 5)
    bias = None if module.bias is None else torch.tensor([0.3, -0.7, 0.1])
    tried._parameters = {"weight": nn.Parameter(weight), "bias": bias if bias is None else nn.Parameter(bias)}
    tried.in_features, tried.out_features = 5, 3
    x = torch.linspace(-2.0, 2.1, 40).sin().reshape(2, 4, 5)
    forward: Any = type(module).forward
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            found = []
            for tried.training in (False, True):
                found += [forward(tried, part) for part in (x, x[0], -3.0 * x)]
        except Exception:
            return False
        expected = 2 * [nn.functional.linear(part, weight, bias) for part in (x, x[0], -3.0 * x)]
        if not all(
            torch.is_tensor(a) and a.shape == b.shape and torch.allclose(a, b)
            for a, b in zip(found, expected, strict=True)
        ):
            return False
        try:
            forward(tried, x.bfloat16())
        except RuntimeError:
            return True
    # It brings dtypes together, which a compact layer does not.
    return False


def outputs_and_inputs(module: nn.Module | StackedMatrices) -> tuple[int, int]:
    """Their numbers, of a layer that :func:`is_target` or of each expert; ``(m, n)`` of another registered layer."""
    if isinstance(module, StackedMatrices):
        return module.outputs_and_inputs
    m, n = whole_shape(module.weight)  # pyright: ignore[reportArgumentType]
    return (n, m) if is_transposed(module) else (m, n)


def is_transposed(module: nn.Module | StackedMatrices) -> bool:
    """Whether the weight of a registered layer, or of each expert, is inputs times outputs."""
    if isinstance(module, StackedMatrices):
        return module.transposed
    found = _types_of(module)
    return found is not None and found.transposed


def is_target(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``target_modules`` may name the layer: it has both compact forms."""
    found = _types_of(module)
    return found is not None and found.projected is not None


def to_selected(module: nn.Module | StackedMatrices, **arguments: Any) -> CompactUnit:
    """Convert a layer of a registered type, or experts, in place, to train a selection of the weight."""
    if isinstance(module, StackedMatrices):
        return module.to_selected(**arguments)
    found = _types_of(module)
    assert found is not None
    return found.selected(module, **arguments)


def to_projected(module: nn.Module | StackedMatrices, **arguments: Any) -> CompactUnit:
    """Convert a layer that :func:`is_target`, or experts, in place, to train a change of the weight."""
    if isinstance(module, StackedMatrices):
        return module.to_projected(**arguments)
    found = _types_of(module)
    assert found is not None
    assert found.projected is not None
    return found.projected(module, **arguments)

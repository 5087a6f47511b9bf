"""The shape of a whole parameter, of which an engine may keep only a part in each process."""

from collections.abc import Callable, Sequence

from torch import Tensor

ShapeOf = Callable[[Tensor], Sequence[int] | None]

_sources: list[ShapeOf] = []


def add_shape_source(source: ShapeOf) -> None:
    """For an engine that keeps parameters in parts: have :func:`whole_shape` ask ``source`` first.

    Args:
        source: gives a parameter's whole shape, or None for one that it does not know.
    """
    _sources.append(source)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; the tensor's own where no engine knows another."""
    shapes = (source(parameter) for source in _sources)
    return tuple(next((shape for shape in shapes if shape is not None), parameter.shape))

"""A model as it is without its optimizer."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .compact import compact_units


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's parameters under its own names: each tied weight once, and no compact values."""
    compact = {id(unit.compact) for unit in compact_units(model)}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in compact)

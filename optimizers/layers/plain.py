"""A model as it is without its optimizer."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .compact import CompactWeight


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's parameters under its own names: each tied weight once, and no compact values."""
    compact = {id(m.compact) for m in model.modules() if isinstance(m, CompactWeight)}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in compact)

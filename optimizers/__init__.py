"""Subspace optimizers: compact linear layers, their selection and refresh, and the optimizers that train them."""

from .compact_linear import CompactLinear
from .grass import Grass

__all__ = ["CompactLinear", "Grass"]

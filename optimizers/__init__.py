"""Subspace optimizers: compact linear layers, their selection and refresh, and the optimizers that train them."""

from .compact import CompactOptimizer
from .compact_linear import CompactLinear
from .grass import Grass
from .sharded import ShardedOptimizer

# By the names that configurations use.
OPTIMIZERS: dict[str, type[CompactOptimizer] | type[ShardedOptimizer]] = {cls.__name__: cls for cls in (Grass,)}

__all__ = ["OPTIMIZERS", "CompactLinear", "CompactOptimizer", "Grass", "ShardedOptimizer"]

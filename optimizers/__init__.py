"""Subspace optimizers: compact linear layers, their selection and refresh, and the optimizers that train them."""

from .apollo.apollo import Apollo
from .compact.full_norm import FullNorm
from .compact.optimizer import CompactOptimizer
from .engine_optimizer import EngineOptimizer
from .frugal.frugal import Frugal
from .galore.galore import GaLore
from .grass.grass import Grass
from .layers.compact import CompactLinear
from .layerwise.lamb import Lamb
from .layerwise.lars import Lars
from .sharded import ShardedOptimizer

# By the names that configurations use.
OPTIMIZERS: dict[str, type[EngineOptimizer]] = {
    cls.__name__: cls for cls in (Grass, GaLore, Frugal, Apollo, Lamb, Lars)
}

__all__ = [
    "OPTIMIZERS",
    "Apollo",
    "CompactLinear",
    "CompactOptimizer",
    "EngineOptimizer",
    "Frugal",
    "FullNorm",
    "GaLore",
    "Grass",
    "Lamb",
    "Lars",
    "ShardedOptimizer",
]

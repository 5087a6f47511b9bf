"""Subspace optimizers: compact linear layers, their selection and refresh, and the optimizers that train them."""

from typing import Any

from .apollo.apollo import Apollo
from .apollo.reference import ApolloReference
from .compact.full_norm import FullNorm
from .compact.optimizer import CompactOptimizer
from .engine_optimizer import EngineOptimizer
from .frugal.frugal import Frugal
from .galore.galore import GaLore
from .galore.reference import GaLoreReference
from .grass.grass import Grass
from .grass.unbiased import GrassUnbiased
from .layers.compact import CompactLinear
from .layerwise.lamb import Lamb
from .layerwise.lars import Lars
from .sharded import ShardedOptimizer
from .trust_region import TrustRegion

# By the names that configurations use.
OPTIMIZERS: dict[str, type[EngineOptimizer[Any]]] = {
    cls.type_name: cls for cls in (Grass, GaLore, Frugal, Apollo, Lamb, Lars)
}

__all__ = [
    "OPTIMIZERS",
    "Apollo",
    "ApolloReference",
    "CompactLinear",
    "CompactOptimizer",
    "EngineOptimizer",
    "Frugal",
    "FullNorm",
    "GaLore",
    "GaLoreReference",
    "Grass",
    "GrassUnbiased",
    "Lamb",
    "Lars",
    "ShardedOptimizer",
    "TrustRegion",
]

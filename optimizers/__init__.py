"""Subspace optimizers: compact linear layers, their selection and refresh, and the optimizers that train them."""

from .apollo import Apollo
from .compact import CompactOptimizer
from .compact_linear import CompactLinear
from .frugal import Frugal
from .full_norm import FullNorm
from .galore import GaLore
from .grass import Grass
from .lamb import Lamb
from .lars import Lars
from .own_optimizer import OwnOptimizer
from .sharded import ShardedOptimizer

# By the names that configurations use.
OPTIMIZERS: dict[str, type[OwnOptimizer]] = {cls.__name__: cls for cls in (Grass, GaLore, Frugal, Apollo, Lamb, Lars)}

__all__ = [
    "OPTIMIZERS",
    "Apollo",
    "CompactLinear",
    "CompactOptimizer",
    "Frugal",
    "FullNorm",
    "GaLore",
    "Grass",
    "Lamb",
    "Lars",
    "OwnOptimizer",
    "ShardedOptimizer",
]

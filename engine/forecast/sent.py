"""Bytes that process ranks send in a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from narrowgauge.optimizers import CompactOptimizer
from narrowgauge.optimizers.apollo.apollo import Apollo
from narrowgauge.optimizers.frugal.frugal import Frugal
from narrowgauge.optimizers.layerwise.lamb import Lamb
from narrowgauge.optimizers.layerwise.lars import Lars

from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes per step and process rank, a mean over the run.

    Attributes:
        reduced: in reductions of gradients and of what optimizers find out about them.
        gathered: in gathers of parameters.
        activations: between the ranks that share a layer, or hold neighbouring ones.
        stages: of these, what goes to the stages of a pipeline before and after.
    """

    reduced: float
    gathered: float
    activations: float = 0.0
    stages: float = 0.0

    @property
    def total(self) -> float:
        return self.reduced + self.gathered + self.activations


def extra_reduced(subject: Subject, *, steps: int, sharded: bool, world_size: int) -> float:
    """Bytes per step that an optimizer of ours reduces beside gradients, as all-reduces over all ranks."""
    optimizer, share = subject.optimizer, (world_size - 1) / world_size
    if isinstance(optimizer, CompactOptimizer):
        observed = sum(unit.probe.numel() * unit.probe.element_size() for unit in _observing(optimizer))
        return 2 * share * observed * num_refreshes(optimizer, steps, first=True) / steps
    if not sharded:
        return 0.0
    if isinstance(optimizer, Frugal):
        summed = optimizer.bytes_summed(sharded=True)
        return 2 * share * (summed["step"] + summed["refresh"] * num_refreshes(optimizer, steps, first=True) / steps)
    if isinstance(optimizer, Apollo):
        shapes = [optimizer.members[name].shape for name in optimizer.targets]
        channels, rank = sum(max(shape) for shape in shapes), optimizer.options.rank
        is_channel = optimizer.options.scale_type == "channel"
        factors = channels if is_channel else len(shapes)
        return 2 * share * 4 * (rank * channels + 2 * factors + (0 if is_channel else channels))
    if isinstance(optimizer, Lamb | Lars):
        return 2 * share * 16 * len(optimizer.members)
    return 0.0


def _observing(optimizer: CompactOptimizer[Any]) -> Sequence[Any]:
    return [layer.module for layer in optimizer.layers if layer.module.probe is not None]


def num_refreshes(optimizer: Any, steps: int, *, first: bool) -> int:
    """Changes of subspace in a run.

    Args:
        first: the first step is followed by one too, where the optimizer's rule needs a gradient.
    """
    interval = getattr(optimizer.options, "refresh_interval", None)
    if not interval:
        return 0
    return -(-steps // interval) if first and optimizer.type_name in ("GaLore", "Frugal") else steps // interval

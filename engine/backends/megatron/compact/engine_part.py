"""What a compact optimizer adds to the engine: conversion before Megatron's DDP, what frames a step, checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge.optimizers import CompactOptimizer
from narrowgauge.optimizers.compact.backend import LocalBackend
from narrowgauge.optimizers.layers.coverage import Coverage

from ....config.config import Config
from ....config.optimizer_params import make_optimizer
from ....config.problems import within
from ..masters import MasterCopies
from ..model import StagedModel
from .backend import MegatronBackend
from .tree import ModelTree, compact_units_of


@dataclass(frozen=True)
class Made:
    """A compact optimizer and the names of what it trains."""

    optimizer: CompactOptimizer[Any]
    tree: ModelTree


def make_own(config: Config, model: StagedModel) -> Made:
    """The configured optimizer on this process rank's part of a model, whose layers it makes compact. Collective.

    Raises:
        ConfigError: its options do not fit the model.
    """
    block, options = config.parsed.optimizer, config.optimizer_options
    assert block is not None
    assert options is not None
    tree, own, problem = ModelTree(model), None, None
    try:
        own = make_optimizer(block.type, tree, options, LocalBackend())
        tree.hand_over(own)
    except ValueError as error:
        problem = within("optimizer.params", str(error))
    # A stage whose layers are not as they should be must not leave the others waiting.
    if problems := [text for text in _of_all_ranks(problem) if text is not None]:
        raise config.error(*dict.fromkeys(problems)).shared()
    assert isinstance(own, CompactOptimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in own.param_groups]
    found = _of_all_ranks(groups)
    if any(other != found[0] for other in found):
        raise config.error(
            "optimizer.params.param_groups: expected each to hold parameters of every stage of the pipeline, got one"
            " that some stages have none of"
        ).shared()
    return Made(own, tree)


def _of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class CompactPart:
    """What a compact optimizer trains of a model, and how it is saved.

    Args:
        made: before the model was wrapped; the masters have not taken its parameters' places yet.

    Attributes:
        parameters: the compact ones of this process rank.
        groups: number of the parameter group of everything that is trained, on all ranks, by name.
    """

    def __init__(self, made: Made, masters: MasterCopies, *, overlaps: bool) -> None:
        own, tree = made.optimizer, made.tree
        self.own = own
        self.parameters = [*tree.compact_parameters()]
        group_of = {id(p): number for number, group in enumerate(own.param_groups) for p in group["params"]}
        local = {name: group_of[id(p)] for name, p in tree.weights_in_groups().items()}
        local |= {held.name: group_of[id(p)] for held, p in self.parameters}
        self.groups: dict[str, int] = {name: n for found in _of_all_ranks(local) for name, n in found.items()}
        shapes = {held.name: held.parts[0].box.shape for held, _ in self.parameters}
        self._shapes = {name: shape for found in _of_all_ranks(shapes) for name, shape in found.items()}
        self._backend = MegatronBackend(own.layers, masters, overlaps=overlaps)
        self._saved: dict[str, Any] | None = None
        own.coverage = _joined(_of_all_ranks((tuple(sorted(local)), own.coverage)))
        own.defer_to_engine(self._backend)

    def trainable_shapes(self, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of everything that is trained.

        Args:
            weights: shapes of all weights of the model, by name.
        """
        return {name: shape for name, shape in weights.items() if name in self.groups} | self._shapes

    def before_step(self) -> None:
        """Before the reduced gradients are used. Collective."""
        self.own.before_step()
        self._backend.sum_replicated()

    def before_save(self) -> None:
        """Fold, and put the subspaces of all ranks' layers together. Collective."""
        self._backend.bring_up_to_date()
        states = _of_all_ranks(self.own.subspace_state())
        self._saved = dict(states[0])
        for key, value in self._saved.items():
            if isinstance(value, dict):
                self._saved[key] = {name: entry for state in states for name, entry in state[key].items()}

    def subspace_state(self) -> dict[str, Any]:
        """Of all ranks' layers, as of :meth:`before_save`."""
        assert self._saved is not None
        return self._saved

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`subspace_state` as far as it is of layers that are here."""
        names = {f"{layer.name}.{key}" for layer in self.own.layers for key in layer.module.subspace()}
        tensors = {name: tensor for name, tensor in state.get("tensors", {}).items() if name in names}
        self.own.load_subspace_state({**state, "tensors": tensors})

    @torch.no_grad()
    def rebuild(self) -> None:
        """Take the compact values from the weights."""
        for unit in compact_units_of(self.own):
            unit.compact.copy_(unit.compact_of(unit.weight))
            for linear in unit.linears:
                linear.is_stale = False


def _joined(found: list[tuple[tuple[str, ...], Coverage]]) -> Coverage:
    """The coverage of all stages' layers; ranks that hold the same weights are counted once."""
    parts = list(dict(found).values())
    dense: dict[str, int] = {}
    for part in parts:
        for name, size in part.dense.items():
            dense[name] = dense.get(name, 0) + size
    reasons = {name: why for part in parts for name, why in part.reasons.items()}
    total, covered = sum(part.total for part in parts), sum(part.covered for part in parts)
    return replace(parts[0], total=total, covered=covered, dense=dense, reasons=reasons)

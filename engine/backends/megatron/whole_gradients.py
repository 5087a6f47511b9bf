"""Our optimizers on whole gradients (Frugal, Apollo, Lamb, Lars): what they see of masters, and how they are saved."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from narrowgauge.optimizers import ShardedOptimizer
from narrowgauge.optimizers.layers.shape import whole_shape
from narrowgauge.optimizers.sharding.shards import Shard

from .compact.backend import communicator
from .own_part import Made, OwnPart, of_all_ranks
from .shards import Members, StageShards
from .start import device


class WholeGradientsPart(OwnPart):
    """What an optimizer on whole gradients trains: each of the model's weights by its own name, also where Megatron
    packs several into one parameter, and wherever their pieces lie in a stage.

    Args:
        made: as of the base class.
    """

    own: ShardedOptimizer[Any]

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        tree, stage = made.tree, parallel_state.get_pipeline_model_parallel_rank()
        shapes = {name: whole_shape(p) for name, p in tree.named_parameters() if name in self.groups}
        self._members: list[Members] = [{} for _ in self.own.param_groups]
        elsewhere: set[str] = set()
        for other, members, found in of_all_ranks((stage, [*self.own.members], shapes)):
            elsewhere |= {*members}
            for name, shape in found.items() if other == stage else ():
                self._members[self.groups[name]] |= {name: shape}  # pyright: ignore[reportOperatorIssue]
        self._elsewhere = elsewhere - self.own.members.keys()

    def take_shards(self, shards: Iterable[Shard]) -> None:
        members: dict[int, Members] = {}
        for group, of_group in zip(self.own.param_groups, self._members, strict=True):
            if not group["params"]:
                # All ranks of a stage step all groups: they sum together.
                group["params"] = [_nothing()]
            members |= dict.fromkeys(map(id, group["params"]), of_group)
        self.own.defer_to_engine(StageShards(shards, members, communicator()))

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        self.own.load_subspace_state(_without(self._elsewhere, state))


def _nothing() -> Tensor:
    """A master without elements."""
    found = torch.zeros(0, device=device())
    found.grad = torch.zeros_like(found)
    return found


def _without(names: Collection[str], state: dict[str, Any]) -> dict[str, Any]:
    """What is not of these members of other stages."""
    return {
        key: _without(names, value) if isinstance(value, dict) else value
        for key, value in state.items()
        if key not in names
    }

"""What one of our optimizers adds to the engine: it is made before Megatron's DDP, frames a step, and is saved."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.compact.backend import LocalBackend
from narrowgauge.optimizers.layers.coverage import Coverage
from narrowgauge.optimizers.sharding.shards import Shard

from ...config.config import Config
from ...config.optimizer_params import make_optimizer
from ...config.problems import within
from .compact.tree import ModelTree
from .globs import options_of_stage
from .model import StagedModel
from .parts import LocalParameter


@dataclass(frozen=True)
class Made:
    """One of our optimizers and the names of what it trains."""

    optimizer: EngineOptimizer[Any]
    tree: ModelTree


def make_own(config: Config, model: StagedModel) -> Made:
    """The configured optimizer on this process rank's part of a model, whose layers a compact one makes compact.
    Collective.

    Raises:
        ConfigError: its options do not fit the model.
    """
    block, options = config.parsed.optimizer, config.optimizer_options
    assert block is not None
    assert options is not None
    tree, own, problem = ModelTree(model), None, None
    try:
        options = options_of_stage(options, model.architecture, model.layout, model.place)
        own = make_optimizer(block.type, tree, options, LocalBackend())
        tree.hand_over(own)
    except ValueError as error:
        problem = within("optimizer.params", str(error))
    # A stage whose layers are not as they should be must not leave the others waiting.
    if problems := [text for text in of_all_ranks(problem) if text is not None]:
        raise config.error(*dict.fromkeys(problems)).shared()
    assert own is not None
    groups = [{key: value for key, value in group.items() if key != "params"} for group in own.param_groups]
    found = of_all_ranks(groups)
    if any(other != found[0] for other in found):
        raise config.error(
            "optimizer.params.param_groups: expected each to hold parameters of every stage of the pipeline, got one"
            " that some stages have none of"
        ).shared()
    return Made(own, tree)


def of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class OwnPart:
    """What one of our optimizers trains of a model, and how it is saved.

    Args:
        made: before the model was wrapped; the masters have not taken its parameters' places yet.

    Attributes:
        own: the optimizer.
        parameters: those of this process rank that it has made.
        groups: number of the parameter group of everything that is trained, on all ranks, by name.
    """

    def __init__(self, made: Made) -> None:
        own, tree = made.optimizer, made.tree
        self.own = own
        self.parameters: Sequence[tuple[LocalParameter, nn.Parameter]] = [*tree.compact_parameters()]
        group_of = {id(p): number for number, group in enumerate(own.param_groups) for p in group["params"]}
        local = {name: group_of[id(p)] for name, p in tree.weights_in_groups().items()}
        local |= {held.name: group_of[id(p)] for held, p in self.parameters}
        found = of_all_ranks(local)
        self.groups: dict[str, int] = {name: n for groups in found for name, n in groups.items()}
        own.coverage = _joined(of_all_ranks((tuple(sorted(local)), own.coverage)))
        self._saved: dict[str, Any] | None = None

    def trainable_shapes(self, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of everything that is trained.

        Args:
            weights: shapes of all weights of the model, by name.
        """
        return {name: shape for name, shape in weights.items() if name in self.groups}

    def take_shards(self, shards: Iterable[Shard]) -> None:
        """Once the optimizer has masters: the shards of this process rank. Collective."""

    def before_step(self) -> None:
        """Before the reduced gradients are used. Collective."""
        self.own.before_step()

    def before_save(self) -> None:
        """Bring the weights up to date, and put the subspaces of all ranks' layers together. Collective."""
        self._saved = _merged(of_all_ranks(self.own.subspace_state()))

    def subspace_state(self) -> dict[str, Any]:
        """Of all ranks' layers, as of :meth:`before_save`."""
        assert self._saved is not None
        return self._saved

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`subspace_state` as far as it is of what is here."""
        raise NotImplementedError

    def rebuild(self) -> None:
        """The weights have been read anew."""


def _merged(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of dicts within, the entries of all; other values are the first's."""
    found: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, dict):
                found[key] = _merged([found.get(key, {}), value])
            else:
                found.setdefault(key, value)
    return found


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

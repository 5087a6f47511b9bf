"""FRUGAL's subspaces: which rule a parameter goes by, and which of its coordinates are state-full at a refresh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..layers.targets import rank_of
from ..members import Member
from ..numerics.seeds import derive_seed
from ..numerics.selection import SELECTION_RULES, select_index
from ..sharding.shards import Shard
from .coordinates import Everything, Lines, Nothing, Part, Place, Scattered, Selection
from .low_rank import LowRank

SelectionName = Literal["columns", "rows", "randk", "blockwise", "svd", "random"]
BlockOrder = Literal["random", "ascending", "descending"]
Rule = Literal["full", "projected", "free"]
LOW_RANK = ("svd", "random")


@dataclass(frozen=True)
class Slot:
    """One shard's place in the state of its flat tensor.

    Attributes:
        place: of the shard's within the state of the whole parameter.
        first: position of the shard's within the flat tensor's state.
        resets: whether they start again at a refresh.
    """

    shard: Shard
    selection: Selection | LowRank
    place: Place
    first: int
    resets: bool

    @property
    def count(self) -> int:
        """Number of the shard's."""
        return self.place.count

    def of(self, state: Tensor) -> Tensor:
        """This shard's part of a state tensor of the flat tensor."""
        return state.narrow(0, self.first, self.count)

    @property
    def low_rank(self) -> LowRank:
        """The selection of a slot that is known to have a low-rank one."""
        assert isinstance(self.selection, LowRank)
        return self.selection

    def parts(self) -> list[Part]:
        """The state-full coordinates of a slot that is known to have a selection of coordinates."""
        assert not isinstance(self.selection, LowRank)
        return self.selection.parts(self.shard)


class Subspaces:
    """The rules of a model's parameters, and the selection of each at any refresh.

    Attributes:
        rules: by parameter: ``full``, ``projected``, ``free``. A projected parameter of which everything or nothing
            would be chosen is ``full`` or ``free``.
        projected: names of the parameters that are left ``projected``, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Mapping[str, Member],
        *,
        density: float,
        selection: SelectionName,
        block_order: BlockOrder,
        seed: int,
        rules: dict[str, str],
    ) -> None:
        """
        Args:
            members: what is trained by one rule each; the targets are projected.
            rules: of the other kinds of parameters, ``embeddings``, ``head`` and ``norms``.
        """
        self.selection: SelectionName = selection
        self._density = density
        self._block_order = block_order
        self._seed = seed
        self._members = members
        of_kind = {**rules, "matrix": "projected", "other": "full"}
        self.rules = {name: of_kind[kind] for name, kind in _kinds_of(model, members).items()}
        self.projected = [name for name, rule in self.rules.items() if rule == "projected"]
        for name in list(self.projected):
            if density == 0.0:
                self.rules[name] = "free"
            elif self._count_of(name) == self._dim_of(name):
                self.rules[name] = "full"
        self.projected = [name for name, rule in self.rules.items() if rule == "projected"]

    def describe(self) -> dict[str, Any]:
        """What the subspaces follow from, as JSON values."""
        keys = {"density": self._density, "selection": self.selection, "block_order": self._block_order}
        return {**keys, "seed": self._seed, "rules": dict(self.rules)}

    def shape_of(self, name: str) -> tuple[int, int]:
        """The shape of a projected parameter."""
        rows, columns = self._members[name].shape
        return rows, columns

    def _dim_of(self, name: str) -> int:
        """Out of how many the chosen of a projected parameter are."""
        shape = self.shape_of(name)
        if self.selection == "blockwise":
            return len(self.projected)
        if self.selection in ("columns", "rows"):
            return shape[self._line_dim(name)]
        return math.prod(shape) if self.selection == "randk" else min(shape)

    def _line_dim(self, name: str) -> int:
        """The dimension that ``columns``, which are inputs, or ``rows`` are chosen from."""
        return int((self.selection == "columns") != self._members[name].is_transposed)

    def _count_of(self, name: str) -> int:
        return rank_of(self._dim_of(name), rank=None, density=self._density)

    def seed_of(self, name: str, refresh: int) -> int:
        """What the randomness of a projected parameter's selection starts from."""
        return derive_seed(self._seed, refresh, name.removesuffix(".weight"))

    def low_rank_of(self, name: str) -> LowRank:
        """The geometry of a projected parameter's low-rank subspaces."""
        return LowRank(self.shape_of(name), self._count_of(name), self._members[name].is_transposed)

    def select(self, name: str, refresh: int, device: torch.device) -> Selection | LowRank:
        """The selection of a parameter whose shards lie on ``device``."""
        if self.rules[name] != "projected":
            return Everything() if self.rules[name] == "full" else Nothing()
        count, shape = self._count_of(name), self.shape_of(name)
        if self.selection in ("columns", "rows"):
            dim = self._line_dim(name)
            index = self._uniform(shape[dim], count, refresh, name.removesuffix(".weight"))
            return Lines(index, dim, shape, device)
        if self.selection == "randk":
            return Scattered(math.prod(shape), count, self.seed_of(name, refresh), device)
        if self.selection == "blockwise":
            return Everything() if name in self._active_blocks(count, refresh) else Nothing()
        return self.low_rank_of(name)

    def _uniform(self, dim: int, count: int, refresh: int, name: str) -> Tensor:
        return select_index(SELECTION_RULES["uniform"], dim, count, seed=self._seed, refresh=refresh, name=name)

    def _active_blocks(self, count: int, refresh: int) -> set[str]:
        """The parameters that ``blockwise`` updates with Adam."""
        if self._block_order == "random":
            chosen = self._uniform(len(self.projected), count, refresh, "blocks").tolist()
        elif self._block_order == "ascending":
            chosen = range(refresh * count, (refresh + 1) * count)
        else:
            chosen = range(-1 - refresh * count, -1 - (refresh + 1) * count, -1)
        return {self.projected[i % len(self.projected)] for i in chosen}


def _kinds_of(model: nn.Module, members: Mapping[str, Member]) -> dict[str, str]:
    """Each member's kind: ``matrix``, ``embeddings``, ``head``, ``norms`` or ``other``."""
    modules = list(model.modules())
    embeddings = {id(m.weight): m.num_embeddings for m in modules if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in modules if isinstance(m, nn.Linear) and m.out_features in embeddings.values()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    kinds = {}
    for name, member in members.items():
        if member.is_target:
            kinds[name] = "matrix"
        elif parameters[member.parameter] in embeddings:
            kinds[name] = "embeddings"
        elif parameters[member.parameter] in heads:
            kinds[name] = "head"
        else:
            kinds[name] = "norms" if member.num_dims < 2 else "other"
    return kinds

"""The layers that train a selection of their weight: which rank each gets, and their conversion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.experts import StackedMatrices
from ..layers.registry import outputs_and_inputs
from ..layers.shared_copy import SharedCopy
from ..layers.targets import CompactLayer, rank_of
from ..layers.unit import CompactUnit, Side
from ..numerics.selection import SelectionRule, select_index
from .budget import ranks_within


@dataclass(frozen=True)
class SelectedTarget:
    """A layer to convert.

    Attributes:
        side: what is selected.
        group: name of the first of the layers that share one index, its own if there are no others.
        is_vocabulary: rows stand for tokens: ``rank`` means the share ``rank / n`` of them.
    """

    name: str
    module: nn.Linear | nn.Embedding | StackedMatrices
    side: Side
    group: str
    is_vocabulary: bool = False

    @property
    def dim(self) -> int:
        """How many columns or rows there are."""
        return self._shape[1 if self.side == "columns" else 0]

    @property
    def elements(self) -> int:
        """Of one column or row; of all experts'."""
        num = self.module.num_matrices if isinstance(self.module, StackedMatrices) else 1
        return num * self._shape[0 if self.side == "columns" else 1]

    @property
    def _shape(self) -> tuple[int, int]:
        return outputs_and_inputs(self.module)


Convert = Callable[[SelectedTarget, Tensor, bool, SharedCopy | None], CompactUnit]


def ranks_of(
    targets: Sequence[SelectedTarget], *, rank: int | None, density: float | None, budget: int | None, strata: int = 1
) -> dict[str, int]:
    """The rank of each target, by name.

    Raises:
        ValueError: a rank is above its layer's selected dimension, the budget is too small, or ``strata`` does not
            divide the dimension.
    """
    if uneven := next((target for target in targets if target.dim % strata), None):
        what = "columns (in_features)" if uneven.side == "columns" else "rows (out_features)"
        raise ValueError(f"strata: expected a divisor of the {uneven.dim} {what} of {uneven.name!r}, got {strata}")
    if budget is not None:
        dims: dict[str, tuple[int, int]] = {}
        for target in targets:
            _, elements = dims.get(target.group, (0, 0))
            dims[target.group] = (target.dim, elements + target.elements)
        ranks = ranks_within(dims, budget)
        return {target.name: ranks[target.group] for target in targets}
    ranks, too_small = {}, []
    for target in targets:
        if rank is not None and target.is_vocabulary:
            ranks[target.name] = rank_of(target.dim, rank=None, density=min(1.0, rank / target.elements))
        else:
            own = rank_of(target.dim // strata, rank=rank and rank // strata, density=density)
            ranks[target.name] = own * strata
        if ranks[target.name] > target.dim:
            too_small.append(target)
    if too_small:
        worst = min(too_small, key=lambda target: target.dim)
        what = "columns (in_features)" if worst.side == "columns" else "rows (out_features)"
        others = f" and the dimension of {len(too_small) - 1} other layers" if len(too_small) > 1 else ""
        raise ValueError(
            f"rank: {rank} is above the {worst.dim} {what} of {worst.name!r}{others}; at most {worst.dim} fits every"
            " layer"
        )
    return ranks


def convert_selected(
    targets: Sequence[SelectedTarget],
    ranks: dict[str, int],
    rule: SelectionRule,
    convert: Convert,
    *,
    seed: int,
    strata: int = 1,
) -> tuple[list[CompactLayer], list[str]]:
    """Convert the targets whose rank is below the selected dimension.

    Args:
        convert: makes a target compact, with the first columns or rows, whether these are one block, and the copy of
            them that its group shares.

    Returns:
        The compact layers, with ``compact`` still to be filled, and the names of the layers left as they are because
        the rank equals the dimension: their subspace is everything.
    """
    layers, full = [], []
    sizes: dict[str, int] = {}
    for target in targets:
        sizes[target.group] = sizes.get(target.group, 0) + 1
    copies = {group: SharedCopy(size) for group, size in sizes.items() if size > 1}
    for target in targets:
        if ranks[target.name] == target.dim:
            full.append(target.name)
            continue
        index = select_index(
            rule, target.dim, ranks[target.name], seed=seed, refresh=0, name=target.group, strata=strata
        )
        unit = convert(target, index, rule.contiguous and strata == 1, copies.get(target.group))
        layers.append(CompactLayer(target.name, unit))
    return layers, full

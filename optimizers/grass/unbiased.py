"""Grass with columns or rows that are drawn with repeats."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..layers.registry import to_projected
from ..layers.shared_copy import SharedCopy
from ..layers.unit import CompactUnit
from ..numerics.seeds import derive_seed
from ..numerics.selection import replacement_scales
from .grass import Grass
from .layers import SelectedTarget
from .options import GrassOptions


class GrassUnbiased(Grass):
    """Grass by ``multinomial_replacement``: the projected gradient, lifted back, has the full one as its expectation.

    Columns or rows are drawn independently with probabilities ``q_j`` and scaled by ``rho_jj = 1 / sqrt(r q_j)``, as
    in the paper. The compact values are a change of the weight, added to it after every step: two of them may stand for
    one column. Decay is of the whole weight.
    """

    folds_to_zero: ClassVar[bool] = True

    @classmethod
    def carries_out(cls, options: GrassOptions) -> bool:
        return options.repeats

    def _to_compact(
        self, target: SelectedTarget, index: Tensor, contiguous: bool, shared: SharedCopy | None
    ) -> CompactUnit:
        scales = replacement_scales(torch.ones(target.dim, dtype=torch.float64), index)
        scales = scales.to(torch.promote_types(target.module.weight.dtype, torch.float32))
        key = "right" if target.side == "columns" else "left"
        return to_projected(target.module, **{key: scales, f"{key}_index": index})

    def _fold(self, learning_rates: Sequence[float]) -> None:
        seed = derive_seed(self.options.seed, "step", self.num_steps)
        self.backend.add_changes(self.layers, self._decays(learning_rates), seed=seed)

    def _take(self, indices: Sequence[Tensor], norms: dict[str, Tensor]) -> None:
        for layer, index in zip(self.layers, indices, strict=True):
            scales = replacement_scales(norms[self._choice_of[layer.name]], index)
            key = "right" if layer.module.side == "columns" else "left"
            layer.module.set_subspace({key: scales, f"{key}_index": index})

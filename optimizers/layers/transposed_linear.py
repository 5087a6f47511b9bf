"""Compact forms of layers that compute ``y = x W + b``, with a weight of inputs times outputs, as GPT-2's ``Conv1D``.

Everything about the weight, its sides and bases included, is of the weight as it is stored; only what callers of
``convert`` say is of ``W^T``, as for an ``nn.Linear``.
"""

from torch import Tensor, nn

from .projected_linear import ProjectedLinear
from .registry import register_name
from .selected_linear import SelectedLinear
from .shared_copy import SharedCopy
from .unit import Side


class TransposedSelectedLinear(SelectedLinear):
    """Trains a selection of inputs (``columns``, which are rows here) or outputs."""

    transposed: bool = True

    @classmethod
    def convert(
        cls, linear: nn.Linear, *, side: Side, index: Tensor, contiguous: bool, shared: SharedCopy | None = None
    ) -> SelectedLinear:
        stored: Side = "rows" if side == "columns" else "columns"
        return super().convert(linear, side=stored, index=index, contiguous=contiguous, shared=shared)


class TransposedProjectedLinear(ProjectedLinear):
    """Trains a change within a subspace."""

    transposed: bool = True

    @classmethod
    def convert(
        cls,
        linear: nn.Linear,
        *,
        left: Tensor | None = None,
        left_index: Tensor | None = None,
        right: Tensor | None = None,
        right_index: Tensor | None = None,
        scale: float = 1.0,
    ) -> ProjectedLinear:
        return super().convert(
            linear, left=right, left_index=right_index, right=left, right_index=left_index, scale=scale
        )


register_name(
    "transformers.pytorch_utils.Conv1D",
    selected=TransposedSelectedLinear.convert,
    projected=TransposedProjectedLinear.convert,
    transposed=True,
)
# It computes ``x W^T + b``, in its own way.
register_name(
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    selected=SelectedLinear.convert,
    projected=ProjectedLinear.convert,
)

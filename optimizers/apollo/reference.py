"""APOLLO as the authors' package computes it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..numerics.adam import late_correction
from .apollo import Apollo
from .options import ApolloOptions

_EPS = 1e-8


class ApolloReference(Apollo):
    """As ``apollo-torch`` 1.0.3, which differs from the paper, and so from :class:`~.apollo.Apollo`, in this:

    - ``eps`` is added to ``sqrt(v)`` before the bias correction, for matrices and for other parameters;
    - the bias correction multiplies the step and not ``D``, so the limiter compares norms without it;
    - 1e-8 is added to the norms of ``R`` and to the previous update's norm; a matrix whose gradient was once zero is
      therefore held near zero by the limiter, while Apollo's limiter starts again;
    - the decay follows the update and acts on the updated weights;
    - the seed of a parameter is its position in the optimizer's groups, from 1, and the next one is drawn from it.

    Three differences remain: its option ``scale`` is the square of this one; it keeps ``P`` between steps, where here
    it is drawn again from the stored seed at each step; its bf16 parameters are computed with and kept in bf16.
    """

    decays_last: ClassVar[bool] = True
    corrects_moments: ClassVar[bool] = False

    @classmethod
    def carries_out(cls, options: ApolloOptions) -> bool:
        return options.reference_compatible

    def _first_seeds(self, model: nn.Module) -> dict[str, int]:
        if stacked := [name for name in self.targets if self.members[name].parameter != name]:
            raise ValueError(
                "reference_compatible: expected matrices that are parameters of their own, as apollo-torch knows them,"
                f" got experts stacked in {self.members[stacked[0]].parameter}: give target_modules without them, or"
                " leave reference_compatible out"
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        order = [names[id(parameter)] for group in self.param_groups for parameter in group["params"]]
        return {name: order.index(name) + 1 for name in self.targets}

    def _next_seed(self, name: str) -> int:
        """The 15th integer drawn from a generator with the present one."""
        generator = torch.Generator().manual_seed(self._seeds[name])
        return int(torch.randint(torch.iinfo(torch.int64).max, (15,), generator=generator)[-1])

    def _ratios(self, adapted: Tensor, own: Tensor) -> Tensor:
        return adapted / (own + _EPS)

    def _limits(self, norms: Tensor, previous: Tensor, growth: float) -> Tensor:
        grown = (norms / (previous + _EPS)).clamp(min=growth)
        return torch.where(previous >= 0.0, growth / grown, 1.0)

    def _late_correction(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return late_correction(state["step"], group["betas"])

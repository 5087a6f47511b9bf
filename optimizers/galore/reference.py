"""GaLore as its reference implementation computes it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..numerics.seeds import derive_seed
from .bases import leading_basis
from .galore import GaLore
from .options import GaLoreOptions


class GaLoreReference(GaLore):
    """As ``galore-torch`` 1.0: the bases are taken from the gradient of the step they are first used in.

    It differs from the paper in adding epsilon outside of the bias correction and in decaying after the update, leaves
    the signs to the SVD, and finds it in fp32 whatever the weights' precision. In plain PyTorch and DDP only. Where
    gradients are clipped, the norm is that of their projection with the former bases.
    """

    changes_in_step: ClassVar[bool] = True

    @classmethod
    def carries_out(cls, options: GaLoreOptions) -> bool:
        return options.reference_compatible

    @classmethod
    def unsupported_in_engine(cls, options: GaLoreOptions, *, sharded: bool) -> list[str]:
        problems = super().unsupported_in_engine(options, sharded=sharded)
        if sharded:
            problems.append(
                "reference_compatible: true does not work with the engine: it projects the gradients again before the"
                " step, when they are sharded"
            )
        return problems

    def is_refresh_due(self) -> bool:
        """Never after a step: the bases change before it."""
        return False

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """The base's step with epsilon added before the bias correction, and decay after the update."""
        if closure is not None:
            raise ValueError("reference_compatible: step takes no closure, the gradient is needed before the step")
        if self._is_multiple_of_interval(self.num_steps):
            self._refresh_before_step()
        groups = self.param_groups
        kept = [(group["eps"], group["weight_decay"]) for group in groups]
        for group in groups:
            # Adam's denominator is sqrt(v / correction) + eps.
            group["eps"] /= math.sqrt(1.0 - group["betas"][1] ** (self.num_steps + 1))
            if group["kind"] != "compact":
                group["weight_decay"] = 0.0
        loss = super()._inner_step(None)
        for group, (eps, decay) in zip(groups, kept, strict=True):
            group["eps"], group["weight_decay"] = eps, decay
            if group["kind"] != "compact" and decay:
                for parameter in (p for p in group["params"] if p.grad is not None):
                    parameter.data.mul_(1.0 - group["lr"] * decay)
        return loss

    @torch.no_grad()
    def _refresh_before_step(self) -> None:
        """Take the bases from this step's gradient and project it again."""
        self.num_refreshes += 1
        gradients = self._observed()
        for layer, gradient in zip(self.layers, gradients, strict=True):
            module = layer.module
            before = module.project_gradient(gradient)
            self._set_bases(layer, gradient)
            given = module.compact.grad
            if given is not None:
                # What was done to the gradient after backward, clipping or unscaling, is done to the new one.
                factor = (given * before).sum() / before.square().sum().clamp_min(torch.finfo(before.dtype).tiny)
                given.copy_(module.project_gradient(gradient) * factor)

    @torch.no_grad()
    def _fold(self, learning_rates: Sequence[float]) -> None:
        seed = derive_seed(self.options.seed, "step", self.num_steps)
        self.backend.add_changes(self.layers, self._decays(learning_rates), seed=seed, decay_last=True)

    def _basis(self, statistic: Tensor, basis: Tensor, *, of_rows: bool) -> Tensor:
        return leading_basis(statistic.float(), basis.shape[-1], of_rows=of_rows)

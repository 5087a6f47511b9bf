"""LAMB: Adam with one trust ratio per parameter tensor."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..numerics.adam import adam_directions
from ..numerics.precision import widen, write_back
from ..numerics.seeds import derive_seed
from ..options import check_adam, check_number
from ..sharded import ShardedOptimizer
from .norms import find_excluded, member_norms


class Lamb(ShardedOptimizer):
    """Adam whose update of each parameter tensor ``x`` is as long as ``lr * phi(||x||)``.

    Source: You, Li, Reddi et al. (2020), "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    arXiv 1904.00962, Algorithm 2: ``x <- x - lr * phi(||x||) / ||u|| * u`` with ``u = m_hat / (sqrt(v_hat) + eps) +
    weight_decay * x``. The paper leaves open what happens where a norm is zero; here the ratio is 1 then, as in other
    implementations.

    The norms are those of whole tensors wherever they lie: under ZeRO, which cuts parameters anywhere, each call sums
    two fp64 numbers per parameter over the process ranks, in one all-reduce. Gradients are reduced whole. State: two
    moments shaped like the parameter, sharded with it; fp32 (also for bf16 and fp16 parameters) or fp64. bf16
    parameters are rounded stochastically, fp16 ones to nearest.

    Args:
        model: whose trainable parameters are all updated.
        lr: learning rate of the dense parameters.
        betas, eps: Adam's.
        weight_decay: of the parameters that are not excluded.
        weight_norm_bounds: ``(low, high)`` of ``phi(z) = min(max(z, low), high)``; None for ``phi(z) = z``.
        exclude: globs over names of parameters that get plain Adam without decay or trust ratio; default those of
            fewer than two dimensions (norms and biases), ``[]`` for none.
        matrix_lr_scale: learning rate of the matrices relative to ``lr``.
        target_modules: globs over the names of the modules whose weights are the matrices; default every linear inside
            the transformer blocks.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins.

    Raises:
        ValueError: an option out of range, or globs that match nothing.
    """

    needs_matrices: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        weight_norm_bounds: Sequence[float] | None = None,
        exclude: Sequence[str] | None = None,
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.check_options(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            weight_norm_bounds=weight_norm_bounds,
            matrix_lr_scale=matrix_lr_scale,
        )
        self.excluded = find_excluded(model, exclude)
        self.weight_norm_bounds = weight_norm_bounds
        super().__init__(
            model,
            lr=lr,
            defaults={"betas": betas, "eps": eps, "weight_decay": weight_decay},
            matrix_lr_scale=matrix_lr_scale,
            target_modules=target_modules,
            param_groups=param_groups,
        )

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check the options that need no model.

        Raises:
            ValueError: naming the option, what was found and what is needed.
        """
        check_adam(options)
        if (bounds := options["weight_norm_bounds"]) is not None:
            if not isinstance(bounds, list | tuple) or len(bounds) != 2 or not 0.0 <= bounds[0] <= bounds[1]:
                raise ValueError(f"weight_norm_bounds: {bounds!r} found, [low, high] with 0 <= low <= high is needed")
            check_number({"weight_norm_bounds": bounds[1]}, "weight_norm_bounds", above=0.0)

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        values = [widen(flat) for flat in flats]
        states = [self._state_of(flat, value) for flat, value in zip(flats, values, strict=True)]
        updates = adam_directions(
            [widen(flat.grad) for flat in flats if flat.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            betas=group["betas"],
            eps=group["eps"],
        )
        adapted = [
            (shard.name, shard.of(value), shard.of(update))
            for flat, value, update in zip(flats, values, updates, strict=True)
            for shard in self.shards.shards_of(flat)
            if shard.name not in self.excluded
        ]
        own_updates = [update for _, _, update in adapted]
        if adapted and group["weight_decay"] > 0.0:
            torch._foreach_add_(own_updates, [value for _, value, _ in adapted], alpha=group["weight_decay"])
        positions, norms = member_norms(self.shards, flats, values, updates)
        if adapted:
            ratios = self._trust_ratios(norms).unbind()
            torch._foreach_mul_(own_updates, [ratios[positions[name]] for name, _, _ in adapted])
        torch._foreach_add_(values, updates, alpha=-float(group["lr"]))
        for flat, value in zip(flats, values, strict=True):
            for shard in self.shards.shards_of(flat):
                seed = derive_seed(self.num_steps, shard.name)
                write_back(shard.of(flat), shard.of(value), seed=seed, position=shard.position)

    def _state_of(self, flat: Tensor, value: Tensor) -> dict[str, Any]:
        """The moments, and the number of the step that is being taken."""
        state = self.state[flat]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(value)
        state["step"] = state.get("step", 0) + 1
        return state

    def _trust_ratios(self, norms: Tensor) -> Tensor:
        weights, updates = norms
        if self.weight_norm_bounds is not None:
            weights = weights.clamp(*self.weight_norm_bounds)
        return torch.where((weights > 0.0) & (updates > 0.0), weights / updates, 1.0)

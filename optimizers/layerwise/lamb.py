"""LAMB: Adam with one trust ratio per parameter tensor."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine_optimizer import keywords_of
from ..numerics.adam import adam_directions
from ..numerics.precision import widen, write_back
from ..numerics.seeds import derive_seed
from ..sharded import ShardedOptimizer
from .norms import find_excluded, member_norms
from .options import LambOptions


class Lamb(ShardedOptimizer[LambOptions]):
    """Adam whose update of each parameter tensor ``x`` is as long as ``lr * phi(||x||)``.

    Source: You, Li, Reddi et al. (2020), "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    arXiv 1904.00962, Algorithm 2: ``x <- x - lr * phi(||x||) / ||u|| * u`` with ``u = m_hat / (sqrt(v_hat) + eps) +
    weight_decay * x``. The paper leaves open what happens where a norm is zero; here the ratio is 1 then, as in other
    implementations.

    Of experts stacked in one parameter, every matrix counts as a tensor, and their biases as biases.

    The norms are those of whole tensors wherever they lie: under ZeRO, which cuts parameters anywhere, each call sums
    two fp64 numbers per parameter over the process ranks, in one all-reduce. Gradients are reduced whole. State: two
    moments shaped like the parameter, sharded with it; fp32 (also for bf16 and fp16 parameters) or fp64. bf16
    parameters are rounded stochastically, fp16 ones to nearest.

    Args:
        model: whose trainable parameters are all updated.
        options: the fields of :class:`~.options.LambOptions`, as keywords.

    Raises:
        ValueError: an option out of range, or globs that match nothing.
    """

    type_name: ClassVar[str] = "Lamb"
    options_type = LambOptions
    needs_matrices: ClassVar[bool] = False

    @keywords_of(LambOptions)
    def __init__(self, model: nn.Module, options: LambOptions) -> None:
        super().__init__(model, options)
        self.excluded = find_excluded(self.members, options.exclude)

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
        if self.options.weight_norm_bounds is not None:
            weights = weights.clamp(*self.options.weight_norm_bounds)
        return torch.where((weights > 0.0) & (updates > 0.0), weights / updates, 1.0)

"""LARS: SGD with momentum and one learning rate per parameter tensor."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine_optimizer import keywords_of
from ..numerics.precision import widen, write_back
from ..numerics.seeds import derive_seed
from ..sharded import ShardedOptimizer
from .norms import find_excluded, member_norms
from .options import LarsOptions


class Lars(ShardedOptimizer[LarsOptions]):
    """Momentum SGD whose rate for each parameter tensor is in proportion to ``||w|| / (||g|| + weight_decay * ||w||)``.

    Source: You, Gitman, Ginsburg (2017), "Large Batch Training of Convolutional Networks", arXiv 1708.03888, Algorithm
    1: ``v <- momentum * v + lr * ratio * (g + weight_decay * w)``, ``w <- w - v`` with ``ratio = trust_coefficient *
    ||w|| / (||g|| + weight_decay * ||w||)``. The paper's rate would hold a tensor at zero forever; where ``||w||`` is
    zero the ratio is 1, as in other implementations. ``nesterov`` is not in the paper.

    Of experts stacked in one parameter, every matrix counts as a tensor, and their biases as biases.

    The norms are those of whole tensors wherever they lie: under ZeRO, which cuts parameters anywhere, each call sums
    two fp64 numbers per parameter over the process ranks, in one all-reduce. Gradients are reduced whole. State: one
    buffer shaped like the parameter, sharded with it; fp32 (also for bf16 and fp16 parameters) or fp64. bf16 parameters
    are rounded stochastically, fp16 ones to nearest.

    Args:
        model: whose trainable parameters are all updated.
        options: the fields of :class:`~.options.LarsOptions`, as keywords.

    Raises:
        ValueError: an option out of range, or globs that match nothing.
    """

    type_name: ClassVar[str] = "Lars"
    options_type = LarsOptions
    needs_matrices: ClassVar[bool] = False
    group_defaults: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay", "nesterov")

    @keywords_of(LarsOptions)
    def __init__(self, model: nn.Module, options: LarsOptions) -> None:
        super().__init__(model, options)
        self.excluded = find_excluded(self.members, options.exclude)

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        values = [widen(flat) for flat in flats]
        grads = [widen(flat.grad) for flat in flats if flat.grad is not None]
        positions, (weight_norms, grad_norms) = member_norms(self.shards, flats, values, grads)
        scale = grad_norms + decay * weight_norms
        ratios = torch.where(
            (weight_norms > 0.0) & (scale > 0.0), self.options.trust_coefficient * weight_norms / scale, 1.0
        ).unbind()
        for flat, value, grad in zip(flats, values, grads, strict=True):
            state = self.state[flat]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(value)
            for shard in self.shards.shards_of(flat):
                own_value, own_buffer = shard.of(value), shard.of(state["momentum_buffer"])
                if shard.name in self.excluded:
                    update = lr * shard.of(grad)
                else:
                    update = torch.add(shard.of(grad), own_value, alpha=decay).mul_(lr * ratios[positions[shard.name]])
                own_buffer.mul_(momentum).add_(update)
                if group["nesterov"]:
                    own_value.sub_(update).sub_(own_buffer, alpha=momentum)
                else:
                    own_value.sub_(own_buffer)
                seed = derive_seed(self.num_steps, shard.name)
                write_back(shard.of(flat), own_value, seed=seed, position=shard.position)

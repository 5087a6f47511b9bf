"""LARS: SGD with momentum and one learning rate per parameter tensor."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..numerics.precision import widen, write_back
from ..numerics.seeds import derive_seed
from ..options import check_number
from ..sharded import ShardedOptimizer
from .norms import find_excluded, member_norms


class Lars(ShardedOptimizer):
    """Momentum SGD whose rate for each parameter tensor is in proportion to ``||w|| / (||g|| + weight_decay * ||w||)``.

    Source: You, Gitman, Ginsburg (2017), "Large Batch Training of Convolutional Networks", arXiv 1708.03888, Algorithm
    1: ``v <- momentum * v + lr * ratio * (g + weight_decay * w)``, ``w <- w - v`` with ``ratio = trust_coefficient *
    ||w|| / (||g|| + weight_decay * ||w||)``. The paper's rate would hold a tensor at zero for ever; where ``||w||`` is
    zero the ratio is 1, as in other implementations. ``nesterov`` is not in the paper.

    The norms are those of whole tensors wherever they lie: under ZeRO, which cuts parameters anywhere, each call sums
    two fp64 numbers per parameter over the process ranks, in one all-reduce. Gradients are reduced whole. State: one
    buffer shaped like the parameter, sharded with it; fp32 (also for bf16 and fp16 parameters) or fp64. bf16 parameters
    are rounded stochastically, fp16 ones to nearest.

    Args:
        model: whose trainable parameters are all updated.
        lr: global learning rate of the dense parameters, the paper's gamma; it multiplies the tensors' own.
        momentum: in [0, 1).
        trust_coefficient: the paper's eta.
        weight_decay: of the parameters that are not excluded; part of the gradient, as in the paper.
        nesterov: step by ``update + momentum * v`` instead of ``v``.
        exclude: globs over names of parameters that get plain momentum SGD without decay or trust ratio; default those
            of fewer than two dimensions (norms and biases), ``[]`` for none.
        matrix_lr_scale: learning rate of the matrices relative to ``lr``.
        target_modules: globs over the names of the modules whose weights are the matrices; default every linear inside
            the transformer blocks.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr`` or ``weight_decay``; the first
            match wins.

    Raises:
        ValueError: an option out of range, or globs that match nothing.
    """

    needs_matrices: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        exclude: Sequence[str] | None = None,
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.check_options(
            lr=lr,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
            weight_decay=weight_decay,
            nesterov=nesterov,
            matrix_lr_scale=matrix_lr_scale,
            param_groups=param_groups,
        )
        self.excluded = find_excluded(model, exclude)
        self.trust_coefficient = trust_coefficient
        super().__init__(
            model,
            lr=lr,
            defaults={"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov},
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
        for key in ("lr", "weight_decay"):
            check_number(options, key, at_least=0.0)
        check_number(options, "momentum", at_least=0.0, below=1.0)
        for key in ("trust_coefficient", "matrix_lr_scale"):
            check_number(options, key, above=0.0)
        if options["nesterov"] and options["momentum"] == 0.0:
            raise ValueError("nesterov: True found with momentum 0, a momentum above 0 is needed")
        for position, spec in enumerate(options["param_groups"]):
            if unused := sorted({"betas", "eps"} & set(spec)):
                raise ValueError(f"param_groups[{position}]: {unused} found, which LARS does not use")

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        values = [widen(flat) for flat in flats]
        grads = [widen(flat.grad) for flat in flats if flat.grad is not None]
        positions, (weight_norms, grad_norms) = member_norms(self.shards, flats, values, grads)
        scale = grad_norms + decay * weight_norms
        ratios = torch.where(
            (weight_norms > 0.0) & (scale > 0.0), self.trust_coefficient * weight_norms / scale, 1.0
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

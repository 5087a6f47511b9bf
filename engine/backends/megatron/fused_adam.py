"""AdamW with the fused kernels of NVIDIA's Transformer Engine or apex, where they are."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .installed import fused_by


def stepped_by(arguments: Mapping[str, Any], *, on_gpu: bool) -> str | None:
    """Whose FusedAdam takes the place of torch's AdamW; None where nothing does.

    Args:
        arguments: of ``optimizer.params``; with ``torch_adam`` it is torch's own.
    """
    return fused_by() if on_gpu and not arguments.get("torch_adam") else None


def fused_adamw(parameters: Iterable[Tensor], arguments: Mapping[str, Any], *, by: str) -> torch.optim.Optimizer:
    """An AdamW of fused kernels, whose state is that of torch's: ``exp_avg``, ``exp_avg_sq`` and ``step`` for each
    parameter. fp32 parameters on a GPU.

    Transformer Engine and apex count steps by group, and begin where they find none, so that a resumed run would
    correct its moments' bias anew.

    Args:
        arguments: of torch's AdamW: ``lr``, ``betas``, ``eps``, ``weight_decay``; all of them are named alike.
        by: of :func:`stepped_by`.

    Raises:
        ImportError, RuntimeError: it is there, but not with what it needs.
    """
    if by == "Transformer Engine":
        from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    else:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    # Of both, the other defaults are those of AdamW with bias correction; the decay's is 0.
    optimizer: torch.optim.Optimizer = FusedAdam(parameters, adam_w_mode=True, **arguments)
    count_by_parameter(optimizer)
    return optimizer


def count_by_parameter(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that counts steps in its groups go on from the ``step`` in its parameters' states."""
    optimizer.register_step_pre_hook(_to_groups)
    optimizer.register_step_post_hook(_to_parameters)


def _to_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        steps = {int(state["step"]) for state in states if "step" in state}
        assert len(steps) <= 1, f"expected one number of steps, got {sorted(steps)}"
        group["step"] = next(iter(steps), 0)


def _to_parameters(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                optimizer.state[p]["step"] = group["step"]

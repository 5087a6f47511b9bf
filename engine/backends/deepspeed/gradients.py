"""What DeepSpeed's update does with gradients that are missing, old or not finite, put right around it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ..gradient_norm import gradient_norm
from .privates import (
    Update,
    loss_scale,
    set_grad_norm,
    settle_gradients,
    start_sums_at_zero,
    unscaled_by,
    wrap_update,
    zero_scaler,
)
from .schedules import check_metrics


def mend_updates(engine: DeepSpeedEngine) -> None:
    """Let every update of the engine see the gradients of its own step, and leave out one that is not finite.

    ZeRO keeps a parameter's gradient in a buffer, and a step in which the parameter has none (an idle expert, a layer
    that LayerDrop leaves out) finds the one of an earlier step there: here it finds zeros, as without ZeRO. And without
    ZeRO, in fp32, DeepSpeed applies gradients that are not finite; here it skips the step, as under ZeRO.

    With fp16 autocast ZeRO clips by the norm of the scaled gradients, and unscales what is left of them; it never
    lowers a scale that is too high for a gradient, and skips all steps then. Here gradients are unscaled before they
    are clipped, and each step, or skipped one, counts once for the scale.
    """
    own: Any = engine

    def wrap(update: Update) -> Update:
        @wraps(update)
        def mended(lr_kwargs: Any) -> None:
            check_metrics(own.lr_scheduler, lr_kwargs)
            optimizer: Any = own.optimizer
            if not isinstance(optimizer, torch.optim.Optimizer):
                settle_gradients(optimizer)
                with _unscaled(optimizer, own.device):
                    update(lr_kwargs)
                return
            # Of this rank's gradients, which are equal on all where no model is cut.
            norm = gradient_norm([p.grad for p in own.module.parameters() if p.grad is not None])
            found, is_finite = _agreed(norm.to(own.device) / loss_scale(engine))
            set_grad_norm(engine, found)
            # DeepSpeed asks its own wrappers for this, and counts the step as skipped.
            is_skipped = vars(optimizer)["overflow"] = not is_finite
            with _without_step(optimizer) if is_skipped else nullcontext():
                update(lr_kwargs)

        return mended

    start_sums_at_zero(own.optimizer)
    wrap_update(engine, wrap)


@contextmanager
def _unscaled(wrapper: Any, device: torch.device) -> Iterator[None]:
    """Around an update of ZeRO's: fp16 autocast's scale is taken out of the gradients, and follows what they were."""
    if (scaler := zero_scaler(wrapper)) is None:
        yield
        return
    with unscaled_by(wrapper, scaler.get_scale()):
        yield
    # The scaler learns from an optimizer's gradients whether there was an overflow.
    told = torch.zeros((), device=device, requires_grad=True)
    told.grad = torch.full_like(told, torch.inf if wrapper.overflow else 0.0)
    scaler.step(torch.optim.SGD([told], lr=0.0))
    scaler.update()


def _agreed(norm: Tensor) -> tuple[float, bool]:
    """This rank's norm, and whether those of all ranks are finite; waits for the device once."""
    flag = 1.0 - torch.isfinite(norm).float()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    found, is_infinite = torch.stack([norm, flag]).tolist()
    return found, not is_infinite


@contextmanager
def _without_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    former = vars(optimizer).get("step")
    vars(optimizer)["step"] = lambda *_: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]
        if former is not None:
            vars(optimizer)["step"] = former

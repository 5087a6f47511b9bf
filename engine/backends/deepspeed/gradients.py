"""What DeepSpeed's update does with gradients that are missing, old or not finite, put right around it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ..gradient_norm import gradient_norm
from .privates import Update, complete_offloaded_gradients, drop_gradients, set_grad_norm, wrap_update
from .schedules import check_metrics


def mend_updates(engine: DeepSpeedEngine) -> None:
    """Let every update of the engine see the gradients of its own step, and leave out one that is not finite.

    ZeRO keeps a parameter's gradient in a buffer, and a step in which the parameter has none (an idle expert, a layer
    that LayerDrop leaves out) finds the one of an earlier step there: here it finds zeros, as without ZeRO. And without
    ZeRO, in fp32, DeepSpeed applies gradients that are not finite; here it skips the step, as under ZeRO.
    """
    own: Any = engine

    def wrap(update: Update) -> Update:
        @wraps(update)
        def mended(lr_kwargs: Any) -> None:
            check_metrics(own.lr_scheduler, lr_kwargs)
            optimizer: Any = own.optimizer
            if not isinstance(optimizer, torch.optim.Optimizer):
                complete_offloaded_gradients(optimizer)
                update(lr_kwargs)
                drop_gradients(optimizer)
                return
            # Of this rank's gradients, which are equal on all where no model is cut.
            norm = float(gradient_norm([p.grad for p in own.module.parameters() if p.grad is not None]))
            set_grad_norm(engine, norm)
            # DeepSpeed asks its own wrappers for this, and counts the step as skipped.
            is_skipped = vars(optimizer)["overflow"] = _on_any_rank(not math.isfinite(norm), own.device)
            with _without_step(optimizer) if is_skipped else nullcontext():
                update(lr_kwargs)

        return mended

    wrap_update(engine, wrap)


def _on_any_rank(found: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(found), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


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

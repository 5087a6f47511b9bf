"""Activation offload around the forwards of DeepSpeed's engine."""

from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from narrowgauge.offload import ActivationOffload


def attach_offload(engine: DeepSpeedEngine, offload: ActivationOffload) -> None:
    """Offload what the engine's forwards save, as ``engine.activation_offload``, until the engine is destroyed."""
    forward, destroy = engine.forward, engine.destroy

    @wraps(forward)
    def forward_with_offload(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with offload:
            return forward(*args, **kwargs)

    @wraps(destroy)
    def destroy_with_offload() -> None:
        offload.close()
        destroy()

    vars(engine).update(forward=forward_with_offload, destroy=destroy_with_offload, activation_offload=offload)

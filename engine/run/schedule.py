"""Learning rate over the run: the schedules of ``training.lr_schedule``, from transformers."""

from collections.abc import Callable
from typing import Any

from transformers import get_constant_schedule_with_warmup, get_wsd_schedule
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from ..config.config import ScheduleBlock


def make_schedule(block: ScheduleBlock, num_steps: int) -> Callable[[Any], Any]:
    """A function that builds the schedule for an optimizer; every group keeps its own highest rate.

    ``cosine`` falls from the highest rate to ``min_lr_ratio`` of it over the run; ``wsd`` holds it and falls over the
    last ``decay_steps``.
    """

    def build(optimizer: Any) -> Any:
        if block.type == "cosine":
            return get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, block.warmup_steps, num_steps, min_lr_rate=block.min_lr_ratio
            )
        if block.type == "wsd":
            decay_steps = block.decay_steps if block.decay_steps is not None else max(1, num_steps // 5)
            return get_wsd_schedule(
                optimizer,
                block.warmup_steps,
                decay_steps,
                num_training_steps=num_steps,
                min_lr_ratio=block.min_lr_ratio,
            )
        return get_constant_schedule_with_warmup(optimizer, block.warmup_steps)

    return build

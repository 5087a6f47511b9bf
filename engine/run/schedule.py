"""Learning rate over the run: the schedules of ``training.lr_schedule``, as transformers has them.

Written here because importing transformers' takes longer than all the rest of a run's start.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..config.run_blocks import ScheduleBlock


def make_schedule(block: ScheduleBlock, num_steps: int) -> Callable[[Any], LambdaLR]:
    """A function that builds the schedule for an optimizer; every group keeps its own highest rate.

    ``cosine`` falls from the highest rate to ``min_lr_ratio`` of it over the run; ``wsd`` holds it and falls over the
    last ``decay_steps``, also on a cosine. Both, and ``constant``, first rise over ``warmup_steps``: from zero, ``wsd``
    from ``min_lr_ratio``.
    """
    warmup, lowest = block.warmup_steps, block.min_lr_ratio
    if block.type == "cosine":
        rule = partial(_cosine, begin=warmup, end=num_steps, lowest=lowest, warmup=warmup, lowest_of_warmup=0.0)
    elif block.type == "wsd":
        decay_steps = block.decay_steps if block.decay_steps is not None else max(1, num_steps // 5)
        begin = num_steps - decay_steps
        rule = partial(_cosine, begin=begin, end=num_steps, lowest=lowest, warmup=warmup, lowest_of_warmup=lowest)
    else:
        rule = partial(_warmup, warmup=warmup, lowest=0.0)
    return lambda optimizer: LambdaLR(optimizer, rule)


def _warmup(step: int, *, warmup: int, lowest: float) -> float:
    return step / warmup * (1.0 - lowest) + lowest if step < warmup else 1.0


def _cosine(step: int, *, begin: int, end: int, lowest: float, warmup: int, lowest_of_warmup: float) -> float:
    """Half a cosine from ``begin`` to ``end``, after a warm-up."""
    if step < begin:
        return _warmup(step, warmup=warmup, lowest=lowest_of_warmup)
    progress = min(1.0, (step - begin) / max(1, end - begin))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - lowest) + lowest

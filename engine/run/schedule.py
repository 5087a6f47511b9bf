"""Learning rate over the run: the schedules of ``training.lr_schedule``, as transformers has them, and ``power``.

Written here because importing transformers' takes longer than all the rest of a run's start.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

from ..config.config import Config
from ..config.rate_blocks import ScheduleBlock
from ..ranks.environment import process_rank

Rule = Callable[[int], float]
"""The rate of a step, the first being 0, relative to the highest."""


def rule_of(block: ScheduleBlock | None, num_steps: int, *, tokens_per_step: int = 0, highest: float = 0.0) -> Rule:
    """The rate over the run, relative to ``highest``.

    ``cosine`` falls from the highest rate to ``min_lr_ratio`` of it over the run; ``wsd`` holds it and falls over the
    last ``decay_steps``, also on a cosine. ``power`` is ``min(highest, batch * a * n ** b)`` after ``n`` tokens, with
    the batch in sequences of ``reference_length`` tokens: neither the length of the run nor the batch size moves the
    best ``a`` and ``b`` (Shen et al. 2024, "Power Scheduler", arXiv 2408.13359); with ``decay_steps`` it ends as
    ``wsd`` does. All, and ``constant``, first rise over ``warmup_steps``: from zero, ``wsd`` from ``min_lr_ratio``.

    Args:
        block: None for a constant rate.
        tokens_per_step: for ``power``.
        highest: the rate of ``optimizer.params.lr``, for ``power``.
    """
    if block is None:
        return _constant
    warmup, lowest = block.warmup_steps, block.min_lr_ratio
    if block.type == "cosine":
        return partial(_cosine, begin=warmup, end=num_steps, lowest=lowest, warmup=warmup, lowest_of_warmup=0.0)
    if block.type == "wsd":
        decay_steps = block.decay_steps if block.decay_steps is not None else max(1, num_steps // 5)
        begin = num_steps - decay_steps
        return partial(_cosine, begin=begin, end=num_steps, lowest=lowest, warmup=warmup, lowest_of_warmup=lowest)
    if block.type == "power":
        begin = num_steps - (block.decay_steps or 0)
        end = partial(_cosine, begin=begin, end=num_steps, lowest=lowest, warmup=warmup, lowest_of_warmup=0.0)
        rise = partial(_warmup, warmup=warmup, lowest=0.0)
        scale = tokens_per_step / block.reference_length * block.coefficient
        return partial(
            _power,
            scale=scale / highest if highest > 0.0 else math.inf,
            exponent=block.exponent,
            tokens_per_step=tokens_per_step,
            around=end if block.decay_steps is not None else rise,
        )
    return partial(_warmup, warmup=warmup, lowest=0.0)


def _constant(step: int) -> float:
    return 1.0


def _warmup(step: int, *, warmup: int, lowest: float) -> float:
    return step / warmup * (1.0 - lowest) + lowest if step < warmup else 1.0


def _cosine(step: int, *, begin: int, end: int, lowest: float, warmup: int, lowest_of_warmup: float) -> float:
    """Half a cosine from ``begin`` to ``end``, after a warm-up."""
    if step < begin:
        return _warmup(step, warmup=warmup, lowest=lowest_of_warmup)
    progress = min(1.0, (step - begin) / max(1, end - begin))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - lowest) + lowest


def _power(step: int, *, scale: float, exponent: float, tokens_per_step: int, around: Rule) -> float:
    """The power law's share of the highest rate, within the warm-up and decay ``around`` it."""
    tokens = step * tokens_per_step
    return around(step) * (min(1.0, scale * tokens**exponent) if tokens else 1.0)


def check_schedule(config: Config, num_steps: int) -> None:
    """Whether the schedule fits the run; a warm-up that takes all of it is a warning.

    Raises:
        ConfigError: the steps are too few.
    """
    training = config.parsed.training
    block = training.lr_schedule if training is not None else None
    if block is None:
        return
    if block.type in ("wsd", "power") and block.warmup_steps + (block.decay_steps or 0) > num_steps:
        raise config.error(
            f"training.lr_schedule: expected at most training.steps, {num_steps}, as warmup_steps and decay_steps"
            f" together, got {block.warmup_steps} and {block.decay_steps}"
        )
    if block.warmup_steps >= num_steps and process_rank() == 0:
        warnings.warn(
            f"training.lr_schedule.warmup_steps: {block.warmup_steps} of {num_steps} steps, the full learning rate is"
            " never reached",
            stacklevel=2,
        )

"""The learning rates of a run: its schedule, and the rules that carry rates to another batch size and width."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig

from ..config.config import Config
from ..config.rate_blocks import ScheduleBlock
from .schedule import rule_of

# Whose steps are in proportion to the gradient, or go by it and the weights' norms in the place of Adam's moments.
_LINEAR = ("sgd", "lars")


@dataclass(frozen=True)
class Rates:
    """How a run's learning rates are made.

    Attributes:
        batch_factor: by which ``training.batch_rule`` multiplies all rates.
        matrix_factor: by which ``training.width_rule`` multiplies those of matrices.
        applied: both, for people and for the run's records.
    """

    schedule: ScheduleBlock | None
    num_steps: int
    tokens_per_step: int
    batch_factor: float
    matrix_factor: float
    applied: dict[str, Any]

    def describe(self) -> Iterator[str]:
        """A line for each rule that acts."""
        if (found := self.applied.get("batch_rule")) is not None:
            yield (
                f"training.batch_rule: all learning rates times {found['factor']:.4g}, {found['rule']} in the batch"
                f" size, {found['batch_size']} in the place of {found['base_batch_size']}"
            )
        if (found := self.applied.get("width_rule")) is not None:
            yield (
                f"training.width_rule: learning rates of matrices times {found['factor']:.4g}, for a width of"
                f" {found['width']} in the place of {found['base_width']}; initial weights and multipliers are as they"
                " were"
            )

    def make(self) -> Callable[[Any], LambdaLR] | None:
        """What builds the schedule for an optimizer; None where the rates are the optimizer's own all the time."""
        if self.schedule is None and not self.applied:
            return None
        return self._build

    def _build(self, optimizer: Any) -> LambdaLR:
        rule = rule_of(
            self.schedule,
            self.num_steps,
            tokens_per_step=self.tokens_per_step,
            highest=float(optimizer.defaults["lr"]),
        )
        return LambdaLR(optimizer, lambda step: rule(step) * self.batch_factor)


def rates_of(
    config: Config, model: PretrainedConfig, *, batch_size: int, num_steps: int, tokens_per_step: int
) -> Rates:
    """What the blocks of ``training`` make of the rates.

    Args:
        batch_size: sequences per optimizer step.

    Raises:
        ConfigError: see :func:`check_rates`, or the model has no width.
    """
    check_rates(config)
    training = config.parsed.training
    assert training is not None
    applied: dict[str, Any] = {}
    batch_factor = matrix_factor = 1.0
    if (block := training.batch_rule) is not None:
        rule = block.rule if block.rule != "auto" else "linear" if _is_linear(config) else "sqrt"
        batch_factor = (batch_size / block.base_batch_size) ** (1.0 if rule == "linear" else 0.5)
        applied["batch_rule"] = {
            "rule": rule,
            "base_batch_size": block.base_batch_size,
            "batch_size": batch_size,
            "factor": batch_factor,
        }
    if (block := training.width_rule) is not None:
        width = getattr(model, "hidden_size", None)
        if not isinstance(width, int):
            raise config.error("training.width_rule: expected a model with a hidden_size, got one without")
        matrix_factor = block.base_width / width
        applied["width_rule"] = {"base_width": block.base_width, "width": width, "factor": matrix_factor}
    return Rates(training.lr_schedule, num_steps, tokens_per_step, batch_factor, matrix_factor, applied)


def check_rates(config: Config) -> None:
    """Refuse rules that would not act, or that act twice.

    Raises:
        ConfigError: naming the keys.
    """
    training, optimizer, problems = config.parsed.training, config.parsed.optimizer, []
    if training is None or optimizer is None:
        return
    if getattr(config.parsed, "scheduler", None) and (training.batch_rule or training.width_rule):
        key = "batch_rule" if training.batch_rule else "width_rule"
        problems.append(f"training.{key}: expected training.lr_schedule, or none, beside it, got scheduler")
    if training.batch_rule is not None and training.lr_schedule is not None and training.lr_schedule.type == "power":
        problems.append(
            "training.batch_rule: expected none with training.lr_schedule.type 'power', which has the batch size in its"
            " formula, got one"
        )
    if training.width_rule is not None and (_is_linear(config) or optimizer.type == "Lamb"):
        problems.append(
            f"training.width_rule: expected an optimizer whose steps do not grow with the gradient or the weights, as"
            f" Adam's, got {optimizer.type}"
        )
    if training.width_rule is not None and config.optimizer_options is None and config.parsed.engine == "megatron":
        problems.append(
            "training.width_rule: expected one of narrowgauge's optimizers with the megatron engine, which has no rate"
            f" of matrices for others, got {optimizer.type}"
        )
    if problems:
        raise config.error(*problems)


def _is_linear(config: Config) -> bool:
    block = config.parsed.optimizer
    return block is not None and block.type.lower() in _LINEAR


def at_width(config: Config, factor: float) -> Config:
    """The configuration of an engine whose matrices' rates are ``factor`` of the given ones."""
    options = config.optimizer_options
    if factor == 1.0 or options is None:
        return replace(config, matrix_factor=factor)
    block = config.raw["optimizer"]
    scale = options.matrix_lr_scale * factor
    raw = {**config.raw, "optimizer": {**block, "params": {**block.get("params", {}), "matrix_lr_scale": scale}}}
    return replace(config, raw=raw, optimizer_options=replace(options, matrix_lr_scale=scale))

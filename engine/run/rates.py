"""The learning rates of a run: its schedule, and the rules that carry rates to another batch size and width."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig

from narrowgauge.optimizers.compact.options import CompactOptions
from narrowgauge.optimizers.trust_region import inner_rate

from ..config.config import Config
from ..config.rate_blocks import ScheduleBlock, TrustRegionBlock
from .lengths import Lengths
from .schedule import rule_of

# Whose steps are in proportion to the gradient, or go by it and the weights' norms in the place of Adam's moments.
_LINEAR = ("sgd", "lars")


@dataclass(frozen=True)
class Rates:
    """How a run's learning rates are made.

    Attributes:
        batch_factor: by which ``training.batch_rule`` multiplies all rates, of steps of full length.
        batch_power: of the sequences of a step, in that factor; 0 without the rule.
        matrix_factor: by which ``training.width_rule`` multiplies those of matrices.
        applied: what rules and schedules make of the rates, for people and for the run's records.
    """

    schedule: ScheduleBlock | None
    num_steps: int
    tokens_per_step: int
    lengths: Lengths
    batch_factor: float
    batch_power: float
    matrix_factor: float
    trust_region: TrustRegionBlock | None
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
        if (found := self.applied.get("trust_region")) is not None:
            yield (
                f"training.trust_region: cycles of {found['steps']} steps, with {found['mean_rate']:.2f} of the"
                " learning rate in the mean"
            )
        if "length_schedule" in self.applied:
            follows = "go with the number of sequences" if self.batch_power else "stay as they are (no batch_rule)"
            for phase in self.applied["length_schedule"]:
                lengths = ", ".join(map(str, phase["lengths"]))
                yield (
                    f"training.length_schedule: {phase['steps']} steps of sequences of {lengths} tokens in turn, cut"
                    f" from those of {self.lengths.full}; learning rates {follows}"
                )

    def make(self) -> Callable[[Any], LambdaLR] | None:
        """What builds the schedule for an optimizer; None where the rates are the optimizer's own all the time."""
        if self.schedule is None and not self.batch_power and self.trust_region is None:
            return None
        return self._build

    def _build(self, optimizer: Any) -> LambdaLR:
        rule = rule_of(
            self.schedule,
            self.num_steps,
            tokens_per_step=self.tokens_per_step,
            highest=float(optimizer.defaults["lr"]),
        )
        cycle = self.trust_region.steps if self.trust_region is not None else 1

        def factor(step: int) -> float:
            batch = self.batch_factor * self.lengths.pieces(step) ** self.batch_power
            return rule(step) * batch * inner_rate(step, cycle)

        return LambdaLR(optimizer, factor)


def rates_of(
    config: Config,
    model: PretrainedConfig,
    lengths: Lengths,
    *,
    batch_size: int,
    num_steps: int,
    tokens_per_step: int,
) -> Rates:
    """What the blocks of ``training`` make of the rates.

    Args:
        lengths: of the sequences of each step.
        batch_size: sequences per optimizer step, of full length.

    Raises:
        ConfigError: see :func:`check_rates`, or the model has no width.
    """
    check_rates(config)
    training = config.parsed.training
    assert training is not None
    applied: dict[str, Any] = {}
    batch_factor = matrix_factor = 1.0
    batch_power = 0.0
    if (block := training.batch_rule) is not None:
        rule = block.rule if block.rule != "auto" else "linear" if _is_linear(config) else "sqrt"
        batch_power = 1.0 if rule == "linear" else 0.5
        batch_factor = (batch_size / block.base_batch_size) ** batch_power
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
    if (block := training.trust_region) is not None:
        rates = [inner_rate(step, block.steps) for step in range(block.steps)]
        applied["trust_region"] = {"pull": block.pull, "steps": block.steps, "mean_rate": sum(rates) / len(rates)}
    if lengths.phases:
        applied["length_schedule"] = lengths.describe()
    return Rates(
        training.lr_schedule,
        num_steps,
        tokens_per_step,
        lengths,
        batch_factor,
        batch_power,
        matrix_factor,
        training.trust_region,
        applied,
    )


def check_rates(config: Config) -> None:
    """Refuse rules that would not act, or that act twice.

    Raises:
        ConfigError: naming the keys.
    """
    training, optimizer, problems = config.parsed.training, config.parsed.optimizer, []
    if training is None or optimizer is None:
        return
    rules = {key: getattr(training, key) for key in ("batch_rule", "width_rule", "trust_region")}
    problems += [
        f"training.{key}: expected training.lr_schedule, or none, beside it, got scheduler"
        for key, rule in rules.items()
        if rule is not None and getattr(config.parsed, "scheduler", None)
    ]
    if training.trust_region is not None:
        problems += [f"training.trust_region: {problem}" for problem in _without_trust(config)]
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
    options = config.optimizer_options
    if training.width_rule is not None and isinstance(options, CompactOptions) and options.base in ("Muon", "NorMuon"):
        problems.append(
            f"training.width_rule: expected another optimizer.params.base beside it, got {options.base}: the rule is"
            " Adam's, and what is orthogonalized grows with the width in another way"
        )
    if problems:
        raise config.error(*problems)


def _without_trust(config: Config) -> Iterator[str]:
    """What a trust region does not go together with."""
    options, zero = config.optimizer_options, config.parsed.zero_optimization
    if isinstance(options, CompactOptions) and options.base != "AdamW":
        yield f"expected optimizer.params.base AdamW beside it, got {options.base}"
    if getattr(options, "reference_compatible", False):
        yield "expected optimizer.params.reference_compatible false beside it, got true"
    if config.bf16 and config.parsed.engine == "ddp":
        yield (
            "expected bf16.enabled false beside it with the ddp engine, got true: there are no fp32 copies of the"
            " weights, and pulls below bf16's precision would be lost"
        )
    offload = getattr(zero, "offload_optimizer", None)
    if getattr(offload, "ratio", 1.0) != 1.0 or getattr(offload, "super_offload", False):
        yield "expected neither zero_optimization.offload_optimizer.ratio nor super_offload beside it, got one"
    if getattr(zero, "zenflow", None) is not None:
        yield "expected no zero_optimization.zenflow beside it, got one"


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

"""The ``scheduler`` block: DeepSpeed's schedules and torch's, as they work with several groups and under ZeRO."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import lr_scheduler as torch_schedules

from narrowgauge.optimizers import EngineOptimizer

from ...config.config import Config
from ...errors import UserError, first_line

# Keys that set learning rates outright; other schedules scale the rates they find.
_ABSOLUTE_RATES = {
    "lr_range_test_min_lr",
    "cycle_min_lr",
    "cycle_max_lr",
    "warmup_min_lr",
    "warmup_max_lr",
    "max_lr",
    "base_lr",
}
# What DeepSpeed's OneCycle and torch's two set betas[0], or the momentum, to if nothing is said.
_CYCLES = {"OneCycle": (0.8, 0.9), "OneCycleLR": (0.85, 0.95), "CyclicLR": (0.8, 0.9)}


def schedule_problems(raw: Mapping[str, Any]) -> list[str]:
    """What the types and names of a ``scheduler`` block do not show."""
    block, optimizer = raw.get("scheduler"), raw.get("optimizer")
    params = block.get("params", {}) if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(params, dict):
        return []
    name, problems = block.get("type"), []
    made_of = [key for key in ("lr_lambda", "schedulers", "scale_fn") if key in params]
    if is_torch_schedule(name) and (
        made_of or name in ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR")
    ):
        problems.append(
            f"scheduler.type: {name} is made of functions or schedules, which JSON cannot hold: pass"
            f" lr_scheduler=lambda optimizer: {name}(optimizer, ...) to initialize"
        )
    if name == "ReduceLROnPlateau" and raw.get("training"):
        problems.append(
            "scheduler.type: ReduceLROnPlateau follows a measured loss, which narrowgauge train gives to none"
        )
    given = optimizer.get("params", {}) if isinstance(optimizer, dict) else {}
    problems += _momentum_problems(name, params, given if isinstance(given, dict) else {})
    steps = training.get("steps") if isinstance(training := raw.get("training"), dict) else None
    return problems or _value_problems(name, params, steps if isinstance(steps, int) else 1)


def _value_problems(name: Any, params: dict[str, Any], steps: int) -> list[str]:
    """What keeps the schedule from being made and stepped, or takes its rate below 0."""
    kind = getattr(lr_schedules, str(name), None) or getattr(torch_schedules, str(name), None)
    if not inspect.isclass(kind) or not _takes(kind, params) or "auto" in params.values():
        # Told elsewhere.
        return []
    if (found := params.get("warmup_type", "log")) not in ("log", "linear"):
        return [f"scheduler.params.warmup_type: expected log or linear, got {found!r}"]
    if (found := params.get("last_epoch", -1)) != -1:
        return [f"scheduler.params.last_epoch: expected -1, got {found!r}: a checkpoint says where a schedule is"]
    milestones = params.get("milestones", [])
    if not isinstance(milestones, list) or any(type(step) is not int for step in milestones):
        return [f"scheduler.params.milestones: expected a list of whole numbers, got {milestones!r}"]
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    try:
        optimizer = torch.optim.AdamW([parameter], lr=1e-3)
        # One group's of several.
        rates = {key: value[0] for key, value in params.items() if key in _ABSOLUTE_RATES and isinstance(value, list)}
        schedule = cast("Callable[..., Any]", kind)(optimizer, **{**params, **rates})
        optimizer.step()
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        total = getattr(schedule, "total_steps", None) if name == "OneCycleLR" else None
        rate = optimizer.param_groups[0]["lr"]
    except Exception as error:
        # Schedules check little, and raise what comes.
        return [f"scheduler.params: {name} cannot be made of them: {type(error).__name__}: {first_line(error)}"]
    if total is not None and steps > total:
        return [f"scheduler.params: {name} has {total} steps, expected at least training.steps, {steps}"]
    return [] if rate >= 0 else [f"scheduler.params: expected rates of at least 0, got {rate} at the first step"]


def _takes(kind: Callable[..., Any], params: dict[str, Any]) -> bool:
    try:
        inspect.signature(kind).bind(None, **params)
    except TypeError:
        return False
    return True


def _momentum_problems(name: Any, params: dict[str, Any], optimizer: dict[str, Any]) -> list[str]:
    if name not in _CYCLES or params.get("cycle_momentum") is False:
        return []
    problems = []
    own = [key for key in ("betas", "momentum") if key in optimizer]
    if own and "cycle_momentum" not in params:
        low, high = _CYCLES[name]
        problems.append(
            f"scheduler.params.cycle_momentum: expected true or false beside optimizer.params.{own[0]}, got none:"
            f" {name} would move it between {low} and {high}"
        )
    if params.get("decay_mom_rate"):
        problems.append(
            f"scheduler.params.decay_mom_rate: expected 0, got {params['decay_mom_rate']}: DeepSpeed multiplies the"
            " momentum by 1 + decay_mom_rate again and again, past 1"
        )
    for key in ("cycle_min_mom", "cycle_max_mom", "base_momentum", "max_momentum"):
        value = params.get(key, 0.0)
        if isinstance(value, int | float) and not 0.0 <= value < 1.0:
            problems.append(f"scheduler.params.{key}: expected at least 0 and less than 1, got {value}")
    return problems


def momentum_note(raw: Mapping[str, Any]) -> str | None:
    """What a cycle does to a momentum of which the configuration says nothing, in words; None where it does nothing."""
    block, optimizer = raw.get("scheduler"), raw.get("optimizer") or {}
    name, params = (block or {}).get("type"), (block or {}).get("params", {})
    given = optimizer.get("params", {})
    if name not in _CYCLES or "cycle_momentum" in params or {"betas", "momentum"} & given.keys():
        return None
    default_low, default_high = _CYCLES[name]
    low_key, high_key = ("cycle_min_mom", "cycle_max_mom") if name == "OneCycle" else ("base_momentum", "max_momentum")
    low, high = params.get(low_key, default_low), params.get(high_key, default_high)
    return (
        f"scheduler: {name} also moves the optimizer's betas[0], or its momentum, between {low} and {high}: say"
        " scheduler.params.cycle_momentum, true or false"
    )


def is_torch_schedule(name: Any) -> bool:
    """Whether a schedule is torch's; a name that both have is DeepSpeed's."""
    if not isinstance(name, str) or hasattr(lr_schedules, name):
        return False
    return inspect.isclass(getattr(torch_schedules, name, None))


def take_torch_schedule(config: Config, settings: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Take a schedule of torch's out of DeepSpeed's settings, which gives it ZeRO's wrapper: no optimizer to torch.

    Returns:
        What makes the schedule for an optimizer; None where the block is DeepSpeed's or missing.
    """
    if not is_torch_schedule((settings.get("scheduler") or {}).get("type")):
        return None
    block = settings.pop("scheduler")

    def make(optimizer: torch.optim.Optimizer) -> Any:
        try:
            return getattr(torch_schedules, block["type"])(optimizer, **block.get("params", {}))
        except (TypeError, ValueError) as error:
            raise config.error(f"scheduler.params: {error}").shared() from error

    return make


def per_group_rates(config: Config, scheduler: dict[str, Any], optimizer: EngineOptimizer) -> dict[str, Any]:
    """Give a schedule that sets one rate for all groups a rate for each, so that the groups keep their proportions."""
    base = optimizer.defaults["lr"]
    if base == 0.0:
        raise config.error(
            "optimizer.params.lr: expected more than 0 with a scheduler, which keeps the groups' rates relative to it"
        )
    proportions = [group["lr"] / base for group in optimizer.param_groups]
    params = dict(scheduler.get("params", {}))
    if scheduler.get("type") == "LRRangeTest":
        params.setdefault("lr_range_test_min_lr", 1e-3)
    for key in _ABSOLUTE_RATES & params.keys():
        if isinstance(params[key], int | float):
            params[key] = [params[key] * proportion for proportion in proportions]
    return {**scheduler, "params": params}


def check_metrics(scheduler: Any, lr_kwargs: Any) -> None:
    """Refuse a step that DeepSpeed would give the batch size for a loss.

    Raises:
        UserError: the schedule wants a loss, and there is none.
    """
    if isinstance(scheduler, torch_schedules.ReduceLROnPlateau) and "metrics" not in (lr_kwargs or {}):
        raise UserError("engine.step: expected lr_kwargs={'metrics': loss} with ReduceLROnPlateau, got none")

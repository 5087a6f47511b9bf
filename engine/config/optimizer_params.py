"""``optimizer.params`` of our optimizers: the fields of their options."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer, EngineOptimizer
from narrowgauge.optimizers.options import AdamOptions, OptionError, Options, is_required, options_of

from ..errors import did_you_mean
from .explained import explained


def read_options(name: str, params: Any) -> tuple[Options | None, list[str]]:
    """The options of one of :mod:`narrowgauge.optimizers` from the JSON of ``optimizer.params``.

    Returns:
        The options, or None with all that is wrong, ``option: expected ..., got ...`` each.
    """
    options_type = OPTIMIZERS[name].options_type
    known = {option.name: option for option in options_of(options_type)}
    if not isinstance(params, dict):
        return None, [f"expected an object, got {params!r}"]
    problems = [f"{key}: unknown key{explained(key) or did_you_mean(key, known)}" for key in params if key not in known]
    problems += [
        f"{key}: expected this key, got none" for key in known if key not in params and is_required(known[key])
    ]
    if problems:
        return None, problems
    values: dict[str, Any] = {
        key: tuple(value) if key == "betas" and isinstance(value, list) else value for key, value in params.items()
    }
    try:
        return options_type(**values), []
    except OptionError as error:
        return None, error.problems


def problems_of_adam(optimizer: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values that AdamW takes in every engine; other optimizers' are their own to check.

    ``auto`` is left to :func:`.problems.autos`.
    """
    name, params = optimizer.get("type"), optimizer.get("params")
    if not isinstance(name, str) or name.lower() not in ("adam", "adamw") or not isinstance(params, dict):
        return []
    given = {key: params[key] for key in AdamOptions.group_options if params.get(key, "auto") != "auto"}
    try:
        AdamOptions(**given)
    except OptionError as error:
        return [f"optimizer.params.{problem}" for problem in error.problems]
    return []


def our_only() -> set[str]:
    """What other optimizers do not take: left out for them, so that a comparison with dense AdamW changes one word."""
    ours = {field.name for cls in OPTIMIZERS.values() for field in fields(cls.options_type)}
    return ours - {*inspect.signature(torch.optim.AdamW).parameters, "momentum", "nesterov"}


def make_optimizer(name: str, model: torch.nn.Module, options: Options, backend: Any = None) -> EngineOptimizer[Any]:
    """An optimizer of ours on ``model``.

    Args:
        backend: where the tensors lie, for compact optimizers.

    Raises:
        ValueError: the options do not fit the model.
    """
    cls: Any = OPTIMIZERS[name]
    return cls(model, options, backend) if issubclass(cls, CompactOptimizer) else cls(model, options)


__all__ = ["make_optimizer", "our_only", "problems_of_adam", "read_options"]

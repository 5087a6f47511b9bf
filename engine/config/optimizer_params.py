"""``optimizer.params`` of our optimizers: checked against the signatures of their constructors."""

import inspect
from typing import Annotated, Any, Optional, get_type_hints

import torch
from pydantic import Field, create_model, model_validator

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer, EngineOptimizer

from .blocks import Count, Flag, StrictBlock

Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]


class ParamGroup(StrictBlock):
    """Parameters with options of their own."""

    params: list[str] = Field(min_length=1)
    """Globs over parameter names."""
    lr: Rate | None = None
    betas: Betas | None = None
    eps: Rate | None = None
    weight_decay: Rate | None = None


# ruff: noqa: UP045 (an Annotated type takes no "|" at run time on Python 3.10)
# What JSON allows where an option of this name appears; the others go by their type hints.
_TYPES: dict[str, Any] = {
    "lr": Rate,
    "betas": Betas,
    "eps": Rate,
    "weight_decay": Rate,
    "matrix_lr_scale": Annotated[float, Field(gt=0.0, allow_inf_nan=False)],
    "rank": Optional[Count],
    "refresh_interval": Optional[Count],
    "target_modules": list[str] | None,
    "param_groups": list[ParamGroup],
    "foreach": Optional[Flag],
    "fused": Optional[Flag],
}
# Given by the engine.
_NOT_OPTIONS = {"self", "model", "backend"}


class OptimizerParams(StrictBlock):
    """The arguments of one of :mod:`narrowgauge.optimizers`."""

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the optimizer."""
        found = self.model_dump()
        for key, value in found.items():
            if key == "param_groups":
                found[key] = [{k: v for k, v in group.items() if v is not None} for group in value]
            elif key == "betas":
                found[key] = tuple(value)
        return found


def _schema_of(cls: type[EngineOptimizer]) -> type[OptimizerParams]:
    hints = get_type_hints(cls.__init__)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _NOT_OPTIONS:
            continue
        default = parameter.default
        if isinstance(default, tuple):
            default = list(default)
        fields[name] = (_TYPES.get(name, hints[name]), ... if default is inspect.Parameter.empty else default)

    def check(self: OptimizerParams) -> OptimizerParams:
        cls.check_options(**self.arguments())
        return self

    validators: dict[str, Any] = {"check": model_validator(mode="after")(check)}
    return create_model(f"{cls.__name__}Params", __base__=OptimizerParams, __validators__=validators, **fields)


OUR_OPTIMIZERS: dict[str, type[OptimizerParams]] = {name: _schema_of(cls) for name, cls in OPTIMIZERS.items()}

# Left out for other optimizers, so that a comparison with dense AdamW changes one word.
OUR_ONLY = {key for schema in OUR_OPTIMIZERS.values() for key in schema.model_fields} - {
    *inspect.signature(torch.optim.AdamW).parameters,
    "momentum",
    "nesterov",
}


def make_optimizer(
    name: str, model: torch.nn.Module, arguments: dict[str, Any], backend: Any = None
) -> EngineOptimizer:
    """An optimizer of ours on ``model``.

    Args:
        backend: where the tensors lie, for compact optimizers.

    Raises:
        ValueError: the options do not fit the model.
    """
    cls: Any = OPTIMIZERS[name]
    return cls(model, **arguments, **({"backend": backend} if issubclass(cls, CompactOptimizer) else {}))


__all__ = ["OUR_ONLY", "OUR_OPTIMIZERS", "OptimizerParams", "make_optimizer"]

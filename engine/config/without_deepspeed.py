"""DeepSpeed's keys in the engines that have only some of them."""

from collections.abc import Mapping
from typing import Any

from pydantic import AfterValidator

from narrowgauge.optimizers import OPTIMIZERS

from .blocks import Block, Flag


class Bf16Block(Block):
    enabled: Flag = False


def off_only(reason: str) -> AfterValidator:
    """For a setting that an engine does not have: allowed where it is off, or says nothing."""

    def check(value: Any) -> Any:
        if value not in (None, False, 0):
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def others_optimizer(raw: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Type and keys of the parameters of a configuration's ``optimizer`` that is not narrowgauge's."""
    optimizer = raw.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        return None
    name, params = optimizer["type"], optimizer.get("params", {})
    return None if name in OPTIMIZERS else (name, list(params) if isinstance(params, dict) else [])


def adam_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of torch's AdamW in the place of DeepSpeed's: its ``weight_decay`` is 0 by default, torch's is
    0.01; with ``torch_adam`` DeepSpeed takes torch's own.
    """
    arguments = {key: value for key, value in params.items() if key != "torch_adam"}
    return arguments if params.get("torch_adam") else {"weight_decay": 0.0, **arguments}

"""The configuration keys of the ``ddp`` engine."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict

from narrowgauge.optimizers import OPTIMIZERS

from ...config.blocks import Block, Flag
from ...config.engine_keys import EngineKeys
from ...config.optimizer_params import our_only
from ...config.problems import unknown_names
from ...config.without_deepspeed import Bf16Block, adam_arguments, off_only, others_optimizer
from ...errors import did_you_mean

if TYPE_CHECKING:
    from ...config.config import Config


def _not_offloaded(reason: str) -> AfterValidator:
    """For DeepSpeed's offloading: allowed where it names no device."""

    def check(value: Any) -> Any:
        device = value.get("device", "none") if isinstance(value, dict) else value
        if device not in (None, False, 0, "none"):
            raise ValueError(reason)
        return value

    return AfterValidator(check)


class Fp16Block(Block):
    model_config = ConfigDict(extra="allow")

    enabled: Annotated[Flag, off_only("expected false with the ddp engine, which scales no losses; use bf16")] = False


class ZeroBlock(Block):
    """Of stage 0, where DeepSpeed does not use the other keys either."""

    model_config = ConfigDict(extra="allow")

    stage: Annotated[int, off_only("expected 0 with the ddp engine, which shards nothing")] = 0
    offload_optimizer: Annotated[Any, _not_offloaded("the ddp engine keeps the optimizer's state on its device")] = None
    offload_param: Annotated[Any, _not_offloaded("the ddp engine keeps the parameters on its device")] = None


class DdpKeys(EngineKeys):
    """What the engine takes beside narrowgauge's blocks."""

    bf16: Bf16Block | None = None
    fp16: Fp16Block | None = None
    zero_optimization: ZeroBlock | None = None
    scheduler: Annotated[Any, off_only("the ddp engine has none; use training.lr_schedule")] = None
    steps_per_print: int | float | None = None
    """Of DeepSpeed's own log, which this engine does not write."""

    @classmethod
    def problems_in(cls, raw: Mapping[str, Any]) -> list[str]:
        found = others_optimizer(raw)
        if found is None:
            return []
        name, keys = found
        try:
            allowed = {*inspect.signature(torch_optimizer(name)).parameters, "torch_adam"} - {"params"}
        except ValueError as error:
            return [f"optimizer.type: {error}"]
        own = [key for key in keys if key not in our_only()]
        return unknown_names("optimizer.params", name, own, allowed)


def torch_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """torch's optimizer of this name; as in DeepSpeed, ``Adam`` is AdamW too.

    Raises:
        ValueError: there is none.
    """
    if name.lower() in ("adam", "adamw"):
        return torch.optim.AdamW
    found = getattr(torch.optim, name, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        known = sorted({*OPTIMIZERS, "AdamW", "SGD"})
        raise ValueError(f"expected one of {known} or another of torch's, got {name!r}{did_you_mean(name, known)}")
    return found


def torch_arguments(config: "Config") -> dict[str, Any]:
    """The arguments of the configured one."""
    optimizer = config.engine_settings()["optimizer"]
    arguments = optimizer.get("params", {})
    return adam_arguments(arguments) if torch_optimizer(optimizer["type"]) is torch.optim.AdamW else dict(arguments)

"""Training under DeepSpeed ZeRO."""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from torch import nn
    from transformers import PretrainedConfig

    from ...config.config import Config
    from ...config.run_blocks import ModelBlock
    from ...forecast.held import Rank
    from ...forecast.sent import Sent
    from ...forecast.whole_model import Traces
    from ...protocol import HeldByRank, Schedule
    from .keys import DeepSpeedKeys
    from .training import DeepSpeedTraining


class DeepSpeedBackend:
    """``"engine": "deepspeed"``; see :class:`narrowgauge.engine.protocol.Backend`."""

    name: ClassVar[str] = "deepspeed"

    @property
    def keys(self) -> "type[DeepSpeedKeys]":
        from .keys import DeepSpeedKeys

        return DeepSpeedKeys

    def check(self, config: "Config") -> None:
        from .supported import check_training

        check_training(config)

    def check_model(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> None:
        """Every model of transformers can be trained."""

    def data_parallel_size(self, config: "Config", world_size: int) -> int:
        return world_size

    def rehearse(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> "Sequence[HeldByRank]":
        """It does not say."""
        return ()

    def forecast(
        self,
        config: "Config",
        model_config: "PretrainedConfig",
        world_size: int,
        *,
        on_gpu: bool,
        steps: int,
        traces: "Traces | None" = None,
    ) -> "Sequence[tuple[Rank, Sent]]":
        from ...forecast.whole_model import Traces
        from .forecast import rank_of, sent

        subject, passes, offloaded = (traces or Traces()).of_rank(config, model_config, world_size)
        rank = rank_of(config, subject, passes, world_size=world_size, on_gpu=on_gpu, offloaded=offloaded)
        return [(rank, sent(config, subject, world_size=world_size, on_gpu=on_gpu, steps=steps))]

    def prepare(self, config: "Config", console: "Console | None" = None) -> None:
        from .extensions import ensure_extensions

        ensure_extensions(config, console)

    def init_distributed(self) -> None:
        from .initialize import init_distributed

        init_distributed()

    def construct(self, block: "ModelBlock", model_config: "PretrainedConfig", config: "Config") -> "nn.Module":
        from .construct import construct

        return construct(block, model_config, config)

    def build(self, config: "Config", model: "nn.Module", *, schedule: "Schedule | None") -> "DeepSpeedTraining":
        from .build import build

        return build(config, model, schedule=schedule)


BACKEND = DeepSpeedBackend()

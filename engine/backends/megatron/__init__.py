"""Training with Megatron-core: tensor, pipeline, sequence and expert parallelism."""

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
    from .keys import MegatronKeys
    from .training import MegatronTraining


class MegatronBackend:
    """``"engine": "megatron"``; see :class:`narrowgauge.engine.protocol.Backend`."""

    name: ClassVar[str] = "megatron"

    @property
    def keys(self) -> "type[MegatronKeys]":
        from .keys import MegatronKeys

        return MegatronKeys

    def check(self, config: "Config") -> None:
        from .supported import check

        check(config)

    def check_model(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> None:
        from .supported import check_model

        check_model(config, model_config, world_size)

    def data_parallel_size(self, config: "Config", world_size: int) -> int:
        from .keys import layout_of

        return layout_of(config, world_size).data

    def rehearse(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> "Sequence[HeldByRank]":
        from .rehearse import rehearse

        return rehearse(config, model_config, world_size)

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
        from .forecast import ranks_of

        return list(ranks_of(config, model_config, world_size, on_gpu=on_gpu, steps=steps))

    def prepare(self, config: "Config", console: "Console | None" = None) -> None:
        """Only what DeepSpeed loads is compiled."""
        if config.zero_stage:
            from ..deepspeed.extensions import ensure_extensions

            ensure_extensions(config, console)

    def init_distributed(self) -> None:
        from .start import init_distributed

        init_distributed()

    def construct(self, block: "ModelBlock", model_config: "PretrainedConfig", config: "Config") -> "nn.Module":
        from .construct import construct

        return construct(block, model_config, config)

    def build(self, config: "Config", model: "nn.Module", *, schedule: "Schedule | None") -> "MegatronTraining":
        from .build import build

        return build(config, model, schedule=schedule)


BACKEND = MegatronBackend()

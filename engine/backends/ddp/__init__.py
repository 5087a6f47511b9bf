"""Training in plain PyTorch: one process, or several under DistributedDataParallel."""

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
    from .keys import DdpKeys
    from .training import DdpTraining


class DdpBackend:
    """``"engine": "ddp"``; see :class:`narrowgauge.engine.protocol.Backend`."""

    name: ClassVar[str] = "ddp"

    @property
    def keys(self) -> "type[DdpKeys]":
        from .keys import DdpKeys

        return DdpKeys

    def check(self, config: "Config") -> None:
        from .supported import check

        check(config)

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
        return [(rank, sent(subject, world_size=world_size, steps=steps))]

    def prepare(self, config: "Config", console: "Console | None" = None) -> None:
        """Nothing is compiled."""

    def init_distributed(self) -> None:
        from .build import init_distributed

        init_distributed()

    def construct(self, block: "ModelBlock", model_config: "PretrainedConfig", config: "Config") -> "nn.Module":
        from ..model import build_model

        return build_model(block, model_config, config)

    def build(self, config: "Config", model: "nn.Module", *, schedule: "Schedule | None") -> "DdpTraining":
        from .build import build

        return build(config, model, schedule=schedule)


BACKEND = DdpBackend()

"""Building a model for DeepSpeed; at stage 3 under ``deepspeed.zero.Init``: it need not fit into one process."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations import deepspeed as transformers_deepspeed

from ...config.config import Config
from ...config.run_blocks import ModelBlock
from ..model import build_model
from .build import run_settings


def construct(block: ModelBlock, model_config: PretrainedConfig, config: Config) -> nn.Module:
    """See :meth:`narrowgauge.engine.protocol.Backend.construct`."""
    if config.zero_stage < 3:
        return build_model(block, model_config, config)
    return build_model(block, model_config, config, sharded=_zero3_construction(run_settings(config)), whole=_whole)


def _whole(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


@contextmanager
def _zero3_construction(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Tell transformers that it builds for ZeRO-3 (its own switch for this needs accelerate)."""
    switch = _Zero3Switch(deepspeed_config)
    transformers_deepspeed.set_hf_deepspeed_config(switch)
    try:
        yield
    finally:
        transformers_deepspeed.unset_hf_deepspeed_config()


class _Zero3Switch:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True

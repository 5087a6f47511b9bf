"""The configuration keys that all engines have, under DeepSpeed's names."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from .blocks import Block, Count, Flag


class OptimizerBlock(Block):
    type: str
    params: dict[str, Any] = {}
    legacy_fusion: Flag | None = None


class EngineKeys(Block):
    """What an engine's model of its keys is derived from; it gives ``bf16`` and ``zero_optimization`` their types."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    gradient_clipping: Annotated[float, Field(ge=0.0, strict=True)] = 1.0
    """Of the norm of all gradients; 0 for none. DeepSpeed (0.19) clips at 1.0 where the file says nothing."""
    optimizer: OptimizerBlock | None = None
    bf16: Any = None
    zero_optimization: Any = None

    @classmethod
    def problems_in(cls, raw: Mapping[str, Any]) -> list[str]:
        """What types cannot say of a configuration: an ``optimizer`` that is not narrowgauge's, a ``scheduler``."""
        return []

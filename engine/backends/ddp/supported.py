"""What the ``ddp`` engine refuses before anything starts."""

import warnings
from typing import Any

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer

from ...config.config import Config
from ...ranks.environment import process_rank


def check(config: Config) -> None:
    """See :meth:`narrowgauge.engine.protocol.Backend.check`."""
    problems = []
    block, options, offload = config.parsed.optimizer, config.our_params(), config.offload()
    if offload is not None and offload.backend == "aio":
        problems.append(
            "activation_offload.backend: expected auto, threads or gds with the ddp engine, got aio: it is DeepSpeed's"
        )
    if block is not None and options is not None:
        problems += [f"optimizer.params.{text}" for text in _unsupported_options(options)]
        if config.bf16 and issubclass(OPTIMIZERS[block.type], CompactOptimizer) and process_rank() == 0:
            warnings.warn(
                f"bf16.enabled: the ddp engine keeps no fp32 copies of the weights, and {block.type} steps what is"
                " trained in bf16: updates below its precision are lost; DeepSpeed's ZeRO stage 1 keeps them",
                stacklevel=2,
            )
    elif block is not None and config.bf16:
        problems.append(
            f"bf16.enabled: expected false with the ddp engine and {block.type}, got true: there are no fp32 copies of"
            " the weights, and updates below bf16's precision would be lost; use one of narrowgauge's optimizers"
        )
    if problems:
        raise config.error(*problems)


def _unsupported_options(options: Any) -> list[str]:
    found = []
    if getattr(options, "base", None) == "Adafactor":
        found.append(
            "base: expected AdamW or AdamW8bit with an engine, got Adafactor: its factors are in no checkpoint"
        )
    if getattr(options, "reduction", None) == "majority_vote":
        found.append(
            "reduction: expected 'mean' with an engine, got 'majority_vote': gradients are averaged before the"
            " optimizer sees them"
        )
    return found

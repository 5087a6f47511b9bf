"""What the ``ddp`` engine refuses before anything starts."""

import warnings

import torch

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer

from ...config.config import Config
from ...config.problems import within
from ...ranks.environment import process_rank
from .keys import torch_arguments, torch_optimizer


def check(config: Config) -> None:
    """See :meth:`narrowgauge.engine.protocol.Backend.check`."""
    problems = []
    block, options, offload = config.parsed.optimizer, config.optimizer_options, config.offload()
    if offload is not None and offload.backend == "aio":
        problems.append(
            "activation_offload.backend: expected auto, threads or gds with the ddp engine, got aio: it is DeepSpeed's"
        )
    if block is not None and options is not None:
        problems += [
            f"optimizer.params.{text}"
            for text in OPTIMIZERS[block.type].class_for(options).unsupported_in_engine(options, sharded=False)
        ]
        if config.bf16 and issubclass(OPTIMIZERS[block.type], CompactOptimizer) and process_rank() == 0:
            warnings.warn(
                f"bf16.enabled: the ddp engine keeps no fp32 copies of the weights, and {block.type} steps what is"
                " trained in bf16: updates below its precision are lost; DeepSpeed's ZeRO stage 1 keeps them",
                stacklevel=2,
            )
    elif block is not None:
        try:
            torch_optimizer(block.type)([torch.empty(0, requires_grad=True)], **torch_arguments(config))
        except (ValueError, TypeError) as error:
            problems.append(within("optimizer.params", str(error)))
        if config.bf16:
            problems.append(
                f"bf16.enabled: expected false with the ddp engine and {block.type}, got true: there are no fp32 copies"
                " of the weights, and updates below bf16's precision would be lost; use one of narrowgauge's optimizers"
            )
    if problems:
        raise config.error(*problems)

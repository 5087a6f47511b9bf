"""What is refused of ``zero_optimization`` beside ``megatron``, before anything starts. Imports neither package."""

from collections.abc import Iterator

from ....config.config import Config
from ....config.problems import unknown_names
from ..architecture import Architecture
from ..keys import ZeroBlock, megatron_block


def unsupported_settings(config: Config) -> Iterator[str]:
    """What does not go with ZeRO, ``key: why`` each; nothing where it is off."""
    if not config.zero_stage:
        return
    block, given = megatron_block(config), config.raw.get("megatron", {})
    own = f"zero_optimization.stage {config.zero_stage}"
    if block.pipeline_parallel > 1:
        yield (
            f"megatron.pipeline_parallel: expected 1 with {own}, got {block.pipeline_parallel}: DeepSpeed runs forward"
            " and backward of each micro-batch itself, and cannot take them from the schedule of a pipeline; use"
            " megatron.distributed_optimizer"
        )
    if block.context_parallel > 1:
        yield (
            f"megatron.context_parallel: expected 1 with {own}, got {block.context_parallel}: DeepSpeed would average"
            " what ranks that share a sequence must sum; use megatron.distributed_optimizer"
        )
    if given.get("distributed_optimizer"):
        yield (
            f"megatron.distributed_optimizer: expected none or false with {own}, got true: one of them shards masters"
            " and moments"
        )
    for key in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(block, key):
            yield f"megatron.{key}: expected false with {own}, got true: use zero_optimization.overlap_comm"
    keys = [key for key in config.raw["zero_optimization"] if key not in ZeroBlock.model_fields]
    yield from unknown_names("zero_optimization", "the megatron engine", keys, ZeroBlock.model_fields)
    if config.zero_stage == 3 and config.offload() is not None:
        yield (
            "activation_offload: expected none with the megatron engine at zero_optimization.stage 3, got one: the"
            " weights that backward needs are gathered again, and must not be written meanwhile; use stage 1 or 2"
        )


def unsupported_model(config: Config, architecture: Architecture) -> Iterator[str]:
    """What of a model does not go with ZeRO."""
    if config.zero_stage and architecture.num_experts:
        yield (
            f"zero_optimization.stage: expected 0 for a model with experts, got {config.zero_stage}: DeepSpeed reduces"
            " their gradients over the ranks that share the data, not over those with the same experts; use"
            " megatron.distributed_optimizer"
        )

"""A tensor-parallel model under ZeRO from a configuration."""

from typing import Any

import torch

from ....config.config import Config
from ....protocol import Schedule
from ...deepspeed.model_parallel import gather_bit16, make_model_parallel
from ..draw import shapes_of
from ..model import StagedModel
from ..offload import make_scheduled
from ..own_part import Made
from .backend import ZeroCompactPart
from .masters import ZeroMasters
from .mpu import TensorParallel, seen_in_parts, sum_over_tensor_parallel_ranks
from .training import ZeroTraining


def build_under_zero(
    config: Config, model: StagedModel, optimizer: torch.optim.Optimizer, made: Made | None, schedule: Schedule | None
) -> ZeroTraining:
    """As :func:`..build.build`, at ``zero_optimization.stage`` 1, 2 or 3. Collective.

    Args:
        optimizer: made from the model's parameters.
        made: where it is a compact one.

    Raises:
        ConfigError: DeepSpeed refuses a setting.
    """
    (chunk,) = model.chunks
    batches, masters = config.batches(model.layout.data), ZeroMasters()
    compact = ZeroCompactPart(made, masters) if made is not None else None
    sum_over_tensor_parallel_ranks(seen_in_parts(model))
    settings: dict[str, Any] = {
        "zero_optimization": config.raw["zero_optimization"],
        "bf16": {"enabled": config.bf16},
        "gradient_clipping": config.parsed.gradient_clipping,
        "train_batch_size": batches.total,
        "train_micro_batch_size_per_gpu": batches.micro,
        "gradient_accumulation_steps": batches.accumulation_steps,
        "steps_per_print": 1 << 62,
    }
    try:
        zero = make_model_parallel(chunk, optimizer, settings, mpu=TensorParallel(), schedule=schedule)
    except (AssertionError, TypeError) as error:
        raise config.error(f"refused by DeepSpeed: {error}").shared() from error
    named = dict(chunk.named_parameters())
    wrapper = zero.engine.optimizer
    shards = [(named[shard.name], shard) for shard in zero.shards()]
    masters.bind(shards, lambda: gather_bit16(wrapper) if zero.zero_stage < 3 else None)
    if compact is not None:
        compact.engine_is_made(wrapper, stage=zero.zero_stage)
    return ZeroTraining(
        model,
        zero,
        masters,
        shapes=shapes_of(model.config),
        batches=batches,
        offload=make_scheduled(config, model, batches.accumulation_steps),
        compact=compact,
    )

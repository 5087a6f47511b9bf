"""Building a process rank's part of a model, with its first weights."""

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ...config.config import Config
from ...config.run_blocks import ModelBlock
from . import cpu
from .architecture import architecture_of
from .first_values import fill_with_first_values
from .groups import make_groups
from .kernels import kernels_of
from .keys import layout_of, megatron_block
from .model import StagedModel, transformer_config


def construct(block: ModelBlock, model_config: PretrainedConfig, config: Config) -> StagedModel:
    """See :meth:`narrowgauge.engine.protocol.Backend.construct`. Collective."""
    cpu.install()
    layout = layout_of(config, dist.get_world_size())
    data, training = config.parsed.data, config.parsed.training
    seed = training.seed if training is not None else 0
    place = make_groups(layout, derive_seed(seed, "megatron") % 2**31)
    model_config.use_cache = False
    sequence_length = data.sequence_length if data is not None else model_config.max_position_embeddings
    architecture = architecture_of(model_config, sequence_length)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    transformer = transformer_config(architecture, layout, megatron_block(config), dtype)
    model = StagedModel(
        model_config,
        architecture,
        layout,
        place,
        transformer,
        sequence_length,
        megatron_block(config).balance_loss,
        kernels_of(config),
    )
    fill_with_first_values(model, block, config)
    model.train()
    return model

"""What each process rank of a layout would hold: its model, built on the meta device in a group of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from ...config.config import Config
from ...protocol import HeldByRank
from . import cpu
from .architecture import architecture_of
from .even_experts import even_settings
from .groups import destroy_groups, make_groups
from .keys import layout_of, megatron_block
from .model import StagedModel, transformer_config

_FP32 = 4


def rehearse(config: Config, model_config: PretrainedConfig, world_size: int) -> list[HeldByRank]:
    """See :meth:`narrowgauge.engine.protocol.Backend.rehearse`; one entry for each stage of the pipeline."""
    layout = layout_of(config, world_size)
    cpu.install()
    found = []
    size = layout.tensor * layout.replicas
    for stage in range(layout.pipeline):
        first = stage * size
        with group_of(first, world_size):
            model = build_abstract(config, model_config, world_size)
            found.append(_held(model, config, f"{first}-{first + size - 1}" if size > 1 else str(first)))
            destroy_groups()
    return found


@contextmanager
def group_of(process_rank: int, world_size: int) -> Iterator[None]:
    """A process group whose other members do not exist: its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=process_rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_abstract(
    config: Config, model_config: PretrainedConfig, world_size: int, *, even: bool = False
) -> StagedModel:
    """A process rank's part of a model, without storage.

    Args:
        even: experts take equal shares, see :mod:`.even_experts`.
    """
    layout, data = layout_of(config, world_size), config.parsed.data
    sequence_length = data.sequence_length if data is not None else model_config.max_position_embeddings
    place = make_groups(layout, seed=0)
    architecture = architecture_of(model_config, sequence_length)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    block = megatron_block(config)
    transformer = transformer_config(architecture, layout, block, dtype)
    if even and architecture.num_experts:
        transformer = replace(transformer, **even_settings(block))
    with torch.device("meta"):
        return StagedModel(model_config, architecture, layout, place, transformer, sequence_length, block.balance_loss)


def _held(model: StagedModel, config: Config, process_ranks: str) -> HeldByRank:
    layout, stage = model.layout, config.zero_stage
    distributed = stage > 0 or megatron_block(config).distributed_optimizer
    parameters = shares = size = 0
    for parameter, tensor in model.local_parameters():
        copies = layout.expert_data if parameter.is_expert and layout.splits_experts else layout.replicas
        parameters, size = parameters + tensor.numel(), size + tensor.nbytes
        shares += -(-tensor.numel() // copies) if distributed else tensor.numel()
    if stage == 3:
        size = -(-size // layout.data)
    if config.optimizer_options is not None:
        # What a compact optimizer trains is known when its layers are.
        return HeldByRank(process_ranks, what_of(model), parameters, {"parameters": size})
    # DeepSpeed's gradients are as wide as the parameters, and have shares of their own from stage 2; its masters are
    # copies in fp32, too, until stage 3.
    element = (2 if config.bf16 else _FP32) if stage else _FP32
    sizes = {
        "parameters": size,
        "gradients": element * (shares if stage > 1 else parameters),
        "masters": _FP32 * shares if config.bf16 or stage in (1, 2) else 0,
        "moments": 2 * _FP32 * shares,
    }
    return HeldByRank(process_ranks, what_of(model), parameters, sizes)


def what_of(model: StagedModel) -> str:
    layout, place, parts = model.layout, model.place, []
    for chunk in range(layout.chunks):
        layers = layout.layers_of(place, chunk, model.architecture.num_layers)
        parts += ["embedding"] if layout.is_first(place, chunk) else []
        parts.append(f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
        parts += ["head"] if layout.is_last(place, chunk) else []
    return ", ".join(parts)

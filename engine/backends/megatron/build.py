"""A run's ``megatron`` engine from its configuration."""

import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn

from narrowgauge.optimizers import CompactOptimizer

from ...config.config import Config
from ...config.without_deepspeed import adam_arguments
from ...protocol import Schedule
from ...ranks.environment import process_rank
from .compact.engine_part import CompactPart
from .draw import shapes_of
from .fused_adam import fused_adamw, stepped_by
from .keys import megatron_block
from .masters import Masters
from .model import StagedModel
from .offload import make_scheduled
from .own_part import Made, OwnPart, make_own
from .start import device
from .training import MegatronTraining
from .whole_gradients import WholeGradientsPart


def build(config: Config, model: nn.Module, *, schedule: Schedule | None) -> MegatronTraining:
    """See :meth:`narrowgauge.engine.protocol.Backend.build`."""
    assert isinstance(model, StagedModel)
    block = megatron_block(config)
    model.to(device())
    made = make_own(config, model) if config.optimizer_options is not None else None
    optimizer = made.optimizer if made is not None else _make_optimizer(config, model)
    if config.zero_stage:
        from .zero.build import build_under_zero  # what is DeepSpeed's is imported where it is used

        return build_under_zero(config, model, optimizer, made, schedule)
    chunks = _wrap(model, config)
    masters = Masters(chunks, distributed=block.distributed_optimizer, bf16=config.bf16)
    own = _own_part(made, masters, overlaps=block.overlap_param_gather) if made is not None else None
    masters.take_over(optimizer)
    batches = config.batches(model.layout.data)
    return MegatronTraining(
        model,
        chunks,
        masters,
        optimizer,
        shapes=shapes_of(model.config),
        lr_scheduler=schedule(optimizer) if schedule is not None else None,
        batches=batches,
        gradient_clipping=config.parsed.gradient_clipping,
        distributed=block.distributed_optimizer,
        offload=make_scheduled(config, model, batches.accumulation_steps),
        own=own,
    )


def _own_part(made: Made, masters: Masters, *, overlaps: bool) -> OwnPart:
    is_compact = isinstance(made.optimizer, CompactOptimizer)
    return CompactPart(made, masters, overlaps=overlaps) if is_compact else WholeGradientsPart(made)


def _wrap(model: StagedModel, config: Config) -> list[DistributedDataParallel]:
    block, transformer = megatron_block(config), model.transformer
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=block.distributed_optimizer,
        overlap_grad_reduce=block.overlap_grad_reduce,
        overlap_param_gather=block.overlap_param_gather,
    )
    # Only the first chunk's gradients are waited for one after the other.
    chunks = [
        DistributedDataParallel(transformer, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.chunks)
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    if block.overlap_grad_reduce:
        waiting: Any = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = waiting if len(chunks) > 1 else waiting[0]
    return chunks


def _make_optimizer(config: Config, model: StagedModel) -> torch.optim.Optimizer:
    block = config.parsed.optimizer
    if block is None:
        raise config.error("optimizer: expected this block, got none")
    if config.unused_params() and process_rank() == 0:
        warnings.warn(config.unused_params_note(), stacklevel=2)
    arguments = config.engine_settings()["optimizer"].get("params", {})
    trainable = [p for p in model.parameters() if p.requires_grad]
    by = None if config.zero_stage else stepped_by(arguments, on_gpu=torch.cuda.is_available())
    if by is None:
        return torch.optim.AdamW(trainable, **adam_arguments(arguments))
    try:
        return fused_adamw(trainable, adam_arguments(arguments), by=by)
    except (ImportError, RuntimeError) as error:
        raise config.error(
            f"optimizer.type: expected {by}'s FusedAdam for AdamW, got {type(error).__name__}: {error}; with"
            " optimizer.params.torch_adam PyTorch's steps"
        ) from error

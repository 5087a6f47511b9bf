"""ZeRO around what a process rank holds of a model that is cut: DeepSpeed shards it over the data-parallel ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from .gradients import mend_updates
from .initialize import init_distributed
from .keys import FORCED
from .privates import (
    configure_python_gc,
    flat_bit16,
    forget_autocast,
    keep_autocast,
    own_shard,
)
from .training import DeepSpeedTraining


class ModelParallel(Protocol):
    """What DeepSpeed asks of an ``mpu``: who shares the model, and who shares the data."""

    def get_model_parallel_rank(self) -> int: ...
    def get_model_parallel_world_size(self) -> int: ...
    def get_model_parallel_group(self) -> Any: ...
    def get_data_parallel_rank(self) -> int: ...
    def get_data_parallel_world_size(self) -> int: ...
    def get_data_parallel_group(self) -> Any: ...


def make_model_parallel(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    *,
    mpu: ModelParallel,
    schedule: Callable[[torch.optim.Optimizer], Any] | None,
) -> DeepSpeedTraining:
    """An engine at ZeRO stage 1, 2 or 3. Collective.

    Parameters that are cut over the model-parallel ranks have ``tensor_model_parallel`` set: the others count once in
    the norm of the gradients.

    Args:
        settings: DeepSpeed's, with all batch sizes.

    Raises:
        AssertionError, TypeError: DeepSpeed refuses a setting.
    """
    settings = {**settings, **FORCED}
    init_distributed()
    forget_autocast()
    engine = DeepSpeedEngine(
        args=None,
        model=module,
        optimizer=optimizer,
        lr_scheduler=schedule,
        mpu=mpu,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
    )
    configure_python_gc(engine)
    keep_autocast(engine)
    mend_updates(engine)
    return DeepSpeedTraining(engine)


def gather_bit16(wrapper: Any) -> None:
    """Gather the parameters of ZeRO-1 and 2 from the pieces that each rank holds. Collective."""
    for flat, pieces, group in zip(*flat_bit16(wrapper), wrapper.real_dp_process_group, strict=True):
        comm.all_gather_into_tensor(flat, pieces[comm.get_rank(group)].clone(), group=group)


@contextmanager
def whole(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that ZeRO-3 has cut are whole inside, to read. Collective over the data-parallel ranks."""
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


@contextmanager
def rewritten(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that ZeRO-3 has cut are whole inside, and all ranks write the same to them, which their shards and
    masters take over. Collective over the data-parallel ranks.
    """
    with whole(parameters):
        yield
        for parameter in parameters:
            take_values(parameter, parameter.detach())


def take_values(parameter: Any, values: Tensor) -> None:
    """Make this rank's shard of a parameter, and its master, a copy of whole values."""
    shard, start = own_shard(parameter)
    shard.copy_(values.reshape(-1).narrow(0, min(start, parameter.ds_numel), shard.numel()))
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, parameter.ds_tensor)


def master_shard(parameter: Any) -> Tensor:
    """This rank's shard of a parameter's fp32 master, without padding, on the parameter's device."""
    shard, _ = own_shard(parameter)
    return safe_get_local_fp32_param(parameter).to(shard.device).narrow(0, 0, shard.numel())


def gathered_shards(parameter: Any) -> Tensor:
    """All ranks' shards of a parameter, flat and whole. Collective over the data-parallel ranks."""
    shard, group = parameter.ds_tensor, parameter.ds_process_group
    flat = shard.new_empty(shard.numel() * comm.get_world_size(group))
    comm.all_gather_into_tensor(flat, shard.contiguous(), group=group)
    return flat.narrow(0, 0, parameter.ds_numel)

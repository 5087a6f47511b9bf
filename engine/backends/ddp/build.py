"""A run's ``ddp`` engine from its configuration."""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from narrowgauge.optimizers.compact.backend import LocalBackend
from narrowgauge.optimizers.sharding.communicator import one_for_all

from ...config.config import Config
from ...config.optimizer_params import make_optimizer
from ...config.problems import within
from ...offload.attach import make_offload_together
from ...protocol import Schedule
from ...ranks.agreement import make_process_group
from ...ranks.environment import process_rank, world_size
from ..matrix_groups import matrix_groups
from .keys import torch_arguments, torch_optimizer
from .traffic import CountedCommunicator, DdpTraffic
from .training import DdpTraining

_TIMEOUT = timedelta(minutes=30)


def init_distributed() -> None:
    """Make the process group, if there is none: NCCL on the GPU of this process's local rank, or gloo."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_device())
    backend = "nccl" if on_gpu else "gloo"
    make_process_group(backend, _TIMEOUT)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=_TIMEOUT)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build(config: Config, model: nn.Module, *, schedule: Schedule | None) -> DdpTraining:
    """See :meth:`narrowgauge.engine.protocol.Backend.build`."""
    model.to(_device())
    traffic = DdpTraffic()
    optimizer = _make_optimizer(config, model, traffic)
    # What ``auto`` would try beside threads and GPUDirect is DeepSpeed's.
    offload = make_offload_together(config, model, auto="threads")
    return DdpTraining(
        model,
        optimizer,
        traffic,
        lr_scheduler=schedule(optimizer) if schedule is not None else None,
        batches=config.batches(world_size()),
        gradient_clipping=config.parsed.gradient_clipping,
        offload=offload,
    )


def _make_optimizer(config: Config, model: nn.Module, traffic: DdpTraffic) -> torch.optim.Optimizer:
    block, options = config.parsed.optimizer, config.optimizer_options
    if block is None:
        raise config.error("optimizer: expected this block, got none")
    try:
        if options is not None:
            backend = LocalBackend(one_for_all(CountedCommunicator(traffic)))
            return make_optimizer(block.type, model, options, backend)
        if config.unused_params() and process_rank() == 0:
            warnings.warn(config.unused_params_note(), stacklevel=2)
        kind, arguments = torch_optimizer(block.type), torch_arguments(config)
        if config.matrix_factor != 1.0:
            return kind(matrix_groups(model, arguments, config.matrix_factor), **arguments)
        return kind([p for p in model.parameters() if p.requires_grad], **arguments)
    except (ValueError, TypeError) as error:
        raise config.error(within("optimizer.params", str(error))) from error

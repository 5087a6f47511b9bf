"""The process group, and Megatron made ready for the device."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from ...ranks.agreement import make_process_group
from . import cpu

_TIMEOUT = timedelta(minutes=30)


def init_distributed() -> None:
    """Make the process group, if there is none: NCCL on the GPU of this process's local rank, or gloo."""
    cpu.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device())
        # Megatron counts on kernels starting in the order they were asked for.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    backend = "nccl" if on_gpu else "gloo"
    make_process_group(backend, _TIMEOUT)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=_TIMEOUT)


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

"""gloo's groups of a process on one device: each has one of its own else, whose thread wakes 100 times a second."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_THREADS = 2  # of a group, as PyTorch has it


def share_device() -> None:
    """Groups that this process makes from now on share a device. Before the first, and after any fork."""
    own: Any = dist.ProcessGroupGloo
    device = own.create_default_device()

    class SharedDevice(own):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = own._Options()
            options._devices, options._threads, options._timeout = [device], _THREADS, timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevice  # pyright: ignore[reportPrivateImportUsage]

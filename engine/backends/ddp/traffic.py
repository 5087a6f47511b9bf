"""Bytes a process rank sends under DistributedDataParallel; see :mod:`narrowgauge.engine.report.dense_traffic`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from narrowgauge.optimizers.sharding.communicator import GroupCommunicator

from ...report.phases import named


class DdpTraffic:
    """Counts the all-reduces of gradients and of what compact optimizers observe, while attached.

    Attributes:
        reduced: bytes this rank sent in reductions.
        gathered: 0; nothing is gathered.
        activations: None: ranks share no layer.
    """

    def __init__(self) -> None:
        self.reduced = self.gathered = 0.0
        self.activations: float | None = None
        self._attached = False

    def attach(self) -> None:
        self._attached = True

    def detach(self) -> None:
        self._attached = False

    def count_all_reduce(self, num_bytes: int) -> None:
        if self._attached:
            size = dist.get_world_size()
            self.reduced += 2 * (size - 1) / size * num_bytes

    def reduce_bucket(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage] (torch compares the annotation)
        """A communication hook: the default one, counted."""
        self.count_all_reduce(bucket.buffer().nbytes)
        with named("reduce"):
            return allreduce_hook(group, bucket)


class CountedCommunicator(GroupCommunicator):
    """All process ranks; what is averaged over them is counted."""

    def __init__(self, traffic: DdpTraffic) -> None:
        super().__init__()
        self._traffic = traffic

    def average_(self, tensor: Tensor) -> Tensor:
        self._traffic.count_all_reduce(tensor.nbytes)
        with named("reduce"):
            return super().average_(tensor)

"""Bytes a process rank sends to reduce gradients and to gather parameters, counted on Megatron's buckets; and those of
activations, between ranks that share layers, experts or a pipeline, counted in one step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from ...report.collectives import CountedCollectives
from ...report.dense_traffic import reduce_scatter_factor
from ...report.phases import named


class MegatronTraffic:
    """Counts while attached.

    Attributes:
        reduced: bytes this rank sent in reductions of gradients.
        gathered: bytes this rank sent in gathers of parameters.
        activations: bytes this rank sent in the forwards and backwards of the first step, other than these; None before
            its end.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self.reduced = self.gathered = 0.0
        self.activations: float | None = None
        self._chunks, self._attached = chunks, False
        for group in self._groups():
            self._count(group)

    def attach(self) -> None:
        self._attached = True

    def detach(self) -> None:
        self._attached = False

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Around the forwards and backwards of a step. Every operation of the first is looked at: it takes longer."""
        if not self._attached or self.activations is not None:
            yield
            return
        counted = CountedCollectives(scatter_factor=reduce_scatter_factor(), leave_out=[*_data_parallel_groups()])
        with counted:
            yield
        self.activations = counted.sent

    def _groups(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from chunk.bucket_groups
            yield from chunk.expert_parallel_bucket_groups

    def _count(self, group: Any) -> None:
        reduce, gather = group.start_grad_sync, group.start_param_sync

        def counted_reduce(*args: Any, **kwargs: Any) -> None:
            before = group.grad_reduce_handle
            with named("reduce"):
                reduce(*args, **kwargs)
            # In the first step a bucket is asked twice and goes once.
            if self._attached and before is None:
                self.reduced += reduced_bytes(group)

        def counted_gather(force_sync: bool = False) -> None:
            waits = force_sync and group.param_gather_handle is not None
            with named("gather"):
                gather(force_sync=force_sync)
            if self._attached and not waits:
                self.gathered += gathered_bytes(group)

        group.start_grad_sync, group.start_param_sync = counted_reduce, counted_gather


def _data_parallel_groups() -> Iterator[Any]:
    """Those that average gradients, and gather parameters."""
    yield parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
    yield parallel_state.get_data_parallel_group(with_context_parallel=True)
    yield parallel_state.get_data_parallel_group()
    yield parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True)
    yield parallel_state.get_expert_data_parallel_group()


def reduced_bytes(group: Any) -> float:
    """What a rank sends to reduce the gradients of a group of buckets once."""
    size = _size(group)
    rings = reduce_scatter_factor() if group.ddp_config.use_distributed_optimizer else 2.0
    return rings * (size - 1) / size * sum(bucket.grad_data.nbytes for bucket in group.buckets)


def gathered_bytes(group: Any) -> float:
    """What a rank sends to gather the parameters of a group of buckets once."""
    size = _size(group)
    return (size - 1) / size * sum(bucket.param_data.nbytes for bucket in group.buckets)


def _size(group: Any) -> int:
    if group.ddp_config.use_distributed_optimizer:
        return group.intra_distributed_optimizer_instance_size
    return group.data_parallel_group.size()

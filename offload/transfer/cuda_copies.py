"""Copies of records between a device and host buffers, on streams that wait for nothing else.

A CPU tensor's "device" is the host: then staging is a plain copy, and what is read back is the buffer itself.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ..storage.level import Level
from .buffers import Lent
from .counters import Counters
from .record import Record


def bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    """A storage as a uint8 tensor on its device."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # pyright: ignore


class CudaCopies:
    """Two streams a device, one for each direction, and the count of what was brought back.

    Attributes:
        loaded: bytes of device memory that hold what was read back.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters, self.loaded = counters, Level()
        self._streams: dict[torch.device, tuple[Any, Any]] = {}

    def mark_ready(self, record: Record) -> None:
        """Note the point of the current stream from which on a record's bytes may be copied."""
        if record.device.type == "cuda":
            self._streams_of(record.device)
            record.ready = torch.cuda.Event()
            record.ready.record(torch.cuda.current_stream(record.device))

    def stage(self, record: Record, storage: UntypedStorage, host: Lent) -> None:
        """Copy a storage into a host buffer, and wait until it is there."""
        source = bytes_of(storage, record.device)
        target = host.tensor(0, record.nbytes)
        if record.device.type == "cpu":
            target.copy_(source)
            return
        assert record.ready is not None
        copy_out, _ = self._streams_of(record.device)
        with torch.cuda.device(record.device), torch.cuda.stream(copy_out):
            copy_out.wait_event(record.ready)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(copy_out)
        # Neither the tensor's memory nor the buffer may be used again before.
        done.synchronize()

    def new_memory(self, record: Record) -> Tensor:
        """Device memory of a record's size that a disk may write to; not counted yet."""
        # Of the copy-in stream's memory, and after the kernels that used it last: the disk knows of no streams.
        _, copy_in = self._streams_of(record.device)
        with torch.cuda.device(record.device), torch.cuda.stream(copy_in):
            memory = torch.empty(record.nbytes, dtype=torch.uint8, device=record.device)
        copy_in.synchronize()
        return memory

    def from_host(self, record: Record, host: Lent) -> UntypedStorage:
        """A record's bytes from a buffer: the buffer itself for a CPU tensor, a copy for a CUDA one."""
        if record.device.type == "cpu":
            return host.tensor(record.delta, record.nbytes).untyped_storage()
        _, copy_in = self._streams_of(record.device)
        with torch.cuda.device(record.device), torch.cuda.stream(copy_in):
            memory = torch.empty(record.nbytes, dtype=torch.uint8, device=record.device)
            memory.copy_(host.tensor(record.delta, record.nbytes), non_blocking=True)
            done = torch.cuda.Event()
            done.record(copy_in)
        done.synchronize()
        self.count(memory.untyped_storage(), record.nbytes)
        return memory.untyped_storage()

    def count(self, storage: UntypedStorage, nbytes: int) -> None:
        """Count device memory that was read back, until it dies."""
        for level in (self.loaded, self._counters.resident):
            level.add(nbytes)
            self._counters.deaths.watch(storage, partial(level.add, -nbytes))

    def on_current_stream(self, record: Record, storage: UntypedStorage) -> UntypedStorage:
        """Memory that was allocated for the copy-in stream must outlive its use by the stream that asks for it."""
        if record.device.type == "cuda" and record.load:
            bytes_of(storage, record.device).record_stream(torch.cuda.current_stream(record.device))
        return storage

    def _streams_of(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

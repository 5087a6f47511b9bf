"""Moves records to disk and back.

Two kinds of threads meet here. The *users'* threads run forward and backward; autograd may run several of them. The
*lanes* carry out transfers. Which of them writes which field:

=========================  ==============================  ==========================================================
object                     fields                          written by
=========================  ==============================  ==========================================================
:class:`Transport`         ``_window``, ``_closed``        users' threads
:class:`.writes.Writes`    ``given_up``, its row of        lanes
                           failures
:class:`.record.Record`    ``ready``, ``write_transfer``,  users' threads, before the record's write is queued
                           ``slot``
..                         ``pinned``, ``handles``,        users' threads
                           ``unpacked``
..                         ``read_transfer``               users' threads; a lane clears it when the bytes are there
..                         ``host``, ``extent``,           the lane that writes; ``extent`` after ``delta`` and
                           ``delta``, ``checksum``         ``checksum``, and before the memory is given up
..                         ``storage``, ``storage_ref``,   the lane that writes or reads; users' threads when they take
                           ``load``                        bytes out of ``host`` or need them no longer
:class:`.counters`         levels, meters                  both, under locks of their own
..                         ``stall``, ``forwarded``        users' threads
..                         ``failed_writes``, ``full``     lanes
:class:`.buffers`          everything                      both, under the pool's lock
:class:`.cuda_copies`      ``_streams``                    users' threads, when a record is offloaded
=========================  ==============================  ==========================================================

``Transfer.claim`` decides who has a queued transfer: a lane that begins it, or the backward that calls it off.
"""

import time
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import UntypedStorage

from ..backends.base import IOBackend
from ..errors import OffloadError, OffloadIOError
from ..storage.deaths import Deaths
from ..storage.level import Level
from ..storage.slab import ALIGNMENT, SlabStore
from .buffers import BufferPool
from .counters import Counters
from .cuda_copies import CudaCopies
from .lanes import Lanes, Transfer
from .reads import Reads
from .record import Record
from .writes import Writes

_FIRST_WINDOW = 64 << 20


class Transport:
    """The machine below the hooks, as forward and backward see it: they offload, read ahead and fetch records."""

    def __init__(
        self,
        backend: IOBackend,
        store: SlabStore,
        *,
        num_lanes: int,
        buffer_bytes: int | None,
        host_memory_bytes: int,
        io_timeout: float,
    ) -> None:
        self.backend, self.store, self.counters = backend, store, Counters()
        self._timeout, self._fixed_window = io_timeout, buffer_bytes
        self._window = buffer_bytes if buffer_bytes is not None else _FIRST_WINDOW
        tokens: SimpleQueue[Any] = SimpleQueue()
        # Where there is a GPU, its memory is what is counted, not the host's.
        counted = partial(_count, self.counters.deaths, self.counters.resident)
        on_change = (lambda _: None) if torch.cuda.is_available() else counted
        self._pool = BufferPool(backend, self._window, on_change=on_change, on_return=tokens.put)
        self._host_tier = BufferPool(backend, host_memory_bytes, on_change=on_change, on_return=None)
        self._copies = CudaCopies(self.counters)
        self._reads = Reads(self._copies, self.counters)
        self._writes = Writes(
            backend,
            store,
            pool=self._pool,
            host_tier=self._host_tier,
            copies=self._copies,
            counters=self.counters,
        )
        self._lanes = Lanes(backend, num_lanes, tokens, self._pool.count_returns)
        self._closed = False
        # Not before the last transfer is gone, whatever became of the object that the user had: each refers to self.
        self._unclosed = weakref.finalize(self, _abandon, self._lanes, (self._pool, self._host_tier), store)
        self._unclosed.atexit = False

    @property
    def name(self) -> str:
        """Of the I/O backend."""
        return self.backend.name

    @property
    def capacity(self) -> int:
        """Bytes of the slab."""
        return self.store.capacity

    def settle(self) -> None:
        """Count what died since the last time."""
        self.counters.deaths.settle()
        self._pool.settle()
        self._host_tier.settle()

    def set_window(self, nbytes: int) -> None:
        """Read ahead by this much from now on, unless a size was given."""
        if self._fixed_window is None:
            self._window = nbytes
            # Pinned buffers for writing take nothing of the GPU's memory.
            self._pool.budget = max(nbytes, _FIRST_WINDOW) if torch.cuda.is_available() else nbytes

    def offload(self, record: Record) -> None:
        """Begin to write a record; its memory is given up when the bytes are elsewhere."""
        if self._closed or self._writes.given_up:
            return
        self._copies.mark_ready(record)
        record.footprint.add(self.counters.offered, record.nbytes + ALIGNMENT)
        reference = weakref.ref(record)
        record.write_transfer = Transfer(lambda lane: self._writes.write(reference, lane))
        self._lanes.write(record.write_transfer)

    def prefetch(self, record: Record) -> bool:
        """See to it that a record is or will be in memory; False if there is no buffer for it."""
        if self._closed:
            return False
        if record.storage is not None:
            if record.load == 0:
                record.call_off_write()
            if record.storage is not None:
                return True
        if record.in_memory() is not None or record.read_transfer is not None or record.extent is None:
            return True
        return self._start_read(record, urgent=False) is not None

    def fetch(self, record: Record) -> UntypedStorage:
        """A record's bytes, on its device.

        Raises:
            OffloadIOError: they cannot be read, or not within the time limit.
            OffloadCorruptionError: other bytes were read.
        """
        while True:
            storage = record.in_memory()
            if storage is not None:
                if record.load == 0:
                    record.call_off_write()
                return self._copies.on_current_stream(record, storage)
            host = record.host
            if host is not None:
                record.take_storage(self._copies.from_host(record, host))
                continue
            self._wait_for_read(record)

    def _wait_for_read(self, record: Record) -> None:
        if self._closed:
            raise OffloadError("activation offload was closed before backward was done; its bytes are gone")
        transfer = record.read_transfer
        if transfer is None and record.storage is not None:
            # Reading ahead was done just now.
            return
        if transfer is None or transfer.error is not None:
            # What failed while reading ahead, perhaps long ago, is tried again.
            transfer = self._start_read(record, urgent=True)
        assert transfer is not None
        if not transfer.is_done:
            self._lanes.hurry(transfer)
            began = time.perf_counter()
            answered = transfer.wait(self._timeout)
            waited = time.perf_counter() - began
            self.counters.stall += waited
            record.waited += waited
            if not answered:
                raise OffloadIOError(
                    f"{record.place}: no answer to a read of {record.nbytes:,} bytes within {self._timeout:g} s"
                )
        if transfer.error is None:
            return
        record.read_transfer = None
        if isinstance(transfer.error, OffloadError):
            # Not the same object: its traceback would refer to this frame, and so to itself and to the buffers.
            raise type(transfer.error)(*transfer.error.args)
        message = f"{record.place}: cannot read {record.nbytes:,} bytes back: {transfer.error}"
        raise OffloadIOError(message) from transfer.error

    def _start_read(self, record: Record, *, urgent: bool) -> Transfer | None:
        extent = record.extent
        assert extent is not None
        device_direct = record.device.type == "cuda" and self.backend.moves_device_memory and record.whole
        loaded = self._copies.loaded.now
        full = loaded > 0 and loaded + record.nbytes > self._window
        if record.device.type == "cuda" and full and not urgent:
            return None
        try:
            buffer = None if device_direct else self._pool.lend(extent.nbytes, force=urgent)
        except (MemoryError, RuntimeError):
            if urgent:
                raise
            return None
        if buffer is None and not device_direct:
            return None
        reference = weakref.ref(record)
        transfer = record.read_transfer = Transfer(lambda lane: self._reads.read(reference, buffer, lane))
        self._lanes.read(transfer, urgent=urgent)
        return transfer

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host buffers over which tensors are alive."""
        return self._pool.lent_bytes() + self._host_tier.lent_bytes()

    @property
    def lanes_alive(self) -> int:
        """Threads that have not ended."""
        return self._lanes.alive

    @property
    def lanes_busy(self) -> int:
        """Threads that are carrying out transfers, or letting go of the last one."""
        return self._lanes.busy

    def close(self) -> None:
        """Stop the lanes and give back the slab and the buffers."""
        if not self._closed:
            self._closed = True
            ended = False
            try:
                ended = self._lanes.close(self._timeout)
            finally:
                # Also after Ctrl-C while a disk does not answer.
                self._unclosed.detach()
                self._pool.close()
                self._host_tier.close()
                self.store.close(in_use=not ended)


def _count(deaths: Deaths, level: Level, nbytes: int) -> None:
    # What died first, or the peak would be too high.
    deaths.settle()
    level.add(nbytes)


def _abandon(lanes: Lanes, pools: Sequence[BufferPool], store: SlabStore) -> None:
    folders = ", ".join(str(file.folder) for file in store.files)
    lanes.abandon()
    for pool in pools:
        pool.close()
    store.close()
    # Last, as it may be made an error.
    warnings.warn(f"{folders}: an ActivationOffload was not closed", ResourceWarning, stacklevel=2)

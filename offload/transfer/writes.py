"""Writing records: what a lane does to bring a record's bytes elsewhere and give its memory up."""

import ctypes
import logging
import warnings
import weakref

import torch
from torch import Tensor, UntypedStorage

from ..backends.base import IOBackend, Lane
from ..storage.filesystem import filesystem_type
from ..storage.slab import ALIGNMENT, Extent, SlabStore, round_up
from .buffers import BufferPool, Lent
from .checksums import checksum
from .counters import Counters
from .cuda_copies import CudaCopies, bytes_of
from .record import Record

# Writing memory to disk while neighbouring bytes of the same page change is safe where the filesystem keeps no
# checksums of its own.
_IN_PLACE_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs")
_MAX_FAILED_WRITES = 8
_log = logging.getLogger(__name__)


class Writes:
    """The lanes' side of :meth:`.transport.Transport.offload`.

    Attributes:
        given_up: too many writes failed in a row; nothing more is to be written.
    """

    def __init__(
        self,
        backend: IOBackend,
        store: SlabStore,
        *,
        pool: BufferPool,
        host_tier: BufferPool,
        copies: CudaCopies,
        counters: Counters,
    ) -> None:
        self._backend, self._store, self._pool, self._host_tier = backend, store, pool, host_tier
        self._copies, self._counters = copies, counters
        self._in_place = backend.writes_in_place and all(
            filesystem_type(file.folder) in _IN_PLACE_FILESYSTEMS for file in store.files
        )
        self._failed_in_a_row, self.given_up = 0, False

    def write(self, reference: "weakref.ref[Record]", lane: Lane) -> bool:
        """Bring a record's bytes to the host tier or to disk; False while there is no buffer for it."""
        record = reference()
        storage = record.storage if record is not None else None
        if record is None or storage is None or record.pinned:
            return True
        if record.changed:
            # Backward will raise; nobody needs these bytes.
            record.give_up_storage()
            return True
        fits = round_up(record.nbytes) <= self._host_tier.budget
        try:
            host = self._host_tier.lend(round_up(record.nbytes)) if fits else None
        except (MemoryError, RuntimeError) as error:
            self._note_failure(record, "activation offload", error, is_of_disk=False)
            return True
        if host is not None:
            self._copies.stage(record, storage, host)
            record.host = host
            _let_go(record)
            return True
        direct = self._in_place if record.device.type == "cpu" else self._backend.moves_device_memory
        direct = direct and record.whole
        address = storage.data_ptr()
        delta = address % ALIGNMENT if direct and record.device.type == "cpu" else 0
        length = round_up(delta + record.nbytes)
        if not direct:
            try:
                host = self._pool.lend(length)
            except (MemoryError, RuntimeError) as error:
                self._note_failure(record, "activation offload", error, is_of_disk=False)
                return True
            if host is None:
                return False
        extent = self._store.allocate(length)
        if extent is None:
            self._note_full(record)
            return True
        try:
            if host is not None:
                self._copies.stage(record, storage, host)
                # Should the write fail, the buffer has the bytes. This frame must not hold the memory meanwhile.
                record.host = host
                _let_go(record)
                storage = None
            self._write_bytes(record, storage, host, extent, delta, lane)
            self._failed_in_a_row = 0
        except Exception as error:
            self._note_failure(record, extent.place, error)
        return True

    def _write_bytes(
        self, record: Record, storage: UntypedStorage | None, host: Lent | None, extent: Extent, delta: int, lane: Lane
    ) -> None:
        if storage is None:
            assert host is not None
            memory = host.tensor()
        elif record.device.type == "cpu":
            memory = _pages_around(storage, delta, extent.nbytes)
        else:
            assert record.ready is not None
            record.ready.synchronize()
            memory = bytes_of(storage, record.device)
        found = checksum(memory, delta, record.nbytes)
        self._counters.written.begin()
        moved = 0
        try:
            lane.write(extent.fd, extent.offset, memory)
            moved = extent.nbytes
        finally:
            self._counters.written.end(moved)
        record.checksum, record.delta, record.extent = found, delta, extent
        record.host = None
        _let_go(record)

    def _note_full(self, record: Record) -> None:
        self._counters.full += 1
        if self._counters.full == 1:
            warnings.warn(
                f"the slab of {self._store.capacity:,} bytes has no room for an activation of {record.nbytes:,} bytes;"
                " it stays in memory, as others will (raise capacity_bytes; stats().full counts them)",
                stacklevel=1,
            )

    def _note_failure(self, record: Record, place: str, error: Exception, *, is_of_disk: bool = True) -> None:
        self._counters.failed_writes += 1
        # Memory that is short now may be there later.
        self._failed_in_a_row += is_of_disk
        is_last = self._failed_in_a_row == _MAX_FAILED_WRITES and not self.given_up
        self.given_up |= is_last
        _log.debug("%s: write %d failed: %s", place, self._counters.failed_writes, error)
        if self._counters.failed_writes == 1 or is_last:
            last = "; nothing more is offloaded" if is_last else ""
            warnings.warn(
                f"{place}: cannot write an activation of {record.nbytes:,} bytes: {error}; it stays in memory{last}",
                stacklevel=1,
            )


def _let_go(record: Record) -> None:
    if not record.pinned:
        record.give_up_storage()


def _pages_around(storage: UntypedStorage, delta: int, length: int) -> Tensor:
    """The whole pages that a storage lies in, without a copy.

    Direct I/O moves whole blocks. The bytes around the storage belong to somebody else; they are in the same pages, so
    reading them is no fault, and what is written of them is never looked at.
    """
    pages = (ctypes.c_char * length).from_address(storage.data_ptr() - delta)
    return torch.frombuffer(pages, dtype=torch.uint8)

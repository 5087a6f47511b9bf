"""Reading records back: what a lane does to bring a record's bytes into memory, checked."""

import weakref

from torch import Tensor

from ..backends.base import Lane
from ..errors import OffloadCorruptionError
from ..storage.slab import Extent
from .buffers import Lent
from .checksums import checksum
from .counters import Counters
from .cuda_copies import CudaCopies
from .record import Record


class Reads:
    """The lanes' side of :meth:`.transport.Transport.fetch` and of reading ahead."""

    def __init__(self, copies: CudaCopies, counters: Counters) -> None:
        self._copies, self._counters = copies, counters

    def read(self, reference: "weakref.ref[Record]", buffer: Lent | None, lane: Lane) -> bool:
        """Bring a record's bytes back, through ``buffer`` or (None) straight into device memory.

        Raises:
            OSError: the disk cannot.
            OffloadCorruptionError: other bytes came.
        """
        record = reference()
        if record is None:
            return True
        extent = record.extent
        assert extent is not None
        memory = self._copies.new_memory(record) if buffer is None else buffer.tensor()
        self._counters.read.begin()
        moved = 0
        try:
            _read_verified(record, extent, memory, lane)
            moved = extent.nbytes
        finally:
            self._counters.read.end(moved)
        if buffer is None:
            self._copies.count(memory.untyped_storage(), record.nbytes)
            record.take_storage(memory.untyped_storage())
        else:
            record.take_storage(self._copies.from_host(record, buffer))
        return True


def _read_verified(record: Record, extent: Extent, memory: Tensor, lane: Lane) -> None:
    """Read, and once more if it failed or the bytes are others: some faults pass."""
    for attempt in range(2):
        try:
            lane.read(extent.fd, extent.offset, memory)
        except OSError:
            if attempt:
                raise
            continue
        if checksum(memory, record.delta, record.nbytes) == record.checksum:
            return
    raise OffloadCorruptionError(
        f"{record.place}: an activation of {record.nbytes:,} bytes came back changed (checksum differs); the"
        " drive or its connection is faulty, no gradient was computed from it"
    )

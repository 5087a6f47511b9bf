"""What an offload holds at one moment, for tests and for looking into a run that hangs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .saving.graph import ForwardGraph
from .transfer.lanes import Transfer
from .transfer.memory_only import MemoryOnly
from .transfer.record import Record
from .transfer.transport import Transport


@dataclass(frozen=True, kw_only=True)
class SlabState:
    """One slab file.

    Attributes:
        folder: it lies in, without a name.
        fd: its descriptor; -1 once it is closed.
        capacity: bytes that are reserved.
        used: bytes of it in extents.
    """

    folder: Path
    fd: int
    capacity: int
    used: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Bytes of a saved storage that are on disk and nowhere else.

    Attributes:
        fd: of the slab file.
        offset: in that file, of the first byte.
        nbytes: of the storage.
        blocks: offsets of the first byte of the blocks around it, and of the first one after them.
    """

    fd: int
    offset: int
    nbytes: int
    blocks: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DebugState:
    """A snapshot; several values may change while it is taken.

    Attributes:
        graphs: of the latest four forwards, or a step's, those of which autograd still holds something.
        records: storages that it holds of them.
        writes_pending, reads_pending: writes and reads of these that are queued or under way.
        lanes_alive: threads that have not ended.
        lanes_busy: threads that are not at rest.
        saved, resident, offered: bytes as in :class:`~.stats.OffloadStats`; ``offered``: given to the lanes to write.
        buffer_bytes: of host buffers in use.
        slabs: one a folder.
        stored: storages of the latest forward that are on disk only, in the order of saving.
    """

    graphs: int
    records: int
    writes_pending: int
    reads_pending: int
    lanes_alive: int
    lanes_busy: int
    saved: int
    resident: int
    offered: int
    buffer_bytes: int
    slabs: tuple[SlabState, ...]
    stored: tuple[StoredTensor, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of all slabs in extents."""
        return sum(slab.used for slab in self.slabs)

    @property
    def is_empty(self) -> bool:
        """Nothing is held for any backward."""
        return (self.slab_bytes, self.saved, self.resident, self.buffer_bytes) == (0, 0, 0, 0)


def debug_state(transport: Transport | MemoryOnly, graphs: Sequence[ForwardGraph]) -> DebugState:
    """Of a transport and the latest forwards."""
    transport.settle()
    counters, store = transport.counters, transport.store
    records = [graph.living_records() for graph in graphs]
    writes = [record.write_transfer for graph in records for record in graph]
    reads = [record.read_transfer for graph in records for record in graph]
    return DebugState(
        graphs=sum(map(bool, records)),
        records=sum(map(len, records)),
        writes_pending=_pending(writes),
        reads_pending=_pending(reads),
        lanes_alive=transport.lanes_alive,
        lanes_busy=transport.lanes_busy,
        saved=counters.saved.now,
        resident=counters.resident.now,
        offered=counters.offered.now,
        buffer_bytes=transport.buffer_bytes,
        slabs=tuple(
            SlabState(folder=file.folder, fd=file.fd, capacity=file.capacity, used=used)
            for file, used in zip(store.files, store.used_by_file(), strict=True)
        )
        if store is not None
        else (),
        stored=tuple(filter(None, map(_stored, records[-1]))) if records else (),
    )


def _pending(transfers: Sequence[Transfer | None]) -> int:
    return sum(transfer is not None and not transfer.is_done for transfer in transfers)


def _stored(record: Record) -> StoredTensor | None:
    extent = record.extent
    if extent is None or record.in_memory() is not None or record.host is not None:
        return None
    return StoredTensor(
        fd=extent.fd,
        offset=extent.offset + record.delta,
        nbytes=record.nbytes,
        blocks=(extent.offset, extent.offset + extent.nbytes),
    )

"""Moves records to disk and back."""

import ctypes
import time
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, UntypedStorage

from ..backends.base import IOBackend, Lane
from ..errors import OffloadCorruptionError, OffloadError, OffloadIOError
from ..stats import Level
from ..storage.deaths import Deaths
from ..storage.slab import ALIGNMENT, Extent, SlabStore, round_up
from .buffers import BufferPool, Lent
from .lanes import BandwidthMeter, Lanes, Transfer
from .record import Record

# Writing memory to disk while neighbouring bytes of the same page change is safe where the filesystem keeps no
# checksums of its own.
_IN_PLACE_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs")
_MAX_FAILED_WRITES = 8
_FIRST_WINDOW = 64 << 20
_CHECKSUM_PART = 16 << 20


class Transport:
    """The machine below the hooks: slab, buffers, lanes, and the counts of what they do."""

    def __init__(
        self,
        backend: IOBackend,
        store: SlabStore,
        *,
        lanes: int,
        buffer_bytes: int | None,
        host_memory_bytes: int,
        io_timeout: float,
    ) -> None:
        self.backend, self.store = backend, store
        self.saved, self.resident, self.offered = Level(), Level(), Level()
        self.deaths = Deaths()
        self.writes, self.reads = BandwidthMeter(), BandwidthMeter()
        self.stall, self.forwarded, self.failed_writes, self.full = 0.0, 0, 0, 0
        self._failed_in_a_row, self._given_up = 0, False
        self._timeout, self._fixed_window = io_timeout, buffer_bytes
        self._window = buffer_bytes if buffer_bytes is not None else _FIRST_WINDOW
        self._loaded_on_device = Level()
        tokens: SimpleQueue[Any] = SimpleQueue()
        # Where there is a GPU, its memory is what is counted, not the host's.
        on_change = (lambda _: None) if torch.cuda.is_available() else partial(_count, self.deaths, self.resident)
        self._pool = BufferPool(backend, self._window, on_change=on_change, on_return=tokens.put)
        self._host_tier = BufferPool(backend, host_memory_bytes, on_change=on_change, on_return=None)
        self._in_place = backend.writes_in_place and all(
            _filesystem(file.folder) in _IN_PLACE_FILESYSTEMS for file in store.files
        )
        self._lanes = Lanes(backend, lanes, tokens, self._pool.count_returns)
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        self._closed = False
        # Not before the last record is gone, whatever became of the object that the user had.
        self._unclosed = weakref.finalize(self, _abandon, self._lanes, (self._pool, self._host_tier), store)
        self._unclosed.atexit = False

    # Called by forward and backward.

    def settle(self) -> None:
        """Count what died since the last time."""
        self.deaths.settle()
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
        if self._closed or self._given_up:
            return
        if record.device.type == "cuda":
            self._streams_of(record.device)
            record.ready = torch.cuda.Event()
            record.ready.record(torch.cuda.current_stream(record.device))
        record.footprint.add(self.offered, record.nbytes + ALIGNMENT)
        reference = weakref.ref(record)
        record.write_transfer = Transfer(lambda lane: self._write(reference, lane))
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
                return self._on_current_stream(record, storage)
            host = record.host
            if host is not None:
                record.take_storage(self._from_host(record, host))
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
            self.stall += waited
            record.graph.stall += waited
            if not answered:
                raise OffloadIOError(
                    f"{_place(record)}: no answer to a read of {record.nbytes:,} bytes within {self._timeout:g} s"
                )
        if transfer.error is None:
            return
        record.read_transfer = None
        if isinstance(transfer.error, OffloadError):
            # Not the same object: its traceback would refer to this frame, and so to itself and to the buffers.
            raise type(transfer.error)(*transfer.error.args)
        message = f"{_place(record)}: cannot read {record.nbytes:,} bytes back: {transfer.error}"
        raise OffloadIOError(message) from transfer.error

    def _start_read(self, record: Record, *, urgent: bool) -> Transfer | None:
        extent = record.extent
        assert extent is not None
        device_direct = record.device.type == "cuda" and self.backend.moves_device_memory and record.whole
        loaded = self._loaded_on_device.now
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
        transfer = record.read_transfer = Transfer(lambda lane: self._read(reference, buffer, lane))
        self._lanes.read(transfer, urgent=urgent)
        return transfer

    # Called by lanes.

    def _write(self, reference: "weakref.ref[Record]", lane: Lane) -> bool:
        record = reference()
        storage = record.storage if record is not None else None
        if record is None or storage is None or record.pinned:
            return True
        if record.changed:
            # Backward will raise; nobody needs these bytes.
            record.give_up_storage()
            return True
        fits = round_up(record.nbytes) <= self._host_tier.budget
        host = self._host_tier.lend(round_up(record.nbytes)) if fits else None
        if host is not None:
            self._stage(record, storage, host)
            record.host = host
            self._let_go(record)
            return True
        direct = self._in_place if record.device.type == "cpu" else self.backend.moves_device_memory
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
        extent = self.store.allocate(length)
        if extent is None:
            self._note_full(record)
            return True
        try:
            if host is not None:
                self._stage(record, storage, host)
                # Should the write fail, the buffer has the bytes. This frame must not hold the memory meanwhile.
                record.host = host
                self._let_go(record)
                storage = None
            self._write_bytes(record, storage, host, extent, delta, lane)
            self._failed_in_a_row = 0
        except Exception as error:
            self._note_failure(record, _place_of(extent), error)
        return True

    def _note_full(self, record: Record) -> None:
        self.full += 1
        if self.full == 1:
            warnings.warn(
                f"the slab of {self.store.capacity:,} bytes has no room for an activation of {record.nbytes:,} bytes;"
                " it stays in memory, as others will (raise capacity_bytes; stats().full counts them)",
                stacklevel=1,
            )

    def _note_failure(self, record: Record, place: str, error: Exception, *, is_of_disk: bool = True) -> None:
        self.failed_writes += 1
        # Memory that is short now may be there later.
        self._failed_in_a_row += is_of_disk
        is_last = self._failed_in_a_row == _MAX_FAILED_WRITES and not self._given_up
        self._given_up |= is_last
        if self.failed_writes == 1 or is_last:
            last = "; nothing more is offloaded" if is_last else ""
            warnings.warn(
                f"{place}: cannot write an activation of {record.nbytes:,} bytes: {error}; it stays in memory{last}",
                stacklevel=1,
            )

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
            memory = torch.empty(0, dtype=torch.uint8, device=record.device).set_(storage)  # pyright: ignore
        checksum = _checksum(memory, delta, record.nbytes)
        self.writes.begin()
        moved = 0
        try:
            lane.write(extent.fd, extent.offset, memory)
            moved = extent.nbytes
        finally:
            self.writes.end(moved)
        record.checksum, record.delta, record.extent = checksum, delta, extent
        record.host = None
        self._let_go(record)

    def _let_go(self, record: Record) -> None:
        if not record.pinned:
            record.give_up_storage()

    def _stage(self, record: Record, storage: UntypedStorage, host: Lent) -> None:
        """Copy a storage into a host buffer, and wait until it is there."""
        source = torch.empty(0, dtype=torch.uint8, device=record.device).set_(storage)  # pyright: ignore
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
        # Neither the tensor's memory nor the buffer may be used anew before.
        done.synchronize()

    def _read(self, reference: "weakref.ref[Record]", buffer: Lent | None, lane: Lane) -> bool:
        record = reference()
        if record is None:
            return True
        extent = record.extent
        assert extent is not None
        if buffer is None:
            # Of the copy-in stream's memory, and after the kernels that used it last: the disk knows of no streams.
            _, copy_in = self._streams_of(record.device)
            with torch.cuda.device(record.device), torch.cuda.stream(copy_in):
                memory = torch.empty(record.nbytes, dtype=torch.uint8, device=record.device)
            copy_in.synchronize()
        else:
            memory = buffer.tensor()
        self.reads.begin()
        moved = 0
        try:
            self._read_verified(record, extent, memory, lane)
            moved = extent.nbytes
        finally:
            self.reads.end(moved)
        if buffer is None:
            self._count_on_device(memory.untyped_storage(), record.nbytes)
            record.take_storage(memory.untyped_storage())
        elif record.device.type == "cpu":
            record.take_storage(buffer.tensor(record.delta, record.nbytes).untyped_storage())
        else:
            record.take_storage(self._from_host(record, buffer))
        return True

    def _read_verified(self, record: Record, extent: Extent, memory: Tensor, lane: Lane) -> None:
        """Read, and once more if it failed or the bytes are others: some faults pass."""
        for attempt in range(2):
            try:
                lane.read(extent.fd, extent.offset, memory)
            except OSError:
                if attempt:
                    raise
                continue
            if _checksum(memory, record.delta, record.nbytes) == record.checksum:
                return
        raise OffloadCorruptionError(
            f"{_place(record)}: an activation of {record.nbytes:,} bytes came back changed (checksum differs); the"
            " drive or its connection is faulty, no gradient was computed from it"
        )

    # Devices.

    def _from_host(self, record: Record, host: Lent) -> UntypedStorage:
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
        self._count_on_device(memory.untyped_storage(), record.nbytes)
        return memory.untyped_storage()

    def _count_on_device(self, storage: UntypedStorage, nbytes: int) -> None:
        for level in (self._loaded_on_device, self.resident):
            level.add(nbytes)
            self.deaths.watch(storage, partial(level.add, -nbytes))

    def _on_current_stream(self, record: Record, storage: UntypedStorage) -> UntypedStorage:
        """Memory that was allocated for the copy-in stream must outlive its use by the stream that asks for it."""
        if record.device.type == "cuda" and record.load:
            tensor = torch.empty(0, dtype=torch.uint8, device=record.device).set_(storage)  # pyright: ignore
            tensor.record_stream(torch.cuda.current_stream(record.device))
        return storage

    def _streams_of(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def buffers_in_use(self) -> int:
        """Bytes of host buffers over which tensors are alive."""
        return self._pool.lent_bytes() + self._host_tier.lent_bytes()

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


def _pages_around(storage: UntypedStorage, delta: int, length: int) -> Tensor:
    """The whole pages that a storage lies in, without a copy.

    Direct I/O moves whole blocks. The bytes around the storage belong to somebody else; they are in the same pages, so
    reading them is no fault, and what is written of them is never looked at.
    """
    pages = (ctypes.c_char * length).from_address(storage.data_ptr() - delta)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _checksum(memory: Tensor, delta: int, nbytes: int) -> int:
    if memory.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(memory.numpy()[delta : delta + nbytes].data)
    return _checksum_on_device(memory[:nbytes])


def _checksum_on_device(memory: Tensor, part: int = _CHECKSUM_PART) -> int:
    """A sum of words with odd weights: any one changed word changes it. In parts, for the memory it takes meanwhile."""
    total = 0
    for begin in range(0, memory.numel(), part):
        piece = memory[begin : begin + part]
        words = F.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        weights = torch.arange(begin // 8, begin // 8 + words.numel(), device=memory.device) * 2 + 1
        total = total + (words * weights).sum()
    return int(total)


def _place(record: Record) -> str:
    return _place_of(record.extent) if record.extent is not None else "activation offload"


def _place_of(extent: Extent) -> str:
    return f"{extent.path} (byte {extent.offset:,} of the slab)"


def _filesystem(folder: Path) -> str:
    """The type of the filesystem a folder is on."""
    best, kind = Path(), ""
    resolved = folder.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split(" ")
        point = Path(mount.encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    return kind

"""What was saved, what of it is in memory, what went to disk and back, and how that wears a drive."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class OffloadStats:
    """A snapshot. Bytes and seconds; totals since the start unless said otherwise.

    Attributes:
        backend: the I/O backend in use; ``memory`` without a disk.
        saved: bytes saved for backward now, each storage counted once.
        saved_peak: the most since the last reset.
        resident: bytes of memory that saved tensors take now: kept, not yet written, in host buffers, read back.
        resident_peak: the most since the last reset.
        capacity: bytes of the slab.
        written, read: bytes moved to and from disk.
        io_stall: seconds for which backward waited for a read.
        forwarded: bytes that backward took from memory although they had been given up for writing.
        failed_writes: transfers that failed; their tensors stayed in memory.
        full: tensors that stayed in memory because the slab was full.
        encoded_from, encoded_to: bytes of tensors that the codec was given, and of what it made of them.
        offload_budget: bytes that the latest forward may write, or of the latest step's the one that may most; None
            before a backward has been measured: until then everything is written.
        unplanned: forwards of which that is true.
        write_bandwidth, read_bandwidth: bytes per second as last measured.
        written_per_day: at the rate since the first write.
        drive_writes_per_day: the same as a multiple of the drive's capacity; of this rank's share of it.
        drive_life_years: until the rated bytes are written at that rate; None without a rating.
    """

    backend: str
    saved: int
    saved_peak: int
    resident: int
    resident_peak: int
    capacity: int
    written: int
    read: int
    io_stall: float
    forwarded: int
    failed_writes: int
    full: int
    encoded_from: int
    encoded_to: int
    offload_budget: int | None
    unplanned: int
    write_bandwidth: float
    read_bandwidth: float
    written_per_day: float
    drive_writes_per_day: float
    drive_life_years: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Endurance:
    """How fast a drive is being worn, and how much may be written.

    A drive's makers rate it in terabytes written (TBW) over its life, or in drive writes per day (DWPD), the capacity
    of the drive being one drive write.
    """

    _DAY = 86400.0

    def __init__(
        self,
        *,
        drive_bytes: float,
        rated_tbw: float | None,
        max_drive_writes_per_day: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._drive_bytes, self._rated_tbw = drive_bytes, rated_tbw
        self._allowed_rate = (
            max_drive_writes_per_day * drive_bytes / self._DAY if max_drive_writes_per_day is not None else None
        )
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count time, once."""
        if self._started is None:
            self._started = self._clock()

    def allowance(self, written: int, period: float) -> int | None:
        """Bytes that may be written in the coming ``period`` seconds, given what was; None without a limit."""
        if self._allowed_rate is None:
            return None
        elapsed = self._clock() - self._started if self._started is not None else 0.0
        return max(0, int(self._allowed_rate * (elapsed + period) - written))

    def per_day(self, written: int) -> float:
        """Bytes per day at the rate so far."""
        elapsed = self._clock() - self._started if self._started is not None else 0.0
        return written / elapsed * self._DAY if elapsed > 0 else 0.0

    def drive_writes_per_day(self, written: int) -> float:
        return self.per_day(written) / self._drive_bytes

    def life_years(self, written: int) -> float | None:
        """Years until the rated bytes are written."""
        per_day = self.per_day(written)
        if self._rated_tbw is None or per_day == 0:
            return None
        return self._rated_tbw * 1e12 / per_day / 365.25

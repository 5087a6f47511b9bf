"""Counts of what is saved, moved and waited for, shared by everything that moves records."""

import threading
import time
from dataclasses import dataclass, field

from ..storage.deaths import Deaths
from ..storage.level import Level


class BandwidthMeter:
    """Bytes moved in one direction, and the time in which at least one lane was moving them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active, self._since = 0, 0.0
        self.bytes, self.seconds = 0, 0.0

    def begin(self) -> None:
        with self._lock:
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1

    def end(self, nbytes: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now
            self._active -= 1
            self.bytes += nbytes


@dataclass(eq=False)
class Counters:
    """Bytes, seconds and events since the start; levels also have what there is now.

    Attributes:
        saved: bytes of storages that autograd holds, each counted once.
        resident: bytes of memory that saved tensors take.
        offered: bytes of what was given to the writers and is not yet dropped, with room for alignment.
        deaths: what is to be counted once records and storages have died.
        written, read: bytes that lanes moved, and how fast.
        stall: seconds for which backward waited for reads.
        forwarded: bytes that backward took from memory although they had been given up for writing.
        failed_writes: transfers that failed; their tensors stayed in memory.
        full: tensors that stayed in memory because the slab was full.
        encoded_from, encoded_to: bytes of tensors that a codec was given, and of what it made of them.
    """

    saved: Level = field(default_factory=Level)
    resident: Level = field(default_factory=Level)
    offered: Level = field(default_factory=Level)
    deaths: Deaths = field(default_factory=Deaths)
    written: BandwidthMeter = field(default_factory=BandwidthMeter)
    read: BandwidthMeter = field(default_factory=BandwidthMeter)
    stall: float = 0.0
    forwarded: int = 0
    failed_writes: int = 0
    full: int = 0
    encoded_from: int = 0
    encoded_to: int = 0

    def clock(self) -> float:
        """Seconds, without those for which backward waited."""
        return time.perf_counter() - self.stall

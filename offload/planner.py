"""How much of a forward the disk can take and give back without being waited for."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Of the measured bandwidth; the rest is for what is not in the model.
_SAFETY = 0.8


@dataclass(frozen=True)
class Saved:
    """One storage that a forward saved. Seconds on one clock, without time spent waiting for the disk.

    Attributes:
        nbytes: its size.
        packed_at: when forward saved it.
        unpacked_at: when backward first asked for it; None if it never did.
    """

    nbytes: int
    packed_at: float
    unpacked_at: float | None


def absorbable_bytes(saved: Sequence[Saved], *, write_bandwidth: float, read_bandwidth: float, window: int) -> int:
    """The most bytes, taken from the first saved tensor on, that can be written and read back in time.

    Writes follow each other from the moment each tensor is saved. Reads follow in reverse, once backward has begun and
    the writes are done, each when it fits into the window of bytes that are read ahead. In time means: each tensor is
    back before backward asks for it. The last layers' tensors, for which no disk is fast enough, stay in memory.

    Args:
        saved: in the order of saving.
        write_bandwidth, read_bandwidth: bytes per second, greater than 0.
        window: bytes of buffers for reading ahead.
    """
    asked = [item.unpacked_at for item in saved if item.unpacked_at is not None]
    if not asked:
        return 0
    backward_begins = min(asked)
    low, high = 0, len(saved)
    while low < high:
        middle = (low + high + 1) // 2
        if _in_time(saved[:middle], backward_begins, write_bandwidth * _SAFETY, read_bandwidth * _SAFETY, window):
            low = middle
        else:
            high = middle - 1
    return sum(item.nbytes for item in saved[:low])


def _in_time(saved: Sequence[Saved], backward_begins: float, write: float, read: float, window: int) -> bool:
    disk_free = 0.0
    for item in saved:
        disk_free = max(disk_free, item.packed_at) + item.nbytes / write
    disk_free = max(disk_free, backward_begins)
    ahead: deque[tuple[int, float]] = deque()
    ahead_bytes = 0
    for item in reversed(saved):
        if item.unpacked_at is None:
            continue
        while ahead and ahead_bytes + item.nbytes > window:
            nbytes, used_at = ahead.popleft()
            ahead_bytes -= nbytes
            disk_free = max(disk_free, used_at)
        disk_free += item.nbytes / read
        if disk_free > item.unpacked_at:
            return False
        ahead.append((item.nbytes, item.unpacked_at))
        ahead_bytes += item.nbytes
    return True

"""How much of each forward the disk can take and give back without being waited for."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
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


@dataclass(frozen=True)
class Forward:
    """One forward as it was measured.

    Attributes:
        saved: in the order of saving.
        read_from: when reading back may begin: with its backward, or with the one before in a schedule.
        group: forwards of one group are planned alike.
    """

    saved: Sequence[Saved]
    read_from: float
    group: Hashable = None


def absorbable_shares(
    forwards: Sequence[Forward],
    *,
    write_bandwidth: float,
    read_bandwidth: float,
    window: int,
    groups: Sequence[Hashable] = (None,),
) -> dict[Hashable, float]:
    """The share of its bytes, taken from the first saved tensor on, that each group's forwards can write and read back
    in time, one after the other: the second group gets what the first one leaves.

    Writes follow each other from the moment each tensor is saved. Reads follow in reverse, forward after forward as
    their backwards do, each when its write is done and it fits into the window of bytes that are read ahead; they go
    before writes that have not begun. In time means: each tensor is back before backward asks for it. The last layers'
    tensors, for which no disk is fast enough, stay in memory.

    Args:
        forwards: of one step, or of one forward, in order.
        write_bandwidth, read_bandwidth: bytes per second, greater than 0.
        window: bytes of buffers for reading ahead.
        groups: of the forwards, in the order in which they are served.
    """
    counts: dict[Hashable, int] = dict.fromkeys(groups, 0)
    shares: dict[Hashable, float] = {}
    for group in groups:
        own = [forward.saved for forward in forwards if forward.group == group]
        is_read = any(item.unpacked_at is not None for saved in own for item in saved)
        low, high = 0, max(map(len, own), default=0) if is_read else 0
        while low < high:
            counts[group] = (low + high + 1) // 2
            if _in_time(forwards, counts, write_bandwidth * _SAFETY, read_bandwidth * _SAFETY, window):
                low = counts[group]
            else:
                high = counts[group] - 1
        counts[group] = low
        total = sum(item.nbytes for saved in own for item in saved)
        chosen = sum(item.nbytes for saved in own for item in saved[:low])
        shares[group] = chosen / total if total else 0.0
    return shares


def _in_time(
    forwards: Sequence[Forward], counts: Mapping[Hashable, int], write: float, read: float, window: int
) -> bool:
    """Whether the first tensors of each forward, as many as ``counts`` says of its group, are all back in time."""
    writes: list[Saved] = []
    backwards: list[tuple[float, float, range]] = []
    for forward in forwards:
        chosen = forward.saved[: counts[forward.group]]
        asked = [item.unpacked_at for item in chosen if item.unpacked_at is not None]
        if asked:
            backwards.append((min(asked), forward.read_from, range(len(writes), len(writes) + len(chosen))))
        writes += chosen
    disk_free, num_written = 0.0, 0
    ahead: deque[tuple[int, float]] = deque()
    ahead_bytes = 0
    for _, read_from, places in sorted(backwards, key=lambda backward: backward[0]):
        for place in reversed(places):
            item = writes[place]
            if item.unpacked_at is None:
                continue
            has_room = read_from
            while ahead and ahead_bytes + item.nbytes > window:
                nbytes, used_at = ahead.popleft()
                ahead_bytes -= nbytes
                has_room = max(has_room, used_at)
            while num_written < len(writes):
                begins = max(disk_free, writes[num_written].packed_at)
                if num_written > place and begins >= has_room:
                    break
                disk_free = begins + writes[num_written].nbytes / write
                num_written += 1
            disk_free = max(disk_free, has_room) + item.nbytes / read
            if disk_free > item.unpacked_at:
                return False
            ahead.append((item.nbytes, item.unpacked_at))
            ahead_bytes += item.nbytes
    return True

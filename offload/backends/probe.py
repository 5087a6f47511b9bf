"""How fast a backend moves bytes on a path."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OffloadIOError
from ..storage.filesystem import available_bytes
from ..storage.slab import SlabFile, round_up
from .base import IOBackend


@dataclass(frozen=True)
class Speed:
    """Bytes per second in each direction."""

    write: float
    read: float

    @property
    def both(self) -> float:
        """For a byte that is written once and read once, per second."""
        return 1 / (1 / self.write + 1 / self.read)


def measure(
    backend: IOBackend,
    folder: Path,
    *,
    block_bytes: int = 4 << 20,
    lanes: int = 2,
    total_bytes: int = 64 << 20,
    staged: bool = False,
    timeout: float = 300.0,
) -> Speed:
    """Write and read ``total_bytes`` in blocks on a slab of their own, each lane a thread of its own.

    Args:
        staged: count the copy into the backend's buffer as part of each write.
        timeout: seconds for each pass over the slab.

    Raises:
        OffloadSpaceError, OffloadError: the folder cannot take the slab.
        OffloadIOError: the disk does not answer.
        OSError: the device failed.
    """
    block_bytes = round_up(block_bytes)
    blocks = max(lanes, min(total_bytes, available_bytes(folder) // 2) // block_bytes)
    slab = SlabFile(folder, blocks * block_bytes)
    workers: list[_Worker] = []
    try:
        source = torch.ones(block_bytes, dtype=torch.uint8) if staged else None
        workers += [_Worker(backend, slab, range(n, blocks, lanes), block_bytes) for n in range(lanes)]
        # The first pass gives the file its blocks; it is not counted.
        seconds = [_pass(workers, timeout, write=True)]
        seconds += [_pass(workers, timeout, write=True, source=source), _pass(workers, timeout, write=False)]
    finally:
        for worker in workers:
            worker.close()
        # After a pass that timed out, a thread may still be in a transfer.
        slab.close(in_use=any(worker.is_moving for worker in workers))
    return Speed(*(blocks * block_bytes / each for each in seconds[1:]))


def _pass(workers: "Sequence[_Worker]", timeout: float, *, write: bool, source: Tensor | None = None) -> float:
    """All blocks once, each copied from ``source`` before if there is one; seconds."""
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=worker.move, kwargs={"write": write, "source": source, "errors": errors}, daemon=True)
        for worker in workers
    ]
    started = time.perf_counter()
    for worker, thread in zip(workers, threads, strict=True):
        worker.is_moving = True
        thread.start()
    for thread in threads:
        thread.join(max(0.0, started + timeout - time.perf_counter()))
    seconds = time.perf_counter() - started
    if any(thread.is_alive() for thread in threads):
        raise OffloadIOError(f"{workers[0].folder}: the disk did not answer within {timeout:g} s")
    if errors:
        raise errors[0]
    return seconds


class _Worker:
    def __init__(self, backend: IOBackend, slab: SlabFile, places: range, block_bytes: int) -> None:
        self._backend, self._slab, self._places, self._lane = backend, slab, places, backend.lane()
        self._buffer = backend.new_buffer(block_bytes).random_()
        self.folder, self.is_moving = slab.folder, False

    def move(self, *, write: bool, source: Tensor | None, errors: list[BaseException]) -> None:
        try:
            move = self._lane.write if write else self._lane.read
            for place in self._places:
                if source is not None:
                    self._buffer.copy_(source)
                move(self._slab.fd, place * self._buffer.nbytes, self._buffer)
        except BaseException as error:
            errors.append(error)
        finally:
            self.is_moving = False

    def close(self) -> None:
        """Give everything back, unless the thread is still using it."""
        if self.is_moving:
            return
        self._lane.close()
        self._backend.free_buffer(self._buffer)

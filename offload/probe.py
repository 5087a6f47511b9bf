"""How fast a backend moves bytes on a path."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .slab import SlabFile, available_bytes, round_up

if TYPE_CHECKING:
    from .backends.base import IOBackend


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
    backend: "IOBackend",
    folder: Path,
    *,
    block_bytes: int = 4 << 20,
    lanes: int = 2,
    total_bytes: int = 64 << 20,
    staged: bool = False,
) -> Speed:
    """Write and read ``total_bytes`` in blocks on a slab of their own, each lane a thread of its own.

    Args:
        staged: count the copy into the backend's buffer as part of each write.

    Raises:
        OffloadSpaceError, OffloadError: the folder cannot take the slab.
        OSError: the device failed.
    """
    block_bytes = round_up(block_bytes)
    blocks = max(lanes, min(total_bytes, available_bytes(folder) // 2) // block_bytes)
    slab = SlabFile(folder, blocks * block_bytes)
    try:
        # The first pass gives the file its blocks; it is not counted.
        _pass(backend, slab, blocks, block_bytes, lanes, write=True, staged=False)
        write = _pass(backend, slab, blocks, block_bytes, lanes, write=True, staged=staged)
        read = _pass(backend, slab, blocks, block_bytes, lanes, write=False, staged=False)
    finally:
        slab.close()
    return Speed(write, read)


def _pass(
    backend: "IOBackend", slab: SlabFile, blocks: int, block_bytes: int, lanes: int, *, write: bool, staged: bool
) -> float:
    errors: list[BaseException] = []
    workers = [
        _Worker(backend, slab, range(n, blocks, lanes), block_bytes, write, staged, errors) for n in range(lanes)
    ]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.close()
    if errors:
        raise errors[0]
    return blocks * block_bytes / seconds


class _Worker:
    def __init__(
        self,
        backend: "IOBackend",
        slab: SlabFile,
        places: range,
        block_bytes: int,
        write: bool,
        staged: bool,
        errors: list[BaseException],
    ) -> None:
        self._backend, self._slab, self._places, self._errors = backend, slab, places, errors
        self._write, self._lane = write, backend.lane()
        self._buffer = backend.new_buffer(block_bytes).random_()
        self._source = torch.ones(block_bytes, dtype=torch.uint8) if staged else None

    def run(self) -> None:
        try:
            move = self._lane.write if self._write else self._lane.read
            for place in self._places:
                if self._source is not None:
                    self._buffer.copy_(self._source)
                move(self._slab.fd, place * self._buffer.nbytes, self._buffer)
        except BaseException as error:
            self._errors.append(error)

    def close(self) -> None:
        self._lane.close()
        self._backend.free_buffer(self._buffer)

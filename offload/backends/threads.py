"""``pwritev`` and ``preadv`` from Python threads: needs no compiler and no library."""

import errno
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

_LARGEST_CALL = 1 << 30


class ThreadsBackend:
    """Blocking system calls, one at a time per lane."""

    name = "threads"
    writes_in_place = True
    moves_device_memory = False

    def lane(self) -> "ThreadsLane":
        return ThreadsLane()

    def new_buffer(self, nbytes: int) -> Tensor:
        if torch.cuda.is_available():
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        memory = mmap.mmap(-1, nbytes)
        with suppress(OSError):
            # Pinning pages for direct I/O costs much less if they are few.
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def free_buffer(self, buffer: Tensor) -> None:
        pass


class ThreadsLane:
    """See :class:`~.base.Lane`."""

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        memory = buffer.numpy().data
        while memory:
            moved = os.pwritev(fd, [memory[:_LARGEST_CALL]], offset)
            if moved == 0:
                raise OSError(errno.EIO, "the device took no bytes")
            memory, offset = memory[moved:], offset + moved

    def read(self, fd: int, offset: int, buffer: Tensor) -> None:
        memory = buffer.numpy().data
        while memory:
            moved = os.preadv(fd, [memory[:_LARGEST_CALL]], offset)
            if moved == 0:
                raise OSError(errno.EIO, f"the file ends at byte {offset}, {len(memory)} bytes are missing")
            memory, offset = memory[moved:], offset + moved

    def close(self) -> None:
        pass

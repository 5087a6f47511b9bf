"""``pwritev`` and ``preadv`` from Python threads: needs no compiler and no library."""

import errno
import os

from torch import Tensor

from .base import Backend
from .registry import register

_LARGEST_CALL = 1 << 30


@register
class ThreadsBackend(Backend):
    """Blocking system calls, one at a time per lane."""

    name = "threads"
    title = "threads"
    writes_in_place = True

    def lane(self) -> "ThreadsLane":
        return ThreadsLane()


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

"""Host buffers that are used again and again: fresh pages cost more than the copy into them."""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends.base import IOBackend
from .deaths import Deaths


class Lent(np.ndarray):
    """A buffer's memory as seen by one borrower; the buffer is free again when the last tensor over it dies."""

    def tensor(self, offset: int = 0, nbytes: int = -1) -> Tensor:
        """The bytes from ``offset`` on as a uint8 tensor with a storage of its own over the same memory."""
        return torch.frombuffer(self, dtype=torch.uint8, offset=offset, count=nbytes)


class BufferPool:
    """Page-aligned buffers up to a budget, found again by their size."""

    def __init__(
        self,
        backend: IOBackend,
        budget: int,
        *,
        on_change: Callable[[int], None],
        on_return: Callable[[Any], None] | None,
    ) -> None:
        """
        Args:
            budget: bytes; exceeded only by :meth:`lend` with ``force``, and, if it is not 0, by one buffer at a time.
            on_change: told by how many bytes the lent memory grows or shrinks.
            on_return: called with an object of no meaning at the moment when a buffer is free again; written in C (see
                :mod:`.deaths`), such as a queue's ``put``.
        """
        self._backend, self.budget, self._on_change = backend, budget, on_change
        self._lock = threading.Lock()
        self._idle: dict[int, list[Tensor]] = {}
        self._idle_bytes = self._lent_bytes = 0
        self._deaths, self._on_return = Deaths(), on_return

    def lend(self, nbytes: int, *, force: bool = False) -> Lent | None:
        """``nbytes`` of memory (a multiple of 4096); None if the budget does not allow it.

        The memory returns to the pool when no tensor over it is alive.
        """
        with self._lock:
            self._deaths.settle()
            is_only_one = self.budget > 0 and self._lent_bytes == 0
            if self._lent_bytes + nbytes > self.budget and not is_only_one and not force:
                return None
            buffers = self._idle.get(nbytes)
            if buffers:
                buffer = buffers.pop()
                self._idle_bytes -= nbytes
            else:
                self._free_idle(self._lent_bytes + nbytes - self.budget)
                buffer = self._backend.new_buffer(nbytes)
            self._lent_bytes += nbytes
            self._free_idle(self._lent_bytes - self.budget)
        self._on_change(nbytes)
        lent = buffer.numpy().view(Lent)
        # References are called back in the opposite order: the note is there before anybody wakes up to read it.
        announcement = weakref.ref(lent, self._on_return)
        self._deaths.watch(lent, partial(self._take_back, buffer, announcement))
        return lent

    def _take_back(self, buffer: Tensor, _: Any) -> None:
        self._lent_bytes -= buffer.nbytes
        self._idle.setdefault(buffer.nbytes, []).append(buffer)
        self._idle_bytes += buffer.nbytes
        self._on_change(-buffer.nbytes)

    def count_returns(self) -> int:
        """How often a buffer has become free; never too small."""
        return self._deaths.count

    def settle(self) -> None:
        """Count the buffers that are free again."""
        with self._lock:
            self._deaths.settle()

    def _free_idle(self, excess: int) -> None:
        """Let go of idle buffers of other sizes until idle and lent ones together keep the budget."""
        for size in list(self._idle):
            buffers = self._idle[size]
            while buffers and self._idle_bytes + excess > 0:
                self._backend.free_buffer(buffers.pop())
                self._idle_bytes -= size
            if not buffers:
                del self._idle[size]

    def lent_bytes(self) -> int:
        """Bytes over which tensors are alive."""
        with self._lock:
            self._deaths.settle()
            return self._lent_bytes

    def close(self) -> None:
        """Free what is idle; what is still lent is freed by its borrowers, if Python can."""
        with self._lock:
            self._deaths.settle()
            self._free_idle(self._idle_bytes)
            for buffers in self._idle.values():
                for buffer in buffers:
                    self._backend.free_buffer(buffer)
            self._idle.clear()
            self._idle_bytes = 0

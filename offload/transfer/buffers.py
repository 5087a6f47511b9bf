"""Host buffers that are used again and again: fresh pages cost more than the copy into them."""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.base import IOBackend
from ..storage.deaths import Deaths
from ..storage.ranges import FreeRanges
from ..storage.slab import ALIGNMENT

_LARGEST_CHUNK = 1 << 30


class Lent(np.ndarray):
    """A buffer's memory as seen by one borrower; the buffer is free again when the last tensor over it dies."""

    def tensor(self, offset: int = 0, nbytes: int = -1) -> Tensor:
        """The bytes from ``offset`` on as a uint8 tensor with a storage of its own over the same memory."""
        return torch.frombuffer(self, dtype=torch.uint8, offset=offset, count=nbytes)


class _Chunk:
    """Memory that buffers are cut from, or that is one buffer only."""

    def __init__(self, backend: IOBackend, nbytes: int, *, is_one_buffer: bool = False) -> None:
        self.memory, self.is_one_buffer = backend.new_buffer(nbytes), is_one_buffer
        self.free = FreeRanges(nbytes)


class BufferPool:
    """Buffers up to a budget, cut from a few large pieces of memory that are kept."""

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
        self._chunks: list[_Chunk] = []
        self._made_for = 0
        self._lent_bytes = 0
        self._deaths, self._on_return = Deaths(), on_return

    def lend(self, nbytes: int, *, force: bool = False) -> Lent | None:
        """``nbytes`` of memory (a multiple of 4096); None if the budget does not allow it.

        The memory returns to the pool when no tensor over it is alive.
        """
        with self._lock:
            self._deaths.settle()
            may_exceed = force or (self.budget > 0 and self._lent_bytes == 0)
            if self._lent_bytes + nbytes > self.budget and not may_exceed:
                return None
            found = self._cut(nbytes)
            if found is None and not may_exceed:
                return None
            chunk, offset = found or (_Chunk(self._backend, nbytes, is_one_buffer=True), 0)
            self._lent_bytes += nbytes
        self._on_change(nbytes)
        lent = chunk.memory.numpy()[offset : offset + nbytes].view(Lent)
        # References are called back in the opposite order: the note is there before anybody wakes up to read it.
        announcement = weakref.ref(lent, self._on_return)
        self._deaths.watch(lent, partial(self._take_back, chunk, offset, nbytes, announcement))
        return lent

    def _cut(self, nbytes: int) -> tuple[_Chunk, int] | None:
        """A part of a chunk, or of a new one where there is room for it."""
        if self._lent_bytes == 0 and not self.budget <= self._made_for <= 2 * self.budget:
            # One piece instead of several. Not for every small change: inputs may have other lengths each time.
            self._free_chunks()
            self._made_for = self.budget
        for chunk in self._chunks:
            offset = chunk.free.take(nbytes)
            if offset is not None:
                return chunk, offset
        room = self._made_for // ALIGNMENT * ALIGNMENT - sum(chunk.memory.nbytes for chunk in self._chunks)
        if room < nbytes:
            return None
        chunk = _Chunk(self._backend, max(nbytes, min(room, _LARGEST_CHUNK)))
        self._chunks.append(chunk)
        offset = chunk.free.take(nbytes)
        assert offset is not None
        return chunk, offset

    def _take_back(self, chunk: _Chunk, offset: int, nbytes: int, _: Any) -> None:
        self._lent_bytes -= nbytes
        if chunk.is_one_buffer:
            self._backend.free_buffer(chunk.memory)
        else:
            chunk.free.give(offset, nbytes)
        self._on_change(-nbytes)

    def _free_chunks(self) -> None:
        for chunk in self._chunks:
            self._backend.free_buffer(chunk.memory)
        self._chunks.clear()

    def count_returns(self) -> int:
        """How often a buffer has become free; never too small."""
        return self._deaths.count

    def settle(self) -> None:
        """Count the buffers that are free again."""
        if self._deaths:
            with self._lock:
                self._deaths.settle()

    def lent_bytes(self) -> int:
        """Bytes over which tensors are alive."""
        with self._lock:
            self._deaths.settle()
            return self._lent_bytes

    def close(self) -> None:
        """Free the memory, unless some of it is still lent: then Python does, if it can."""
        with self._lock:
            self._deaths.settle()
            if self._lent_bytes == 0:
                self._free_chunks()
            self._chunks.clear()

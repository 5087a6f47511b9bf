"""Threads that do the transfers: reads before writes, and writes only when there is a buffer for them."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from ..backends.base import IOBackend, Lane

# At the end of the interpreter, for transfers under way.
_EXIT_SECONDS = 5.0


class Transfer:
    """One read or write that is to be done once.

    ``work`` gets the lane and returns False if it cannot start yet, for want of a buffer.
    """

    __slots__ = ("_claim", "_done", "error", "work")

    def __init__(self, work: Callable[[Lane], bool]) -> None:
        self.work = work
        self.error: BaseException | None = None
        self._claim = threading.Lock()
        self._done = threading.Event()

    def claim(self) -> bool:
        """True for the first caller only: a lane that begins it, or whoever calls it off before."""
        return self._claim.acquire(blocking=False)

    def unclaim(self) -> None:
        self._claim.release()

    def finish(self, error: BaseException | None = None) -> None:
        # Tracebacks refer to the frames of the work, and these to buffers and to this transfer: without them nothing
        # has to wait for Python's collection of cycles.
        self.error = error.with_traceback(None) if error is not None else None
        if error is not None:
            error.__context__ = None
        self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: float) -> bool:
        return self._done.wait(timeout)


class Lanes:
    """Worker threads over two queues."""

    def __init__(self, backend: IOBackend, count: int, tokens: SimpleQueue[Any], returns: Callable[[], int]) -> None:
        """
        Args:
            count: threads.
            tokens: has something true put into it for each thing that may let a lane go on.
            returns: how often a buffer has become free; each has put a token besides.
        """
        self._reads: deque[Transfer] = deque()
        self._writes: deque[Transfer] = deque()
        self._tokens, self._returns = tokens, returns
        self._threads: list[threading.Thread] = []
        self._at_work = [False] * count
        try:
            for number in range(count):
                thread = threading.Thread(
                    target=self._run, args=(backend.lane(), number), name=f"narrowgauge-offload-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            _stop(self._reads, self._writes, self._tokens, self._threads, _EXIT_SECONDS)
            raise
        # A thread that comes back from torch's C++ to an interpreter that is ending would abort the process.
        self._exit = weakref.finalize(
            self, _stop, self._reads, self._writes, self._tokens, self._threads, _EXIT_SECONDS
        )

    def read(self, transfer: Transfer, *, urgent: bool) -> None:
        """Queue a read; an urgent one goes first."""
        if urgent:
            self._reads.appendleft(transfer)
        else:
            self._reads.append(transfer)
        self._tokens.put(True)

    def hurry(self, transfer: Transfer) -> None:
        """Move a queued read to the front."""
        try:
            self._reads.remove(transfer)
        except ValueError:
            return
        self._reads.appendleft(transfer)
        self._tokens.put(True)

    def write(self, transfer: Transfer) -> None:
        """Queue a write behind the others."""
        self._writes.append(transfer)
        self._tokens.put(True)

    def abandon(self) -> None:
        """Stop without waiting for the threads; nothing is under way or queued."""
        for _ in self._threads:
            self._tokens.put(False)
        self._exit.detach()

    def close(self, timeout: float) -> bool:
        """Stop after the transfers under way; those still queued are dropped.

        Returns:
            Whether all threads ended within ``timeout`` seconds.
        """
        ended = _stop(self._reads, self._writes, self._tokens, self._threads, timeout)
        if ended:
            self._exit.detach()
        return ended

    @property
    def alive(self) -> int:
        """Threads that have not ended."""
        return sum(thread.is_alive() for thread in self._threads)

    @property
    def busy(self) -> int:
        """Threads that look for transfers or carry them out; what the others did is given up."""
        return sum(self._at_work)

    def _run(self, lane: Lane, number: int) -> None:
        while self._tokens.get():
            self._at_work[number] = True
            while self._do_one(self._reads, lane) or self._do_one(self._writes, lane):
                pass
            self._at_work[number] = False
        lane.close()

    def _do_one(self, queue: deque[Transfer], lane: Lane) -> bool:
        try:
            transfer = queue.popleft()
        except IndexError:
            return False
        if not transfer.claim():
            return True
        returns = self._returns()
        try:
            started = transfer.work(lane)
        except BaseException as error:
            transfer.finish(error)
            return True
        if started:
            transfer.finish()
            return True
        transfer.unclaim()
        queue.appendleft(transfer)
        if self._returns() != returns:
            # A buffer came free meanwhile; another lane may have found the queue empty and taken the token.
            self._tokens.put(True)
        return False


def _stop(
    reads: deque[Transfer],
    writes: deque[Transfer],
    tokens: SimpleQueue[Any],
    threads: Sequence[threading.Thread],
    timeout: float,
) -> bool:
    deadline = time.monotonic() + timeout
    reads.clear()
    writes.clear()
    for _ in threads:
        tokens.put(False)
    # The last reference may go in a thread that ends late.
    for thread in {*threads} - {threading.current_thread()}:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)

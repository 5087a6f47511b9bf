"""Ending early on request: on SIGTERM, SIGUSR1 or SIGHUP the step is finished, a checkpoint saved, and the run can go
on later.

A scheduler that needs the machine back sends one of them to some or all processes, a terminal that is closed SIGHUP.
The ranks agree on the step with the all-reduce of its loss, which they make anyway. Before the first step there is
nothing to save and perhaps long to wait, for a lock, other ranks or a process group: a rank ends at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from .environment import process_rank
from .exit_codes import EXIT_PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Preempted(Exception):
    """The run was asked to end, on some rank, and has saved; raised on all ranks."""


class StopRequest:
    """Notes that the process has been asked to end, while it is entered; asking again changes nothing.

    Attributes:
        received: the name of the signal, or None.
        tell_others: called with the reason before a rank ends that others may wait for.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.tell_others: Callable[[str], None] = lambda reason: None
        self._is_heard, self._lock = False, threading.Lock()
        self._previous: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread of a process may handle signals.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            # Python runs a handler once the main thread is back from whatever C++ it waits in; this wakes a thread.
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(self._pipe[0],), name="narrowgauge-stop", daemon=True).start()
            for number in _SIGNALS:
                # Of `nohup`: a closed terminal is not for this process.
                if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, lambda number, frame: self._note(number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            # The thread reads the end and closes its side.
            os.close(self._pipe[1])

    def begin(self) -> None:
        """From now on somebody looks at ``received`` and saves."""
        with self._lock:
            self._is_heard = True

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in set(_SIGNALS):
                    self._note(number)
        os.close(pipe)

    def _note(self, number: int) -> None:
        self.received = self.received or signal.Signals(number).name
        if threading.current_thread() is threading.main_thread():
            return
        with self._lock:
            if not self._is_heard:
                message = f"asked to end ({self.received}) before the first step: nothing to save"
                print(f"process rank {process_rank()}: {message}", file=sys.stderr, flush=True)  # noqa: T201
                self.tell_others(message)
                os._exit(EXIT_PREEMPTED)


def ignore_stop_signals(worker: int = 0) -> None:
    """In a data loader's worker process: the rank that it reads for decides when to end."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

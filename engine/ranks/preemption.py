"""Ending early on request: on SIGTERM or SIGUSR1 the step is finished, a checkpoint saved, and the run can go on later.

A scheduler that needs the machine back sends one of them to some or all processes. The ranks agree on the step with
the all-reduce of its loss, which they make anyway.
"""

import signal
from contextlib import suppress
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to end, on some rank, and has saved; raised on all ranks."""


class StopRequest:
    """Notes that the process has been asked to end, while it is entered; asking again changes nothing.

    Attributes:
        received: the name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread of a process may handle signals.
        with suppress(ValueError):
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def ignore_stop_signals(worker: int = 0) -> None:
    """In a data loader's worker process: the rank that it reads for decides when to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""Signals that ask a launch to end, passed on to the ranks once."""

import contextlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_PREEMPTED


class StopSignals:
    """Notes SIGTERM, SIGUSR1, SIGHUP (unless it is ignored, as under ``nohup``) and SIGINT while it is entered.

    The first of them is passed on and no other: asking ranks that save again does no good. SIGINT, which a
    user types until something happens, is passed on every time.

    Attributes:
        received: all that came.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._passed_on = 0
        self._started = False
        self._send: Callable[[int], Any] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received.append(signal.Signals(number))
        if self._send is not None:
            self._flush()
        elif number == signal.SIGINT and not self._started:
            raise KeyboardInterrupt

    def start(self) -> None:
        """From now on somebody asks for :meth:`news`; before, SIGINT interrupts."""
        self._started = True

    def pass_on(self, send: Callable[[int], Any]) -> None:
        """From now on, and for those that came before, call ``send`` from the handler."""
        self._send = send
        self._flush()

    def news(self) -> list[int]:
        """The signals to pass on that have come since the last call."""
        found: list[int] = []
        while self._passed_on < len(self.received):
            number = self.received[self._passed_on]
            first = all(earlier == signal.SIGINT for earlier in self.received[: self._passed_on])
            self._passed_on += 1
            if number == signal.SIGINT or first:
                found.append(number)
        return found

    def _flush(self) -> None:
        assert self._send is not None
        for number in self.news():
            with contextlib.suppress(OSError):
                self._send(number)


def exit_code(codes: Sequence[int], signals: StopSignals) -> int:
    """One code for those of all hosts: 0, 2 for bad input, 75 where the ranks were asked to end, else 1."""
    if not any(codes):
        return 0
    if EXIT_BAD_INPUT in codes:
        return EXIT_BAD_INPUT
    asked = any(number != signal.SIGINT for number in signals.received)
    return EXIT_PREEMPTED if asked or all(code in (0, EXIT_PREEMPTED) for code in codes) else 1

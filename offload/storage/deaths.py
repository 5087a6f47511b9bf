"""Noticing that objects died without running Python code at that moment.

A ``__del__``, or a callback that is written in Python, runs wherever the last reference goes: in the middle of
backward, or of an allocation under a lock. There a lock may be taken twice, and the exception of a signal handler
(Ctrl-C) is printed and lost. So a death only leaves a note, in C code, and whoever needs to know reads the notes.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any


class _Note(weakref.ref):
    __slots__ = ("action",)
    action: Callable[[], object]


class Deaths:
    """Actions to be done after objects have died, on any thread."""

    def __init__(self) -> None:
        self._alive: dict[int, _Note] = {}
        self._notes: deque[_Note] = deque()
        self._read = 0

    def watch(self, thing: Any, action: Callable[[], object]) -> None:
        """Do ``action`` at the first :meth:`settle` after ``thing`` is gone; it must not refer to ``thing``."""
        note = _Note(thing, self._notes.append)
        note.action = action
        self._alive[id(note)] = note

    @property
    def count(self) -> int:
        """Deaths so far. Exact while one thread at a time settles; never too small."""
        return self._read + len(self._notes)

    def __bool__(self) -> bool:
        """Whether there is something to settle."""
        return bool(self._notes)

    def settle(self) -> None:
        """Do what the deaths so far ask for."""
        while self._notes:
            self._read += 1
            try:
                note = self._notes.popleft()
            except IndexError:
                # Another thread was faster.
                return
            del self._alive[id(note)]
            note.action()

"""An amount that several threads change."""

import threading


class Level:
    """An amount that goes up and down from several threads, and its highest value."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.now = self.peak = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self.now += amount
            if self.now > self.peak:
                self.peak = self.now

    def reset_peak(self) -> None:
        with self._lock:
            self.peak = self.now

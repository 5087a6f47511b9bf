"""How far another host's clock is off."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_ROUNDS = 5


@dataclass(frozen=True)
class Skew:
    """Seconds that a clock is ahead of this one, give or take ``bound``."""

    seconds: float
    bound: float

    @property
    def at_least(self) -> float:
        """Seconds between the two clocks, whichever is ahead, that are certain."""
        return max(0.0, abs(self.seconds) - self.bound)


def estimate_skew(ask: Callable[[], float]) -> Skew:
    """Ask for the other clock's time some times, and believe the quickest answer.

    The answer was given some time between question and receipt, so half of the round trip bounds the error.
    """
    found = []
    for _ in range(_ROUNDS):
        asked = time.time()
        there = ask()
        received = time.time()
        found.append(Skew(there - (asked + received) / 2, abs(received - asked) / 2))
    return min(found, key=lambda skew: skew.bound)

"""How much each forward may write: planned from the latest backward, the disk's speed, its room and its wear."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from .backends.probe import Speed
from .errors import OffloadError
from .planner import absorbable_bytes
from .saving.graph import ForwardGraph
from .stats import Endurance
from .storage.reservation import LEAST_CAPACITY
from .transfer.transport import Transport

# A plan is made for each of the first forwards, then every so many, and whenever the disk's speed has changed.
_FIRST_FORWARDS, _PLAN_INTERVAL, _SPEED_CHANGE = 5, 20, 0.2
# Bytes written now and then by a plan that writes nothing, to notice when the disk has become fast enough.
_PROBE_INTERVAL, _PROBE_BYTES = 32, 8 << 20
_ENOUGH_TO_MEASURE = 4 << 20
_log = logging.getLogger(__name__)


class Controller:
    """Decides, before each forward, how many bytes it may write, and how large the slab is.

    Attributes:
        speed: of the disk, as last measured.
        planned_budget: bytes that the latest forward may write; None before a backward has been measured.
        unplanned: forwards before which none had been.
    """

    def __init__(
        self,
        transport: Transport,
        speed: Speed,
        endurance: Endurance,
        *,
        keep_resident: float | Literal["auto"],
        buffer_bytes: int | None,
        may_resize: bool,
    ) -> None:
        """
        Args:
            keep_resident: the share of bytes that stays in memory, or ``auto``.
            buffer_bytes: read ahead, where a size was given.
            may_resize: the slab's size may follow the need.
        """
        self._transport, self._endurance, self.speed = transport, endurance, speed
        self._keep_resident, self._buffer_bytes, self._may_resize = keep_resident, buffer_bytes, may_resize
        self._forwards, self._previous_began, self._period = 0, 0.0, 0.0
        # When, which share of the bytes, and at which speed.
        self._planned: tuple[int, float, Speed] | None = None
        self.planned_budget: int | None = None
        self.unplanned = 0
        self._largest = 0
        self._trust = 1.0
        self._counted = (0, 0.0, 0, 0.0)

    def next_budget(self, graphs: Sequence[ForwardGraph]) -> float:
        """Bytes that the coming forward may write.

        Args:
            graphs: the latest forwards, in order.
        """
        self._endurance.start()
        now = time.perf_counter()
        if self._forwards:
            self._period = now - self._previous_began
        self._previous_began = now
        self._forwards += 1
        self._measure_speed()
        self._fit_capacity()
        # Inputs may be short now and long the next time.
        self._largest = max([self._largest, *(graph.offered for graph in graphs)])
        budget = math.inf
        profiled = next((graph for graph in reversed(graphs) if graph.is_profiled), None)
        if profiled is not None and self._keep_resident == "auto":
            budget = self._plan(profiled)
        elif self._keep_resident == 1:
            budget = 0
        elif profiled is not None and self._keep_resident:
            assert not isinstance(self._keep_resident, str)
            budget = (1 - self._keep_resident) * self._largest
        allowance = self._endurance.allowance(self._transport.counters.written.bytes, self._period)
        budget = budget if allowance is None else min(budget, allowance)
        if profiled is not None:
            self.planned_budget = int(min(budget, self._largest))
        else:
            self.unplanned += 1
        return budget

    def _plan(self, graph: ForwardGraph) -> float:
        """What the disk can take and give back unnoticed, from the latest forward and backward."""
        duration = time.perf_counter() - graph.began
        self._trust = max(0.2, self._trust * 0.9) if graph.stall > 0.01 * duration else min(1.0, self._trust * 1.02)
        made_at, share, speed = self._planned or (-math.inf, 0.0, self.speed)
        due = self._forwards <= _FIRST_FORWARDS or self._forwards - made_at >= _PLAN_INTERVAL
        if due or _differs(speed.write, self.speed.write) or _differs(speed.read, self.speed.read):
            absorbable = absorbable_bytes(
                graph.profile(),
                write_bandwidth=self.speed.write,
                read_bandwidth=self.speed.read,
                window=self._buffer_bytes or graph.window,
            )
            share = absorbable / graph.offered
            self._planned = (self._forwards, share, self.speed)
            _log.info(
                "forward %d: %.0f%% of the saved bytes go to disk at %.2f GB/s write, %.2f GB/s read",
                self._forwards,
                100 * share * self._trust,
                self.speed.write / 1e9,
                self.speed.read / 1e9,
            )
        share *= self._trust
        least = max(_PROBE_BYTES, graph.first_size)
        if share * self._largest < least and self._forwards % _PROBE_INTERVAL == 0:
            return least
        return share * self._largest if share < 1 else math.inf

    def _measure_speed(self) -> None:
        """Update the bandwidths from what the lanes moved since the last time."""
        writes, reads = self._transport.counters.written, self._transport.counters.read
        written, write_seconds, read, read_seconds = self._counted
        speed = [self.speed.write, self.speed.read]
        for place, (nbytes, seconds) in enumerate(
            (
                (writes.bytes - written, writes.seconds - write_seconds),
                (reads.bytes - read, reads.seconds - read_seconds),
            )
        ):
            if nbytes >= _ENOUGH_TO_MEASURE and seconds > 0:
                speed[place] = 0.5 * speed[place] + 0.5 * nbytes / seconds
        self.speed = Speed(*speed)
        self._counted = (writes.bytes, writes.seconds, reads.bytes, reads.seconds)

    def _fit_capacity(self) -> None:
        """Cut an automatic reservation down to the need, or raise it, while nothing is in the slab."""
        store, counters = self._transport.store, self._transport.counters
        need = 2 * counters.offered.peak
        too_large = self._forwards == 3 and store.capacity > max(need, LEAST_CAPACITY)
        if self._may_resize and (too_large or (counters.full and store.capacity < need)):
            with suppress(OffloadError):
                if store.resize_unused(max(need, LEAST_CAPACITY)):
                    counters.full = 0
                    _log.info("the slab has %d bytes from now on", store.capacity)


def _differs(before: float, now: float) -> bool:
    return abs(now - before) > _SPEED_CHANGE * before

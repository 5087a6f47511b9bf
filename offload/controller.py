"""How much each forward may write: planned from the latest backward, the disk's speed, its room and its wear."""

import logging
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .backends.probe import Speed
from .errors import OffloadError
from .planner import absorbable_shares
from .saving.graph import ForwardGraph
from .schedule import MicroBatch, Schedule, Step
from .stats import Endurance
from .storage.reservation import LEAST_CAPACITY
from .transfer.transport import Transport

# A plan is made for each of the first rounds, then every so many, and whenever the disk's speed has changed.
_FIRST_ROUNDS, _PLAN_INTERVAL, _SPEED_CHANGE = 5, 20, 0.2
# Bytes written now and then by a plan that writes nothing, to notice when the disk has become fast enough.
_PROBE_INTERVAL, _PROBE_BYTES = 32, 8 << 20
_ENOUGH_TO_MEASURE = 4 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """Which share of their bytes the forwards of each group write.

    Attributes:
        made_at: the round.
        speed: the disk's at that time.
    """

    made_at: int
    shares: Mapping[Hashable, float]
    speed: Speed

    def is_of_another(self, speed: Speed) -> bool:
        return _differs(self.speed.write, speed.write) or _differs(self.speed.read, speed.read)


class Controller:
    """Decides, before each forward, how many bytes it may write, and how large the slab is.

    Attributes:
        speed: of the disk, as last measured.
        planned_budget: bytes that the latest forward may write, or of a step's forwards the one that may most; None
            before a backward has been measured.
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
        # Forwards, or steps where a schedule says what belongs to one.
        self._rounds, self._previous_began, self._period = 0, 0.0, 0.0
        self._plan: _Plan | None = None
        self._has_profile = False
        self._most_planned = 0
        self.planned_budget: int | None = None
        self.unplanned = 0
        # Of each group of forwards, the most that one offered, and its first tensor.
        self._largest: dict[Hashable, int] = {}
        self._first: dict[Hashable, int] = {}
        self._trust = 1.0
        self._counted = (0, 0.0, 0, 0.0)

    def next_budget(self, graphs: Sequence[ForwardGraph]) -> float:
        """Bytes that the coming forward may write.

        Args:
            graphs: the latest forwards, in order.
        """
        self._begin_round()
        profiled = next((graph for graph in reversed(graphs) if graph.is_profiled), None)
        self._note_sizes([(None, graph) for graph in graphs])
        self._has_profile = profiled is not None
        if profiled is not None and self._keep_resident == "auto":
            self._make_plan([(None, profiled)])
        return self._budget(None)

    def begin_step(self, schedule: Schedule, before: Step | None) -> None:
        """A step of several forwards begins.

        Args:
            before: the last one.
        """
        self._begin_round()
        if before is None or before.schedule.groups != schedule.groups:
            self._has_profile = False
            return
        graphs = {of: (before.schedule.group_of(of), graph) for of, graph in before.graphs.items() if graph.offered}
        self._note_sizes(list(graphs.values()))
        is_whole = len(before.graphs) == len(before.schedule.forwards)
        self._has_profile = is_whole and all(graph.is_profiled for _, graph in graphs.values())
        written = [found for of, found in graphs.items() if of not in schedule.kept]
        if self._has_profile and written and self._keep_resident == "auto":
            self._make_plan(written, schedule.groups)

    def budget_of(self, schedule: Schedule, micro_batch: MicroBatch) -> float:
        """Bytes that a forward of the step may write."""
        return self._budget(schedule.group_of(micro_batch), is_kept=micro_batch in schedule.kept)

    def _begin_round(self) -> None:
        self._endurance.start()
        self._rounds += 1
        self._most_planned = 0
        self._measure_speed()
        self._fit_capacity()

    def _note_sizes(self, graphs: Sequence[tuple[Hashable, ForwardGraph]]) -> None:
        for group, graph in graphs:
            # Inputs may be short now and long the next time.
            self._largest[group] = max(self._largest.get(group, 0), graph.offered)
            self._first[group] = graph.first_size

    def _budget(self, group: Hashable, *, is_kept: bool = False) -> float:
        now = time.perf_counter()
        if self._previous_began:
            self._period = now - self._previous_began
        self._previous_began = now
        budget, largest = math.inf, self._largest.get(group, 0)
        if self._keep_resident == 1 or (is_kept and self._keep_resident == "auto"):
            budget = 0
        elif self._has_profile and self._keep_resident == "auto":
            budget = self._planned_bytes(group, largest)
        elif self._has_profile and self._keep_resident:
            assert not isinstance(self._keep_resident, str)
            budget = (1 - self._keep_resident) * largest
        allowance = self._endurance.allowance(self._transport.counters.written.bytes, self._period)
        budget = budget if allowance is None else min(budget, allowance)
        if self._has_profile:
            self._most_planned = max(self._most_planned, int(min(budget, largest)))
            self.planned_budget = self._most_planned
        else:
            self.unplanned += 1
        return budget

    def _make_plan(self, graphs: Sequence[tuple[Hashable, ForwardGraph]], groups: Sequence[Hashable] = (None,)) -> None:
        """What the disk can take and give back unnoticed, from the latest forwards and backwards."""
        duration = time.perf_counter() - min(graph.began for _, graph in graphs)
        stall = sum(graph.stall for _, graph in graphs)
        self._trust = max(0.2, self._trust * 0.9) if stall > 0.01 * duration else min(1.0, self._trust * 1.02)
        plan = self._plan
        due = plan is None or self._rounds <= _FIRST_ROUNDS or self._rounds - plan.made_at >= _PLAN_INTERVAL
        if plan is None or due or plan.is_of_another(self.speed) or not plan.shares.keys() >= set(groups):
            shares = absorbable_shares(
                [graph.profile(group) for group, graph in graphs],
                write_bandwidth=self.speed.write,
                read_bandwidth=self.speed.read,
                window=self._buffer_bytes or max(graph.window for _, graph in graphs),
                groups=groups,
            )
            self._plan = _Plan(self._rounds, shares, self.speed)
            offered = sum(graph.offered for _, graph in graphs)
            _log.info(
                "round %d: %.0f%% of the saved bytes go to disk at %.2f GB/s write, %.2f GB/s read",
                self._rounds,
                100 * self._trust * sum(shares[group] * graph.offered for group, graph in graphs) / offered,
                self.speed.write / 1e9,
                self.speed.read / 1e9,
            )

    def _planned_bytes(self, group: Hashable, largest: int) -> float:
        if not largest:
            return math.inf
        assert self._plan is not None
        share = self._plan.shares[group] * self._trust
        least = max(_PROBE_BYTES, self._first.get(group, 0))
        if share * largest < least and self._rounds % _PROBE_INTERVAL == 0:
            return least
        return share * largest if share < 1 else math.inf

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
        too_large = self._rounds == 3 and store.capacity > max(need, LEAST_CAPACITY)
        if self._may_resize and (too_large or (counters.full and store.capacity < need)):
            with suppress(OffloadError):
                if store.resize_unused(max(need, LEAST_CAPACITY)):
                    counters.full = 0
                    _log.info("the slab has %d bytes from now on", store.capacity)


def _differs(before: float, now: float) -> bool:
    return abs(now - before) > _SPEED_CHANGE * before
